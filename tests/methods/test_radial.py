"""Radial Attention: the numbers of the authors' mask and of the paper's formula, and what both promise."""

import math

import pytest
import torch

from dit_sparse.grid import TokenGrid
from dit_sparse.methods.radial import Radial, frame_pair, paper_density, paper_pair, radial_blocks

# frames x tokens of a frame, text, block, decay, sink -> blocks of the reference's mask, kept, sparsity
GOLDEN = [
    (18, 3840, 0, 128, 0.2, True, 540, 83728, 0.71287),
    (18, 3840, 0, 128, 0.2, False, 540, 70736, 0.75742),
    (20, 3840, 0, 128, 0.8, True, 600, 126912, 0.64747),
    (21, 3600, 0, 128, 0.2, True, 590, 91264, 0.73782),
    (21, 1560, 0, 64, 0.2, True, 511, 69998, 0.73193),
    (30, 3840, 256, 128, 0.95, False, 902, 226056, 0.72216),
    (33, 3600, 256, 128, 0.95, False, 930, 236401, 0.72667),
    (41, 3840, 0, 128, 0.2, True, 1230, 274680, 0.81844),
    (128, 3840, 256, 128, 0.95, False, 3842, 1637520, 0.88906),
    (6, 384, 0, 128, 0.5, True, 18, 285, 0.12037),
    (8, 512, 128, 128, 0.25, False, 33, 837, 0.23140),
    (5, 300, 0, 128, 0.3, True, 11, 119, 0.01653),
    (9, 200, 64, 64, 0.4, False, 29, 481, 0.42806),
]


def reference_blocks(
    frames: int, frame: int, text: int, block: int, decay: float, sink: bool
) -> torch.Tensor:
    """The authors' procedure, written out with whole frames of tokens."""
    tokens = frames * frame + text
    mask = torch.zeros(tokens // block, tokens // block, dtype=torch.bool)
    first_text = frames * frame // block
    mask[first_text:] = True
    mask[:, first_text:] = True
    padded = -(-frame // block) * block
    place = torch.arange(frame)
    distance_in_frame = (place[:, None] - place).abs()
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            whole = 2.0 ** frame.bit_length() / 2.0 ** distance.bit_length()
            width = frame if distance <= 1 else max(whole * decay, block)
            split = 1 if whole >= 128 else int(128 / whole)
            if sink and j == 0:
                width, split = frame, 1
            if distance % split:
                continue
            row, column = i * frame % block, j * frame % block
            pair = torch.zeros(row + padded, column + padded, dtype=torch.bool)
            height, wide = min(frame, padded), min(frame, padded)
            pair[row : row + height, column : column + wide] = distance_in_frame <= width
            for p in range(pair.shape[0] // block):
                for q in range(pair.shape[1] // block):
                    part = pair[p * block : (p + 1) * block, q * block : (q + 1) * block].float().mean(0)
                    good = int((part > 1 / 3).sum()) / (int((part > 0).sum()) + 1e-9) > 0.6
                    at = i * frame // block + p, j * frame // block + q
                    if good and max(at) < mask.shape[0]:
                        mask[at] = True
    return mask


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c[0]}x{c[1]}+{c[2]}-{c[3]}-{c[4]}-{c[5]}")
def test_golden_numbers(case) -> None:
    frames, frame, text, block, decay, sink, blocks, kept, sparsity = case
    mask = radial_blocks(frames, frame, text, block, decay=decay, sink=sink)[:blocks, :blocks]
    assert mask.shape == (blocks, blocks)
    assert int(mask.sum()) == kept
    assert 1 - kept / blocks**2 == pytest.approx(sparsity, abs=6e-6)


@pytest.mark.parametrize(
    "case",
    [
        (6, 384, 0, 128, 0.5, True),
        (8, 512, 128, 128, 0.25, False),
        (5, 300, 0, 128, 0.3, True),
        (9, 200, 64, 64, 0.4, False),
        (7, 143, 19, 32, 0.6, True),
        (12, 96, 0, 32, 0.3, False),
    ],
)
def test_closed_form_equals_the_procedure(case) -> None:
    frames, frame, text, block, decay, sink = case
    want = reference_blocks(*case)
    got = radial_blocks(frames, frame, text, block, decay=decay, sink=sink)[: len(want), : len(want)]
    want.fill_diagonal_(True)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    "frames, frame, plain, sink",
    [
        (4, 4, 0.859375, 0.90625),
        (8, 4, 0.63672, 0.69531),
        (16, 8, 0.47266, 0.51270),
        (18, 3840, 0.51635, 0.54918),
        (30, 3840, 0.38987, 0.41341),
    ],
)
def test_density_of_the_paper_mask(frames, frame, plain, sink) -> None:
    assert paper_density(frames, frame, sink=False) == pytest.approx(plain, abs=5e-6)
    assert paper_density(frames, frame) == pytest.approx(sink, abs=5e-6)


def _paper_tokens(frames: int, frame: int, sink: bool) -> torch.Tensor:
    """The paper's formula, token by token."""
    at = torch.arange(frames * frame)
    mask = torch.zeros(len(at), len(at), dtype=torch.bool)
    for q in at.tolist():
        for k in at.tolist():
            distance, apart = abs(q // frame - k // frame), abs(q % frame - k % frame)
            power = 2 ** math.floor(math.log2(max(distance, 1)))
            if power <= frame:
                mask[q, k] = apart + 1 <= frame / power
            else:
                mask[q, k] = apart == 0 and distance % math.ceil(power / frame) == 0
            if sink and k < frame:
                mask[q, k] = True
    return mask


@pytest.mark.parametrize("frames, frame", [(4, 4), (8, 4), (16, 8), (9, 3), (1, 5)])
@pytest.mark.parametrize("sink", [True, False])
def test_paper_variant_covers_the_formula(frames, frame, sink) -> None:
    want = _paper_tokens(frames, frame, sink)
    assert paper_density(frames, frame, sink=sink) == pytest.approx(float(want.double().mean()))
    got = Radial(mask="paper", sink=sink, block_size=16).build(TokenGrid(frames, 1, frame)).token_mask()[0, 0]
    assert (got | ~want).all()


def test_paper_bound() -> None:
    for frames, frame in [(18, 3840), (30, 3840), (128, 1560)]:
        kept = paper_density(frames, frame, sink=False) * (frames * frame) ** 2
        assert kept <= 4 * frame * frames * frame * math.log2(frames)
        bands = {paper_pair(d, frame) for d in range(frames)}
        assert 2 * len(bands) - 1 <= 2 * math.ceil(math.log2(frames)) + 1


def test_neighbouring_frames_and_first_frame_are_whole() -> None:
    frames, frame, block = 18, 3840, 128
    per = frame // block
    mask = radial_blocks(frames, frame, 0, block, sink=True)
    pairs = mask.reshape(frames, per, frames, per).permute(0, 2, 1, 3)
    for i in range(frames):
        assert pairs[i, 0].all()
        for j in (i - 1, i, i + 1):
            assert not 0 <= j < frames or pairs[i, j].all()
    assert mask.diagonal().all() and mask.any(1).all()


def test_symmetry() -> None:
    plain = radial_blocks(18, 3840, 0, 128, sink=False)
    sunk = radial_blocks(18, 3840, 0, 128, sink=True)
    assert torch.equal(plain, plain.T) and not torch.equal(sunk, sunk.T)
    assert (sunk | ~plain).all()


def test_growth_with_frames() -> None:
    """Kept pairs of a row grow like the logarithm of the frames (paper), or far less than twice (blocks)."""
    counts = (9, 18, 36, 72, 144)
    kept = [int(radial_blocks(n, 3840, 0, 128, sink=False).sum()) for n in counts]
    assert kept[2] < 3 * kept[1]
    rows = [k / n for k, n in zip(kept, counts, strict=True)]
    assert all(b < 1.45 * a for a, b in zip(rows, rows[1:], strict=False))
    paper = [paper_density(n, 3840, sink=False) * n for n in counts]
    steps = [b - a for a, b in zip(paper, paper[1:], strict=False)]
    assert max(steps) < 1.3 * min(steps)


def test_decay_below_a_fifth_changes_nothing() -> None:
    at = [radial_blocks(18, 3840, 0, 128, decay=d) for d in (0.2, 0.1)]
    kept = [int(m.sum()) for m in at]
    assert kept[1] > 0.93 * kept[0]
    # neighbouring frames and the sink alone
    floor = 3 / 18 + 1 / 18
    assert kept[1] / 540**2 > floor - 0.02


def test_text_in_front_equals_text_at_the_back_where_blocks_fit() -> None:
    """With text of whole blocks the video part is the same wherever the text is."""
    back = Radial(block_size=32).build(TokenGrid(6, 8, 8, text=32, text_at="back")).token_mask()[0, 0]
    front = Radial(block_size=32).build(TokenGrid(6, 8, 8, text=32, text_at="front")).token_mask()[0, 0]
    assert torch.equal(back[:-32, :-32], front[32:, 32:])
    assert back[-32:].all() and front[:32].all()


def test_frame_pair_drops_far_frames_of_small_frames() -> None:
    assert [frame_pair(d, 256, 64, 0.2) is None for d in range(9)] == [
        False,
        False,
        False,
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def test_no_permutation_is_needed() -> None:
    mask = Radial().build(TokenGrid(5, 9, 9, text=17, text_at="front"))
    assert mask.query.index is None and mask.key.index is None and mask.window is None
