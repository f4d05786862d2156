"""Masks of one run in another: the same result without the method, refusals, the reasons of what does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from dit_sparse import SparseFallbackError, disable, enable, summary
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.grid import TokenGrid
from dit_sparse.methods import all_methods
from dit_sparse.methods.base import Plan
from dit_sparse.operators import Soft
from dit_sparse.replay import Kept, Place, Recording, overlap, record, replay
from tests.tiny_wan import build_tiny_wan

STEPS, LAYERS = 3, 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: Any, *, seed: int = 0, width: int = 64) -> torch.Tensor:
    return pipe("a red circle", height=64, width=width, num_frames=9, num_inference_steps=STEPS, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(seed), output_type="latent", max_sequence_length=16).frames


def on(pipe: Any, method: str = "svg", **options: Any) -> None:
    enable(pipe, method, **({"dense_steps": 1, "dense_layers": 0} | options))


@pytest.mark.parametrize(("method", "options"), [("svg", {}), ("svg", {"refresh": 2}), ("sol", {}), ("radial", {}),
                                                 ("rettention", {}), ("sparse_vdit", {}), ("skip_softmax", {})])
def test_a_replayed_run_is_the_recorded_one_without_the_method(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, method: str, options: dict
) -> None:
    on(pipe, method, **options)
    with record(pipe) as recording:
        want = run(pipe)
    calls = summary(pipe).sparse_calls
    assert calls and set(recording) <= {Place("transformer", layer, step, branch) for layer in range(LAYERS)
                                        for step in range(1, STEPS) for branch in ("cond", "uncond")}
    assert recording.nbytes > 0
    on(pipe, method, **options)
    monkeypatch.setattr(all_methods()[method], "plan", lambda *_: pytest.fail("the method was asked"))
    with replay(pipe, recording) as used:
        assert torch.equal(run(pipe), want)
    assert used == set(recording) and summary(pipe).sparse_calls == calls and not summary(pipe).fallbacks


def test_recording_changes_nothing_and_ends_with_the_block(pipe: Any) -> None:
    on(pipe)
    alone = run(pipe)
    with record(pipe) as recording:
        assert torch.equal(run(pipe), alone)
    before = dict(recording)
    assert torch.equal(run(pipe, seed=1), run(pipe, seed=1)) and dict(recording) == before
    assert overlap(recording, recording).share == 1 and overlap(recording, recording).common == len(recording)


def test_other_masks_give_another_result(pipe: Any) -> None:
    on(pipe, "radial")
    plain = run(pipe)
    on(pipe, "svg", density=0.2)
    with record(pipe) as recording:
        run(pipe)
    on(pipe, "radial")
    with replay(pipe, recording):
        assert not torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain), "after the block the method is asked again"


@pytest.mark.parametrize(("change", "reason"), [
    (lambda kept: dataclasses.replace(kept, grid=dataclasses.replace(kept.grid, frames=2)), "recorded for 2x"),
    (lambda kept: dataclasses.replace(kept, batch=3), "batch of 3"),
    (lambda kept: None, "no mask was recorded"),
])
def test_what_does_not_fit_is_counted_or_raised(pipe: Any, change: Any, reason: str) -> None:
    on(pipe)
    with record(pipe) as recording:
        run(pipe)
    place = Place("transformer", 1, 2, "cond")
    changed = change(recording[place])
    recording.pop(place)
    if changed is not None:
        recording[place] = changed
    with replay(pipe, recording):
        run(pipe)
    (text, count), = summary(pipe).fallbacks.items()
    assert reason in text and count == 1
    on(pipe, strict=True)
    with replay(pipe, recording), pytest.raises(SparseFallbackError, match=reason):
        run(pipe)


def test_another_size_falls_back(pipe: Any) -> None:
    on(pipe)
    with record(pipe) as recording:
        run(pipe)
    with replay(pipe, recording) as used:
        run(pipe, width=96)
    assert not used and not summary(pipe).sparse_calls
    assert "recorded for 5x4x4 tokens and 0 of text" in next(iter(summary(pipe).fallbacks))


def test_refusals(pipe: Any) -> None:
    disable(pipe)
    for use in (lambda: record(pipe), lambda: replay(pipe, Recording())):
        with pytest.raises(ValueError, match="not enabled"), use():
            pass
    on(pipe)
    with record(pipe) as recording:
        with pytest.raises(ValueError, match="already"), record(pipe):
            pass
        run(pipe)
    with pytest.raises(ValueError, match="holds masks of no transformer; target has transformer"):
        with replay(pipe, Recording()):
            pass
    other = Recording({dataclasses.replace(place, transformer="transformer_2"): k for place, k in recording.items()})
    with pytest.raises(ValueError, match="transformer_2"), replay(pipe, other):
        pass
    with record(pipe):
        pass  # a refusal leaves nothing behind


def kept_of(mask: BlockMask | None, operator: Any = None) -> Recording:
    plan = Plan(mask) if operator is None else Plan(mask, operator=operator)
    return Recording({Place("transformer", 0, 0, ""): Kept(plan, TokenGrid(1, 1, 4), 1, 2)})


def test_overlap_counts_pairs_of_blocks_that_hold_the_same_tokens() -> None:
    raster = BlockLayout.raster(4, 1)
    eye, full = torch.eye(4, dtype=torch.bool)[None, None], torch.ones(1, 1, 4, 4, dtype=torch.bool)
    one, all_pairs = (kept_of(BlockMask.from_dense(keep, raster, raster)) for keep in (eye, full))
    assert overlap(one, all_pairs).share == pytest.approx(4 / 16)
    turned = BlockLayout.from_order(torch.tensor([[[0, 1, 2, 3], [1, 0, 2, 3]]]), 1)
    other = kept_of(BlockMask.from_dense(eye.expand(1, 2, 4, 4), turned, turned))
    assert overlap(one, other).share == pytest.approx(4 / 12), "one head of two has its tokens elsewhere"
    assert overlap(one, kept_of(None)).share == 0 and overlap(kept_of(None), kept_of(None)).share == 1
    soft = kept_of(BlockMask.from_dense(eye, raster, raster), Soft())
    assert overlap(one, soft).share == 0 and overlap(soft, soft).share == 1
    moved = Recording({dataclasses.replace(place, step=1): kept for place, kept in one.items()})
    found = overlap(one, moved)
    assert (found.share, found.common, found.only_first, found.only_second) == (1, 0, 1, 1)
    coarse = BlockLayout.raster(4, 2)
    assert overlap(one, kept_of(BlockMask.full(coarse, coarse))).share == 0


def test_layouts_are_held_once(pipe: Any) -> None:
    """What all calls of a shape share is recorded once."""
    on(pipe, "radial")
    with record(pipe) as recording:
        run(pipe)
    kept = list(recording.values())
    assert len(kept) > 2 and len({id(k.plan.mask.query.lengths) for k in kept if k.plan.mask}) == 1
