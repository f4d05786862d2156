"""A denoising step's time is put together from a few layers: the sums, and what the row says of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dit_sparse import SparseFallbackError
from dit_sparse.eval import step_speed
from dit_sparse.eval.step_speed import GEOMETRIES, Geometry, bench_step


def tiny_wan() -> Geometry:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"hidden_states": torch.randn(1, 4, 4, 16, 16, dtype=dtype), "timestep": torch.full((1,), 999.0),
                "encoder_hidden_states": torch.randn(1, 8, 16, dtype=dtype)}

    small = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 16,
             "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
    return Geometry("tiny", "a tiny Wan", "WanTransformer3DModel", {"num_layers": 10}, inputs, 256, small)


def test_rows_of_a_tiny_model() -> None:
    seen: list[str] = []
    rows = bench_step(tiny_wan(), ["svg", "radial"], density=0.5, device="cpu", dtype="fp32", compiled=False,
                      seconds=0.01, on_row=lambda row: seen.append(row.what))
    assert [row.what for row in rows] == seen == ["dense", "svg", "radial"]
    dense, svg = rows[0], rows[1]
    assert dense.density == 1 and dense.speedup == 1 and dense.backend == "dense"
    assert svg.density < 1 and svg.backend == "cpu" and svg.fallbacks == {}
    for row in rows:
        assert row.step_seconds == pytest.approx((row.rest_ms + 10 * row.layer_ms["num_layers"]) / 1e3)
        assert len(row.cells()) == len(step_speed.COLUMNS)


def test_scaling_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(_geometry, counts, proc, *_rest):
        cost = {"double": 2.0, "single": 1.0} if proc is None else {"double": 1.0, "single": 0.25}
        return step_speed._Timed(5.0 + sum(cost[kind] * number for kind, number in counts.items()), 1.0)

    monkeypatch.setattr(step_speed, "_time_model", timed)
    model = Geometry("two", "two kinds", "", {"double": 20, "single": 40}, lambda *_: {}, 1)
    dense, sparse = bench_step(model, ["radial"], device="cpu")
    assert dense.layer_ms == {"double": 2.0, "single": 1.0} and dense.rest_ms == 5.0
    assert dense.step_seconds == pytest.approx(0.085)
    assert sparse.step_seconds == pytest.approx(0.035) and sparse.speedup == pytest.approx(0.085 / 0.035)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_are_what_diffusers_builds(name: str) -> None:
    """The configuration is accepted, and the inputs have the tokens that the table names (on the meta device)."""
    geometry = GEOMETRIES[name]
    model = step_speed.build(geometry, dict.fromkeys(geometry.kinds, 1), "meta", torch.bfloat16)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    inputs = geometry.inputs("meta", torch.bfloat16)
    hidden = inputs["hidden_states"]
    if hidden.dim() == 5:
        patch = model.config.patch_size
        patch = tuple(patch) if not isinstance(patch, int) else (model.config.patch_size_t, patch, patch)
        video = 1
        frames_first = geometry.cls == "CogVideoXTransformer3DModel"
        sizes = (hidden.shape[1], *hidden.shape[3:]) if frames_first else hidden.shape[2:]
        for size, cut in zip(sizes, patch, strict=True):
            video *= size // cut
        joint = geometry.cls != "WanTransformer3DModel"
        text = inputs["encoder_hidden_states"].shape[1] if joint else 0
    else:
        video, text = hidden.shape[1], inputs["encoder_hidden_states"].shape[1]
    assert geometry.tokens == video + text
    assert set(geometry.kinds) <= set(model.config)


def test_an_unknown_option_of_a_method_never_passes() -> None:
    with pytest.raises(ValueError, match="backend"):
        bench_step(tiny_wan(), ["svg"], device="cpu", dtype="fp32", compiled=False, seconds=0.01, backend="magic")


def test_times_too_short_to_tell_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(_geometry, counts, proc, *_rest):
        layers = counts["layers"]
        fallbacks = {} if proc is None else {"text": layers}
        return step_speed._Timed(4.0 if proc else 4.0 * layers + (layers > 1), 1.0, fallbacks=fallbacks)

    monkeypatch.setattr(step_speed, "_time_model", timed)
    dense, sparse = bench_step(Geometry("one", "", "", {"layers": 10}, lambda *_: {}, 1), ["radial"], device="cpu")
    assert dense.rest_ms == 0 and not dense.short  # a layer of 4.5 ms in a model of 4
    assert sparse.layer_ms == {"layers": 0.0} and sparse.short and sparse.cells()[7:9] == ["0.004?", "11.25?"]
    assert sparse.fallbacks == {"text": step_speed.FEW + step_speed.MORE}
    assert "too short" in step_speed.note([dense, sparse]) and "too short" not in step_speed.note([dense])


def test_a_call_that_cannot_run_sparse_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SparseFallbackError, match="triton"):
        bench_step(tiny_wan(), ["svg"], device="cpu", dtype="fp32", compiled=False, seconds=0.01, backend="triton")


@pytest.mark.parametrize(("words", "expected"), [
    (["--density", "0"], "(0, 1]"), (["--method", "magic"], "radial"), (["--method", "dense"], "radial"),
    (["--backend", "magic"], "cpu"), (["--device", "cuda:99"], "is not there"),
    (["--device", "cpu", "--model", "wan-14b-720p"], "needs a GPU"),
    (["--device", "cpu", "--fp8", "both"], "--fp8 cannot run here"), (["--fp8", "all"], "linear"),
])
def test_misuse_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], expected: str
) -> None:
    monkeypatch.setattr(step_speed, "_time_model", None)
    with pytest.raises(SystemExit, match="2"):
        step_speed.main(words)
    assert expected in capsys.readouterr().err


def test_the_folder_of_the_results_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step_speed, "_time_model", lambda _geometry, counts, *_: step_speed._Timed(
        1.0 + sum(counts.values()), 1.0))
    out = tmp_path / "new" / "step.json"
    assert step_speed.main(["--device", "cpu", "--method", "svg", "--out", str(out)]) == 0
    assert [row["what"] for row in json.loads(out.read_text())["rows"]] == ["dense", "svg"]


def test_rungs_in_8_bit_floats_are_timed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []

    def timed(_geometry, counts, proc, device, dtype, compiled, seconds, linear8, look):
        seen.append((proc and (proc.method.name, proc.settings.backend), linear8, look))
        return step_speed._Timed(1.0 + 2.0 * counts["layers"], 10.0 if proc is None else 10.4)

    monkeypatch.setattr(step_speed, "_time_model", timed)
    model = Geometry("one", "", "", {"layers": 10}, lambda *_: {}, 1)
    rows = bench_step(model, ["radial"], device="cpu", fp8=["linear", "both"], profiled=True)
    assert [row.what for row in rows] == ["dense", "dense, fp8 linear", "radial", "radial, fp8 linear",
                                          "radial, fp8 both"]
    assert seen[::2] == [(None, False, False), (None, True, False), (("radial", None), False, False),
                         (("radial", None), True, False), (("radial", "fp8"), True, False)]
    assert all(look for *_, look in seen[1::2])
    assert rows[0].cells()[-1] == "+0.0 %" and rows[2].cells()[-1] == "+4.0 %"


def test_8_bit_layers_and_the_profile_of_a_real_model() -> None:
    rows = bench_step(tiny_wan(), ["radial"], density=0.5, device="cpu", dtype="bf16", compiled=False, seconds=0.01,
                      fp8=["linear"], profiled=True)
    assert [row.what for row in rows][2:] == ["radial", "radial, fp8 linear"]
    for row in rows:
        assert row.profile["num_layers"]["self-attention"] > 0 and row.profile["num_layers"]["matrix products"] > 0
        assert "3 layers: " in row.profile_lines[0] and row.above_dense is None and row.cells()[-1] == ""
    assert rows[2].profile["num_layers"]["plan and checks"] > 0
