"""SVG2: k-means, the top-p rule by hand, the block mask against the map of cluster pairs, densities, centroids kept."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dit_sparse.clustering import (
    Clusters,
    block_scores,
    block_shares,
    counts_in_blocks,
    kmeans,
    pair_shares,
    seeds,
    touches,
)
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.kernels.attention import block_sparse_attention
from dit_sparse.kernels.reference import attention_reference
from dit_sparse.memory import Memory, State
from dit_sparse.methods import build
from dit_sparse.methods.base import Call
from dit_sparse.methods.svg2 import SVG2, cluster_counts
from dit_sparse.selection import select_top_p

GRIDS = [
    TokenGrid(5, 7, 9),
    TokenGrid(3, 9, 11, text=40, text_at="front"),
    TokenGrid(1, 20, 23, text=5, text_at="back"),
    TokenGrid(1, 1, 1, text=3, text_at="front"),
]


# -- k-means -------------------------------------------------------------------------------------------------------


def _twin_kmeans(x: torch.Tensor, centroids: torch.Tensor, iterations: int) -> tuple[torch.Tensor, ...]:
    """One head, token by token: nearest centroid, mean of the members, an empty cluster as it was."""
    centroids = centroids.clone()
    for _ in range(iterations):
        labels = torch.stack([(token - centroids).square().sum(-1).argmin() for token in x])
        for c in range(len(centroids)):
            if (labels == c).any():
                centroids[c] = x[labels == c].mean(0)
    return centroids, labels, torch.bincount(labels, minlength=len(centroids))


def test_kmeans_is_lloyds_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", 1024)  # several chunks of tokens
    x = torch.randn(2, 113, 3, 8)
    start = seeds(x, 7)
    found = kmeans(x, start, 4)
    for b in range(2):
        for h in range(3):
            centroids, labels, sizes = _twin_kmeans(x[b, :, h], start[b, h], 4)
            assert torch.equal(found.labels[b, h], labels) and torch.equal(found.sizes[b, h], sizes.float())
            torch.testing.assert_close(found.centroids[b, h], centroids, atol=1e-5, rtol=1e-5)
    assert (found.sizes.sum(-1) == 113).all()


def test_inertia_never_increases() -> None:
    x = torch.randn(1, 400, 2, 16)
    centroids, before = seeds(x, 20), math.inf
    for _ in range(8):
        found = kmeans(x, centroids, 1)
        near = centroids.gather(2, found.labels[..., None].expand(-1, -1, -1, 16))
        inertia = float((x.transpose(1, 2) - near).square().sum())
        assert inertia <= before * (1 + 1e-6)
        centroids, before = found.centroids, inertia


def test_blobs_are_recovered() -> None:
    """Eight far blobs, a seed in each: every cluster is a blob."""
    centre = 20 * torch.eye(8, 16)
    blob = torch.arange(8).repeat(25)
    x = (centre[blob] + 0.1 * torch.randn(200, 16))[None, :, None].expand(1, 200, 2, 16)
    found = kmeans(x, x[:, :8].transpose(1, 2), 3)
    assert torch.equal(found.labels, blob.expand(1, 2, -1)) and (found.sizes == 25).all()
    torch.testing.assert_close(found.centroids[0, 0], centre, atol=0.2, rtol=0)


def test_empty_clusters_and_masked_tokens() -> None:
    """A cluster without tokens keeps its centroid; masked tokens, NaN here, count nowhere."""
    x = torch.randn(1, 63, 1, 4)
    start = torch.cat((seeds(x, 3), torch.full((1, 1, 1, 4), 1e3)), dim=2)
    found = kmeans(x, start, 3)
    assert found.sizes[0, 0, 3] == 0 and torch.equal(found.centroids[0, 0, 3], start[0, 0, 3])
    mask = torch.rand(1, 63) < 0.7
    spoilt = x.masked_fill(~mask[..., None, None], torch.nan)
    masked = kmeans(spoilt, seeds(spoilt, 5, mask=mask), 3, mask=mask)
    plain = kmeans(x[:, mask[0]], seeds(spoilt, 5, mask=mask), 3)
    assert masked.sizes.sum() == mask.sum() and torch.equal(masked.labels[..., mask[0]], plain.labels)
    torch.testing.assert_close(masked.centroids, plain.centroids)
    assert seeds(x, 99).shape[2] == 63, "no more clusters than tokens"
    for dtype in (torch.float16, torch.bfloat16):
        half = kmeans(x.to(dtype), start, 2)
        assert half.centroids.dtype == torch.float32 and half.sizes.sum() == 63 and half.sizes[0, 0, 3] == 0


def test_seeds_are_tokens_and_follow_the_generator() -> None:
    x = torch.arange(50.0)[None, :, None, None].expand(1, 50, 2, 1)
    drawn = [seeds(x, 10, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert len(set(drawn[0][0, 0, :, 0].tolist())) == 10


# -- the map of cluster pairs --------------------------------------------------------------------------------------


def test_top_p_by_hand() -> None:
    """Sizes 10, 20, 30, 40 and logits 2, 1, 0, -1."""
    query = Clusters(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    logits = torch.tensor([2.0, 1, 0, -1])
    key = Clusters(logits[None, None, :, None], torch.zeros(1, 1, 1), torch.tensor([[[10.0, 20, 30, 40]]]))
    shares = pair_shares(query, key, 1.0)
    torch.testing.assert_close(shares[0, 0, 0], torch.tensor([0.4272, 0.3143, 0.1734, 0.0851]), atol=1e-4, rtol=0)
    counts = [int(select_top_p(shares, p).sum()) for p in (0.9, 0.7, 0.4, 1.0)]
    assert counts == [3, 2, 1, 4]
    assert int(select_top_p(shares, 0.4, least=int(0.5 * 4)).sum()) == 2


def _clusters(method: SVG2, call: Call) -> list[Clusters]:
    """The clusters that a plan of the call uses, made by hand from the same seeds."""
    call.generator.manual_seed(0)
    video = call.grid.video_slice
    sizes = (x.block_size for x in method.layouts(call.grid))
    counts = cluster_counts(call.grid.video, *sizes)
    counts = method.query_clusters or counts[0], method.key_clusters or counts[1]
    real = None if call.key_mask is None else call.key_mask[:, video]
    return [kmeans(x[:, video], seeds(x[:, video], n, generator=call.generator, mask=m), method.iter_init, mask=m)
            for x, n, m in ((call.query, counts[0], None), (call.key, counts[1], real))]


def _token_map(call: Call, query: Clusters, key: Clusters, top_p: float, min_kc: float) -> torch.Tensor:
    """bool (B, H, video, video): map[labelQ, labelK], the map written row by row."""
    rows = []
    for b, h in torch.cartesian_prod(torch.arange(call.query.shape[0]), torch.arange(call.query.shape[2])).tolist():
        sizes = key.sizes[b, h]
        logits = query.centroids[b, h] @ key.centroids[b, h].T * call.scale
        weights = sizes * logits.exp()
        shares = weights / weights.sum(-1, keepdim=True)
        keep = torch.zeros_like(shares, dtype=torch.bool)
        for i, row in enumerate(shares):
            before = 0.0
            for place, j in enumerate(row.sort(descending=True, stable=True).indices.tolist()):
                keep[i, j] = before <= top_p or place < int(min_kc * len(row)) or place == 0
                before += float(row[j])
        rows.append(keep[query.labels[b, h]][:, key.labels[b, h]])
    return torch.stack(rows).unflatten(0, (call.query.shape[0], call.query.shape[2]))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("top_p, min_kc", [(0.5, 0.0), (0.2, 0.4)])
def test_every_kept_pair_is_in_the_block_mask(grid: TokenGrid, top_p: float, min_kc: float, make_call) -> None:
    """A block pair is kept exactly when a token pair that the map keeps lies in it; text is kept."""
    call = make_call(grid, batch=2, heads=3)
    method = SVG2(top_p=top_p, min_kc_ratio=min_kc, query_clusters=6, key_clusters=11, iter_init=3, block_size=32)
    call.generator.manual_seed(0)
    mask = method.plan(call).mask
    query, key = _clusters(method, call)
    want = _token_map(call, query, key, top_p, min_kc)
    got = mask.token_mask()
    video = got[..., grid.video_slice, grid.video_slice]
    assert (video | ~want).all(), "a pair that the map keeps is missing"
    assert got[..., grid.text_slice, :].all() and got[..., grid.text_slice].all()
    # and nothing else: each kept block pair of the video holds a kept pair
    tokens = torch.ones(2, 3, grid.tokens, grid.tokens, dtype=torch.bool)
    tokens[..., grid.video_slice, grid.video_slice] = want
    blocks = torch.zeros_like(mask.to_dense(), dtype=torch.int32)
    rows, columns = (x.block_of_token for x in (mask.query, mask.key))
    for b in range(2):
        for h in range(3):
            at = rows[b, h, :, None].expand_as(tokens[b, h]), columns[b, h].expand_as(tokens[b, h])
            blocks[b, h].index_put_(at, tokens[b, h].int(), accumulate=True)
    assert torch.equal(mask.to_dense(), blocks > 0)


def test_touched_pairs_take_the_best_score() -> None:
    """Block by block, with empty clusters."""
    labels = [torch.randint(0, n, (2, 2, 45)).sort(-1).values for n in (4, 9)]
    pairs = torch.rand(2, 2, 5, 10)  # clusters 4 and 9 are empty
    got = block_scores(pairs, touches(labels[0], 5, 8), touches(labels[1], 10, 4), 6, 12)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        rows, columns = labels[0][b, h, 8 * i : 8 * i + 8], labels[1][b, h, 4 * j : 4 * j + 4]
        assert got[b, h, i, j] == pairs[b, h][rows][:, columns].max()


def test_a_pair_of_blocks_is_expected_to_hold_what_its_pairs_of_tokens_hold() -> None:
    """Token by token, with an empty cluster and short last blocks: every key of a cluster gets as much."""
    labels = [torch.randint(0, n, (2, 2, 45)).sort(-1).values for n in (4, 9)]
    shares = torch.rand(2, 2, 5, 10)
    sizes = torch.nn.functional.one_hot(labels[1], 10).sum(-2).float()
    got = block_shares(shares, sizes, counts_in_blocks(labels[0], 5, 8), counts_in_blocks(labels[1], 10, 4))
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, got.shape)).tolist():
        rows, columns = labels[0][b, h, 8 * i : 8 * i + 8], labels[1][b, h, 4 * j : 4 * j + 4]
        want = (shares[b, h][rows][:, columns] / sizes[b, h, columns]).sum()
        torch.testing.assert_close(got[b, h, i, j], want)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_of_top_p_is_dense(grid: TokenGrid, make_call) -> None:
    call = make_call(grid, batch=2, head_dim=16)
    mask = SVG2(top_p=1.0, block_size=32, iter_init=2).plan(call).mask
    assert mask.token_mask().all()
    out, _ = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale)
    torch.testing.assert_close(out, attention_reference(call.query, call.key, call.value, scale=call.scale)[0],
                               atol=1e-5, rtol=1e-5)


def test_sorting_and_back_is_the_identity(make_call) -> None:
    grid = TokenGrid(3, 9, 11, text=40, text_at="front")
    mask = SVG2(block_size=32, iter_init=2).plan(make_call(grid)).mask
    for side in (mask.query, mask.key):
        token = side.token_of_slot
        back = token.gather(-1, side.slot_of_token)
        assert torch.equal(back, torch.arange(grid.tokens).expand_as(back))
        assert torch.equal((token >= 0), side.real.expand_as(token))


def test_masked_keys(make_call) -> None:
    """Keys that are no tokens may be NaN: the map is that of the others."""
    grid = TokenGrid(3, 9, 11, text=9, text_at="back")
    call = make_call(grid, batch=2, head_dim=16)
    key_mask = torch.rand(2, grid.tokens) < 0.8
    call.key[~key_mask], call.value[~key_mask] = torch.nan, torch.nan
    call = dataclasses.replace(call, key_mask=key_mask)
    method = SVG2(top_p=0.4, query_clusters=5, key_clusters=8, iter_init=3, block_size=32)
    call.generator.manual_seed(0)
    plan = method.plan(call)
    want = _token_map(call, *_clusters(method, call), 0.4, 0.1) & key_mask[:, None, None, grid.video_slice]
    got = plan.mask.token_mask()
    assert (got[..., grid.video_slice, grid.video_slice] | ~want).all()
    out, _ = block_sparse_attention(call.query, call.key, call.value, plan.mask, scale=call.scale, key_mask=key_mask)
    assert out.isfinite().all()


# -- over the steps ------------------------------------------------------------------------------------------------


def test_centroids_go_from_step_to_step(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    """iter_init iterations from random tokens, then iter_step from the last centroids; layers and branches apart."""
    seen = []

    def counting(x: torch.Tensor, start: torch.Tensor, iterations: int, **options: object) -> Clusters:
        seen.append((iterations, start))
        return kmeans(x, start, iterations, **options)

    monkeypatch.setattr("dit_sparse.methods.svg2.kmeans", counting)
    grid, memory = TokenGrid(3, 9, 11), Memory()
    method = SVG2(iter_init=4, iter_step=1, block_size=32)

    def plan(step: int, branch: str = "cond", *, dense: bool = False) -> None:
        state = State(memory, (0, branch), step=step, shape=grid)
        call = dataclasses.replace(make_call(grid), step=step, branch=branch, state=state)
        method.observe(call, call.query, None) if dense else method.plan(call)

    plan(3, dense=True)
    assert not seen, "dense steps are left alone"
    plan(5)
    first = memory.get(("state", "centroids", (0, "cond")), step=6, max_age=2, shape=grid)
    plan(6)
    plan(6, "uncond")
    assert [n for n, _ in seen] == [4, 4, 1, 1, 4, 4]
    assert all(torch.equal(start, kept) for (_, start), kept in zip(seen[2:4], first, strict=True))
    method, seen[:] = SVG2(iter_init=4, iter_step=1, dense_init=True, block_size=32), []
    memory.reset()
    plan(3, dense=True)
    plan(5)
    assert [n for n, _ in seen] == [4, 4, 1, 1]


def test_no_step_waits(make_call, no_waiting) -> None:
    """The first call and later ones."""
    grid = TokenGrid(5, 6, 11, text=40, text_at="front")
    for options in ({}, {"density": 0.3}):
        method = SVG2(iter_init=3, **options)
        call = make_call(grid, batch=2, key_mask=torch.rand(2, grid.tokens) < 0.8)
        method.layouts_of(call)
        with no_waiting():
            for _ in range(2):
                method.plan(call).mask.density()


def test_few_heads_at_a_time_give_the_same(make_call, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make_call(TokenGrid(4, 8, 8, text=20, text_at="back"), batch=2, heads=3)
    masks = []
    for numbers in (2**26, 4000):
        monkeypatch.setattr("dit_sparse.scoring._NUMBERS_AT_ONCE", numbers)
        call.generator.manual_seed(0)
        masks.append(SVG2(top_p=0.5, iter_init=2, block_size=32).plan(dataclasses.replace(call, state=State())).mask)
    assert torch.equal(masks[0].token_mask(), masks[1].token_mask())


# -- numbers of clusters, densities, options -----------------------------------------------------------------------


def test_numbers_of_clusters() -> None:
    assert cluster_counts(75_600, 128, 64) == (100, 500)
    assert cluster_counts(17_408, 128, 64) == (48, 136)
    assert cluster_counts(2304, 64, 32) == (17, 36)
    assert cluster_counts(1, 32, 16) == (1, 1)


@pytest.mark.parametrize(
    "grid", [TokenGrid(9, 16, 16), TokenGrid(1, 64, 64), TokenGrid(5, 20, 30, text=226, text_at="front")], ids=str
)
def test_density_is_near_the_asked_one(grid: TokenGrid) -> None:
    text = 1 - (grid.video / grid.tokens) ** 2
    for density in (0.15, 0.5):
        got = SVG2(iter_init=5).at_density(density).plan(planted_call(grid, heads=2)).mask.head_density()
        assert (got - max(density, text + (1 - text) * density / 2)).abs().max() <= 0.03


def test_clusters_find_what_heads_look_at() -> None:
    """At a quarter of the pairs: heads that look at their frame keep their mass, at their place most of it."""
    call = planted_call(TokenGrid(9, 16, 16), heads=2)
    mask = SVG2(density=0.25).plan(call).mask
    _, kept = block_sparse_attention(call.query, call.key, call.value, mask, scale=call.scale)
    _, every = attention_reference(call.query, call.key, call.value, scale=call.scale)
    recall = (kept - every).exp().mean((0, 2))
    assert (recall > torch.tensor([0.95, 0.6])).all(), recall


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_p": 0}, "top_p=0"),
        ({"min_kc_ratio": 1.5}, "min_kc_ratio=1.5"),
        ({"density": 2}, "density=2"),
        ({"query_clusters": 0}, "query_clusters=0"),
        ({"key_clusters": 1.5}, "key_clusters=1.5"),
        ({"iter_init": 0}, "iter_init=0"),
        ({"iter_step": None}, "iter_step=None"),
        ({"dense_init": 1}, "True or False"),
        ({"block_size": 48}, "block_size=48"),
        ({"key_block_size": 8}, "key_block_size=8"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        build("svg2", **options)
    assert "\n" not in str(caught.value)
