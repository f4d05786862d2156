"""Speed of block-sparse attention, beside dense attention on the same machine: `dit-sparse bench`.

TFLOP/s count the blocks computed: 4 * B * H * D per (query, key) pair of listed blocks, and all pairs for dense.
Every time is the median of repeated calls after a warm-up, layout passes included; building the mask has its own row.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.eval.peers import Peer, available, first_line
from dit_sparse.kernels.attention import backends, block_sparse_attention, choose_backend, dense_attention
from dit_sparse.methods import all_methods

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = ("tokens", "heads", "head dim", "dtype", "blocks", "what", "backend", "density", "median ms", "TFLOP/s",
           "x dense")
_FLUSH_BYTES = 2**28  # written before every timed GPU call, so that none finds its inputs in the cache


@dataclass(frozen=True)
class Row:
    """One measured time.

    Args:
        tokens, heads, head_dim, batch, dtype, block_size: the shape.
        what: "dense", "sparse", "sparse, permuted", "sparse, band" or "build mask".
        backend: kernel that ran.
        density: computed share of the (query, key) pairs.
        milliseconds: median time of a call.
        tflops: 10^12 operations per second over the blocks computed; 0 for a mask.
        speedup: time of the dense call over this one; 0 for a mask.
    """

    tokens: int
    heads: int
    head_dim: int
    batch: int
    dtype: str
    block_size: int
    what: str
    backend: str
    density: float
    milliseconds: float
    tflops: float
    speedup: float

    def cells(self) -> list[str]:
        """The row as printed."""
        shape = [str(self.tokens), str(self.heads), str(self.head_dim), self.dtype, str(self.block_size)]
        rates = [f"{self.tflops:.{0 if self.tflops >= 10 else 3}f}", f"{self.speedup:.2f}"] if self.tflops else ["", ""]
        return [*shape, self.what, self.backend, f"{self.density:.3f}", f"{self.milliseconds:.3f}", *rates]


def environment(device: str) -> dict[str, str]:
    """Device and library versions that a time belongs to."""
    cuda = torch.device(device).type == "cuda"
    processor = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if cuda else processor
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    found = {"device": name, "torch": torch.__version__, "triton": triton, "python": platform.python_version()}
    return found | ({"cuda": str(torch.version.cuda)} if cuda else {})


def median_ms(call: Callable[[], Any], device: str, *, seconds: float = 0.4, least: int = 3) -> float:
    """Median time of a call in milliseconds, over about `seconds` of calls after a warm-up of two.

    On a GPU the calls are queued without waiting and timed by events; the cache is overwritten before each.
    """
    call()
    if torch.device(device).type != "cuda":
        times: list[float] = []
        while len(times) < least or sum(times) < seconds:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e3
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    repeats = max(least, min(100, int(seconds / (time.perf_counter() - start + 1e-4))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in events:
        flush.zero_()
        first.record()
        call()
        last.record()
    torch.cuda.synchronize(device)
    return statistics.median(first.elapsed_time(last) for first, last in events)


def in_turn(calls: dict[str, Callable[[], Any]], device: str, *, rounds: int = 24) -> dict[str, float]:
    """Median milliseconds of calls that take turns: clock and temperature are the same for all of them.

    At its power limit a GPU runs a call faster after one that draws less, so every round has an order of its own.

    Args:
        calls: by name; each runs once before it is timed.
        device: where they compute. On a GPU the cache is overwritten before each call.
        rounds: timed calls of each.
    """
    for call in calls.values():
        call()
    names, cuda = list(calls), torch.device(device).type == "cuda"
    shuffled = random.Random(0)
    turns = [name for _ in range(rounds) for name in shuffled.sample(names, len(names))]
    times: dict[str, list[float]] = {name: [] for name in names}
    if not cuda:
        for name in turns:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(found) for name, found in times.items()}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = []
    for name in turns:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        calls[name]()
        last.record()
        events.append((name, first, last))
    torch.cuda.synchronize(device)
    for name, first, last in events:
        times[name].append(first.elapsed_time(last))
    return {name: statistics.median(found) for name, found in times.items()}


def random_keep(heads: int, query_blocks: int, key_blocks: int, density: float, device: str) -> Tensor:
    """bool (1, H, nq, nk): the same number of random key blocks in every row."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(density * key_blocks))
    places = torch.rand(1, heads, query_blocks, key_blocks, generator=generator).topk(count).indices
    keep = torch.zeros(1, heads, query_blocks, key_blocks, dtype=torch.bool)
    return keep.scatter_(-1, places, True).to(device)


def band_keep(blocks: int, density: float, device: str) -> Tensor:
    """bool (nq, nk): a band around the diagonal of about the given density."""
    place = torch.arange(blocks, device=device)
    return (place[:, None] - place).abs() <= max(0, round((density * blocks - 1) / 2))


def bench_attention(
    *,
    tokens: int,
    heads: int,
    head_dim: int,
    densities: Sequence[float],
    device: str,
    dtype: str = "bf16",
    batch: int = 1,
    block_size: int = 128,
    backend: str | None = None,
    seconds: float = 0.4,
    peers: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
    on_failure: Callable[[str, str], object] = lambda name, reason: None,
) -> list[Row]:
    """Times dense attention, then block-sparse attention at each density.

    Args:
        tokens, heads, head_dim, batch: shape of query, key and value.
        densities: shares of key blocks that each query block keeps.
        device: "cuda", "cpu", ...
        dtype: "bf16", "fp16" or "fp32".
        block_size: of queries and keys.
        backend: kernel to time; None: the fastest that can run.
        seconds: of timed calls per row.
        peers: also time the kernels of others that can run here, on the same tensors and the same random lists.
        on_row: called with each row as it is measured.
        on_failure: called with the name of a kernel of others that raised, and the reason; it has no row.

    Returns:
        The rows: dense; per density random lists, the same with permuted tokens, a band; and one mask build.
    """
    query, key, value = (torch.randn(batch, tokens, heads, head_dim, device=device).to(DTYPES[dtype])
                         for _ in range(3))
    pairs = 4 * batch * heads * head_dim * tokens**2
    rows: list[Row] = []
    common = dict(tokens=tokens, heads=heads, head_dim=head_dim, batch=batch, dtype=dtype, block_size=block_size)

    def add(what: str, kernel: str, density: float, call: Callable[[], Any], *, rated: bool = True) -> None:
        took = median_ms(call, device, seconds=seconds)
        dense = rows[0].milliseconds if rows else took
        rows.append(Row(**common, what=what, backend=kernel, density=density, milliseconds=took,  # type: ignore[arg-type]
                        tflops=pairs * density / took / 1e9 if rated else 0.0, speedup=dense / took if rated else 0.0))
        on_row(rows[-1])

    def add_peer(peer: Peer, what: str, density: float, pattern: Tensor) -> None:
        try:
            add(what, peer.name, density, peer.prepare(query, key, value, pattern, block_size))
        except Exception as error:  # whatever the kernel of others trips over, the rest of the table is measured
            on_failure(peer.name, f"{what} at {tokens} tokens: {first_line(error)}")

    others = available(device, DTYPES[dtype])[0] if peers else []
    add("dense", "dense", 1.0, lambda: dense_attention(query, key, value))
    for peer in others:
        if not peer.sparse:
            add_peer(peer, "dense", 1.0, query)
    layout = BlockLayout.raster(tokens, block_size, device)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = BlockLayout.from_order(order, block_size)
    for density in densities:
        keep = random_keep(heads, layout.blocks, layout.blocks, density, device)
        for what, pattern, blocks in (("sparse", keep, layout), ("sparse, permuted", keep, permuted),
                                      ("sparse, band", band_keep(layout.blocks, density, device), layout)):
            mask = BlockMask.from_dense(pattern, blocks, blocks)
            kernel = backend or choose_backend(query, key, value, mask)
            call = functools.partial(block_sparse_attention, query, key, value, mask, backend=kernel)
            add(what, kernel, mask.density().item(), call)
            for peer in others if what == "sparse" else ():
                if peer.sparse:
                    add_peer(peer, what, mask.density().item(), pattern)
    add("build mask", "torch", densities[-1], lambda: BlockMask.from_dense(keep, layout, layout), rated=False)
    return rows


def misuse(device: str, densities: Iterable[float], methods: Iterable[str] | None = None,
           backend: str | None = None) -> str:
    """Why options cannot be measured, in one line, "" when they can: told before minutes are spent."""
    try:
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError):
        return f"--device {device} is not there; use cpu"
    if wrong := [density for density in densities if not 0 < density <= 1]:
        return f"--density {wrong[0]} is not allowed; use numbers in (0, 1]"
    known = sorted(name for name in all_methods() if name != "dense")  # dense leads every table
    if unknown := [name for name in methods or () if name not in known]:
        return f"--method {unknown[0]!r} is not allowed; use one of {', '.join(known)}"
    names = [each.name for each in backends()]
    return "" if backend in (None, *names) else f"--backend {backend!r} is unknown; use one of {', '.join(names)}"


def table(rows: Iterable[Sequence[str]], header: Sequence[str] = COLUMNS) -> str:
    """Rows of text in aligned columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table; also runs on a CPU, at a small size by default."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="dit-sparse bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 32768 on a GPU, 4096 on a CPU")
    parser.add_argument("--heads", type=int, help="default: 12 on a GPU, 4 on a CPU")
    parser.add_argument("--head-dim", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--block-size", type=int, help="default: 128 on a GPU, 64 on a CPU")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--backend", help="default: the fastest that can run")
    parser.add_argument("--seconds", type=float, default=0.4, help="of timed calls per row")
    parser.add_argument("--peers", action="store_true", help="time the kernels of others too, where they can run")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    options = parser.parse_args(argv)
    if why := misuse(options.device, options.density, backend=options.backend):
        parser.error(why)
    gpu = torch.device(options.device).type == "cuda"
    head_dim, heads = options.head_dim or (128 if gpu else 64), options.heads or (12 if gpu else 4)
    dtype, block_size = options.dtype or ("bf16" if gpu else "fp32"), options.block_size or (128 if gpu else 64)

    where = environment(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    rows: list[Row] = []
    missing = available(options.device, DTYPES[dtype])[1] if options.peers else {}
    for tokens in options.tokens or [32768 if gpu else 4096]:
        rows += bench_attention(tokens=tokens, heads=heads, head_dim=head_dim, batch=options.batch, dtype=dtype,
                                block_size=block_size, densities=options.density, device=options.device,
                                backend=options.backend, seconds=options.seconds, peers=options.peers,
                                on_failure=missing.setdefault)
    print(table(row.cells() for row in rows))
    for name, reason in missing.items():
        print(f"not measured: {name} ({reason})")
    if options.json:
        content = {"environment": where, "rows": [dataclasses.asdict(row) for row in rows], "not_measured": missing}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
