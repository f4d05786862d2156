"""Neighbourhood attention: windows, densities, exactness, sliding tiles, and the simulator."""

import itertools
import math
import random

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.gna import GNA, axis_window, default_tile, fit_tiles, tile_axis
from dit_sparse.tilecount import simulate_gna
from tests.gpu.gna_checks import against_flex

HUNYUAN = TokenGrid(30, 48, 80)


def allowed(
    q: int, k: int, size: int, window: int, stride: int, dilation: int = 1, causal: bool = False
) -> bool:
    """The paper's rule along one axis, for one pair."""
    if q % dilation != k % dilation:
        return False
    length = math.ceil((size - q % dilation) / dilation)
    q, k = q // dilation, k // dilation
    if causal:
        leader = min(q // stride * stride + stride - 1, length - 1)
        return k <= q and leader - k < window
    left, right = window // 2, window // 2 + window % 2 - 1
    centre = min(max(min(q // stride * stride + stride // 2, length - 1), left), length - 1 - right)
    return centre - left <= k <= centre + right


def axis_mask(*rule) -> torch.Tensor:
    return torch.tensor([[allowed(q, k, *rule) for k in range(rule[0])] for q in range(rule[0])])


@pytest.mark.parametrize(
    "size, window, stride, starts",
    [
        (10, 5, 1, [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]),
        (10, 4, 2, [0, 0, 1, 1, 3, 3, 5, 5, 6, 6]),
        (12, 6, 6, [0] * 6 + [6] * 6),
        (30, 18, 16, [0] * 16 + [12] * 14),
        (48, 24, 8, [s for s in (0, 0, 8, 16, 24, 24) for _ in range(8)]),
    ],
)
def test_golden_windows(size, window, stride, starts) -> None:
    place, low, high = axis_window(size, window, stride)
    assert place.tolist() == list(range(size))
    assert low.tolist() == starts and (high - low + 1 == window).all()


def test_axis_rule_equals_the_formula() -> None:
    rng = random.Random(0)
    for _ in range(150):
        size, dilation = rng.randint(1, 20), rng.choice([1, 1, 2, 3])
        if dilation > size:
            continue
        window = rng.randint(1, size // dilation)
        rule = size, window, rng.randint(1, window), dilation, rng.random() < 0.4
        place, low, high = axis_window(*rule)
        assert torch.equal((low[:, None] <= place) & (place <= high[:, None]), axis_mask(*rule)), rule


def test_blocked_attention_and_dilation_and_causal() -> None:
    assert torch.equal(axis_mask(12, 4, 4), torch.block_diag(*[torch.ones(4, 4)] * 3).bool())
    place, low, high = axis_window(16, 4, 1, 2)
    seen = [[k for k in range(16) if low[q] <= place[k] <= high[q]] for q in range(16)]
    assert all(len(s) == 4 and {k % 2 for k in s} == {q % 2} for q, s in enumerate(seen))
    place, low, high = axis_window(9, 5, 1, 1, True)
    assert low[0] == high[0] == 0, "the first causal query sees itself only"


@pytest.mark.parametrize(
    "grid, window, stride, density",
    [
        (HUNYUAN, (18, 24, 24), (16, 8, 8), 0.09),
        (HUNYUAN, (30, 40, 40), (1, 32, 8), 0.41667),
        (TokenGrid(16, 44, 80), (16, 32, 48), (1, 8, 16), 0.43636),
        (TokenGrid(1, 256, 256), (1, 80, 80), (1, 16, 16), 0.09766),
    ],
    ids=["hunyuan-91", "hunyuan-58", "cosmos", "flux"],
)
def test_published_densities(grid, window, stride, density) -> None:
    mask = GNA(window=window, stride=stride).build(grid)
    assert float(mask.density()) == pytest.approx(density, abs=5e-6)
    # every query block sees whole tiles around the window, never less
    assert float(mask.work().float().mean()) / mask.key.blocks >= density - 1e-5


def test_masks_are_exact() -> None:
    """Any rule, tile, text and block size: the token mask is the paper's rule, its pairs counted right."""
    rng = random.Random(1)
    for trial in range(40):
        sizes = tuple(rng.choice([1, 2, 3, 5, 7, 9, 12]) for _ in range(3))
        dilation = tuple(rng.choice([1, 1, 2, 3]) if n > 3 else 1 for n in sizes)
        window = tuple(rng.randint(1, n // d) for n, d in zip(sizes, dilation, strict=True))
        stride = tuple(rng.randint(1, w) for w in window)
        causal = tuple(rng.random() < 0.3 for _ in range(3))
        text = rng.choice([0, 0, 5, 40])
        grid = TokenGrid(*sizes, text=text, text_at=("front" if trial % 2 else "back") if text else "none")
        method = GNA(
            window=window,
            stride=stride,
            dilation=dilation,
            causal=causal,
            tile=tuple(rng.randint(1, 6) for _ in range(3)),
            block_size=rng.choice([16, 32]),
        )
        mask = method.build(grid)
        at = grid.coordinates().long()
        video = torch.ones(grid.video, grid.video, dtype=torch.bool)
        for c, rule in enumerate(zip(sizes, window, stride, dilation, causal, strict=True)):
            video &= axis_mask(*rule)[at[:, c][:, None], at[:, c]]
        want = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        want[grid.video_slice, grid.video_slice] = video
        assert torch.equal(mask.token_mask()[0, 0], want), method
        assert int(mask.pairs) == int(want.sum())
        if not any(causal):
            if dilation == (1, 1, 1):
                assert (video.sum(1) == math.prod(window)).all()


def test_whole_window_is_dense() -> None:
    mask = GNA(window=(3, 5, 7)).build(TokenGrid(3, 5, 7))
    assert mask.token_mask().all() and float(mask.density()) == 1


def test_aligned_windows_need_no_test_of_pairs() -> None:
    mask = GNA(window=(18, 24, 24), stride=(6, 8, 8), tile=(6, 8, 8)).build(HUNYUAN)
    assert int(mask.boundary.sum()) == 0 and float(mask.density()) == pytest.approx(0.09)


# -- sliding tiles --------------------------------


def sliding_tiles(tiles: int, window: int) -> torch.Tensor:
    """The published rule of Sliding Tile Attention along one axis."""
    mask = torch.zeros(tiles, tiles, dtype=torch.bool)
    half = window // 2
    for u in range(tiles):
        centre = min(max(u, half), tiles - 1 - half)
        for v in range(tiles):
            mask[u, v] = abs(centre - v) <= half
    return mask


@pytest.mark.parametrize("size, tile", [(30, 6), (48, 8), (80, 8), (18, 6), (36, 6)])
def test_sliding_tiles_are_neighbourhood_attention(size, tile) -> None:
    tiles = size // tile
    for window in range(1, tiles + 1, 2):
        want = sliding_tiles(tiles, window)
        assert torch.equal(tile_axis(tiles, window), want)
        place, low, high = axis_window(size, window * tile, tile)
        tokens = (low[:, None] <= place) & (place <= high[:, None])
        assert torch.equal(tokens, want.repeat_interleave(tile, 0).repeat_interleave(tile, 1))
    assert tile_axis(tiles, tiles).all() and tile_axis(tiles, tiles + 3).all()


@pytest.mark.parametrize(
    "canvas, window, tiles",
    [
        ((5, 6, 10), (3, 3, 3), 27),
        ((5, 6, 10), (5, 3, 3), 45),
        ((5, 6, 10), (3, 3, 5), 45),
        ((5, 6, 10), (1, 6, 10), 60),
        ((5, 6, 10), (5, 1, 10), 50),
        ((5, 6, 10), (5, 6, 1), 30),
        ((3, 6, 10), (3, 1, 10), 30),
        ((3, 6, 10), (1, 5, 7), 35),
        ((3, 6, 10), (1, 6, 5), 30),
        ((3, 6, 10), (3, 6, 1), 18),
    ],
)
def test_tiles_per_row(canvas, window, tiles) -> None:
    counts = [tile_axis(n, k).sum(1) for n, k in zip(canvas, window, strict=True)]
    rows = {math.prod(c) for c in itertools.product(*(x.tolist() for x in counts))}
    assert rows == {tiles}


def test_density_of_the_published_table() -> None:
    heads = {(5, 3, 3): 20380, (1, 6, 10): 15916, (3, 3, 5): 7396, (5, 1, 10): 5244, (5, 6, 1): 1464}
    kept = sum(n * math.prod(w) for w, n in heads.items()) / (300 * sum(heads.values()))
    assert kept == pytest.approx(0.16607, abs=5e-6)
    mask = GNA(tile_windows=tuple(heads), tile=(6, 8, 8)).build(HUNYUAN)
    for density, window in zip(mask.head_density()[0].tolist(), heads, strict=True):
        assert density == pytest.approx(math.prod(window) / 300)
    assert int(mask.boundary.sum()) == 0


def test_windows_per_head_layer_and_step(make_call) -> None:
    grid = TokenGrid(4, 8, 8)
    a, b = (1, 2, 2), (2, 1, 1)
    one = GNA(tile_windows=a, tile=(2, 4, 4), block_size=32)
    heads = GNA(tile_windows=(a, b), tile=(2, 4, 4), block_size=32)
    layers = GNA(tile_windows=((a, a), (a, b)), tile=(2, 4, 4), block_size=32)
    steps = GNA(tile_windows=(((a, a), (a, a)), ((b, b), (a, b))), tile=(2, 4, 4), block_size=32)
    call = make_call(grid, heads=2)
    want = torch.stack(
        [GNA(tile_windows=w, tile=(2, 4, 4), block_size=32).build(grid).token_mask()[0, 0] for w in (a, b)]
    )
    assert torch.equal(one.plan(call).mask.token_mask().expand(1, 2, -1, -1)[0, 1], want[0])
    assert torch.equal(heads.plan(call).mask.token_mask()[0], want)
    later = make_call(grid, heads=2, layer=1, step=9)
    assert torch.equal(layers.plan(later).mask.token_mask()[0], want)
    assert torch.equal(steps.plan(later).mask.token_mask()[0], want)
    with pytest.raises(ValueError, match="2 heads, the model has 3"):
        heads.plan(make_call(grid, heads=3))
    with pytest.raises(ValueError, match="2 layers, the model has layer 5"):
        layers.plan(make_call(grid, heads=2, layer=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliding_tiles_equal_flexattention(dtype) -> None:
    """An attention that shares no code with ours, told the paper's rule pair by pair; large on a GPU in tests/gpu."""
    assert against_flex((4, 9, 10), (2, 4, 4), (1, 3, 3), 2, 16, dtype, "cpu") == ""


def test_sliding_tiles_on_a_ragged_grid() -> None:
    """45 rows are no multiple of 8: the last tiles are short, and each tile still sees whole tiles."""
    grid = TokenGrid(2, 13, 9, text=3, text_at="front")
    mask = GNA(tile_windows=(1, 3, 1), tile=(2, 4, 4), block_size=32).build(grid)
    at = grid.coordinates().long()
    sees = tile_axis(4, 3)[at[:, 1][:, None] // 4, at[:, 1] // 4] & (at[:, 2][:, None] // 4 == at[:, 2] // 4)
    got = mask.token_mask()[0, 0]
    assert torch.equal(got[3:, 3:], sees) and got[:3].all() and got[:, :3].all()
    assert mask.window is None


# -- choice of window and tile --------------------------------


def test_default_tiles_are_whole_blocks() -> None:
    for sizes in [(21, 45, 80), (30, 48, 80), (1, 64, 64), (13, 30, 45), (17, 32, 32)]:
        assert math.prod(default_tile(TokenGrid(*sizes), 128)) == 128
    assert math.prod(default_tile(TokenGrid(1, 1, 3), 32)) <= 32


def test_fitted_windows_reach_in_time_and_space() -> None:
    window = fit_tiles(TokenGrid(21, 45, 80), (2, 8, 8), 0.25)
    counts = (11, 6, 10)
    assert all(1 < w <= n for w, n in zip(window, counts, strict=True))


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="window 9 with dilation 1 along rows does not fit .* use at most 5"):
        GNA(window=(3, 9, 3)).check(TokenGrid(3, 5, 7))
    with pytest.raises(ValueError, match="window 3 with dilation 3 along columns"):
        GNA(window=(1, 1, 3), dilation=(1, 1, 3)).build(TokenGrid(3, 5, 7))


# -- simulator --------------------------------


@pytest.mark.parametrize(
    "window, stride, query_tile, fixed, moving",
    [
        ((18, 24, 24), (1, 1, 1), (4, 8, 8), 3.27, 5.11),
        ((18, 24, 24), (16, 8, 8), (4, 8, 8), 11.11, 11.11),
        ((18, 24, 24), (1, 1, 1), (2, 8, 8), 3.60, 5.62),
        ((18, 24, 24), (16, 8, 8), (2, 8, 8), 11.11, 11.11),
        ((30, 40, 40), (1, 32, 8), (4, 8, 8), 2.4, 2.4),
    ],
)
def test_simulator_on_hunyuan(window, stride, query_tile, fixed, moving) -> None:
    report = simulate_gna(HUNYUAN, window, stride, query_tile, (2, 8, 8))
    assert report.fixed_speedup == pytest.approx(fixed, abs=0.006)
    assert report.moving_speedup == pytest.approx(moving, abs=0.006)
    assert report.perfect == (stride != (1, 1, 1))


@pytest.mark.parametrize("stride, fixed, moving", [(1, 6.10, 7.11), (16, 10.24, 10.24)])
def test_simulator_on_flux(stride, fixed, moving) -> None:
    report = simulate_gna(TokenGrid(1, 256, 256), (1, 80, 80), (1, stride, stride), (1, 16, 16), (1, 16, 8))
    assert report.fixed_speedup == pytest.approx(fixed, abs=0.006)
    assert report.moving_speedup == pytest.approx(moving, abs=0.006)


def test_simulator_counts_what_the_mask_visits() -> None:
    """The same tiles as blocks: the block lists are as long as the simulator says."""
    grid = TokenGrid(6, 8, 16)
    for dilation, causal in [((1, 1, 1), (False,) * 3), ((1, 2, 1), (True, False, False))]:
        rule = dict(window=(3, 4, 7), stride=(1, 2, 3), dilation=dilation, causal=causal)
        mask = GNA(**rule, tile=(2, 4, 4), block_size=32).build(grid)
        report = simulate_gna(
            grid, rule["window"], rule["stride"], (2, 4, 4), (2, 4, 4), dilation=dilation, causal=causal
        )
        assert (mask.key.blocks, int(mask.work().max())) == (report.key_tiles, report.fixed_most)
        assert float(mask.work().double().mean()) == pytest.approx(report.fixed_mean)
        assert float(mask.density()) == pytest.approx(report.density)
        assert (
            dict(report.rows())["grid"] == "6x8x16"
            and report.to_dict()["fixed_speedup"] == report.fixed_speedup
        )


def test_simulator_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        simulate_gna(TokenGrid(2, 4, 4), (3, 4, 4), (1, 1, 1), (1, 4, 4), (1, 4, 4))
    with pytest.raises(ValueError, match="tile"):
        simulate_gna(TokenGrid(2, 4, 4), (2, 4, 4), (1, 1, 1), (1, 4, 4), (0, 4, 4))
