"""One denoising step on one GPU and on several of the same host, dense and sparse: what Ulysses parallelism gains.

    python -m dit_sparse.eval.parallel_speed --gpus 2 --method svg --density 0.2

Starts one process for each GPU. Weights are random and made on the device; they say nothing about quality. A few layers
are timed, the same with more, and the step is scaled to the real number of layers. In the same run the outputs of one
GPU and of several are compared: dense, sparse with the masks of one GPU replayed (what is left is rounding), and sparse
as it runs, with the share of equal blocks in the lists. With `--ring` the sequence is shared instead of the heads.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

import dit_sparse
from dit_sparse.eval.speed import DTYPES, environment, misuse, table
from dit_sparse.eval.step_models import GEOMETRIES, Geometry, build
from dit_sparse.eval.step_speed import FEW, MORE, best_dense, release, sparse_of

COLUMNS = ("what", "GPUs", "ms a layer", "rest ms", "step s", "x one GPU", "GiB")


@dataclass(frozen=True)
class ParallelRow:
    """One measured step, scaled to the real number of layers.

    Args:
        what: "dense" or the method.
        gpus: how many shared the step.
        layer_ms, rest_ms: one layer, and what is not in the layers.
        step_seconds: all layers.
        speedup: seconds of one GPU over this one's.
        peak_gib: peak memory of the larger timed model on the first GPU; 0 where it is not known.
    """

    what: str
    gpus: int
    layer_ms: float
    rest_ms: float
    step_seconds: float
    speedup: float
    peak_gib: float

    def cells(self) -> list[str]:
        """The row as printed."""
        return [self.what, str(self.gpus), f"{self.layer_ms:.2f}", f"{self.rest_ms:.1f}", f"{self.step_seconds:.3f}",
                f"{self.speedup:.2f}", f"{self.peak_gib:.2f}"]


@dataclass(frozen=True)
class Agreement:
    """How far several GPUs compute what one does, for the first step of the larger model.

    Args:
        dense, live, replayed: norm of the difference of the outputs over that of one GPU's: dense, sparse, and sparse
            with the masks of one GPU.
        overlap: share of the blocks kept by either that both keep.
        notes: what the summary says of the spread of the heads.
    """

    dense: float
    live: float
    replayed: float
    overlap: float
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """As printed."""
        return [f"outputs, several GPUs against one: dense {self.dense:.2e}, sparse {self.live:.2e} with "
                f"{100 * self.overlap:.1f} % of the lists equal, sparse with one GPU's masks {self.replayed:.2e}",
                *self.notes]


class Bench:
    """The models and timings of one process.

    Args:
        geometry: what to build.
        options: of the command line.
        rank: of this process.
    """

    def __init__(self, geometry: Geometry, options: argparse.Namespace, rank: int) -> None:
        self.geometry, self.options = geometry, options
        self.cuda = torch.device(options.device).type == "cuda"
        self.device = f"cuda:{rank}" if self.cuda else options.device
        self.dtype = DTYPES[options.dtype]
        self.inputs = self._inputs()

    def _inputs(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.geometry.inputs(self.device, self.dtype)

    def model(self, layers: int, shared: bool) -> torch.nn.Module:
        """The model of so many layers, on this GPU alone or shared by all."""
        from diffusers import ContextParallelConfig

        release(self.device, self.options.compiled)
        kind, = self.geometry.kinds
        model = build(self.geometry, {kind: layers}, self.device, self.dtype)
        if shared:
            degree = {"ring_degree" if self.options.ring else "ulysses_degree": self.options.gpus}
            model.enable_parallelism(config=ContextParallelConfig(**degree))  # type: ignore[operator]
        if self.options.compiled:
            model.compile_repeated_blocks()  # type: ignore[operator]
        return model

    def step(self, model: torch.nn.Module, number: int) -> torch.Tensor:
        """The output of a step; each number has a timestep of its own."""
        time_of = self.inputs["timestep"] * ((999 - number) / 999)
        with best_dense(self.device), torch.no_grad():
            out: torch.Tensor = model(**(self.inputs | {"timestep": time_of}), return_dict=False)[0]
        return out

    def wait(self) -> None:
        """Until this GPU has done its work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, model: torch.nn.Module) -> float:
        """Median of some steps: as many in every process, which meet in each."""
        times = []
        for number in range(2 + self.options.repeats):
            self.wait()
            dist.barrier()
            start = time.perf_counter()
            self.step(model, 1 + number)
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def row(self, what: str, proc: Any, shared: bool, one: ParallelRow | None) -> ParallelRow:
        """Time a step; `one` is the row of one GPU."""
        took, peak = {}, 0.0
        for layers in (FEW, MORE):
            model = self.model(layers, shared)
            if proc is not None:
                dit_sparse.enable(model, proc)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            took[layers] = self.seconds(model) * 1e3
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else 0.0
            del model
        layer = max(0.0, (took[MORE] - took[FEW]) / (MORE - FEW))
        rest = max(0.0, took[FEW] - FEW * layer)
        kind, = self.geometry.kinds
        step = (rest + layer * self.geometry.kinds[kind]) / 1e3
        return ParallelRow(what, self.options.gpus if shared else 1, layer, rest, step,
                           one.step_seconds / step if one else 1.0, peak)

    def agreement(self, proc: Any) -> Agreement:
        """Compare outputs and lists of one GPU and of several."""
        from dit_sparse.bridge import binding_of
        from dit_sparse.replay import record, replay

        alone = self.model(MORE, False)
        dense = self.step(alone, 0)
        dit_sparse.enable(alone, proc)
        with record(alone) as kept:
            sparse = self.step(alone, 0)
        del alone
        shared = self.model(MORE, True)
        if self.options.ring:
            dit_sparse.enable(shared, "dense")
        found = [_difference(self.step(shared, 0), dense)]
        dit_sparse.enable(shared, proc)
        session: Any = binding_of(shared).session  # type: ignore[union-attr]
        counts = [0, 0]
        session.plans = _comparing(kept, counts)
        found.append(_difference(self.step(shared, 0), sparse))
        session.plans = None
        dit_sparse.enable(shared, proc)
        with replay(shared, kept):
            found.append(_difference(self.step(shared, 0), sparse))
        for number in range(1, 4):
            self.step(shared, number)
        both = torch.tensor(counts, dtype=torch.float64, device=self.device)
        dist.all_reduce(both)
        plain, live, replayed = found
        notes = tuple(dit_sparse.summary(shared).notes)
        return Agreement(plain, live, replayed, float(both[0] / both[1].clamp(min=1)), notes)


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).norm() / expected.float().norm())


def _comparing(kept: Any, counts: list[int]) -> Callable[[Any, Any], Any]:
    """Takes the place of a session's `plans`: counts the blocks that a call and a recording both keep, and either."""
    from dit_sparse.patterns import heads_of
    from dit_sparse.replay import Place

    def compare(call: Any, make: Callable[[], Any]) -> Any:
        plan, reused = make()
        other = kept[Place("transformer", call.layer, call.step, call.branch)].plan.mask.to(call.device)
        other = other if call.heads is None else heads_of(other, call.heads)
        mine, theirs = plan.mask.to_dense(), other.to_dense()
        if plan.mask.query.index is not None and plan.mask.query.index.dim() == 3:
            same = (plan.mask.query.index == other.query.index).all(-1)[..., None, None]  # heads of another order
            theirs = theirs & same
        counts[0] += int((mine & theirs).sum())
        counts[1] += int((mine | theirs).sum())
        return plan, reused

    return compare


def _work(rank: int, options: argparse.Namespace, place: str) -> None:
    """One process."""
    cuda = torch.device(options.device).type == "cuda"
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast can upset hosts whose GPUs are shared
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        torch.accelerator.device_count = lambda: 1  # it is 0 without an accelerator, and Diffusers divides by it
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{place}", rank=rank,
                            world_size=options.gpus)
    try:
        geometry = GEOMETRIES[options.model]
        bench, rows = Bench(geometry, options, rank), list[ParallelRow]()
        proc = sparse_of(options.method, options.density, options.backend)
        for what, used in (("dense", None), (options.method, proc)):
            one = bench.row(what, used, False, None)
            # Not every attention of Diffusers can take part in its ring; ours can.
            ring = dit_sparse.SparseProc("dense") if options.ring and used is None else used
            rows += [one, bench.row(what, ring, True, one)]
            if rank == 0:
                print("  ".join(rows[-1].cells()), flush=True)
        agreement = bench.agreement(proc)
        if rank == 0:
            _tell(options, geometry, bench, rows, agreement)
    finally:
        dist.destroy_process_group()


def _tell(options: argparse.Namespace, geometry: Geometry, bench: Bench, rows: list[ParallelRow],
          agreement: Agreement) -> None:
    where = environment(bench.device)
    kind, = geometry.kinds
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"{geometry.title}, {geometry.tokens} tokens, {options.dtype}, density {options.density}, "
          f"{'compiled' if options.compiled else 'eager'}; {FEW} and {MORE} of {geometry.kinds[kind]} layers timed")
    print(table((row.cells() for row in rows), COLUMNS))
    print("\n".join(agreement.lines()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({
            "environment": where, "model": geometry.name, "tokens": geometry.tokens, "density": options.density,
            "dtype": options.dtype, "compiled": options.compiled, "ring": options.ring, "layers": [FEW, MORE],
            "rows": [asdict(row) for row in rows], "agreement": asdict(agreement)}, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes; print the table; `--out` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2, help="processes, one GPU each")
    parser.add_argument("--model", choices=[name for name, g in GEOMETRIES.items() if len(g.kinds) == 1])
    parser.add_argument("--method", default="svg")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--backend")
    parser.add_argument("--compiled", action="store_true", help="compile the repeated blocks")
    parser.add_argument("--ring", action="store_true", help="share the sequence instead of the heads")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--quick", action="store_true", help="the tiny model, two steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    cuda = torch.device(options.device).type == "cuda"
    options.model = options.model or ("tiny" if options.quick or not cuda else "wan-14b-720p")
    options.dtype = options.dtype or ("bf16" if cuda else "fp32")
    options.repeats = 2 if options.quick else options.repeats
    why = misuse(options.device, [options.density], [options.method], options.backend)
    if not why and options.gpus < 2:
        why = f"--gpus {options.gpus} is not allowed; use at least 2"
    if not why and cuda and options.gpus > torch.cuda.device_count():
        why = f"--gpus {options.gpus} is not allowed; this machine has {torch.cuda.device_count()}"
    if not why and not cuda and options.model != "tiny":
        why = f"--model {options.model} needs GPUs; on a CPU use tiny"
    if why:
        parser.error(why)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (options, f"{folder}/meet"), nprocs=options.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
