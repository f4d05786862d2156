"""RainFusion: widths, patterns, recall, the classes of heads, and the narrowest band that is good enough."""

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.methods.rainfusion import RainFusion, bandwidth, checkerboard, class_masks

TEMPORAL, SPATIAL, TEXTURAL = 0, 1, 2


def test_bandwidth() -> None:
    assert bandwidth(0.64) == 0.20 and bandwidth(0.5) == 0.29


@pytest.mark.parametrize("grid", [TokenGrid(8, 32, 64), TokenGrid(21, 45, 80), TokenGrid(9, 46, 47)], ids=str)
@pytest.mark.parametrize("width", [0.20, 0.29, 0.5])
def test_density_of_the_bands(grid, width) -> None:
    mask = class_masks(grid, 128, (width,), None, sink=False)
    for density in mask.head_density()[0].tolist():
        assert density == pytest.approx(1 - (1 - width) ** 2, abs=0.02)


def test_textural_heads_keep_half() -> None:
    grid = TokenGrid(8, 16, 16)
    mask = class_masks(grid, 64, (0.3,), 2, sink=False)
    kept = mask.token_mask()[0, TEXTURAL]
    assert (kept.sum(1) == grid.video // 2).all() and (kept == kept[0]).all()
    at = grid.coordinates().sum(1)
    assert torch.equal(kept[0], at % 2 == 0), "a checkerboard in time, rows and columns"


@pytest.mark.parametrize("tau", [1, 2, 3, 5])
def test_checkerboard_is_an_order(tau) -> None:
    grid = TokenGrid(3, 5, 7)
    order, kept = checkerboard(grid, tau)
    assert torch.equal(order.sort().values, torch.arange(grid.video))
    assert abs(kept - grid.video / tau) <= 2
    assert (grid.coordinates().sum(1)[order[:kept]] % tau == 0).all()


@pytest.mark.parametrize(
    "grid",
    [
        TokenGrid(5, 6, 11),
        TokenGrid(6, 5, 7, text=40, text_at="front"),
        TokenGrid(4, 8, 8, text=9, text_at="back"),
    ],
    ids=str,
)
def test_bands_and_first_frame(grid) -> None:
    """Every head sees the first frame, its queries see everything, and the bands are bands in their order."""
    mask = class_masks(grid, 16, (0.2, 0.4), 2, sink=True)
    kept = mask.token_mask()[0]
    first = slice(grid.video_start, grid.video_start + grid.frame_tokens)
    assert kept.shape[0] == 5 and kept[:, first].all() and kept[:, :, first].all()
    frames, frame = grid.frames - 1, grid.frame_tokens
    token = torch.arange(frames * frame)
    rest = kept[:, first.stop : first.stop + len(token), first.stop : first.stop + len(token)]
    for head, width in ((0, 0.2), (1, 0.2), (2, 0.4), (3, 0.4)):
        place = token if head % 2 else token % frame * frames + token // frame
        distance = (place[:, None] - place).abs()
        assert rest[head][distance <= width * len(token) - 24].all()
        assert not rest[head][distance > width * len(token) + 24].any()


def test_planted_heads_get_their_class() -> None:
    grid = TokenGrid(9, 16, 16)
    method = RainFusion(alpha=0.9)
    right = []
    for seed in range(20):
        call = planted_call(grid, head_dim=64, seed=seed)
        choice = method.plan(call).notes["pattern"][0]
        right.append(choice == torch.tensor([SPATIAL, TEMPORAL, TEXTURAL]))
    assert (torch.stack(right).double().mean(0) > 0.95).all()


def test_vendor_rule_has_no_textural_heads() -> None:
    grid = TokenGrid(9, 16, 16)
    method = RainFusion(textural=False)
    call = planted_call(grid, head_dim=64)
    choice = method.plan(call).notes["pattern"][0]
    assert choice[:2].tolist() == [SPATIAL, TEMPORAL] and int(choice[2]) in (SPATIAL, TEMPORAL)
    recalls = torch.tensor([[[[0.96, 0.99]], [[0.5, 0.4]], [[0.4, 0.5]]]])
    assert method.choose(recalls).tolist() == [[TEMPORAL, TEMPORAL, SPATIAL]]


def test_recalls_are_shares_of_the_attention() -> None:
    grid = TokenGrid(5, 4, 6)
    call = planted_call(grid, heads=3, head_dim=16)
    method = RainFusion(sink=False, samples=1000, bandwidths=(0.25, 0.5))
    got = method.recalls(call)
    assert got.shape == (1, 3, 2, 2)
    for kind, step, tokens in ((0, 1, 24), (1, 5, 120)):
        q, k = (x[0, 0:tokens:step].transpose(0, 1) for x in (call.query, call.key))
        probs = (q @ k.transpose(1, 2) * call.scale).softmax(-1)
        at = torch.arange(probs.shape[-1])
        for i, width in enumerate((0.25, 0.5)):
            inside = (at[:, None] - at).abs() <= int(len(at) * width)
            want = (probs * inside).sum((1, 2)) / len(at)
            assert torch.allclose(got[0, :, i, kind], want, atol=1e-5)


def test_narrowest_band_that_recalls_enough() -> None:
    """RainFusion+: narrow before wide, temporal before spatial, textural when neither is enough."""
    method = RainFusion(bandwidths=(0.5, 0.125, 0.25))
    assert method.bandwidths == (0.125, 0.25, 0.5)
    recalls = torch.tensor(
        [
            [
                [[0.95, 0.95], [0.96, 0.96], [0.99, 0.99]],
                [[0.5, 0.91], [0.9, 0.95], [0.99, 0.99]],
                [[0.5, 0.5], [0.9, 0.95], [0.99, 0.99]],
                [[0.5, 0.5], [0.5, 0.5], [0.5, 0.9]],
                [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]],
            ]
        ]
    )
    assert method.choose(recalls).tolist() == [[0, 1, 2, 5, 6]]


def test_published_densities_of_the_plus_bands() -> None:
    mask = class_masks(TokenGrid(21, 45, 80), 128, (0.125, 0.25, 0.5), None, sink=False)
    assert mask.head_density()[0].tolist() == pytest.approx(
        [0.234, 0.234, 0.4375, 0.4375, 0.75, 0.75], abs=0.005
    )


def test_image_has_no_sink() -> None:
    mask = RainFusion().build(TokenGrid(1, 32, 32))
    assert float(mask.head_density().max()) == pytest.approx(0.5, abs=0.03)
