"""Milliseconds and kept bytes of each method's plan and attention at a real model's geometry, random activations.

    python -m dit_sparse.eval.method_speed --grid 21x45x80 --heads 40 --head-dim 128
    python -m dit_sparse.eval.method_speed --density 0.3 0.15 --own --kernels --out eval/data/attention_time.json

Random activations say nothing about quality; they give the time of the masks and of the kernels that run them. A
method is timed over a short run of steps, so that what it keeps from step to step counts with its true share. The
second command makes the table that `dit-sparse eval methods` models the attention's time by; it goes on where it was
stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_sparse.eval.speed import DTYPES, environment, median_ms, misuse, table
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.memory import Memory, State
from dit_sparse.methods import all_methods, build, family_options
from dit_sparse.methods.base import Call, Method
from dit_sparse.report import Stopwatch

COLUMNS = ("method", "options", "backend", "block", "density", "plan ms", "attention ms", "x dense", "kept MiB")
OWN = "own"  # what the authors used for Wan; the defaults where they say nothing
STEPS, DENSE = 10, 2  # of a timed run, the first ones dense: what the comparison of methods does
WAN_14B = (40, 2)  # layers, and guidance branches of Wan2.1-14B: what keeps state
BLOCKS, DENSITIES = (64, 128), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # of the table of kernels


@dataclass(frozen=True)
class MethodRow:
    """One method at one geometry: milliseconds of a call, mean over the steps of a run, median over runs.

    Args:
        method: its name; "dense" leads the table.
        options: "density=0.25", "own" (the authors' for Wan) or "" (the method's defaults).
        backend: kernel that ran.
        density: computed share of the pairs, as the operator counts it; mean over the steps.
        plan_ms: scores, selection and lists.
        attention_ms: the operator: kernel and corrections.
        speedup: dense over plan and attention together.
        block_size: tokens of a query block, 0 for dense.
        state_bytes: the most that one layer and guidance branch keeps from step to step, without parts that all layers
            share.
    """

    method: str
    options: str
    backend: str
    density: float
    plan_ms: float
    attention_ms: float
    speedup: float
    block_size: int = 0
    state_bytes: int = 0

    def cells(self) -> list[str]:
        """The row as printed."""
        return [self.method, self.options, self.backend, str(self.block_size or ""), f"{self.density:.3f}",
                f"{self.plan_ms:.2f}", f"{self.attention_ms:.2f}", f"{self.speedup:.2f}",
                f"{self.state_bytes / 2**20:.3g}"]


@dataclass
class Bench:
    """Activations of one geometry, and the time of dense attention on them.

    Args:
        grid: tokens of the call, text included.
        heads, head_dim: shape of the activations (1, L, H, D).
        dtype, device: of the activations.
        seconds: of timed calls for each number.
    """

    grid: TokenGrid
    heads: int
    head_dim: int
    dtype: str = "bf16"
    device: str = "cuda"
    seconds: float = 0.5

    def __post_init__(self) -> None:
        self.generator = torch.Generator(device=self.device).manual_seed(0)
        made = dict(generator=self.generator, device=self.device, dtype=DTYPES[self.dtype])
        shape = (1, self.grid.tokens, self.heads, self.head_dim)
        query, key, value = (torch.randn(shape, **made) for _ in range(3))  # type: ignore[call-overload]
        self.qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = (query, key, value)
        self.scale = self.head_dim**-0.5
        self.dense = dense_attention(*self.qkv, scale=self.scale)
        self.dense_ms = median_ms(lambda: dense_attention(*self.qkv, scale=self.scale), self.device,
                                  seconds=self.seconds)

    def time(self, method: Method, options: str = "") -> MethodRow:
        """Time a method over a run of `STEPS` steps once its static parts are built and its kernels compiled."""
        memory, used, sizes = Memory(), [""], [0]
        densities: list[float] = []
        held = [0]
        attend = functools.partial(block_sparse_attention, scale=self.scale, on_backend=lambda x: used.append(x))

        def run(first: bool = False) -> list[Stopwatch]:
            memory.reset()
            watches = []
            for step in range(STEPS):
                call = Call(*self.qkv, self.grid, self.scale, step=step, num_steps=STEPS, family="wan",
                            cached=memory.static, generator=self.generator,
                            state=State(memory, (0, ""), step=step, shape=self.grid))
                if step < DENSE:
                    if method.observes:
                        method.observe(call, *self.dense)
                    held.append(memory.nbytes if first else 0)
                    continue
                watches.append(Stopwatch(call.device))
                plan = method.plan(call)
                watches[-1].mark()
                if plan.mask is None:
                    dense_attention(*self.qkv, scale=self.scale)
                else:
                    plan.operator.run(call, plan.mask, attend)
                watches[-1].mark()
                if first:
                    held.append(memory.nbytes)
                    densities.append(1.0 if plan.mask is None else float(plan.operator.computed(call, plan.mask)))
                    sizes.append(0 if plan.mask is None else plan.mask.query.block_size)
            return watches

        run(first=True)
        kept, start = state_bytes_of(memory, max(held)), time.perf_counter()
        runs: list[list[Stopwatch]] = []
        while not runs or time.perf_counter() - start < self.seconds:
            runs.append(run())
            runs[-1][-1].seconds()  # waits for the GPU
        plan_ms, attention_ms = (
            1e3 * statistics.mean(statistics.median(run[step].seconds(*marks) for run in runs)
                                  for step in range(STEPS - DENSE))
            for marks in ((0, 1), (1, 2))
        )
        return MethodRow(method.name, options, used[-1] or "dense", statistics.mean(densities), plan_ms, attention_ms,
                         self.dense_ms / (plan_ms + attention_ms), max(sizes), kept)

    def kernel(self, block_size: int, density: float) -> float:
        """Milliseconds of block-sparse attention over random key blocks, the own one kept."""
        from .random_blocks import RandomBlocks

        memory = Memory()
        call = Call(*self.qkv, self.grid, self.scale, cached=memory.static, generator=self.generator)
        mask = RandomBlocks(density, block_size).plan(call).mask
        assert mask is not None
        return median_ms(lambda: block_sparse_attention(*self.qkv, mask, scale=self.scale), self.device,
                         seconds=self.seconds)


def state_bytes_of(memory: Memory, most: int = 0) -> int:
    """Bytes that a run keeps from step to step, without the static parts; the memory is reset with that.

    Args:
        memory: of the run, whose last step is over.
        most: bytes it held after an earlier step, where that was more.
    """
    total = max(most, memory.nbytes)
    memory.reset()
    return max(0, total - memory.nbytes)


def needs_weights(name: str) -> bool:
    """Whether a method cannot work without trained weights of its own."""
    return "trained" in getattr(all_methods()[name], "needs", "")


def comparable() -> list[str]:
    """Names of the methods that can run on any model: all but dense and those that need trained weights."""
    return [name for name in sorted(all_methods()) if name != "dense" and not needs_weights(name)]


def takes_density(name: str) -> bool:
    """Whether a method has the option `density`."""
    return "density" in getattr(all_methods().get(name), "__dataclass_fields__", {})


def own_options(name: str) -> dict[str, Any]:
    """The method's options that its authors used for Wan, without those of the schedule."""
    shared = ("dense_steps", "dense_layers", "dense_last_steps", "refresh")
    return {key: value for key, value in family_options(name, "wan").items() if key not in shared}


def bench_methods(grid: TokenGrid, heads: int, head_dim: int, *, density: float = 0.25, dtype: str = "bf16",
                  device: str = "cuda", names: list[str] | None = None, seconds: float = 0.5) -> list[MethodRow]:
    """Time every method at one density.

    Args:
        grid: tokens of the call, text included.
        heads, head_dim: shape of the activations (1, L, H, D).
        density: asked of the methods that have the option.
        dtype, device: of the activations.
        names: methods, default all that can run; `dense` always leads the table.
        seconds: of timed calls for each number.
    """
    bench = Bench(grid, heads, head_dim, dtype, device, seconds)
    rows = [MethodRow("dense", "", "dense", 1.0, 0.0, bench.dense_ms, 1.0)]
    for name in names or comparable():
        options = {"density": density} if takes_density(name) else {}
        rows.append(bench.time(build(name, **options), f"density={density:g}" if options else ""))
    return rows


def measure(bench: Bench, content: dict[str, Any], names: Sequence[str], densities: Sequence[float], *, own: bool,
            kernels: bool, keep: Callable[[], None], log: Callable[[str], None],
            stop: Callable[[], bool] = lambda: False) -> None:
    """Fill a table of times with what it lacks.

    Args:
        bench: the geometry.
        content: has "rows" (as `MethodRow`), "kernels" (block, density, ms) and "failed" (reasons); added to.
        names, densities: what is asked of whom; methods without the option run once, with their defaults.
        own: also with the authors' options for Wan.
        kernels: also the kernel alone, at `BLOCKS` and `DENSITIES`.
        keep: called after every number.
        log: takes a line for each row.
        stop: nothing new is begun once it says so.
    """
    there = {(row["method"], row["options"]) for row in content["rows"]}
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for density in densities:
        jobs += [(name, f"density={density:g}", {"density": density}) if takes_density(name) else (name, "", {})
                 for name in names]
    jobs += [(name, OWN, own_options(name)) for name in names] if own else []
    cells = [(block, density) for block in BLOCKS for density in DENSITIES] if kernels else []
    for block, density in cells:
        if stop() or any((cell["block"], cell["density"]) == (block, density) for cell in content["kernels"]):
            continue
        content["kernels"].append({"block": block, "density": density, "ms": bench.kernel(block, density)})
        keep()
    for name, options, given in dict.fromkeys((n, o, tuple(g.items())) for n, o, g in jobs):
        if stop() or (name, options) in there:
            continue
        try:
            row = bench.time(build(name, **dict(given)), options)
        except (ValueError, RuntimeError) as error:
            content["failed"][f"{name} {options}".strip()] = (str(error).splitlines() or [""])[0]
            log(f"{name} {options}: {content['failed'][f'{name} {options}'.strip()]}")
        else:
            content["failed"].pop(f"{name} {options}".strip(), None)
            content["rows"].append(asdict(row))
            log("  ".join(row.cells()))
        keep()


def state_table(rows: Sequence[MethodRow], layers: int = WAN_14B[0], branches: int = WAN_14B[1]) -> str:
    """What every method keeps between steps over all layers and guidance branches, in words of a table."""
    cells = [[row.method, row.options, f"{row.state_bytes / 2**20:.3g}",
              f"{row.state_bytes * layers * branches / 2**30:.3g}"] for row in rows if row.method != "dense"]
    return table(cells, ("method", "options", "MiB a layer and branch", f"GiB, {layers} layers x {branches}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="21x45x80")
    parser.add_argument("--text", type=int, default=0)
    parser.add_argument("--text-at", default="none", choices=["none", "front", "back"])
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, nargs="+", default=[0.25])
    parser.add_argument("--own", action="store_true", help="also with the options that the authors used for Wan")
    parser.add_argument("--kernels", action="store_true", help="also the kernel alone, by block size and density")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", action="append", dest="names")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timed calls for each number")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file, made or continued")
    return parser


def _content(file: pathlib.Path | None, head: dict[str, Any]) -> dict[str, Any]:
    """What the file holds when it is of this geometry and device, else an empty table."""
    if file is not None and file.exists():
        held = json.loads(file.read_text())
        if all(held.get(name) == value for name, value in head.items()):
            return dict(held)
        raise ValueError(f"--out {file} is of another geometry, device or version; name another file")
    return {**head, "rows": [], "kernels": [], "failed": {}}


def main() -> None:
    """Print the tables; `--out` also writes them as JSON, after every number."""
    parser, start = _parser(), time.monotonic()
    options = parser.parse_args()
    if why := misuse(options.device, options.density, options.names):
        parser.error(why)
    where = environment(options.device)
    try:
        grid = TokenGrid.parse(options.grid, text=options.text, text_at=options.text_at)
        shape = {"heads": options.heads, "head_dim": options.head_dim, "dtype": options.dtype}
        content = _content(options.out, {"where": where, "grid": str(grid), **shape})
    except ValueError as error:
        parser.error(str(error))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    with torch.no_grad():
        bench = Bench(grid, options.heads, options.head_dim, options.dtype, options.device, options.seconds)
        content["dense_ms"] = bench.dense_ms

        def keep() -> None:
            if options.out:
                options.out.write_text(json.dumps(content, indent=1) + "\n")

        measure(bench, content, options.names or comparable(), options.density, own=options.own,
                kernels=options.kernels, keep=keep, log=lambda line: print(line, flush=True),
                stop=lambda: time.monotonic() - start > options.budget)
        keep()
    dense = MethodRow("dense", "", "dense", 1.0, 0.0, bench.dense_ms, 1.0)
    rows = [dense, *(MethodRow(**row) for row in content["rows"])]
    print(table((row.cells() for row in rows), COLUMNS))
    print(f"\nKept between steps at {grid}, {options.heads} heads of {options.head_dim}:")
    print(state_table(rows))
    for name, reason in content["failed"].items():
        print(f"not measured: {name} ({reason})")


if __name__ == "__main__":
    main()
