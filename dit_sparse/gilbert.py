"""The generalised Hilbert ("Gilbert") curve: through every cell of a box of any size, nearly always to a neighbour.

Source: J. Cerveny, gilbert, https://github.com/jakubcerveny/gilbert (BSD 2-Clause). On boxes of even sizes every step
goes to a neighbour; where a size is odd a few steps are longer.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .grid import TokenGrid

Vector = tuple[int, int, int]


def _plus(*vectors: Vector) -> Vector:
    x, y, z = (sum(parts) for parts in zip(*vectors, strict=True))
    return x, y, z


def _minus(vector: Vector, other: Vector = (0, 0, 0)) -> Vector:
    return vector[0] - other[0], vector[1] - other[1], vector[2] - other[2]


def _negative(vector: Vector) -> Vector:
    return -vector[0], -vector[1], -vector[2]


def _unit(vector: Vector) -> Vector:
    x, y, z = ((n > 0) - (n < 0) for n in vector)
    return x, y, z


def _size(vector: Vector) -> int:
    return abs(sum(vector))  # along one axis only


def _half(vector: Vector) -> Vector:
    """Half of a side, made even where that is possible."""
    half: Vector = (vector[0] // 2, vector[1] // 2, vector[2] // 2)
    return _plus(half, _unit(vector)) if _size(half) % 2 and _size(vector) > 2 else half


def _parts(at: Vector, a: Vector, b: Vector, c: Vector) -> list[tuple[Vector, Vector, Vector, Vector]]:
    """The boxes that a box is cut into, in the order in which the curve runs through them.

    Args:
        at: the corner where the curve begins.
        a, b, c: the sides; the curve ends at the other end of `a`.
    """
    w, h, d = _size(a), _size(b), _size(c)
    a2, b2, c2 = _half(a), _half(b), _half(c)
    far_a, last_b, last_c = _minus(a, _unit(a)), _minus(b2, _unit(b)), _minus(c2, _unit(c))
    rest_a, rest_b, rest_c = _minus(a, a2), _minus(b, b2), _minus(c, c2)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # wide
        return [(at, a2, b, c), (_plus(at, a2), rest_a, b, c)]
    if 3 * h > 4 * d:  # flat: c is not cut
        return [(at, b2, c, a2), (_plus(at, b2), a, rest_b, c),
                (_plus(at, far_a, last_b), _negative(b2), c, _negative(rest_a))]
    if 3 * d > 4 * h:  # b is not cut
        return [(at, c2, a2, b), (_plus(at, c2), a, b, rest_c),
                (_plus(at, far_a, last_c), _negative(c2), _negative(rest_a), b)]
    end_c = _minus(c, _unit(c))
    return [(at, b2, c2, a2), (_plus(at, b2), c, a2, rest_b),
            (_plus(at, last_b, end_c), a, _negative(b2), _negative(rest_c)),
            (_plus(at, far_a, b2, end_c), _negative(c), _negative(rest_a), rest_b),
            (_plus(at, far_a, last_b), _negative(b2), c2, _negative(rest_a))]


@lru_cache(maxsize=8)
def gilbert(grid: TokenGrid) -> Tensor:
    """The video tokens along the curve, on the CPU; the longest axis first, of equal ones the width, then the height.

    Returns:
        int64 (video,). One step in Python for every straight run of the curve: about a second for 75,600 tokens.
    """
    width, height, frames = (grid.width, 0, 0), (0, grid.height, 0), (0, 0, grid.frames)
    if grid.width >= max(grid.height, grid.frames):
        sides = width, height, frames
    elif grid.height >= max(grid.width, grid.frames):
        sides = height, width, frames
    else:
        sides = frames, width, height
    stride = (1, grid.width, grid.frame_tokens)
    tokens: list[int] = []
    todo: list[tuple[Vector, Vector, Vector, Vector]] = [((0, 0, 0), *sides)]
    while todo:
        at, *box = todo.pop()
        if not all(map(_size, box)):
            continue  # half of a side of 1
        long = [side for side in box if _size(side) > 1]
        if len(long) > 1:
            todo.extend(reversed(_parts(at, *box)))
            continue
        start = sum(n * s for n, s in zip(at, stride, strict=True))
        run = long[0] if long else box[0]
        step = sum(n * s for n, s in zip(_unit(run), stride, strict=True))
        tokens.extend(range(start, start + step * _size(run), step))
    return torch.tensor(tokens)


def neighbour_blocks(grid: TokenGrid, order: Tensor, block_size: int) -> Tensor:
    """Pairs of blocks that hold two cells next to each other, corners included, or the same cell.

    Args:
        grid: the tokens; text takes no part.
        order: int64 (video,).
        block_size: tokens of a block.

    Returns:
        bool (video blocks, video blocks), symmetric.
    """
    block = torch.empty(grid.video, dtype=torch.int64)
    block[order] = torch.arange(grid.video) // block_size
    block = block.reshape(grid.sizes)
    blocks = -(-grid.video // block_size)
    found = torch.eye(blocks, dtype=torch.bool).flatten()
    # Half of the 26 directions: the others are the same pairs the other way round.
    for t, y, x in [(0, 0, 1)] + [(0, 1, x) for x in (-1, 0, 1)] + [(1, y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
        here, there = block, block
        for dim, step in enumerate((t, y, x)):
            n = max(0, block.shape[dim] - abs(step))
            here = here.narrow(dim, 0 if step >= 0 else min(1, block.shape[dim]), n)
            there = there.narrow(dim, min(1, block.shape[dim]) if step > 0 else 0, n)
        found[(here * blocks + there).flatten()] = True
    near = found.reshape(blocks, blocks)
    return near | near.T
