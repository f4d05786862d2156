"""The attention kernels as a ladder, one idea a rung, at a real model's geometry: `dit-sparse bench ladder`.

    dit-sparse bench ladder --out ladder        # 21x45x80 tokens, 40 heads of 128: Wan-14B at 720p

All rungs compute the same activations at nearly the same density and take turns, so that clock and temperature are the
same for all of them. TFLOP/s count the pairs of real tokens that are computed exactly. The block lists are random:
activations and lists say nothing about quality.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dit_sparse import order, routing
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval.peers import first_line
from dit_sparse.eval.speed import DTYPES, environment, in_turn, misuse, random_keep, table
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.dense import prefers_cudnn
from dit_sparse.kernels.fp8 import block_sparse_attention_fp8
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.soft import soft_attention
from dit_sparse.pipelines.video_io import finished_file

COLUMNS = ("rung", "density", "median ms", "TFLOP/s", "x dense")
BLOCK = 128
TILE = (2, 8, 8)
AGAINST = "times as fast as dense attention"
SPARSEST = 0.08  # the sparsest of uneven heads, times the mean density


@dataclass(frozen=True)
class Rung:
    """One line of the ladder: what it is, the share of pairs that it computes, and the call."""

    name: str
    density: float
    call: Callable[[], Any]


class Measured(Protocol):
    """A rung that can be written and drawn: a dataclass with these two fields and the words beside its bar."""

    @property
    def rung(self) -> str:
        """What the rung is."""

    @property
    def speedup(self) -> float:
        """Time of the first rung over this one's."""

    def words(self) -> str:
        """What is written beside the bar."""


@dataclass(frozen=True)
class LadderRow:
    """One measured rung; `speedup`: time of the dense rung over this one's."""

    rung: str
    density: float
    milliseconds: float
    tflops: float
    speedup: float

    def cells(self) -> list[str]:
        """The row as printed."""
        return [self.rung, f"{self.density:.3f}", f"{self.milliseconds:.3f}", f"{self.tflops:.0f}",
                f"{self.speedup:.2f}"]

    def words(self) -> str:
        """What is written beside its bar."""
        return f"{self.speedup:.2f}x   {self.milliseconds:.1f} ms   {self.tflops:.0f} TFLOP/s"


def _hopper(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, scale: float, tuning: Tuning) -> Any:
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    return block_sparse_attention_hopper(query, key, value, blocks, scale, tuning)


def uneven(heads: int, density: float) -> list[float]:
    """Densities of heads from sparse to dense, the densest ones last, of about the given mean."""
    found = torch.logspace(0, 1, heads, base=1 / SPARSEST).double()
    for _ in range(50):  # what is cut at 1 goes to the others
        found = (found * (density / found.mean())).clamp(max=1.0)
    return found.tolist()


def rungs(query: Tensor, key: Tensor, value: Tensor, grid: TokenGrid, density: float) -> Iterator[Rung]:
    """The rungs in order, the dense one first.

    Args:
        query, key, value: (1, L, H, D), tokens of the grid in raster order.
        grid: without text.
        density: share of the key blocks that each query block lists.
    """
    heads, scale, device = query.shape[2], query.shape[3] ** -0.5, str(query.device)
    cuda = query.device.type == "cuda"
    raster = BlockLayout.raster(grid.tokens, BLOCK, device)
    positions, lengths = order.tile(grid, TILE)
    boxes = order.layout(grid, positions, BLOCK, lengths=lengths, tile_shape=TILE, device=device)
    packed = order.layout(grid, positions, BLOCK, device=device)

    def mask_of(layout: BlockLayout, densities: Sequence[float]) -> BlockMask:
        keep = [random_keep(heads // len(densities), layout.blocks, layout.blocks, d, device) for d in densities]
        return BlockMask.from_dense(torch.cat(keep, dim=1), layout, layout)

    def rung(name: str, mask: BlockMask, tuning: Tuning) -> Rung:
        call = functools.partial(_hopper, query, key, value, Blocks.from_mask(mask), scale, tuning)
        return Rung(name, float(mask.density()), call)

    def soft() -> Tensor:
        mean_key, mean_value = routing.pool(key, raster), routing.pool(value, raster)
        return soft_attention(query, key, value, mean_key, mean_value, plain, backend="hopper" if cuda else None)[0]

    tile = "x".join(map(str, TILE))
    plain = mask_of(raster, [density])
    found = float(plain.density())
    portable = ("portable kernel (Triton)", "triton") if cuda else ("PyTorch's CPU kernel", "cpu")
    yield Rung("dense (cuDNN)" if prefers_cudnn(query) else "dense", 1.0, lambda: dense_attention(query, key, value))
    yield Rung(portable[0], found, lambda: block_sparse_attention(query, key, value, plain, backend=portable[1]))
    yield rung("Hopper kernel (Gluon)", plain, Tuning(cuda=False))
    yield rung("Hopper kernel (CUDA C++)", plain, Tuning())
    yield rung(f"Hopper, tiles {tile} as 3-D boxes, padded", mask_of(boxes, [density]), Tuning(ragged_boxes=True))
    yield rung(f"Hopper, tokens in the order of tiles {tile}", mask_of(packed, [density]), Tuning())
    heads_apart = mask_of(raster, uneven(heads, density))
    yield rung("Hopper, uneven heads, as they come", heads_apart, Tuning(longest_first=False))
    yield rung("Hopper, uneven heads, longest first", heads_apart, Tuning(longest_first=True))
    yield Rung("Hopper, and soft blocks for the rest", found, soft)
    blocks = Blocks.from_mask(plain)
    yield Rung("Hopper, 8-bit floats, rounding included", found,
               lambda: block_sparse_attention_fp8(query, key, value, blocks, scale))


def bench_ladder(grid: TokenGrid, heads: int = 40, head_dim: int = 128, *, density: float = 0.25, device: str = "cuda",
                 dtype: str = "bf16", rounds: int = 12,
                 on_failure: Callable[[str, str], object] = lambda name, reason: None) -> list[LadderRow]:
    """Times every rung that can run here.

    Args:
        grid, heads, head_dim: shape of the activations (1, L, H, D), no text.
        density: of the sparse rungs.
        device, dtype: where and in which type ("bf16", "fp16", "fp32").
        rounds: how often the rungs take turns.
        on_failure: called with the name of a rung that cannot run, and the reason; it has no row.

    Returns:
        The rows, dense first.
    """
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (torch.randn(1, grid.tokens, heads, head_dim, generator=generator, device=device,
                                     dtype=DTYPES[dtype]) for _ in range(3))
    able: dict[str, Rung] = {}
    for rung in rungs(query, key, value, grid, density):
        try:
            rung.call()
            if query.device.type == "cuda":
                torch.cuda.synchronize(query.device)
            able[rung.name] = rung
        except Exception as error:  # whatever a sparse kernel trips over, the other rungs are measured
            if not able:
                raise
            on_failure(rung.name, first_line(error))
    took = in_turn({name: rung.call for name, rung in able.items()}, device, rounds=rounds)
    pairs, dense = 4 * heads * head_dim * grid.tokens**2, next(iter(took.values()))
    return [LadderRow(name, able[name].density, ms, pairs * able[name].density / ms / 1e9, dense / ms)
            for name, ms in took.items()]


def write(rows: Sequence[Measured], folder: pathlib.Path, title: str, footer: str, *, stem: str = "ladder",
          against: str = AGAINST, more: dict[str, Any] | None = None) -> list[pathlib.Path]:
    """Writes STEM.csv, STEM.json and, where matplotlib is installed, STEM.png to a folder, which is made.

    Args:
        rows: what was measured, dataclasses of one class.
        folder: where to.
        title, footer: what was computed, and the machine and versions it was computed with.
        stem: of the files' names.
        against: what the axis of the picture is.
        more: stands in the JSON beside the rows.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = [asdict(row) for row in rows]  # type: ignore[call-overload]
    lines, whole = folder / f"{stem}.csv", folder / f"{stem}.json"
    with finished_file(lines) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    with finished_file(whole) as path:
        path.write_text(json.dumps({"title": title, "footer": footer, "rows": found, **(more or {})}, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return [lines, whole]
    return [lines, whole, draw(rows, folder / f"{stem}.png", title, footer, against)]


def draw(rows: Sequence[Measured], path: pathlib.Path, title: str, footer: str, against: str = AGAINST
         ) -> pathlib.Path:
    """The rungs as horizontal bars, the dense one first, as a PNG; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 1.5 + 0.42 * len(rows)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.add_subplot()
    speeds = [row.speedup for row in rows]
    bars = axes.barh(range(len(rows)), speeds, color=["#9aa3ad"] + ["#2a6f97"] * (len(rows) - 1), height=0.66)
    axes.bar_label(bars, [row.words() for row in rows], padding=5, fontsize=9)
    axes.set_yticks(range(len(rows)), [row.rung for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, max(speeds) * 1.5)
    axes.set_xlabel(against)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)  # above long names of rungs too
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(footer, fontsize=7.5, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    return path


def titles(grid: TokenGrid, heads: int, head_dim: int, dtype: str, density: float, device: str) -> tuple[str, str]:
    """Title and footer of the picture."""
    return (f"Attention at {grid}, {heads} heads of {head_dim}, {dtype}, density {density:g}",
            ", ".join(f"{name} {value}" for name, value in environment(device).items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ladder; `--out` also writes table and picture, which `--redraw` makes from a folder of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="21x45x80")
    parser.add_argument("--heads", type=int, default=40)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--redraw", type=pathlib.Path, metavar="FOLDER", help="measured where matplotlib was missing")
    options = parser.parse_args(argv)
    if options.redraw:
        found = json.loads((options.redraw / "ladder.json").read_text())
        rows = [LadderRow(**row) for row in found["rows"]]
        print(draw(rows, options.redraw / "ladder.png", found["title"], found["footer"]))
        return 0
    if why := misuse(options.device, [options.density]):
        parser.error(why)
    try:
        grid = TokenGrid.parse(options.grid)
    except ValueError as error:
        parser.error(str(error))
    title, footer = titles(grid, options.heads, options.head_dim, options.dtype, options.density, options.device)
    print(f"{title}\n{footer}", flush=True)
    rows = bench_ladder(grid, options.heads, options.head_dim, density=options.density, device=options.device,
                        dtype=options.dtype, rounds=options.rounds,
                        on_failure=lambda name, reason: print(f"not measured: {name}: {reason}", flush=True))
    print(table((row.cells() for row in rows), COLUMNS))
    for path in write(rows, options.out, title, footer) if options.out else ():
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
