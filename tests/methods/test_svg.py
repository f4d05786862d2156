"""Sparse VideoGen: widths and densities of the reference, the two orders, and the choice of heads."""

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import planted_call
from dit_sparse.methods.svg import SVG, band_width, orders, row_errors
from dit_sparse.order import inverse

WAN = TokenGrid(21, 45, 80)


@pytest.mark.parametrize(
    "density, frames, frame, text, width, strict, inclusive",
    [
        (0.25, 21, 3600, 0, 2.813467, 10112, 10240),
        (0.30, 21, 3600, 0, 3.430139, 12288, 12416),
        (0.25, 33, 3600, 256, 4.348694, 15616, 15744),
        (0.25, 11, 4080, 226, 1.417393, 5760, 5888),
    ],
)
def test_golden_widths(density, frames, frame, text, width, strict, inclusive) -> None:
    assert band_width(density, frames, frame, text, edge="strict") == strict
    assert band_width(density, frames, frame, text) == inclusive
    assert band_width(density, frames, frame, text, edge="strict", step=1) / frame == pytest.approx(
        width, abs=1 / frame
    )


def test_width_at_the_ends() -> None:
    assert band_width(1.0, 3, 100) == 300
    assert band_width(0.01, 3, 100, 40) == 128


@pytest.mark.parametrize(
    "options, density",
    [
        (dict(sink="none", edge="strict"), 0.24961),
        (dict(sink="none"), 0.25256),
        (dict(sink="permuted"), 0.29260),
        (dict(sink="none", density=0.3), 0.30150),
        (dict(sink="permuted", density=0.3), 0.34017),
    ],
)
def test_golden_densities(options, density) -> None:
    mask = SVG(count_forced=False, **options).build(WAN)
    assert float(mask.density()) == pytest.approx(density, abs=5e-6)


def test_golden_density_in_blocks() -> None:
    """With bands covered by blocks: 0.25387 without, 0.29505 with the first frame, of 591 blocks."""
    mask = SVG(count_forced=False).build(WAN)
    assert mask.query.blocks == 591
    spatial = mask.work()[0, 0].double().mean() / 591
    assert float(spatial) == pytest.approx(0.29505, abs=5e-6)
    plain = SVG(count_forced=False, sink="none").build(WAN)
    assert float(plain.work().double().mean() / 591) == pytest.approx(0.25387, abs=5e-6)


def test_temporal_order() -> None:
    place = inverse(orders(WAN)[1])
    assert [int(place[t]) for t in (0, 1, 3600, 3601, 75599)] == [0, 21, 1, 22, 75599]
    x = torch.randn(WAN.video)
    order = orders(WAN)[1]
    assert torch.equal(x[order][place], x)


def _bands(grid: TokenGrid, reach: int) -> torch.Tensor:
    """bool (2, L, L): both bands, written token by token, with text."""
    frame, frames = grid.frame_tokens, grid.frames
    token = torch.arange(grid.video)
    places = torch.stack((token, token % frame * frames + token // frame))
    masks = torch.ones(2, grid.tokens, grid.tokens, dtype=torch.bool)
    masks[:, grid.video_slice, grid.video_slice] = (places[:, :, None] - places[:, None]).abs() <= reach
    return masks


GRIDS = [
    TokenGrid(5, 6, 11),
    TokenGrid(7, 5, 9, text=40, text_at="front"),
    TokenGrid(4, 8, 8, text=20, text_at="back"),
    TokenGrid(2, 3, 50),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sink", ["none", "permuted", "frame0"])
@pytest.mark.parametrize("edge", ["strict", "inclusive"])
def test_masks_are_the_bands_mapped_back(grid, sink, edge) -> None:
    method = SVG(sink=sink, edge=edge, count_forced=False, block_size=32)
    reach = band_width(0.25, grid.frames, grid.frame_tokens, grid.text, edge=edge, step=32) - (
        edge == "strict"
    )
    want = _bands(grid, reach)
    if sink == "permuted":
        place = inverse(orders(grid))
        want[:, :, grid.video_slice] |= (place < grid.frame_tokens)[:, None]
    first = slice(grid.video_start, grid.video_start + grid.frame_tokens)
    if sink == "frame0":
        want[:, :, first] = True
    mask = method.build(grid)
    got = mask.token_mask()[0].expand(2, -1, -1)
    if sink != "frame0":
        assert torch.equal(got, want)
        return
    # Covered by whole blocks: all that is wanted, and nothing more than a block of queries and one of keys
    # outside.
    assert (got | ~want).all()
    wide = _bands(grid, reach + 33 + 32 * grid.frames // (grid.frames - 1))
    in_blocks_of_the_sink = mask.key.slot_of_token[0] < -(-grid.frame_tokens // 32) * 32
    wide |= in_blocks_of_the_sink[:, None]
    assert (wide | ~got).all()


def test_sparse_temporal_heads_equal_the_mapped_back_mask() -> None:
    """Operator over the permuted layout against dense attention under the mask in the model's own order."""
    from dit_sparse.kernels.attention import block_sparse_attention
    from dit_sparse.kernels.reference import attention_reference

    grid = TokenGrid(6, 7, 9, text=13, text_at="back")
    call = planted_call(grid)
    method = SVG(sink="none", count_forced=False, edge="strict", block_size=32)
    plan = method.plan(call)
    assert plan.notes["temporal"].tolist()[0][:2] == [0, 1]
    reach = band_width(0.25, 6, 63, 13, edge="strict", step=32) - 1
    want = _bands(grid, reach)[plan.notes["temporal"]]
    out, _ = block_sparse_attention(call.query, call.key, call.value, plan.mask, scale=call.scale)
    twin, _ = attention_reference(call.query, call.key, call.value, want, call.scale)
    assert torch.allclose(out, twin, atol=1e-5)


# -- the choice of heads --------------------------------


@pytest.mark.parametrize("sink", ["none", "permuted", "frame0"])
@pytest.mark.parametrize("grid", [TokenGrid(8, 8, 8), TokenGrid(8, 8, 8, text=40, text_at="front")], ids=str)
def test_planted_heads_are_recognised(sink, grid) -> None:
    """Heads that look at their own frame are spatial, at their own place temporal: for over 95 % of seeds."""
    method = SVG(sink=sink, block_size=32)
    right = []
    for seed in range(40):
        call = planted_call(grid, heads=2, seed=seed)
        right.append(method.choose(call)[0] == torch.tensor([0, 1]))
    assert (torch.stack(right).double().mean(0) > 0.95).all()


def test_each_head_and_batch_element_chooses_for_itself() -> None:
    grid = TokenGrid(6, 8, 8)
    call = planted_call(grid, heads=2)
    for x in (call.query, call.key, call.value):
        assert x.shape[0] == 1
    call.query, call.key = (torch.cat((x, x.flip(2))) for x in (call.query, call.key))
    call.value = call.value.expand(2, -1, -1, -1)
    plan = SVG(block_size=32).plan(call)
    assert plan.notes["temporal"].tolist() == [[0, 1], [1, 0]]
    masks = plan.mask.token_mask()
    assert torch.equal(masks[0, 0], masks[1, 1]) and torch.equal(masks[0, 1], masks[1, 0])
    assert not torch.equal(masks[0, 0], masks[0, 1])
    assert torch.allclose(plan.mask.head_density().double(), masks.double().mean((-2, -1)), atol=1e-6)


def test_profile_masks_are_the_reference_bands() -> None:
    """Rows of the masks that the reference writes out whole: blocks of the order nearer than the width."""
    grid = TokenGrid(5, 6, 11, text=7, text_at="back")
    block, always = SVG(sink="permuted").profile(grid, 32)
    frame, frames = grid.frame_tokens, grid.frames
    width = int(2.0 * frame / 32)
    for kind in range(2):
        for q, k in [(0, 0), (3, 200), (100, 131), (17, 299), (329, 5), (60, 120)]:
            place = [t if kind == 0 else t % frame * frames + t // frame for t in (q, k)]
            want = abs(place[0] // 32 - place[1] // 32) < width or place[1] < frame
            got = abs(int(block[kind, q]) - int(block[kind, k])) < width or bool(always[kind, k])
            assert got == want
    assert always[:, -7:].all()


def test_row_errors_are_those_of_masked_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 50, 3, 8).unbind(0)
    rows, allowed = torch.tensor([4, 30, 4, 49]), torch.rand(2, 4, 50) < 0.4
    allowed[..., 0] = True
    key_mask = torch.ones(2, 50, dtype=torch.bool)
    key_mask[1, 40:] = False
    logits = torch.einsum("brhd,bkhd->bhrk", query[:, rows], key) * 0.3
    logits = logits.masked_fill(~key_mask[:, None, None], -torch.inf)

    def out(mask: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value.transpose(1, 2)

    dense = out(torch.ones(4, 50, dtype=torch.bool))
    want = torch.stack([(out(m) - dense).square().mean((2, 3)) for m in allowed], dim=-1)
    got = row_errors(query, key, value, rows, allowed, 0.3, key_mask)
    assert torch.allclose(got, want, atol=1e-6)


def test_row_errors_survive_rows_far_below_the_maximum() -> None:
    query, key, value = torch.ones(1, 8, 1, 4), torch.full((1, 8, 1, 4), -500.0), torch.ones(1, 8, 1, 4)
    key[:, 0] = 500.0
    allowed = torch.ones(2, 1, 8, dtype=torch.bool)
    allowed[1, :, 0] = False
    errors = row_errors(query, key, value, torch.tensor([3]), allowed, 1.0)
    assert torch.isfinite(errors).all() and errors[0, 0, 0] == 0 and errors[0, 0, 1] == 1


def test_an_image_has_one_kind_of_head(make_call) -> None:
    plan = SVG().plan(make_call(TokenGrid(1, 20, 20)))
    assert not plan.notes and plan.mask.query.index is None


def test_rows_follow_the_generator_and_the_range(make_call) -> None:
    grid = TokenGrid(4, 6, 6)
    call = make_call(grid)
    call.generator.manual_seed(0)
    first = SVG(rows=5).choose(call)
    call.generator.manual_seed(0)
    assert torch.equal(first, SVG(rows=5).choose(call))
    # rows of the first token only: the same as asking for that one row
    assert torch.equal(SVG(rows=5, row_range=1).choose(call), SVG(rows=1, row_range=1).choose(call))
    call.generator = None
    assert torch.equal(SVG(rows=5).choose(call), SVG(rows=5).choose(call))
