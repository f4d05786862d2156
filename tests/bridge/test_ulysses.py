"""Ulysses context parallelism: the token order in one process and the exchange between two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_sparse.bridge import ForwardInfo
from dit_sparse.grid import TokenGrid
from dit_sparse.runtime import Runtime
from dit_sparse.ulysses import Order
from tests.bridge.sessions import Recorder
from tests.bridge.workers import run_two

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_see_the_order_of_one(tmp_path: Path) -> None:
    for output in run_two("tests.bridge.ulysses_worker", tmp_path, timeout=150):
        assert [line for line in output.splitlines() if line.endswith("ok")] == ["wan-t2v: ok", "flux: ok", "qwen: ok"]


@pytest.mark.parametrize("text_at", ["front", "back"])
@pytest.mark.parametrize("world", [2, 4])
def test_order_of_ranks_is_undone(text_at: str, world: int) -> None:
    text, video = 8, 24
    words, pixels = torch.arange(text), 100 + torch.arange(video)
    pieces = zip(words.chunk(world), pixels.chunk(world), strict=True)
    ranks = torch.cat([torch.cat(p if text_at == "front" else p[::-1]) for p in pieces])
    whole = torch.cat((words, pixels) if text_at == "front" else (pixels, words))
    order = Order(text + video, video, world, text_at)
    tokens = ranks[None, :, None, None].expand(2, -1, 3, 5).contiguous()
    assert torch.equal(order.to_one_process(tokens)[0, :, 0, 0], whole)
    assert torch.equal(order.to_ranks(order.to_one_process(tokens)), tokens)
    mask = (ranks % 3 == 0).expand(2, 1, 1, -1)
    assert torch.equal(order.mask_to_one_process(mask)[0, 0, 0], whole % 3 == 0)
    assert order.mask_to_one_process(None) is None


@pytest.mark.parametrize(("text_at", "split", "length", "reason"), [
    ("front", True, 32, ""), ("none", False, 24, ""), ("back", False, 32, "unknown order"),
    ("front", True, 31, "unequal pieces"), ("front", True, 24, ""),
])
def test_orders_that_are_not_known_are_refused(text_at: str, split: bool, length: int, reason: str) -> None:
    runtime = Runtime(Recorder(), text_at, split)
    runtime.begin(ForwardInfo(TokenGrid(2, 3, 4, text_at=text_at), "", 0, None, "0", True, "toy"))
    found = runtime.refusal(length, 2)
    assert reason in found if reason else not found
