"""Recordings: exact where they keep, bounded in bytes, the same numbers as the attention probe's; their pictures."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse import SparseProc
from dit_sparse.app import maps
from dit_sparse.app.capture import Recorder, Recording, choose_detail, pack, pool_keys, record, spread, unpack
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.bridge import ForwardInfo
from dit_sparse.eval.attention import NAMES, look
from dit_sparse.grid import TokenGrid
from dit_sparse.inspect import allowed_pairs, planted_call

from .conftest import PROMPT

SHAPE = {"height": 64, "width": 96, "frames": 5, "steps": 3, "guidance_scale": 1.0}


def procs() -> dict[str, Any]:
    return {"A": SparseProc("svg", density=0.3, dense_layers=0), "B": SparseProc("rainfusion2", density=0.5)}


@pytest.fixture(scope="module")
def recording(shelf: Any) -> Recording:
    return record(shelf.open("embedded"), PROMPT, procs(), seed=3, shape=SHAPE)[0]


def test_numbers_are_those_of_the_probe(shelf: Any, recording: Recording) -> None:
    pipe = shelf.open("embedded")
    for label, proc in procs().items():
        calls = look(pipe, PROMPT, proc, seed=3, shape=SHAPE)
        assert len(calls) == 3 * 8
        for call in calls:
            view = recording.moments[call["step"], call["layer"]].views[label]
            assert (view.numbers is None) == (call["kind"] == "dense")
            if view.numbers is None:
                assert "dense" in view.reason
                continue
            for row, name in enumerate(NAMES):
                assert view.numbers[row].tolist() == pytest.approx(call[name], rel=1e-3, abs=1e-5)


def test_what_is_kept(recording: Recording) -> None:
    assert recording.grid == TokenGrid(3, 4, 6) and recording.detail is not None and recording.num_steps == 3
    assert recording.detail.keys == (3, 4, 6) and len(recording.detail.queries) == 72  # small: everything
    moment = recording.moments[2, 5]
    for head in range(4):
        for query in (0, 40, 71):
            assert float(moment.attention(head, query).sum()) == pytest.approx(1, abs=0.1)  # bytes
    assert torch.allclose(moment.frames.sum(-1), torch.ones(4, 3), atol=1e-4)
    view = moment.views["A"]
    # The kept mass of the queries, which are all there are, is the recall.
    assert view.mass is not None and view.numbers is not None
    assert torch.allclose(view.mass.float().mean(1), view.numbers[1], atol=2e-3)


def test_a_planted_head_looks_where_it_was_told() -> None:
    grid = TokenGrid(5, 7, 9)
    call = planted_call(grid)
    recorded = Recording("", ())
    recorder = Recorder({}, recorded)
    recorder.begin_forward(ForwardInfo(grid, "", 0, 4, "cond", True, "wan"))
    out = recorder.attention(0, call.query, call.key, call.value, None, call.scale)
    assert out.shape == call.query.shape
    recorder.begin_forward(ForwardInfo(grid, "", 0, 4, "uncond", False, "wan"))
    recorder.attention(0, call.query * 0, call.key, call.value, None, call.scale)  # guidance's other branch
    moment, detail = recorded.moments[0, 0], recorded.detail
    assert detail is not None and detail.keys == (5, 7, 9)
    assert moment.frames[0].diagonal().min() > 0.9  # its own frame
    query = maps.query_index(detail, 3, 6, 1)
    assert detail.queries[query] == (3, 6, 1)
    found = moment.attention(1, query).unflatten(0, detail.keys)  # its own place, in all frames
    assert float(found[:, 6, 1].sum()) > 0.9


def test_bytes_are_bounded() -> None:
    for grid, heads in ((TokenGrid(9, 16, 16), 4), (TokenGrid(21, 45, 80), 40), (TokenGrid(1, 1, 1), 1)):
        detail = choose_detail(grid, 50, 30, heads, budget=32 * 2**20)
        assert detail.nbytes <= 32 * 2**20 and len(detail.steps) <= 4
        assert detail.steps[0] == 0 and detail.steps[-1] == 49 and detail.layers[-1] == 29
    assert spread(3, 8) == (0, 1, 2) and spread(1, 4) == (0,) and spread(100, 1) == (0,)


def test_kept_pairs_are_the_masks_own() -> None:
    """Some rows and columns of a mask, against the mask written out."""
    layout = BlockLayout.raster(113, 16)
    keep = torch.rand(1, 2, layout.blocks, layout.blocks, generator=torch.Generator().manual_seed(1)) > 0.5
    mask = BlockMask.from_dense(keep, layout, layout)
    queries, keys = torch.tensor([0, 17, 112, 63]), torch.tensor([112, 5, 64])
    for head in range(2):
        assert torch.equal(allowed_pairs(mask, head, queries, keys), mask.token_mask()[0, head][queries][:, keys])


def test_bits_and_pools() -> None:
    bits = torch.rand(5, 21) > 0.5
    assert torch.equal(unpack(pack(bits), 21), bits)
    rows = torch.rand(2, 3 * 5 * 7)
    assert torch.allclose(pool_keys(rows, TokenGrid(3, 5, 7), (3, 5, 7)), rows)
    assert float(pool_keys(torch.ones(1, 16), TokenGrid(1, 4, 4), (1, 2, 2)).sum()) == 16


def test_places_on_the_sheet(recording: Recording) -> None:
    """Every place that can be clicked leads back to the token that is drawn there."""
    assert recording.pictures is not None and recording.grid is not None
    high = max(1, round(maps.STAMP * recording.pictures.shape[2] / recording.pictures.shape[3]))
    sheet = maps.sheet_size(3, high)
    for frame, row, column in itertools.product(range(3), range(4), range(6)):
        left, top = maps.corner(frame, high)
        x, y = left + (column + 0.5) / 6 * maps.STAMP, top + (row + 0.5) / 4 * high
        found = maps.token_at(recording, x / sheet[0], y / sheet[1])
        assert found is not None and found == pytest.approx((frame, row, column))
    assert maps.token_at(recording, 0.0, 0.0) is None


def test_pictures(recording: Recording) -> None:
    moment = recording.moments[2, 5]
    bare, masked = (np.asarray(maps.attention_map(recording, moment, 1, view)) for view in (None, moment.views["A"]))
    assert bare.shape == masked.shape
    red = (masked[..., 0].astype(int) - masked[..., 2]) > 40
    assert not ((bare[..., 0].astype(int) - bare[..., 2]) > 150).all() and red.any() and not red.all()
    for view in (None, *moment.views.values()):
        sheet = maps.query_over_frames(recording, moment, 0, 7, view)
        assert sheet.size == maps.sheet_size(3, round(maps.STAMP * 64 / 96))
    blocks = maps.block_picture(moment.views["A"], 0)
    assert blocks is not None and len(blocks.getcolors()) > 1
    assert maps.block_picture(recording.moments[0, 0].views["A"], 0) is None  # dense by plan
