"""Speeds of the attention kernels: rows for the tables in docs/benchmarks. Run by run.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow
from dit_sparse.eval import speed
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning

Log = Callable[[str], None]

# What the portable kernel must reach, from the prototype: 32,768 tokens, 12 heads of 128, bf16, density 0.25.
TARGET_TFLOPS = 450
# FlashAttention-4 4.0.0b36, block-sparse, with the same shape on an H200: another run, so that it is only a guide.
FLASH4 = {1.0: 673, 0.5: 653, 0.25: 616, 0.1: 549}


def noted(log: Log, rows: Iterable[speed.Row]) -> Iterator[speed.Row]:
    """The rows, each written down as it is measured: a run that is cut keeps what it has."""
    for row in rows:
        log("  ".join(row.cells()))
        yield row


TUNINGS = {", persistent" * persistent: Tuning(persistent=persistent, cuda=False) for persistent in (False, True)}
SHAPES = ((12, 128, 128), (24, 64, 128), (12, 128, 64))  # heads, head dim, key block of `hopper_variants`
GRIDS = (((20, 48, 80), (4, 4, 8)), ((21, 45, 80), (2, 8, 8)), ((21, 30, 52), (4, 8, 4)))  # and their tiles


def compile_hopper() -> dict[str, Callable[[], str]]:
    """By name, a small call of every variant that `hopper` and `peers` time, to be compiled by several processes."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    def call(layouts: tuple[BlockLayout, BlockLayout], dim: int, dtype: torch.dtype, tuning: Tuning, window: int = 0,
             masked: bool = False) -> str:
        tokens = layouts[0].tokens
        x = torch.randn(1, tokens, 2, dim, device="cuda", dtype=dtype)
        keep = torch.ones(1, 2, layouts[0].blocks, layouts[1].blocks, dtype=torch.bool, device="cuda")
        place = torch.zeros(window, tokens, dtype=torch.int32, device="cuda")
        tested = TokenWindow.from_tokens(place, place, place, *layouts) if window else None
        mask = BlockMask.from_dense(keep, *layouts, partial=keep, window=tested)
        real = torch.ones(1, tokens, dtype=torch.bool, device="cuda") if masked else None
        out, _ = block_sparse_attention_hopper(x, x, x, Blocks.from_mask(mask, real), 0.1, tuning)
        return "" if bool(torch.isfinite(out).all()) else "not finite"

    def raster(key_block: int = 128) -> tuple[BlockLayout, BlockLayout]:
        return BlockLayout.raster(256, 128, "cuda"), BlockLayout.raster(256, key_block, "cuda")

    def twice(layout: BlockLayout) -> tuple[BlockLayout, BlockLayout]:
        return layout, layout

    bf16, plain = torch.bfloat16, Tuning()
    permuted = partial(BlockLayout.from_order, torch.arange(256, device="cuda").flip(0), 128)
    found: dict[str, Callable[[], str]] = {
        f"{dim} {key_block}{name}": lambda d=dim, k=key_block, t=tuning: call(raster(k), d, bf16, t)  # type: ignore[misc]
        for _, dim, key_block in SHAPES for name, tuning in TUNINGS.items()}
    for sizes, tile in GRIDS:
        small = TokenGrid(*(n + (whole % n > 0) for n, whole in zip(tile, sizes, strict=True)))

        def tiled(grid: TokenGrid = small, tile: Any = tile) -> str:
            positions, lengths = order.tile(grid, tile)
            layout = order.layout(grid, positions, 128, lengths=lengths, tile_shape=tile, device="cuda")
            return call(twice(layout), 128, bf16, Tuning(ragged_boxes=True))

        found[f"tiles {tile}"] = tiled
    found["permuted"] = lambda: call(twice(permuted()), 128, bf16, plain)
    found["permuted 64"] = lambda: call(twice(permuted()), 64, bf16, plain)
    found["permuted fp16"] = lambda: call(twice(permuted()), 128, torch.float16, plain)
    found["fp16"] = lambda: call(raster(), 128, torch.float16, plain)
    found["key mask"] = lambda: call(raster(), 128, bf16, plain, masked=True)
    found |= {f"{n} coordinates": lambda n=n: call(raster(), 128, bf16, plain, window=n) for n in (1, 3)}  # type: ignore[misc]
    return found


def portable(log: Log) -> list[dict[str, Any]]:
    """Times the shapes that matter, dense beside sparse."""
    shapes: list[dict[str, Any]] = [
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.5, 0.25, 0.1)),
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.25,), dtype="fp16"),
        dict(tokens=32768, heads=12, head_dim=128, densities=(0.25,), block_size=64),
        dict(tokens=32768, heads=24, head_dim=64, densities=(0.25,)),
        dict(tokens=75600, heads=12, head_dim=128, densities=(0.25, 0.1)),
        dict(tokens=8192, heads=12, head_dim=128, densities=(0.25,)),
        dict(tokens=8192, heads=12, head_dim=128, densities=(0.25,), dtype="fp32"),
    ]
    log("  ".join(speed.COLUMNS))
    rows: list[speed.Row] = []
    for shape in shapes:
        rows += speed.bench_attention(**shape, device="cuda", seconds=0.25, backend="triton",
                                      on_row=lambda row: log("  ".join(row.cells())))
        torch.cuda.empty_cache()
    rows += noted(log, boundary_speeds())
    log("\n" + speed.table(row.cells() for row in rows))
    reached = next(row.tflops for row in rows if row.what == "sparse" and abs(row.density - 0.25) < 0.01)
    log(f"\nportable kernel at density 0.25: {reached:.0f} TFLOP/s, target {TARGET_TFLOPS}")
    return [dataclasses.asdict(row) for row in rows]


def hopper(log: Log) -> list[dict[str, Any]]:
    """Times the Hopper kernel: densities, head dims, key blocks, persistent programs, uneven heads, boundary tests."""
    from dit_sparse.kernels import hopper_plan

    if why := hopper_plan.missing():
        log(f"speeds of the Hopper kernel left out: {why}")
        return []
    densities = (1.0, 0.5, 0.25, 0.1)
    rows: list[speed.Row] = []
    for shape in (dict(heads=12, head_dim=128, densities=densities),
                  dict(heads=12, head_dim=128, densities=(0.25,), dtype="fp16"),
                  dict(heads=24, head_dim=64, densities=(1.0, 0.25))):
        rows += speed.bench_attention(tokens=32768, **shape, device="cuda", seconds=0.25,  # type: ignore[arg-type]
                                      backend="hopper", on_row=lambda row: log("  ".join(row.cells())))
        torch.cuda.empty_cache()
    for more in (hopper_variants(densities, rows[0].milliseconds), hopper_tile_speeds(), boundary_speeds("hopper")):
        rows += noted(log, more)
    log("\n" + speed.table(row.cells() for row in rows))
    for row in rows:
        nearest = min(densities, key=lambda d: abs(d - row.density))
        if row.what == "sparse" and row.head_dim == 128 and row.dtype == "bf16":
            log(f"Hopper kernel at density {row.density:.2f}: {row.tflops:.0f} TFLOP/s, "
                f"{row.tflops / FLASH4[nearest]:.2f} of FlashAttention-4 in another run ({FLASH4[nearest]})")
    return [dataclasses.asdict(row) for row in rows]


def peers(log: Log) -> list[dict[str, Any]]:
    """The Hopper kernel and the kernels of others on the same tensors and lists, in turn, in one process."""
    from dit_sparse.eval.peers import Peer, available
    from dit_sparse.kernels import hopper_plan

    if why := hopper_plan.missing():
        log(f"speeds beside the kernels of others left out: {why}")
        return []
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    tokens, heads, dim, dtype = 32768, 12, 128, torch.bfloat16
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=dtype) for _ in range(3))
    layout = BlockLayout.raster(tokens, 128, "cuda")
    others, missing = available("cuda", dtype)
    for name, why in missing.items():
        log(f"not measured: {name}: {why}")

    def prepared(peer: Peer, keep: torch.Tensor) -> Callable[[], Any] | None:
        try:
            call = peer.prepare(query, key, value, keep, 128)
            call()
            torch.cuda.synchronize()
        except Exception as error:
            log(f"not measured: {peer.name}: {' '.join(str(error).split())[:300]}")
            return None
        return call

    def measured() -> Iterator[speed.Row]:
        every = torch.ones(1, heads, layout.blocks, layout.blocks, dtype=torch.bool, device="cuda")
        calls = {peer.name: call for peer in others if not peer.sparse and (call := prepared(peer, every))}
        dense = speed.in_turn(calls, "cuda", rounds=12)
        base = dense.get("cuDNN", float("nan"))
        for name, took in dense.items():
            yield row("dense", name, 1.0, took, base)
        # FlexAttention compiles for some ten seconds: last.
        for some in (["FlashAttention-4"], ["FlexAttention"]):
            for density in (1.0, 0.5, 0.25, 0.1):
                keep = speed.random_keep(heads, layout.blocks, layout.blocks, density, "cuda")
                mask = BlockMask.from_dense(keep, layout, layout)
                listed, found = Blocks.from_mask(mask), mask.density().item()
                if density == 0.25:
                    quarter = listed, keep, found
                calls = {"hopper": partial(block_sparse_attention_hopper, query, key, value, listed, dim**-0.5)}
                calls |= {peer.name: call for peer in others
                          if peer.sparse and peer.name in some and (call := prepared(peer, keep))}
                for name, took in speed.in_turn(calls, "cuda").items():
                    yield row(f"random {density}", name, found, took, base)
        calls = {"hopper": partial(block_sparse_attention_hopper, query, key, value, quarter[0], dim**-0.5)}
        calls |= {peer.name: call for peer in others
                  if peer.name == "FlashAttention-4" and peer.sparse and (call := prepared(peer, quarter[1]))}
        for name, took in speed.in_turn(calls | in_8_bits(query, key, value, quarter[0]), "cuda").items():
            yield row("random 0.25, beside 8 bits", name, quarter[2], took, base)

    def row(what: str, name: str, density: float, took: float, base: float) -> speed.Row:
        return speed.Row(tokens, heads, dim, 1, "bf16", 128, what, name, density, took,
                         4 * heads * dim * tokens**2 * density / took / 1e9, base / took)

    return [dataclasses.asdict(x) for x in noted(log, measured())]


def in_8_bits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Blocks
              ) -> dict[str, Callable[[], Any]]:
    """The 8-bit kernels on a call, quantised before and with the quantising."""
    from dit_sparse.kernels import fp8, quantise

    tokens, dim = query.shape[1], query.shape[3]
    scale, plan = dim**-0.5, fp8.fp8_plan(blocks, tokens, dim, dim)
    calls: dict[str, Callable[[], Any]] = {}
    for scores in quantise.SCORES:
        made = quantise.quantise(query, key, value, blocks, scale, scores=scores)
        calls[f"{scores}, quantised before"] = partial(fp8.attend, made, blocks, plan, scale, tokens, query.dtype)
        calls[f"{scores}, quantising included"] = partial(fp8.block_sparse_attention_fp8, query, key, value, blocks,
                                                          scale, scores=scores)
    return calls


def hopper_variants(densities: tuple[float, ...], dense_ms: float) -> Iterator[speed.Row]:
    """Ways to compute the same call in turn, and heads of uneven density against even ones of equal work."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    for heads, dim, key_block in SHAPES:
        tokens = 32768
        query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        layouts = [BlockLayout.raster(tokens, size, "cuda") for size in (128, key_block)]
        blocks = layouts[0].blocks, layouts[1].blocks
        masks = {f"random {d}": speed.random_keep(heads, *blocks, d, "cuda")
                 for d in (densities if (dim, key_block) == (128, 128) else (1.0, 0.25))}
        if (dim, key_block) == (128, 128):
            uneven = torch.logspace(math.log10(0.02), 0, heads).tolist()
            masks["uneven heads"] = torch.cat([speed.random_keep(1, *blocks, d, "cuda") for d in uneven], dim=1)
            masks["even heads, same work"] = speed.random_keep(heads, *blocks, sum(uneven) / heads, "cuda")
        for name, keep in masks.items():
            mask = BlockMask.from_dense(keep, *layouts)
            density, listed = mask.density().item(), Blocks.from_mask(mask)
            took = speed.in_turn({
                f"{name}{way}": partial(block_sparse_attention_hopper, query, key, value, listed, dim**-0.5, tuning)
                for way, tuning in TUNINGS.items()}, "cuda")
            for what, ms in took.items():
                yield speed.Row(tokens, heads, dim, 1, "bf16", key_block, what, "hopper", density, ms,
                                4 * heads * dim * tokens**2 * density / ms / 1e9, dense_ms / ms if dim == 128 else 0.0)


def hopper_tile_speeds() -> Iterator[speed.Row]:
    """Three grids, the first a multiple of its tiles, the others ragged: rates count pairs of real tokens only.

    boxes: tiles copied straight from the activations, padded where the grid cuts them. index: the same blocks, keys and
    values put in order once. permuted tile order: tokens in the order of the tiles, cut every 128: no padding.
    """
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper

    heads, dim = 12, 128
    for sizes, shape in GRIDS:
        grid = TokenGrid(*sizes)
        positions, lengths = order.tile(grid, shape)
        tiled = order.layout(grid, positions, 128, lengths=lengths, tile_shape=shape, device="cuda")
        through_index = dataclasses.replace(tiled, box=None)
        packed = order.layout(grid, positions, 128, device="cuda")
        query, key, value = (torch.randn(1, grid.tokens, heads, dim, device="cuda", dtype=torch.bfloat16)
                             for _ in range(3))
        dense_ms = speed.median_ms(partial(dense_attention, query, key, value), "cuda", seconds=0.25)
        for density in (1.0, 0.25, 0.1):
            calls, found = {}, {}
            for way, layout in (("boxes", tiled), ("index", through_index), ("permuted tile order", packed)):
                keep = speed.random_keep(heads, layout.blocks, layout.blocks, density, "cuda")
                mask = BlockMask.from_dense(keep, layout, layout)
                name = f"{'x'.join(map(str, sizes))} {way} {'x'.join(map(str, shape))}"
                found[name] = mask.density().item()
                calls[name] = partial(block_sparse_attention_hopper, query, key, value, Blocks.from_mask(mask),
                                      dim**-0.5, Tuning(ragged_boxes=True))
            for name, took in speed.in_turn(calls, "cuda", rounds=9 if density == 1.0 else 15).items():
                yield speed.Row(grid.tokens, heads, dim, 1, "bf16", 128, name, "hopper", found[name], took,
                                4 * heads * dim * grid.tokens**2 * found[name] / took / 1e9, dense_ms / took)


def boundary_speeds(backend: str = "triton") -> Iterator[speed.Row]:
    """What the tests of boundary blocks, and a key mask, cost at 32,768 tokens: every listed block is tested."""
    tokens, heads, dim, block = 32768, 12, 128, 128
    query, key, value = (torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    layout = BlockLayout.raster(tokens, block, "cuda")
    keep = speed.random_keep(heads, layout.blocks, layout.blocks, 0.25, "cuda")
    place = torch.zeros(3, tokens, dtype=torch.int32, device="cuda")
    key_mask = torch.ones(1, tokens, dtype=torch.bool, device="cuda")
    key_mask[:, -200:] = False
    masks = {"all tested, no window": BlockMask.from_dense(keep, layout, layout, partial=keep)}
    for count in (1, 3):
        window = TokenWindow.from_tokens(place[:count], place[:count] - 1, place[:count] + 1, layout, layout)
        tested = BlockMask.from_dense(keep, layout, layout, partial=keep, window=window)
        masks[f"all tested, {count} coordinates"] = tested
    plain = BlockMask.from_dense(keep, layout, layout)
    sparse = partial(block_sparse_attention, query, key, value, backend=backend)
    dense = partial(dense_attention, query, key, value)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    calls: dict[str, Callable[[], Any]] = {name: partial(sparse, mask) for name, mask in masks.items()}
    calls["sparse, key mask"] = partial(sparse, plain, key_mask=key_mask)
    calls["dense, key mask"] = partial(dense, key_mask=key_mask)
    calls["dense, key mask, SDPA"] = partial(F.scaled_dot_product_attention, q, k, v, attn_mask=key_mask[:, None, None])
    base = speed.median_ms(dense, "cuda", seconds=0.25)
    for name, call in calls.items():
        density = 1.0 if name.startswith("dense") else 0.25
        took = speed.median_ms(call, "cuda", seconds=0.25)
        yield speed.Row(tokens, heads, dim, 1, "bf16", block, name, "" if name.startswith("dense") else backend,
                        density, took, 4 * heads * dim * tokens**2 * density / took / 1e9, base / took)
