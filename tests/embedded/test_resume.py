"""The training's program in several calls: what a call has done is there for the next one."""

import json
import sys
import time

import pytest
import torch

from dit_sparse.pipelines.embedded import curve, folder, model, state, train

TINY = ["--scale", ".125", "--device", "cpu", "--compile", "0", "--reserve", "0", "--words-seconds", "2", "--wide", "0"]


def call(monkeypatch, path, *words):
    """One call of the program, as from the shell."""
    monkeypatch.setattr(sys, "argv", ["train", "--state", str(path), *TINY, *words])
    monkeypatch.setattr(train, "_BEGIN", time.time())
    train.main()


def test_calls_resume_one_another(tmp_path, monkeypatch):
    stages = ["--stages", "images=3,preview=0,joint=0"]
    start = ["--start", str(folder())]
    call(monkeypatch, tmp_path, *start, "--stages", "images=0,preview=0,joint=0", "--seconds", "60")
    words, facts = state.load(tmp_path)
    assert facts["words_done"] and facts["calls"] == 1
    assert "transformer.patch_embedding.weight" in words  # the start's transformer is not lost with the words
    with pytest.raises(FileNotFoundError, match="no trained transformer"):
        train.load_parts(tmp_path)
    call(monkeypatch, tmp_path, *stages, "--seconds", "60")
    trained, facts = state.load(tmp_path)
    assert facts["calls"] == 2 and facts["spent"]["images"] >= 1
    same = [name for name in words if name.startswith(("text_encoder.", "vae."))]
    assert same and all(torch.equal(words[name], trained[name]) for name in same)  # frozen, not trained again
    assert not torch.equal(words["transformer.proj_out.weight"], trained["transformer.proj_out.weight"])
    vae, text_encoder, transformer = train.load_parts(tmp_path, shipped=False)
    average = state.take(trained, "average.transformer")
    assert set(average) == set(transformer.state_dict())
    assert torch.equal(text_encoder.shared.weight, trained["text_encoder.shared.weight"])


def test_a_call_too_short_for_the_words_says_so(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="too little time"):
        call(monkeypatch, tmp_path, "--start", str(folder()), "--seconds", "1")


def test_a_state_of_the_earlier_program_is_refused_but_can_be_loaded(tmp_path, monkeypatch):
    parts = {
        "vae": model.build_vae(),
        "text_encoder": model.build_text_encoder(),
        "transformer": model.build_transformer(),
    }
    tensors = {name: value for part, module in parts.items() for name, value in state.put(part, module).items()}
    for part in ("text_encoder", "transformer"):
        tensors |= {"average." + n: (v * 0.5).bfloat16() for n, v in state.put(part, parts[part]).items()}
    norm = {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 16}
    state.save(tmp_path, tensors, {"vae_done": True, "norm": norm, "spent": {"images": 5.0}})
    with pytest.raises(SystemExit, match="earlier version"):
        call(monkeypatch, tmp_path, "--seconds", "60")
    loaded = train.load_parts(tmp_path, shipped=False)[1]
    raw = parts["text_encoder"].shared.weight
    assert torch.allclose(loaded.shared.weight, raw * 0.5, rtol=0.01)  # the average that goes with the transformer's


def test_the_curve_counts_minutes_through_all_calls_of_a_log(tmp_path):
    log = [
        {"at": 10.0, "call": 1, "stage": "start"},
        {"at": 60.0, "call": 1, "stage": "images", "step": 50, "loss": {"256x1": 0.5}},
        {"at": 120.0, "call": 1, "stage": "images", "done": True},
        {"at": 60.0, "call": 2, "stage": "joint", "step": 50, "loss": {"256x1": 0.25, "512x33": 0.125}},
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(record) for record in log))
    losses, stages = curve.points(tmp_path / "log.jsonl")
    assert losses == {"256x1": [(1.0, 0.5), (3.0, 0.25)], "512x33": [(3.0, 0.125)]}
    assert stages == [(1.0, "images"), (3.0, "joint")]
