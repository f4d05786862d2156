"""Other kernels beside ours: the mask they are given is the same one, and what cannot run says why."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.eval import peers
from dit_sparse.eval.speed import random_keep


def test_flex_attention_is_given_the_same_blocks() -> None:
    """Uncompiled, FlexAttention ignores block lists: the mask itself is compared."""
    keep = random_keep(2, 5, 5, 0.4, "cpu")
    keep[0, 1, 3] = True  # rows of different lengths
    mask = peers.flex_mask(keep, 64, 320, 320)
    assert torch.equal(mask.to_dense().bool(), keep)
    for head in range(2):
        for row in range(5):
            count = int(mask.full_kv_num_blocks[0, head, row])
            listed = mask.full_kv_indices[0, head, row, :count].tolist()
            assert listed == keep[0, head, row].nonzero().flatten().tolist()
    assert mask.kv_num_blocks.sum() == 0  # no block is tested


def test_each_missing_peer_has_its_reason() -> None:
    found, reasons = peers.available("cpu", torch.bfloat16)
    assert found == [] and set(reasons) == {peer.name for peer in peers.PEERS}
    assert all(reason == "needs an NVIDIA GPU" for reason in reasons.values())


def test_another_shape_starts_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the ninth shape would meet the recompile limit, and the uncompiled path would be timed."""
    resets: list[int] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(1))
    peers._compiled.cache_clear()
    for tokens in (128, 128, 256, 256):
        x = torch.zeros(1, tokens, 1, 16)
        peers._flex(x, x, x, random_keep(1, tokens // 64, tokens // 64, 0.5, "cpu"), 64)
    assert len(resets) == 2
    peers._compiled.cache_clear()
