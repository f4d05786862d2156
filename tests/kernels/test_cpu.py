"""The CPU path: against the twins, and its cutting into pieces."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels import cpu
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.blocks import Blocks
from dit_sparse.kernels.cpu import attend
from dit_sparse.kernels.cpu_plan import plan_pieces, runs
from tests.kernels.cases import Case, build, check

CASES = [
    Case(),
    Case(1023, 1023, head_dim=128, lists="shared"),
    Case(1, 1, lists="shared"),
    Case(1, 63),
    Case(63, 1023, head_dim=96, window=2),
    Case(1023, 113, query_block=32, key_block=128, order="permuted"),
    Case(batch=2, lists="all", order="heads", masked=True),
    Case(batch=2, masked=True, order="permuted", window=3, always=True),
    Case(batch=2, masked=True, lists="shared"),
    Case(strided=True, order="permuted"),
    Case(strided=True, window=1, heads=3, batch=2),
    Case(1023, 1023, order="heads", window=0, dtype=torch.bfloat16),
    Case(dtype=torch.float16, window=2),
    Case(dtype=torch.bfloat16, masked=True),
    Case(value_dim=96, window=1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu_is_as_accurate_as_plain_pytorch(case: Case) -> None:
    inputs = build(case)
    out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, scale=inputs.scale,
                                      key_mask=inputs.key_mask, backend="cpu")
    assert check(inputs, out, lse) == ""


@pytest.mark.parametrize("case", [Case(2000, 2000, lists="shared"), Case(1999, 1999, window=1, lists="shared")],
                         ids=lambda case: case.name)
@pytest.mark.parametrize("pattern", ["band", "frames"])
@pytest.mark.parametrize("together", [True, False], ids=["small-pieces-together", "each-piece-alone"])
def test_neighbours_with_common_keys_are_merged_right(
    case: Case, pattern: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr(cpu, "_SMALL_BYTES", 0)
    inputs = build(case)
    n = inputs.mask.query.blocks
    block = torch.arange(n)
    apart = (block[:, None] - block).abs()
    keep = apart <= 6 if pattern == "band" else (block[:, None] // 8 == block // 8) | (apart < 2)
    mask = BlockMask.from_dense(keep, inputs.mask.query, inputs.mask.key, window=inputs.mask.window)
    inputs = dataclasses.replace(inputs, mask=mask)
    out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, mask, scale=inputs.scale)
    assert check(inputs, out, lse) == ""


def test_fresh_memory_full_of_nan_never_shows() -> None:
    inputs = build(Case(order="permuted", masked=True, strided=True, batch=2))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask, scale=inputs.scale,
                                          key_mask=inputs.key_mask)
    finally:
        torch.use_deterministic_algorithms(False)
    assert check(inputs, out, lse) == ""


def test_permuting_tokens_changes_nothing() -> None:
    query, key, value = (torch.randn(1, 256, 2, 64) for _ in range(3))
    order = torch.randperm(256)
    keep = torch.rand(4, 4) < 0.6
    plain, permuted = BlockLayout.raster(256, 64), BlockLayout.from_order(order, 64)
    inverse = order.argsort()
    there = block_sparse_attention(query, key, value, BlockMask.from_dense(keep, permuted, permuted))
    here = block_sparse_attention(*(x[:, order] for x in (query, key, value)),
                                  BlockMask.from_dense(keep, plain, plain))
    torch.testing.assert_close(there[0], here[0][:, inverse])
    torch.testing.assert_close(there[1], here[1][..., inverse])


def test_repeated_calls_are_bit_equal() -> None:
    inputs = build(Case(window=2, order="permuted"))
    first, *others = (block_sparse_attention(inputs.query, inputs.key, inputs.value, inputs.mask) for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_attend_reports_queries_without_a_key() -> None:
    query, key = torch.randn(1, 2, 4, 16), torch.randn(1, 2, 6, 16)
    allowed = torch.ones(4, 6, dtype=torch.bool)
    allowed[1] = False
    out, lse = attend(query, key, key, 0.25, allowed)
    assert not out[:, :, 1].any() and (lse[..., 1] == -torch.inf).all() and torch.isfinite(lse[..., 0]).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 64), keys=st.integers(1, 40),
       density=st.sampled_from([0.1, 0.5, 0.95]), threads=st.integers(1, 64))
def test_pieces_cover_every_pair_once(seed: int, size: int, keys: int, density: float, threads: int) -> None:
    random = np.random.default_rng(seed)
    column = random.random((1, keys)) < 0.5  # columns that everyone lists, as text or sink blocks are
    keep = (random.random((size, keys)) < density) | column
    tested = (random.random((size, keys)) < 0.3) & ~keep
    query_lengths, key_lengths = random.integers(0, 65, size), random.integers(0, 65, keys)
    pieces = plan_pieces(keep, tested, query_lengths, key_lengths, heads=4, threads=threads)
    times = np.zeros((2, size, keys), dtype=int)
    for piece in pieces:
        times[int(piece.tested), piece.first : piece.last, piece.keys] += 1
    alive = (query_lengths > 0)[:, None] & (key_lengths > 0)
    assert (times[0][alive & keep] == 1).all() and (times[0][alive & ~keep] == 0).all()
    # A tested piece may reach further than the lists: it tests the lists too.
    assert (times[1][alive & tested] == 1).all() and (times[1] <= 1).all()


def test_runs_joins_consecutive_blocks() -> None:
    offsets = np.array([0, 4, 4, 8, 10, 14])
    assert runs(np.array([0, 1, 2, 4]), offsets) == [(0, 8), (10, 14)]
    assert runs(np.array([3]), offsets) == [(8, 10)]


def test_heads_that_share_lists_are_computed_together() -> None:
    inputs = build(Case(heads=4))
    lists = inputs.mask.lists
    same = dataclasses.replace(inputs.mask, lists=lists[:, [0, 1, 0, 2]], whole=inputs.mask.whole[:, [0, 1, 0, 2]],
                               boundary=inputs.mask.boundary[:, [0, 1, 0, 2]])
    groups = [heads for _, heads, *_ in cpu._groups(Blocks.from_mask(same), 1, 4)]
    assert [g.tolist() if isinstance(g, torch.Tensor) else list(range(g.start, g.stop)) for g in groups] == \
        [[0, 2], [1], [3]]
    inputs = dataclasses.replace(inputs, mask=same)
    out, lse = block_sparse_attention(inputs.query, inputs.key, inputs.value, same, scale=inputs.scale)
    assert check(inputs, out, lse) == ""
