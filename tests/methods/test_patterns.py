"""Shared parts of static masks."""

import math

import pytest
import torch

from dit_sparse.blockmask import BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.order import layout, token_major
from dit_sparse.patterns import build_mask, choose_block_size, half_band, interval_blocks, pick, static_mask


def test_block_sizes() -> None:
    assert [choose_block_size(n) for n in (1, 2047, 2048, 8191, 8192, 75600)] == [32, 32, 64, 64, 128, 128]
    assert choose_block_size(75600, 32) == 32


def test_interval_blocks() -> None:
    got = interval_blocks(torch.tensor([0, 5, 7, -9, 4]), torch.tensor([3, 8, 7, 100, 3]), 3, 4)
    assert got.tolist() == [
        [True, False, False],
        [False, True, True],
        [False, True, False],
        [True] * 3,
        [False] * 3,
    ]


def test_half_band() -> None:
    grid = TokenGrid(10, 10, 10)
    assert half_band(0.19, grid, 0.0) == pytest.approx(0.1)
    assert half_band(1.0, grid, 0.1) == 1.0 and half_band(1.0, grid, 1.0) == 1.0
    # the sink pays for itself, down to half of the density
    assert 1 - (1 - half_band(0.4, grid, 0.1)) ** 2 == pytest.approx(1 / 3)
    assert 1 - (1 - half_band(0.12, grid, 0.1)) ** 2 == pytest.approx(0.06)
    texts = TokenGrid(10, 10, 10, text=100, text_at="back")
    kept = 1 - (1 - half_band(0.4, texts, 0.0)) ** 2
    assert kept * 1000**2 + 1100**2 - 1000**2 == pytest.approx(0.4 * 1100**2)


def _two_heads(grid: TokenGrid) -> BlockMask:
    orders = torch.stack((torch.arange(grid.video), token_major(grid)))[None]
    blocks = layout(grid, orders, 16)
    keep = torch.ones(1, 2, blocks.blocks, blocks.blocks, dtype=torch.bool).tril()
    keep[0, 1] = keep[0, 1].T.clone()
    return build_mask(keep, blocks, blocks)


def test_pick_gives_every_head_its_own(no_waiting) -> None:
    grid = TokenGrid(3, 5, 7, text=9, text_at="front")
    mask = _two_heads(grid)
    choice = torch.tensor([[1, 0, 1], [0, 0, 1]])
    densities = mask.head_density()[0]
    with no_waiting():
        picked = pick(mask, choice)
        picked.density()
    want = mask.token_mask()[0][choice]
    assert torch.equal(picked.token_mask(), want)
    assert torch.equal(picked.head_density(), densities[choice])
    assert picked.query is picked.key


def test_static_masks_are_built_once_and_counted(make_call) -> None:
    grid = TokenGrid(3, 5, 7)
    call = make_call(grid)
    built = []

    def build() -> BlockMask:
        built.append(1)
        return _two_heads(grid)

    first, second = (static_mask(call, "name", build) for _ in range(2))
    assert first is second and len(built) == 1 and "pairs" in first.__dict__
    assert math.isclose(float(first.density()), float(first.token_mask().double().mean()), rel_tol=1e-6)
