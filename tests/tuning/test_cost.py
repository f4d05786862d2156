"""The cost table: interpolation, exact JSON, the modelled table against its source, a measurement on this machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dit_sparse.eval.attention_time import read_times
from dit_sparse.grid import TokenGrid
from dit_sparse.tuning.candidates import DENSE, Candidate, candidates_of
from dit_sparse.tuning.cost import CostTable, measure, timed

TABLE = CostTable({"device": "a GPU"}, "5x7x9", 4, 64, 1 / 3, {"drop/tile": ((0.1, 0.1), (0.3, 0.5), (1.0, 0.7))},
                  {"tile": 0.25}, 1.1)


def test_times_lie_between_the_measured_ones() -> None:
    at = [TABLE.tau(Candidate("drop", "tile", d)) for d in (0.1, 0.2, 0.3, 0.65, 0.05)]
    assert at == pytest.approx([0.11, 0.33, 0.55, 0.66, 0.0]) and TABLE.tau(DENSE) == 1 / 3
    assert TABLE.tau(Candidate("drop", "tile", 0.1), 0.2) == pytest.approx(0.33)
    assert TABLE.times([DENSE, Candidate("drop", "tile", 0.1)]).tolist() == pytest.approx([1 / 3, 0.11])
    one = Candidate("drop", "tile", 0.1)
    assert TABLE.layer([DENSE, one, one]) == pytest.approx(1 / 3 + 0.22 + 0.25)
    assert TABLE.layer({DENSE: 4}) == pytest.approx(4 / 3) and TABLE.fix("morton") == 0
    assert TABLE.layer([one], lambda c: 0.2) == pytest.approx(0.33 + 0.25)
    with pytest.raises(ValueError, match="has no 'soft/tile'"):
        TABLE.tau(Candidate("soft", "tile", 0.1))


def test_a_saved_table_is_the_very_same(tmp_path: Path) -> None:
    for number, table in enumerate((TABLE, CostTable.modelled())):
        table.save(tmp_path / f"{number}.json")
        assert CostTable.load(tmp_path / f"{number}.json") == table
    (tmp_path / "foreign.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "short.json").write_text(json.dumps({"format": "dit-sparse cost table 1"}))
    for name, expected in (("foreign", "no table of the form"), ("broken", "cannot be read"), ("short", "incomplete"),
                           ("none", "cannot be read")):
        with pytest.raises(ValueError, match=expected) as refusal:
            CostTable.load(tmp_path / f"{name}.json")
        assert "\n" not in str(refusal.value)
    for words in ({"dense": float("nan")}, {"curves": {"drop/tile": ((0.1, 0.1),)}}):
        with pytest.raises(ValueError, match="cost table"):
            CostTable(**{**TABLE.__dict__, **words})


def test_the_modelled_table_is_that_of_the_comparison_of_methods() -> None:
    times, table = read_times(), CostTable.modelled()
    assert times is not None and table.grid == "21x45x80" and table.heads == 40
    assert 40 * table.dense == times.dense_ms and table.layer({DENSE: 40}) == times.dense_ms
    soft = Candidate("soft", "morton", 0.15)
    for method, one, wide in (("sol", soft, 0.03), ("rainfusion2", Candidate("drop", "morton", 0.15), 0.08)):
        modelled, said = table.layer({one: 40}, lambda c: 0.2), times.milliseconds(method, 0.15, 0.2)
        assert said is not None and modelled == pytest.approx(said, rel=wide), method
    every = candidates_of()
    for a, b in zip(every[1:], every[2:], strict=False):
        assert (a.pattern, a.order) != (b.pattern, b.order) or table.tau(a) < table.tau(b)
    assert table.tau(Candidate("band", "morton", 1.0)) > times.kernels[128][-1][1] / 40


def test_a_measured_table_has_every_curve_and_rises() -> None:
    said: list[float] = []
    table = measure(TokenGrid(3, 9, 9, text=5, text_at="back"), 2, 16, seconds=1.0, densities=(0.1, 0.5, 1.0),
                    progress=lambda done, text: said.append(done))
    assert set(table.curves) == {f"{p}/{o}" for p in ("drop", "soft", "spread", "band") for o in ("tile", "morton")}
    for curve in table.curves.values():
        assert [d for d, _ in curve] == [0.1, 0.5, 1.0]
        assert curve[0][1] > 0 and all(a[1] <= b[1] for a, b in zip(curve, curve[1:], strict=False))
    assert table.dense > 0 and table.mixed >= 1 and min(table.fixed.values()) >= 0 and table.where["device"] == "CPU"
    assert said == sorted(said) and len(said) == 24 and max(said) < 1
    assert CostTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_an_older_table_serves_the_patterns_that_it_has() -> None:
    table = CostTable.modelled()
    older = dataclasses.replace(table, curves={k: v for k, v in table.curves.items() if not k.startswith("spread/")})
    every = ("drop", "soft", "spread", "band")
    assert timed(table, every, chosen=True) == every and timed(older, every, chosen=False) == ("drop", "soft", "band")
    for patterns, chosen in ((every, True), (("spread",), False)):
        with pytest.raises(ValueError, match="costs have no times of spread"):
            timed(older, patterns, chosen=chosen)
