"""Comparisons on a tiny model: identities, and the runner's work on several methods."""

from pathlib import Path

import pytest

from dit_sparse import SparseProc
from dit_sparse.eval.compare import compare
from dit_sparse.eval.fidelity import CAP
from dit_sparse.eval.run import FidelityWork, fidelity_jobs, job_key, main, run
from tests.tiny_wan import build_tiny_wan, save_tiny_wan

SHAPE = {"frames": 5, "height": 32, "width": 48, "steps": 3, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = build_tiny_wan()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_dense_against_dense_is_the_same_clip(pipe) -> None:
    numbers, dense, sparse = compare(pipe, "a red circle", SparseProc("dense"), shape=SHAPE)
    assert numbers.psnr > 60 and numbers.ssim == pytest.approx(1, abs=1e-3)
    assert numbers.density == 1 and numbers.sparse_density is None
    assert dense.shape == sparse.shape == (5, 3, 32, 48)


def test_the_pipeline_is_left_untouched(pipe) -> None:
    before = pipe.transformer.blocks[0].attn1.processor
    compare(pipe, "a red circle", SparseProc("svg"), shape=SHAPE)
    assert pipe.transformer.blocks[0].attn1.processor is before


def test_numbers_belong_together(pipe) -> None:
    proc = SparseProc("svg", density=0.3, dense_layers=0, dense_steps=0)
    numbers, dense, sparse = compare(pipe, "a red circle", proc, shape=SHAPE, seed=1)
    assert numbers.speedup == numbers.dense_seconds / numbers.sparse_seconds
    assert numbers.attention_seconds <= numbers.sparse_seconds
    assert numbers.density == pytest.approx(numbers.sparse_density)
    again, _, second = compare(pipe, "a red circle", proc, shape=SHAPE, seed=1, dense=(dense, 1.0))
    assert again.dense_seconds == 1.0
    assert again.psnr == numbers.psnr and (sparse == second).all()


def test_a_dense_clip_serves_all_methods(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_sparse.eval.compare as module

    runs = []
    timed = module.timed
    monkeypatch.setattr(module, "timed", lambda *args: runs.append(1) or timed(*args))
    jobs = fidelity_jobs(["a red circle", "a blue star"], ["dense", "svg"], [0], SHAPE)
    results = run(jobs, FidelityWork(pipe), tmp_path / "results.jsonl")
    assert len(runs) == 2 * (1 + 2)  # for each prompt one dense clip and two methods
    assert results[0]["psnr"] > 60 and results[2]["psnr"] > 60
    assert all(0 < r["psnr"] <= CAP for r in results)


def test_command_prints_means(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import dit_sparse.pipelines.text_to_video as module

    small = module.text_to_video
    monkeypatch.setattr(module, "text_to_video", lambda *a, **k: small(*a, **{**k, **SHAPE}))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--methods", "dense", "--output", tmp_path / "results.jsonl"]
    model = save_tiny_wan(tmp_path / "wan")
    assert main([*map(str, words), "--model", str(model)]) == 0
    assert "dense: psnr" in capsys.readouterr().out
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_a_job_names_model_and_options() -> None:
    def keys(**given) -> set[str]:
        return {job_key(job) for job in fidelity_jobs(["a"], ["svg"], [0], SHAPE, **given)}

    assert keys() == keys(model="embedded", options={"radial": {"density": 0.1}})
    assert not keys() & keys(model="other")
    assert not keys() & keys(options={"svg": {"density": 0.1}})


WRONG = {
    "prompts": {"--prompts": "none.txt"},
    "folder": {"--output": "none/results.jsonl"},
    "method": {"--methods": "magic"},
    "seed": {"--seeds": "-1"},
    "foreign file": {"--output": "prompts.txt"},
    "model": {"--model": "nowhere"},
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\n")
    words = {"--prompts": "prompts.txt", "--methods": "svg", "--output": "results.jsonl", **WRONG[case]}
    assert main([word for pair in words.items() for word in pair]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "error: " in err
    assert [file.name for file in tmp_path.iterdir()] == ["prompts.txt"]
