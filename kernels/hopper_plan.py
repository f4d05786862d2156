"""Host side of the Hopper kernel: what it can run, and what it is launched with. Needs neither triton nor a GPU."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .blocks import Blocks

QUERY_BLOCK = 128
KEY_BLOCKS = (64, 128)
MAX_HEAD_DIM = 128


@torch.compiler.assume_constant_result  # what a compiler traces ends here
def missing() -> str:
    """Why the Hopper kernel cannot be used on this machine at all, "" when it can."""
    return _missing()


@functools.cache
def _missing() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'dit-sparse[gpu]')"
    if os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on"):
        return "Triton's interpreter (TRITON_INTERPRET) does not run Gluon kernels"
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "no NVIDIA GPU"
    capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if all(major != 9 for major, _ in capabilities):
        found = ", ".join(f"{major}.{minor}" for major, minor in capabilities)
        return f"no Hopper GPU (compute capability 9.0); this machine has {found}"
    try:
        from . import hopper  # noqa: F401
    except Exception as error:
        # Gluon is experimental: another version of triton may lack a name.
        words = str(error).splitlines()
        return f"triton's Gluon cannot be imported: {words[0] if words else type(error).__name__}"
    return ""


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def hopper_reasons(query: Tensor, key: Tensor, value: Tensor, blocks: Blocks | None = None) -> list[str]:
    """Why the Hopper kernel cannot run these tensors, in words; empty when it can."""
    reasons = [why] if (why := missing()) else []
    if query.device.type != "cuda":
        reasons.append(f"the tensors are on {query.device.type}, it needs a Hopper GPU")
    elif (capability := _capability(query.device))[0] != 9:
        reasons.append(f"the GPU has compute capability {capability[0]}.{capability[1]}, it needs 9.0")
    if query.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {query.dtype} is not float16 or bfloat16")
    for name, dim in (("head dim", query.shape[3]), ("head dim of the values", value.shape[3])):
        if dim > MAX_HEAD_DIM or dim % 8:
            reasons.append(f"{name} {dim} is not a multiple of 8 up to {MAX_HEAD_DIM}")
    if blocks is not None:
        if blocks.query_block != QUERY_BLOCK:
            reasons.append(f"query block size {blocks.query_block} is not {QUERY_BLOCK}")
        if blocks.key_block not in KEY_BLOCKS:
            reasons.append(f"key block size {blocks.key_block} is not one of {', '.join(map(str, KEY_BLOCKS))}")
    return reasons


def kind_of(query: Tensor, value: Tensor, blocks: Blocks) -> tuple[object, ...]:
    """What of a call decides which variant of the kernel is compiled."""
    return (query.device, query.dtype, query.shape[3], value.shape[3], blocks.key_block, blocks.coordinates,
            blocks.query_index is None, blocks.always is None, blocks.key_mask is None, common_box(blocks) is None)


@dataclass(frozen=True)
class Tuning:
    """How a call is computed; the results are the same up to rounding.

    Args:
        persistent: one program per multiprocessor takes every n-th tile, instead of one program per tile; raster
            order without a window only, as the others would spill registers. None: as `prefers_persistent` says.
        ragged_boxes: copy tiles that the grid cuts straight from the activations as well.
        longest_first: start the longest lists first, or keep the order of heads and blocks; None: by their number, see
            `launch_order`.
        cuda: take the kernel in CUDA C++, which is an error where it cannot run, or the one in Gluon; None: as
            `prefers_cuda` says where it can run.
    """

    persistent: bool | None = None
    ragged_boxes: bool = False
    longest_first: bool | None = None
    cuda: bool | None = None


@dataclass(frozen=True)
class Plan:
    """What the kernel is launched with, beside the activations.

    Args:
        lists: int32 (B|1, H|1, nq, width), whole blocks first.
        whole, boundary: int32 (B|1, H|1, nq), how many there are of each.
        exempt: int32 like them, how many boundary blocks, first in the list, the window does not test; None: none.
        flags: int8 (B|1, H|1, key slots), bit 0: a key that may be seen, bit 1: a key that the window does not test;
            None: the block lengths say which keys are real, and the window tests all of them.
        key_ok: bool (B|1, H|1, key slots), bit 0 of the flags; None: without key mask.
        box: where the tiles of the layouts lie in the grid, see `BlockLayout`; None: blocks are not copied as tiles.
        width: head dim in shared memory.
        stages: blocks of keys, and of values, that are in flight.
    """

    lists: Tensor
    whole: Tensor
    boundary: Tensor
    exempt: Tensor | None
    flags: Tensor | None
    key_ok: Tensor | None
    box: tuple[int, ...] | None
    width: int
    stages: int

    @property
    def video_blocks(self) -> int:
        """Blocks that are tiles; 0 without tiles."""
        box = self.box
        return 0 if box is None else math.prod(_tile_counts(box))

    def element(self, b: int) -> Plan:
        """The plan of one batch element."""
        def cut(x: Tensor | None) -> Tensor | None:
            return x if x is None or x.shape[0] == 1 else x[b : b + 1]

        names = ("lists", "whole", "boundary", "exempt", "flags", "key_ok")
        parts: dict[str, Any] = {name: cut(getattr(self, name)) for name in names}
        return dataclasses.replace(self, **parts)


def make_plan(
    blocks: Blocks, key_tokens: int, head_dim: int, value_dim: int, *, ragged_boxes: bool = False
) -> Plan:
    """The plan of a call; nothing in it waits for the device.

    Args:
        blocks: which key blocks each query block computes.
        key_tokens, head_dim, value_dim: sizes of key and value.
        ragged_boxes: as for `common_box`.
    """
    width = 64 if max(head_dim, value_dim) <= 64 else 128
    # Two stages of 128 x 128 keys and values beside the queries fill the shared memory; smaller blocks take four.
    stages = 2 if blocks.key_block * width == 128 * 128 else 4
    lists, whole, boundary = blocks.lists, blocks.whole, blocks.boundary
    exempt = flags = key_ok = None
    box = common_box(blocks, ragged=ragged_boxes)
    if box is not None and _ragged(box):
        # The slots of a cut tile are not those of the layout: its padding lies anywhere, not at its end.
        token = tile_tokens(box, lists.device)
        key_ok = (token >= 0)[None, None]
        if blocks.key_mask is not None:
            key_ok = key_ok & blocks.key_mask[:, None, token.clamp(min=0)]
        flags = key_ok.to(torch.int8)
    elif blocks.key_mask is not None:
        key_ok = blocks.real_keys(key_tokens)
    if key_ok is not None and blocks.key_mask is not None:
        from .portable import demote_masked

        lists, whole, boundary, exempt = demote_masked(blocks, key_ok)
        boundary = boundary.contiguous()
        flags = key_ok.to(torch.int8)
    if blocks.always is not None:
        real = blocks.real_keys(key_tokens) if key_ok is None else key_ok
        flags = real.to(torch.int8) | (blocks.always.to(torch.int8) << 1)
    return Plan(lists, whole, boundary, exempt if blocks.coordinates else None,
                None if flags is None else flags.contiguous(), key_ok, box, width, stages)


def runs_persistent(blocks: Blocks, plan: Plan) -> bool:
    """Whether persistent programs are possible: in the other variants their counters would spill registers."""
    return plan.box is None and blocks.query_index is None and not blocks.coordinates


def prefers_persistent(blocks: Blocks, plan: Plan) -> bool:
    """Whether persistent programs are expected to be faster than one program per tile, where they are possible.

    The density lies on the device, so that one rule serves all densities. H200, bf16, 32,768 tokens, 12 heads of 128,
    November 2026, TFLOP/s of one program per tile -> persistent, taking turns: density 1: 645 -> 653, .5: 627 -> 637,
    .25: 611 -> 618, .1: 570 -> 582; heads of uneven density 625 -> 626, of even density and equal work 603 -> 612. 24
    heads of 64: density 1: 457 -> 473, .25: 425 -> 449. 64-key blocks lose: 573 -> 558, 547 -> 542.
    """
    return blocks.key_block == 128


def prefers_cuda(blocks: Blocks, width: int, *, ragged_boxes: bool = False) -> bool:
    """Whether the kernel in CUDA C++ is expected to be faster than the one in Gluon, where it can run.

    It is wherever it was measured: H200, bf16, 32,768 tokens, random lists, November 2026, TFLOP/s Gluon -> CUDA C++,
    taking turns. 12 heads of 128 in raster order, density 1: 636 -> 647, .25: 597 -> 613, .1: 596 -> 631 and 633 -> 634
    in two runs; permuted 617 -> 631, 587 -> 609, 535 -> 568; 64-key blocks 560 -> 637, 550 -> 669, 564 -> 640, permuted
    at .25 and .1: 514 -> 575, 485 -> 551. 24 heads of 64, density 1, .5, .25: 457 -> 471, 450 -> 468, 440 -> 460;
    permuted 438 -> 466, 432 -> 460, 412 -> 445. Grids that no tile divides, in the order of tiles, density .25 and .1:
    21x45x80 620 -> 701, 648 -> 674; 21x30x52 644 -> 669, 529 -> 562.

    Args:
        blocks: the lists and layouts.
        width: the larger head dim, of the queries or of the values. 64-key blocks were not timed up to 64.
        ragged_boxes: as for `common_box`; tiles that it lets one copy as boxes are left to Gluon.
    """
    timed = blocks.key_block == QUERY_BLOCK or width > 64
    return timed and not (ragged_boxes and common_box(blocks, ragged=True) is not None)


def common_box(blocks: Blocks, *, ragged: bool = False) -> tuple[int, ...] | None:
    """The box of the layouts when queries and keys are to be copied as tiles of the grid, else None.

    A tile must fill its block, with powers of two along each axis, and divide the grid. Tiles that the grid cuts are
    faster through the index, keys and values put in order once. H200, bf16, 12 heads of 128, November 2026, TFLOP/s
    over real tokens at density 1, .25, .1: 21x45x80 in tiles of 2x8x8, boxes 477, 465, 457, index 539, 518, 493;
    21x30x52 in tiles of 4x8x4, boxes 396, 391, 368, index 440, 428, 400. Where tiles divide the grid, 20x48x80 in
    4x4x8, boxes 653 and 630, 621, 591, index 631 and 673, 622 and 638, 565 and 597 in two runs: equal within the noise,
    and boxes need no copy.

    Args:
        blocks: the lists and layouts.
        ragged: allow tiles that the grid cuts too, which saves the memory of the copy. The slots of a cut block are not
            those of the layout, so that a window, whose coordinates are in slot order, needs the layout's own order.
    """
    box = blocks.query_box
    if not box or blocks.key_box != box or (blocks.query_block, blocks.key_block) != (QUERY_BLOCK, QUERY_BLOCK):
        return None
    fits = math.prod(box[3:6]) == QUERY_BLOCK and all(n & (n - 1) == 0 for n in box[3:6])
    return box if fits and (not _ragged(box) or (ragged and not blocks.coordinates)) else None


@functools.lru_cache(maxsize=16)
def tile_tokens(box: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 (slots,): token at each slot of tiles that are copied as boxes, then of the text blocks; -1 for padding."""
    *grid, video_start, text_start, text = box
    sizes, tile = grid[:3], grid[3:]
    places = [torch.arange(n * t, device=device).reshape(n, t) for n, t in zip(_tile_counts(box), tile, strict=True)]
    # (tiles along t, y, x, then frames, rows, columns of a tile)
    t, y, x = (places[c].reshape([-1 if axis == c else 1 for axis in range(3)] + [tile[c] if axis == c else 1
                                                                                  for axis in range(3)])
               for c in range(3))
    inside = (t < sizes[0]) & (y < sizes[1]) & (x < sizes[2])
    video = torch.where(inside, video_start + (t * sizes[1] + y) * sizes[2] + x, -1).flatten()
    slot = torch.arange(-(-text // QUERY_BLOCK) * QUERY_BLOCK, device=device)
    return torch.cat((video, torch.where(slot < text, text_start + slot, -1)))


def _tile_counts(box: tuple[int, ...]) -> list[int]:
    """Tiles along frames, rows and columns."""
    return [-(-n // t) for n, t in zip(box[:3], box[3:6], strict=True)]


def half_of(tile: Sequence[int]) -> tuple[int, ...]:
    """The tile of 64 queries: a tile of 128 cut across its first axis longer than 1, so that slots stay in order."""
    axis = min(i for i in range(3) if tile[i] > 1)
    return tuple(n // 2 if i == axis else n for i, n in enumerate(tile))


def _ragged(box: tuple[int, ...]) -> bool:
    return any(n % t for n, t in zip(box[:3], box[3:6], strict=True))


def bulk_readable(x: Tensor) -> Tensor:
    """x (B, L, H, D) itself when the GPU's bulk copies can read it, else a contiguous copy.

    They need 16-byte aligned memory and steps, a contiguous last dimension and no step of 0 (expanded tensors).
    """
    steps = (stride * x.element_size() for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1)
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def bulk_strides(x: Tensor) -> list[int]:
    """Strides of x (B, L, H, D) in the order (B, H, L, D), for a descriptor."""
    # The stride of a dimension of size 1 is never used, but must be a multiple of 16 bytes.
    b, n, h = (stride if size > 1 else 16 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))
    return [b, h, n, 1]
