"""bench: rows for dense and sparse, and refusals."""

from pathlib import Path

import pytest

from dit_sparse.eval import step_models
from dit_sparse.eval.peers import Peer
from tests.eval.steps import kinds, small

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


def test_rungs_and_profile_of_a_step(dit_sparse) -> None:
    words = ["--model", "tiny", "--method", "radial", "--seconds", "0.01", "--device", "cpu", "--fp8", "linear"]
    done = dit_sparse("bench", "step", *words, "--profile", "--json")
    assert done.code == 0, done.err
    assert [row["what"] for row in done.json["rows"]] == ["dense", "dense, fp8 linear", "radial", "radial, fp8 linear"]
    assert all(row["profile"]["num_layers"]["matrix products"] > 0 for row in done.json["rows"])


def test_ladder(dit_sparse, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ["--grid", "2x9x10", "--heads", "1", "--head-dim", "16", "--seconds", "0.01", "--device", "cpu"]
    done = dit_sparse("bench", "ladder", *words, "--out", str(tmp_path / "made"))
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"ladder.csv", "ladder.json", "ladder.png"}
    for word in ("PyTorch's CPU kernel", "Not measured: Hopper kernel (Gluon)", "Written: "):
        assert word in done.out.replace("\n", " "), done.out


def test_generate(dit_sparse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(step_models.GEOMETRIES, "tiny", small())
    words = ["--model", "tiny", "--method", "radial", "--seconds", "0.01", "--device", "cpu", "--dense-steps", "0.2"]
    done = dit_sparse("bench", "generate", *words, "--step-cache", "teacache", "--out", "made", "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert {row["warmup"] for row in rows} == {"asked for", "radial's authors"}
    assert [row["dense_steps"] for row in rows] == [50, 10, 10, 10, 50, 12, 12, 12]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 0, 25, 0, 0, 0, 25]
    assert done.json["rate"]["title"] == "TeaCache" and any("not counted" in note for note in done.json["notes"])
    assert {path.suffix for path in (tmp_path / "made").iterdir()} == {".csv", ".json", ".md", ".png"}


def test_the_table_of_a_generation(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_sparse.eval.generate_speed.measure", lambda *_words, **_options: kinds())
    done = dit_sparse("bench", "generate", "--device", "cpu", "--model", "tiny")
    for word in ("asked for", "svg's authors", "5 + 13 + 32 skipped", "Skip rate: MagCache", "60:04 to 21:40",
                 "reached"):
        assert word in " ".join(done.out.split()), done.out


def test_a_step_that_never_ran_sparse_is_refused(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args, **_options):
        raise RuntimeError("no such lane")

    monkeypatch.setattr("dit_sparse.session.block_sparse_attention", broken)
    words = ["--model", "tiny", "--method", "radial", "--seconds", "0.01", "--device", "cpu"]
    assert "no such lane" in dit_sparse("bench", "step", *words).refusal()


def test_a_kernel_of_others_that_raises_is_listed(dit_sparse, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_args):
        def call():
            raise TypeError("wrong layout\nand more")

        return call

    def early(*_args):
        raise RuntimeError("no compiler")

    peers = [Peer("Late", False, lambda *_: "", late), Peer("Early", True, lambda *_: "", early)]
    monkeypatch.setattr("dit_sparse.eval.peers.PEERS", peers)
    done = dit_sparse("bench", *TINY, "--density", "0.5", "--json")
    assert done.code == 0, done.err
    assert done.json["not_measured"] == {"Late": "dense at 256 tokens: wrong layout",
                                         "Early": "sparse at 256 tokens: no compiler"}
    assert {"sparse", "build mask"} <= {row["what"] for row in done.json["rows"]}
    assert "Not measured: Early, sparse at 256 tokens: no compiler." in dit_sparse("bench", *TINY).out


REFUSALS = {
    "topic": (["weather"], "kernels, routing, step, ladder"),
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
    "large grid": (["routing", "--grid", "200x200x200"], "the limit is 1000000"),
    "huge grid": (["routing", "--grid", "99999999999x1x1"], "the limit is 1000000"),
    "no memory": (["--tokens", "1000000", "--heads", "1024", "--head-dim", "512", "--device", "cpu"], "GiB"),
    "dense, routing": (["routing", "--method", "dense"], "leave it out"),
    "dense, step": (["step", "--method", "dense"], "leave it out"),
    "large model": (["step", "--model", "wan-14b-720p", "--device", "cpu"], "--model tiny"),
    "8-bit attention elsewhere": (["step", "--fp8", "attention", "--device", "cpu"], "--fp8 cannot run here"),
    "8-bit what": (["step", "--fp8", "all"], "linear, attention, both"),
    "misplaced rung": (["routing", "--fp8", "linear"], "--fp8"),
    "no folder": (["ladder", "--out", __file__], "--out"),
    "no new folder": (["ladder", "--out", "/proc/none"], "--out /proc/none"),
    "two densities": (["ladder", "--density", "0.2", "--density", "0.3"], "takes one"),
    "misplaced dense steps": (["step", "--dense-steps", "5"], "--dense-steps is not an option of bench step"),
    "no published rate": (["generate", "--model", "flux-2048"], "wan-14b-720p, wan-1.3b-480p, tiny"),
    "two methods": (["generate", "--method", "svg", "--method", "radial"], "takes one"),
    "step cache": (["generate", "--step-cache", "pab", "--device", "cpu"], "magcache, teacache"),
    "dense steps": (["generate", "--dense-steps", "many", "--device", "cpu"], "dense_steps='many'"),
    "large generation": (["generate", "--model", "wan-14b-720p", "--device", "cpu"], "--model tiny"),
    "kernel elsewhere": (["step", "--backend", "triton", "--method", "svg", "--device", "cpu"], "triton"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments(dit_sparse, case: str) -> None:
    words, expected = REFUSALS[case]
    assert expected in dit_sparse("bench", *words).refusal()
