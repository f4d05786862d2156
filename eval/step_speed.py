"""Seconds of one denoising step at a real model's geometry, dense and sparse: `dit-sparse bench step`.

    python -m dit_sparse.eval.step_speed --model wan-14b-720p --density 0.2 --fp8 linear --fp8 both --profile

Weights are random and made on the device; they say nothing about quality. A few layers are timed, the same with more
of each kind, and the step is scaled to the real number of layers: the table says so. Dense is the model as it is,
with the same compilation and, on an NVIDIA GPU, with cuDNN's attention first. Rungs of --fp8 compute the linear layers
of the blocks, the attention, or both in 8-bit floats.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import dit_sparse
from dit_sparse.eval.peers import first_line
from dit_sparse.eval.speed import DTYPES, environment, median_ms, misuse, table
from dit_sparse.eval.step_models import GEOMETRIES, Geometry, build
from dit_sparse.eval.step_profile import Profile, profile
from dit_sparse.kernels import hopper_plan
from dit_sparse.linear8 import fp8_linears
from dit_sparse.linear8 import missing as linear8_missing
from dit_sparse.methods import all_methods

COLUMNS = ("model", "tokens", "what", "backend", "density", "ms a layer", "rest ms", "step s", "x dense", "GiB",
           "memory")
FEW, MORE = 1, 3  # layers of a kind in the small and in the larger model
LONG_RUN = 1000  # steps that a timed run pretends to have, so that every call is a step of its own
RUNGS = {"linear": ("linear",), "attention": ("attention",), "both": ("linear", "attention")}


@dataclass(frozen=True)
class Variant:
    """What is timed: a method, None for dense, and the parts that are computed in 8-bit floats."""

    method: str | None
    fp8: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """As printed."""
        rung = next((name for name, parts in RUNGS.items() if parts == self.fp8), "")
        return (self.method or "dense") + f", fp8 {rung}" * bool(rung)


@dataclass(frozen=True)
class StepRow:
    """One measured step; `layer_ms` by kind of layer, `step_seconds` scaled to the real number of layers.

    Args:
        speedup: seconds of the dense step over this one's.
        peak_gib: peak memory of the larger timed model; above_dense: over that of the dense one with as many layers,
            less 1. 0 and None where it is not known.
        fallbacks: calls that ran dense, by reason.
        short: more layers took no longer than few, so the times were too short to tell what a layer takes.
        profile: milliseconds by kind of layer and kind of kernel, of one step of the larger model.
        profile_lines: the same as text.
    """

    model: str
    tokens: int
    what: str
    backend: str
    density: float
    layer_ms: dict[str, float]
    rest_ms: float
    step_seconds: float
    speedup: float
    peak_gib: float
    fallbacks: dict[str, int]
    short: bool = False
    above_dense: float | None = None
    profile: dict[str, dict[str, float]] = field(default_factory=dict)
    profile_lines: list[str] = field(default_factory=list)

    def cells(self) -> list[str]:
        """The row as printed."""
        layers = " + ".join(f"{ms:.2f}" for ms in self.layer_ms.values())
        return [self.model, str(self.tokens), self.what, self.backend, f"{self.density:.3f}", layers,
                f"{self.rest_ms:.1f}", f"{self.step_seconds:.3f}" + "?" * self.short,
                f"{self.speedup:.2f}" + "?" * self.short, f"{self.peak_gib:.2f}",
                "" if self.above_dense is None else f"{100 * self.above_dense:+.1f} %"]


@contextlib.contextmanager
def best_dense(device: str) -> Iterator[None]:
    """Dense attention by cuDNN where it can run, on an NVIDIA GPU; PyTorch's own choice elsewhere."""
    if torch.device(device).type != "cuda" or torch.version.hip:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


@dataclass
class _Timed:
    """One model's forward in milliseconds, its peak memory, and what the summary said of it."""

    ms: float
    peak: float
    density: float = 1.0
    backend: str = "dense"
    fallbacks: dict[str, int] = field(default_factory=dict)
    profile: Profile | None = None


@torch.no_grad()
def _time_model(geometry: Geometry, counts: dict[str, int], proc: Any, device: str, dtype: torch.dtype,
                compiled: bool, seconds: float, linear8: bool = False, profiled: bool = False) -> _Timed:
    """Times one forward; `proc` is a SparseProc, or None for dense."""
    cuda = torch.device(device).type == "cuda"
    model, inputs = build(geometry, counts, device, dtype), geometry.inputs(device, dtype)
    if linear8:
        fp8_linears(model, keep=False)
    if proc is not None:
        dit_sparse.enable(model, proc)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    unit = inputs["timestep"] / 999 * (1 if inputs["timestep"].max() > 1 else 0.999)
    calls = [0]

    def step() -> None:
        # Another timestep each time: the next step of one long run, not the other branch of guidance.
        calls[0] += 1
        model(**(inputs | {"timestep": unit * (999 - calls[0] % 990)}), return_dict=False)

    with best_dense(device):
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        took = median_ms(step, device, seconds=seconds, least=5)
        peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
        timed = _Timed(took, peak, profile=profile(step, device) if profiled else None)
    if proc is not None:
        report = dit_sparse.summary(model)
        timed.density, timed.fallbacks = report.density, dict(report.fallbacks)
        timed.backend = "+".join(sorted(report.backends))
    return timed


def release(device: str, compiled: bool) -> None:
    """Give the memory of the last model back, which its graphs hold too, before the next is built."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def bench_step(geometry: Geometry, methods: Sequence[str], *, density: float = 0.2, device: str = "cuda",
               dtype: str = "bf16", compiled: bool = True, backend: str | None = None, seconds: float = 1.0,
               fp8: Sequence[str] = (), profiled: bool = False,
               on_row: Callable[[StepRow], None] = lambda row: None) -> list[StepRow]:
    """Times a step dense, then with every method, no step and no layer kept dense.

    Args:
        geometry: one of `GEOMETRIES`.
        methods: names; the density is given to those that have the option.
        density: share of the blocks that is computed.
        device, dtype: where and in which type ("bf16", "fp16", "fp32").
        compiled: compile the repeated blocks, dense and sparse alike.
        backend: kernel of the sparse calls; None: the fastest that can run.
        seconds: of timed calls for each number of layers.
        fp8: rungs to time every method with as well, names of `RUNGS`; "linear" also dense.
        profiled: also look at one step of each larger model under the profiler, once it is timed.
        on_row: called with each row as it is measured.

    Returns:
        The rows, dense first.

    Raises:
        SparseFallbackError: a method's call could not run sparse: its row would tell of dense attention.
    """
    return time_variants(geometry, variants(methods, fp8), density=density, device=device, dtype=dtype,
                         compiled=compiled, backend=backend, seconds=seconds, profiled=profiled, on_row=on_row)


def time_variants(geometry: Geometry, chosen: Sequence[Variant], *, density: float = 0.2, device: str = "cuda",
                  dtype: str = "bf16", compiled: bool = True, backend: str | None = None, seconds: float = 1.0,
                  profiled: bool = False, on_row: Callable[[StepRow], None] = lambda row: None) -> list[StepRow]:
    """Times a step as each of some variants, in their order; the first is what the others are compared with.

    Args:
        geometry, density, device, dtype, compiled, backend, seconds, profiled, on_row: as in `bench_step`.
        chosen: what is timed.

    Returns:
        A row for each.

    Raises:
        SparseFallbackError: as in `bench_step`.
    """
    rows: list[StepRow] = []
    for variant in chosen:
        def timed(counts: dict[str, int], look: bool, variant: Variant = variant) -> _Timed:
            kernel = "fp8" if "attention" in variant.fp8 else backend
            proc = None if variant.method is None else sparse_of(variant.method, density, kernel)
            release(device, compiled)
            return _time_model(geometry, counts, proc, device, DTYPES[dtype], compiled, seconds,
                               "linear" in variant.fp8, look)

        base = dict.fromkeys(geometry.kinds, FEW)
        few = timed(base, False)
        more = {kind: timed(base | {kind: MORE}, profiled) for kind in geometry.kinds}
        rows.append(_row(geometry, variant, few, more, rows[0] if rows else None))
        on_row(rows[-1])
    return rows


def variants(methods: Sequence[str], fp8: Sequence[str]) -> list[Variant]:
    """What is timed, in this order: dense, then every method, each with its rungs in 8-bit floats."""
    dense = [Variant(None)] + [Variant(None, RUNGS["linear"])] * ("linear" in fp8)
    return dense + [Variant(name, parts) for name in methods for parts in ((), *(RUNGS[rung] for rung in fp8))]


def _row(geometry: Geometry, variant: Variant, few: _Timed, more: dict[str, _Timed], dense: StepRow | None) -> StepRow:
    """The row of a variant from its small and larger models, the latter by the kind of layer they have more of."""
    layer = {kind: max(0.0, (timed.ms - few.ms) / (MORE - FEW)) for kind, timed in more.items()}
    rest = max(0.0, few.ms - FEW * sum(layer.values()))
    fallbacks: Counter[str] = sum((Counter(m.fallbacks) for m in (few, *more.values())), Counter())
    step = (rest + sum(layer[kind] * geometry.kinds[kind] for kind in more)) / 1e3
    peak = max(m.peak for m in more.values())
    looked = {kind: m.profile for kind, m in more.items() if m.profile is not None}
    lines = [line for kind, found in looked.items()
             for line in found.lines(f"{geometry.name}, {variant.title}, {MORE} {kind.removeprefix('num_')}")]
    return StepRow(
        geometry.name, geometry.tokens, variant.title, few.backend, few.density, layer, rest, step,
        dense.step_seconds / step if dense else 1.0, peak, dict(fallbacks),
        short=min(layer.values()) == 0 or (dense is not None and dense.short),
        above_dense=peak / (dense.peak_gib if dense else peak) - 1 if peak else None,
        profile={kind: found.kinds() for kind, found in looked.items()}, profile_lines=lines)


def sparse_of(name: str, density: float, backend: str | None) -> Any:
    """A SparseProc that runs a method at every step and in every layer, at a density where it takes one."""
    takes_density = "density" in getattr(all_methods().get(name), "__dataclass_fields__", {})
    options: dict[str, Any] = {"density": density} if takes_density else {}
    return dit_sparse.SparseProc(name, dense_steps=0, dense_layers=0, num_steps=LONG_RUN, backend=backend, strict=True,
                                 **options)


def default_models(device: str) -> list[str]:
    """What is timed where no model is named."""
    return ["wan-14b-720p" if torch.device(device).type == "cuda" else "tiny"]


def needs_gpu(models: Sequence[str], device: str) -> str:
    """Why a model cannot be timed on the device, in one line, or "": a step would take hours."""
    large = [name for name in models if name != "tiny"] if torch.device(device).type == "cpu" else []
    return f"--model {large[0]} needs a GPU; on a CPU use --model tiny" if large else ""


def fp8_missing(rungs: Sequence[str], device: str) -> str:
    """Why rungs in 8-bit floats cannot be timed on a device, in one line, "" when they can."""
    if unknown := [rung for rung in rungs if rung not in RUNGS]:
        return f"--fp8 {unknown[0]!r} is not allowed; use one of {', '.join(RUNGS)}"
    parts = {part for rung in rungs for part in RUNGS[rung]}
    why = linear8_missing(device) if "linear" in parts else ""
    if not why and "attention" in parts:
        why = hopper_plan.missing()
    return f"--fp8 cannot run here: {why}" if why else ""


def note(rows: Sequence[StepRow]) -> str:
    """What the table's reader must know."""
    kinds = ", ".join(f"{GEOMETRIES[name].title}: {' + '.join(map(str, GEOMETRIES[name].kinds.values()))} layers"
                      for name in dict.fromkeys(row.model for row in rows) if name in GEOMETRIES)
    return (f"Random weights. Timed with {FEW} and {MORE} layers of each kind and scaled to the model's own ({kinds}); "
            "plan included, no step or layer kept dense. GiB: peak of the larger timed model, not of the whole one; "
            "memory: the same above dense."
            + " ?: --seconds is too short to tell a layer's time." * any(row.short for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; `--out` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(GEOMETRIES))
    parser.add_argument("--method", action="append", help="default: svg, rainfusion2 and radial")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--backend")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fp8", action="append", choices=list(RUNGS), default=[],
                        help="time every method with these parts in 8-bit floats as well; may be repeated")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes, by kind of kernel")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    why = misuse(options.device, [options.density], options.method, options.backend)
    models = options.model or ([] if why else default_models(options.device))
    if why := why or needs_gpu(models, options.device) or fp8_missing(options.fp8, options.device):
        parser.error(why)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    where, rows = environment(options.device), []
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    for name in models:
        try:
            rows += bench_step(GEOMETRIES[name], options.method or ["svg", "rainfusion2", "radial"],
                               density=options.density, device=options.device, dtype=options.dtype,
                               compiled=not options.eager, backend=options.backend, seconds=options.seconds,
                               fp8=options.fp8, profiled=options.profile,
                               on_row=lambda row: print("\n".join(["  ".join(row.cells()), *row.profile_lines]),
                                                        flush=True))
        except dit_sparse.SparseFallbackError as error:
            parser.error(first_line(error))
        if options.out:  # after every model: a long run that is cut off keeps what it has
            options.out.write_text(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1))
    print(table((row.cells() for row in rows), COLUMNS))
    print(note(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
