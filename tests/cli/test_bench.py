"""bench: rows for dense and sparse, and refusals."""

import pytest

TINY = ["--tokens", "256", "--heads", "1", "--seconds", "0.01", "--device", "cpu"]


def test_rows(dit_sparse) -> None:
    done = dit_sparse("bench", *TINY, "--density", "0.25", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert rows[0]["what"] == "dense" and rows[0]["density"] == 1
    assert {"sparse", "build mask"} <= {row["what"] for row in rows}
    assert all(row["milliseconds"] > 0 for row in rows)
    assert "torch" in done.json["environment"]


def test_table(dit_sparse) -> None:
    done = dit_sparse("bench", *TINY, "--density", "0.5", "--density", "0.25")
    for word in ("median ms", "TFLOP/s", "dense", "0.500", "0.250"):
        assert word in done.out


def test_routing(dit_sparse) -> None:
    words = ["--grid", "2x8x8", "--heads", "2", "--head-dim", "16", "--method", "radial", "--seconds", "0.01"]
    done = dit_sparse("bench", "routing", *words, "--device", "cpu", "--json")
    assert done.code == 0, done.err
    assert [row["method"] for row in done.json["rows"]] == ["dense", "radial"]
    assert done.json["rows"][1]["plan_ms"] > 0


def test_step(dit_sparse) -> None:
    words = ["--model", "tiny", "--method", "radial", "--seconds", "0.01", "--device", "cpu"]
    done = dit_sparse("bench", "step", *words)
    assert done.code == 0, done.err
    for word in ("step s", "radial", "Random weights", "8 layers"):
        assert word in done.out, done.out


REFUSALS = {
    "topic": (["weather"], "kernels, routing, step"),
    "misplaced": (["step", "--tokens", "64"], "--tokens"),
    "model": (["step", "--model", "gpt"], "wan-14b-720p"),
    "method": (["routing", "--method", "magic"], "radial"),
    "grid": (["routing", "--grid", "5by5"], "frames x height x width"),
    "density": (["--density", "2"], "(0, 1]"),
    "dtype": (["--dtype", "int4"], "bf16, fp16, fp32"),
    "backend": (["--backend", "magic"], "cpu"),
    "tokens": (["--tokens", "0"], "--tokens"),
    "device": (["--device", "cuda:99"], "--device"),
    "heads": (["--heads", "0"], "--heads"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments(dit_sparse, case: str) -> None:
    words, expected = REFUSALS[case]
    assert expected in dit_sparse("bench", *words).refusal()
