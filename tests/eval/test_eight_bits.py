"""The error of 8-bit attention by what queries and keys are rounded to."""

import pytest
import torch

from dit_sparse.eval import eight_bits
from dit_sparse.eval.eight_bits import as_e4m3, as_int8, errors


def noise(tokens: int = 300, dim: int = 64) -> tuple[torch.Tensor, ...]:
    """Query, key and value (1, tokens, 2, dim)."""
    return torch.randn(3, 1, tokens, 2, dim, generator=torch.Generator().manual_seed(0)).unbind(0)


def test_int8_moves_numbers_by_half_a_step_of_their_block() -> None:
    x = noise()[0][0].transpose(0, 1) * torch.tensor([1.0, 100.0])[:, None, None]
    moved = (as_int8(x) - x).abs()
    for start in range(0, 300, 128):
        rows = slice(start, start + 128)
        step = x[:, rows].abs().amax((1, 2)) / 127
        most = moved[:, rows].amax((1, 2)) / step
        assert (most <= 0.501).all() and (most > 0.49).all()
    assert (as_e4m3(x) - x).norm() > 2 * moved.norm()


def test_int8_is_nearer_than_e4m3_where_some_channels_are_loud_in_queries_and_keys() -> None:
    query, key, value = noise()
    loud = torch.ones(64)
    loud[::16] = 8.0
    for factor in (torch.ones(64), loud):
        e4m3, int8, exact, int8_only, e4m3_only = errors(query * factor, key * factor, value, 1 / 64)
        assert exact < int8 < e4m3 < 0.15 and int8_only < e4m3_only / 2
    assert int8 < e4m3 / 2


def test_int8_is_worse_where_one_channel_of_the_keys_hides_all_others() -> None:
    query, key, value = noise()
    one = torch.ones(64)
    one[3] = 100.0
    e4m3, int8, *_ = errors(query / one, key * one, value, 1 / 8)
    assert int8 > 5 * e4m3


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = [("white noise", *noise(100), 1 / 8), ("other noise", *noise(130), 1 / 8)]
    monkeypatch.setattr(eight_bits, "activations", lambda tokens, heads: iter(made))
    assert eight_bits.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(column in lines[0] for column in eight_bits.COLUMNS)
    assert "white noise" in lines[1] and lines[1].count("%") == 5
