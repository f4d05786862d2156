"""Thousands of small random calls of the Hopper kernel, and a share of them of the portable one, against float64.

A seed is a call: its kind, which decides what is compiled, is the seed modulo the number of kinds, all else is drawn
from the seed. A verdict stays on the device until many of them are read together, so that the calls do not wait.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse import order
from dit_sparse.blockmask import BlockLayout, BlockMask, TokenWindow
from dit_sparse.grid import TokenGrid
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.hopper_plan import Tuning
from dit_sparse.kernels.reference import attention_reference
from tests.kernels.cases import FLOOR, LSE_FLOOR, Inputs, check, plain_attention

BF16, FP16 = torch.bfloat16, torch.float16
TILE = (4, 4, 8)
AT_ONCE = 64  # verdicts that are read together
PORTABLE_SHARE = 4  # of the kinds that the portable kernel runs too, every n-th call


@dataclass(frozen=True)
class Kind:
    """What is compiled once for many calls.

    Args:
        order: "raster", "permuted" (one order), "heads" (an order per head, or per batch element and head), "boxes"
            (tiles that divide the grid), "ragged boxes" (tiles cut by the grid, copied as boxes) or "tiles" (the same
            through the index).
        portable: the portable kernel runs a share of the calls too.
        persistent: None: as the launcher decides.
    """

    dtype: torch.dtype = BF16
    head_dim: int = 128
    key_block: int = 128
    order: str = "raster"
    window: int = 0
    always: bool = False
    masked: bool = False
    text: bool = False
    persistent: bool | None = None
    portable: bool = False
    value_dim: int = 0

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)
                   if f.name != "portable" and getattr(self, f.name) != f.default}
        return " ".join(f"{k}={v}".replace("torch.", "") for k, v in changed.items()) or "bf16 128 raster"


# A number that 4 and 8 divide: parts of a run then compile kinds of their own.
KINDS = [
    Kind(persistent=False, portable=True), Kind(persistent=True), Kind(dtype=FP16, masked=True),
    Kind(order="permuted", portable=True), Kind(order="heads", masked=True),
    Kind(window=1), Kind(window=3, always=True, masked=True, order="permuted", portable=True),
    Kind(dtype=FP16, head_dim=64), Kind(head_dim=64, order="permuted"), Kind(key_block=64),
    Kind(dtype=FP16, head_dim=64, key_block=64, order="heads"), Kind(head_dim=96, value_dim=64),
    Kind(order="boxes"), Kind(order="boxes", text=True, masked=True),
    Kind(order="ragged boxes", text=True), Kind(order="tiles", text=True, portable=True),
]


@dataclass(frozen=True)
class Drawn:
    """A call: its seed, kind and tensors."""

    seed: int
    kind: Kind
    inputs: Inputs


def draw(seed: int, device: str, most: int = 400) -> Drawn:
    """The call of a seed.

    Args:
        seed: any whole number.
        device: where the tensors are made. Numbers differ between devices, shapes do not.
        most: tokens of a sequence at most, about.
    """
    kind = KINDS[seed % len(KINDS)]
    chance = random.Random(seed)
    generator = torch.Generator(device).manual_seed(seed)
    batch, heads = chance.choice((1, 1, 2)), chance.choice((1, 2, 3))
    box = _box_layout(kind, chance, device, most)
    if box is not None:
        query_layout = key_layout = box
    else:
        query_layout, key_layout = (_layout(kind, chance, generator, batch, heads, size, most)
                                    for size in (128, kind.key_block))
    window = _window(kind, chance, query_layout, key_layout, generator) if kind.window else None
    mask = _mask(chance, generator, batch, heads, query_layout, key_layout, window)
    key_mask = None
    if kind.masked:
        share = chance.choice((0.05, 0.5, 0.9, 1.0))
        key_mask = torch.rand(batch, key_layout.tokens, generator=generator, device=device) < share
    style = chance.choice(("plain", "heads first", "fused"))
    size = chance.choice((0.3, 1.0, 1.0, 6.0))  # weights from even to a few large ones
    query = _activations(style, batch, query_layout.tokens, heads, kind.head_dim, kind.dtype, generator, size)
    key = _activations(style, batch, key_layout.tokens, heads, kind.head_dim, kind.dtype, generator, 1.0)
    value = _activations(style, batch, key_layout.tokens, heads, kind.value_dim or kind.head_dim, kind.dtype, generator,
                         1.0)
    if key_mask is not None:
        for x in (key, value):
            x.masked_fill_(~key_mask[..., None, None], torch.nan)
    return Drawn(seed, kind, Inputs(query, key, value, mask, key_mask, kind.head_dim**-0.5 * chance.uniform(0.7, 1.5)))


def _layout(
    kind: Kind, chance: random.Random, generator: torch.Generator, batch: int, heads: int, block: int, most: int
) -> BlockLayout:
    """Raster or random orders of a few hundred tokens, an odd number as a rule."""
    tokens = chance.choice((1, most // 2, chance.randint(1, most)) + (2 * chance.randint(0, most // 2) + 1,) * 7)
    device = generator.device
    if kind.order == "raster":
        return BlockLayout.raster(tokens, block, device)
    shape = {"permuted": (), "heads": chance.choice(((1, heads), (batch, heads)))}[kind.order]
    places = torch.rand(*shape, tokens, generator=generator, device=device).argsort(-1)
    if chance.random() < 0.5:
        return BlockLayout.from_order(places, block)
    # Segments of any length: short blocks anywhere, not only at the end.
    lengths, left = [], tokens
    while left:
        lengths.append(min(left, chance.randint(1, 2 * block)))
        left -= lengths[-1]
    return BlockLayout.from_order(places, block, lengths=lengths)


def _box_layout(kind: Kind, chance: random.Random, device: str, most: int) -> BlockLayout | None:
    """Tiles of a small grid, with text at either end, or None for kinds without tiles."""
    if kind.order not in ("boxes", "ragged boxes", "tiles"):
        return None
    if kind.order == "boxes":
        sizes = [n * chance.choice((1, 1, 2) if most > 300 else (1,)) for n in TILE]
    else:
        sizes = [chance.randint(n, 2 * n + 1 if most > 300 else n + 1) for n in TILE]
        sizes[1] = chance.choice((5, 6, 7) if most > 300 else (5,))  # never a multiple of the tile's
    text = chance.randint(1, 150) if kind.text else 0
    grid = TokenGrid(*sizes, text=text, text_at=chance.choice(("front", "back")) if text else "none")
    positions, lengths = order.tile(grid, TILE)
    return order.layout(grid, positions, 128, lengths=lengths, device=device,
                        tile_shape=None if kind.order == "tiles" else TILE)


def _window(
    kind: Kind, chance: random.Random, query: BlockLayout, key: BlockLayout, generator: torch.Generator
) -> TokenWindow:
    """Boxes of random reach around places that wrap at random sides."""
    device, sides = generator.device, [chance.randint(2, 12) for _ in range(kind.window)]
    places = [torch.stack([torch.arange(x.tokens, device=device) // side**c % side for c, side in enumerate(sides)])
              for x in (query, key)]
    always = torch.rand(key.tokens, generator=generator, device=device) < 0.05 if kind.always else None
    low, high = chance.randint(0, 5), chance.randint(-1, 5)
    return TokenWindow.from_tokens(places[1], places[0] - low, places[0] + high, query, key, always=always)


def _mask(
    chance: random.Random, generator: torch.Generator, batch: int, heads: int, query: BlockLayout, key: BlockLayout,
    window: TokenWindow | None,
) -> BlockMask:
    """Lists of random lengths, shared or not by batch elements and heads; some rows empty, some full."""
    shape = chance.choice(((1, 1), (1, heads), (batch, heads), (batch, 1)))
    device = generator.device

    def rand(*sizes: int) -> Tensor:
        return torch.rand(*shape, *sizes, generator=generator, device=device)

    density = rand(query.blocks, 1) * 1.4 - 0.2  # below 0: no block, above 1: all of them
    if chance.random() < 0.02:
        density = density - 2  # nothing at all
    keep = rand(query.blocks, key.blocks) < density
    partial = rand(query.blocks, key.blocks) < chance.choice((0.0, 0.3, 1.0))
    width = None if chance.random() < 0.5 else key.blocks
    return BlockMask.from_dense(keep, query, key, partial=partial, window=window, max_width=width)


def _activations(
    style: str, batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, generator: torch.Generator,
    size: float,
) -> Tensor:
    """(B, L, H, D) as its own memory, with heads first, or a part of a fused projection; NaN around it.

    All steps are multiples of 16 numbers: others are other variants of the kernel.
    """
    device = generator.device
    fresh = torch.randn(batch, tokens, heads, dim, generator=generator, device=device) * size
    if style == "plain":
        return fresh.to(dtype)
    shape = (batch, heads, tokens + 5, dim + 16) if style == "heads first" else (batch, tokens, 3, heads, dim)
    room = torch.full(shape, torch.nan, dtype=dtype, device=device)
    view = room.transpose(1, 2)[:, :tokens, :, :dim] if style == "heads first" else room[:, :, 1]
    return view.copy_(fresh)


def moved(inputs: Inputs, device: str) -> Inputs:
    """A call on another device; strides are kept."""
    def move(x: Tensor) -> Tensor:
        # The memory that a view was cut from goes along.
        room = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
        return room.as_strided(x.shape, x.stride(), x.storage_offset())

    mask = None if inputs.key_mask is None else inputs.key_mask.to(device)
    return Inputs(*map(move, (inputs.query, inputs.key, inputs.value)), inputs.mask.to(device), mask, inputs.scale)


def verdict(inputs: Inputs, out: Tensor, lse: Tensor) -> Tensor:
    """float64 (3,): 1 where the accuracy rule of `cases.check` holds, and error over bound of output and LSE."""
    arguments = (inputs.query, inputs.key, inputs.value, inputs.mask.token_mask(), inputs.scale, inputs.key_mask)
    want, want_lse = attention_reference(*arguments, dtype=torch.float64)
    plain, plain_lse = plain_attention(*arguments)
    empty = want_lse == -torch.inf
    wrong = ((lse == -torch.inf) != empty).any() | ~torch.isfinite(out).all()
    wrong = wrong | ((out.transpose(1, 2) != 0) & empty[..., None]).any()
    ratios = []
    for got, plainly, wanted, least in ((out, plain, want, FLOOR[out.dtype]), (lse, plain_lse, want_lse, LSE_FLOOR)):
        skip = empty if got is lse else torch.zeros((), dtype=torch.bool, device=out.device)
        error, bound = (torch.where(skip, 0, (x.double() - wanted).abs()).amax() for x in (got, plainly))
        ratios.append(error / (2 * bound + least))
    good = ~wrong & (ratios[0] <= 1) & (ratios[1] <= 1)
    return torch.stack([good.double(), *ratios])


Attend = Callable[[Drawn], tuple[Tensor, Tensor]]


def tuning_of(kind: Kind) -> Tuning:
    """How the Hopper kernel in Gluon computes the calls of a kind."""
    return Tuning(persistent=kind.persistent, ragged_boxes=kind.order == "ragged boxes", cuda=False)


def hopper(drawn: Drawn, cuda: bool = False) -> tuple[Tensor, Tensor]:
    """The call on the Hopper kernel, in Gluon or in CUDA C++, with NaN in all fresh memory."""
    from dit_sparse.kernels.hopper import block_sparse_attention_hopper
    from tests.gpu.checks import poisoned

    inputs = drawn.inputs
    with poisoned():
        return block_sparse_attention_hopper(
            inputs.query, inputs.key, inputs.value, Blocks.from_mask(inputs.mask, inputs.key_mask), inputs.scale,
            dataclasses.replace(tuning_of(drawn.kind), cuda=cuda))


def portable(drawn: Drawn) -> tuple[Tensor, Tensor]:
    """The call on the portable kernel, with NaN in all fresh memory."""
    from dit_sparse.kernels.portable import block_sparse_attention_triton
    from tests.gpu.checks import poisoned

    inputs = drawn.inputs
    with poisoned():
        return block_sparse_attention_triton(inputs.query, inputs.key, inputs.value,
                                             Blocks.from_mask(inputs.mask, inputs.key_mask), inputs.scale)


def kernels_of(seed: int) -> dict[str, Attend]:
    """The kernels that run the call of a seed."""
    shared = KINDS[seed % len(KINDS)].portable and seed // len(KINDS) % PORTABLE_SHARE == 0
    return {"hopper": hopper} | ({"portable": portable} if shared else {})


def cuda_seeds(first: int, calls: int) -> list[int]:
    """The first seeds, from `first` on, of calls that the kernel in CUDA C++ runs."""
    fits = [i for i, kind in enumerate(KINDS)
            if not (kind.window or kind.masked) and "boxes" not in kind.order]
    return [seed for seed in range(first, first + (calls // len(fits) + 2) * len(KINDS))
            if seed % len(KINDS) in fits][:calls]


def only_cuda(_: int) -> dict[str, Attend]:
    """The kernel in CUDA C++ alone, for any of `cuda_seeds`."""
    return {"cuda": lambda drawn: hopper(drawn, cuda=True)}


def run(
    seeds: Iterable[int], device: str, on_failure: Callable[[str], object], *, most: int = 400,
    kernels: Callable[[int], dict[str, Attend]] = kernels_of, stop: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Runs the calls of the seeds.

    Args:
        seeds, device, most: as in `draw`.
        on_failure: called with a line for every failing call.
        kernels: seed -> the kernels to run it, by name.
        stop: asked before every call.

    Returns:
        For each kernel: calls, failed seeds, and the largest error over its bound of output and LSE.
    """
    totals: dict[str, dict[str, Any]] = {}
    waiting: list[tuple[int, str, Tensor]] = []

    def read() -> None:
        numbers = torch.stack([x for *_, x in waiting]).tolist() if waiting else []
        for (seed, name, _), (good, out_ratio, lse_ratio) in zip(waiting, numbers, strict=True):
            total = totals.setdefault(name, {"calls": 0, "failed": [], "out": 0.0, "lse": 0.0})
            total["calls"] += 1
            total["out"], total["lse"] = max(total["out"], out_ratio), max(total["lse"], lse_ratio)
            if not good:
                total["failed"].append(seed)
                drawn = draw(seed, device, most)
                words = check(drawn.inputs, *kernels(seed)[name](drawn)) or "right when repeated"
                on_failure(f"FAILED {name} seed {seed} ({drawn.kind.name}): {words}")
        waiting.clear()

    for seed in seeds:
        if stop():
            break
        drawn = draw(seed, device, most)
        for name, attend in kernels(seed).items():
            waiting.append((seed, name, verdict(drawn.inputs, *attend(drawn))))
        if len(waiting) >= AT_ONCE:
            read()
    read()
    return totals
