"""`tune` on a tiny random DiT: targets, determinism, resuming, and the pipe as it was found."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse import Preset, SparseProc, disable, enable, summary, tune
from dit_sparse.bridge import binding_of
from dit_sparse.pipelines.hosts import call_host
from dit_sparse.tuning.cost import CostTable
from dit_sparse.tuning.preset import TunedPreset
from dit_sparse.tuning.probe import bucket_edges, forced_buckets
from dit_sparse.tuning.run import as_found
from tests.tuning.tiny import CALL, PROMPTS, SMALL, build

COSTS = CostTable.modelled()


def quick(pipe: Any, target: str, **options: Any) -> TunedPreset:
    found = tune(pipe, target, PROMPTS, **{"mode": "quick", "call": CALL, "costs": COSTS, **options})
    assert isinstance(found, TunedPreset)
    return found


def looks(pipe: Any) -> dict[str, Any]:
    """What a user could notice of a pipeline."""
    model = pipe.transformer
    return {"processors": {n: id(p) for n, p in model.attn_processors.items()}, "scheduler": id(pipe.scheduler),
            "bound": binding_of(model) is not None, "bar": dict(getattr(pipe, "_progress_bar_config", {})),
            "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
            "random": torch.get_rng_state().sum().item(), "timesteps": id(getattr(pipe.scheduler, "timesteps", None))}


@pytest.mark.slow  # the acceptance checks of the tiny DiT that are not of the small one below
def test_targets(tmp_path: Path) -> None:
    """Plans for rising targets are ever denser; a target beyond all rounding is met by the dense plan alone."""
    pipe, state = build(), tmp_path  # dense run and probe serve all targets
    before = looks(pipe)
    found = [quick(pipe, f"psnr>={db}", state=state) for db in (25, 30, 35)]
    assert looks(pipe) == before
    densities = [preset.table.density() for preset in found]
    assert densities == sorted(densities) and densities[0] < 0.9
    assert all(preset.met and preset.evidence[0]["psnr"] >= db for preset, db in zip(found, (25, 30, 35), strict=True))
    assert quick(pipe, "psnr>=200", state=state).table.all_dense
    even = quick(pipe, "speedup>=1", state=state)
    assert even.met and even.evidence[0]["attention_speedup"] >= 1
    fast = quick(pipe, "speedup>=1.5", state=state)
    assert fast.met and fast.evidence[0]["attention_speedup"] >= 1.5
    assert found[0].buckets == (0, 1, 3, 4, 8, 10) and found[0].grid == (8, 16, 16)
    assert not found[0].choices[0].any(), "the first bucket is dense"

    # The clip that was verified is the clip that the preset makes.
    enable(pipe, preset=found[0])
    made = call_host(pipe, {"prompt": PROMPTS[1], **CALL}, seed=1)
    disable(pipe)
    dense = call_host(pipe, {"prompt": PROMPTS[1], **CALL}, seed=1)
    psnr = -10 * torch.log10((made - dense).square().mean())
    assert float(psnr) == pytest.approx(found[0].evidence[0]["psnr"], abs=0.01)

    # Saved, loaded and applied it makes the very same clip; on another grid it is refused.
    found[0].save(state / "preset.json")
    enable(pipe, preset=str(state / "preset.json"))
    assert torch.equal(made, call_host(pipe, {"prompt": PROMPTS[1], **CALL}, seed=1))
    with pytest.raises(ValueError, match="not 8x8x8 .* run dit-sparse tune"):
        call_host(pipe, {"prompt": PROMPTS[1], **CALL, "height": 128, "width": 128}, seed=1)
    disable(pipe)

    # What was measured before the loop is told.
    for preset in found:
        assert preset.checks is not None and preset.checks[0]["patterns"] == "all"
        assert all(min(check["measured"]) > 0 for check in preset.checks)


SHORT = {"call": {**SMALL, "num_inference_steps": 9, "guidance_scale": 1.0}, "costs": COSTS}
FEW = {**CALL, "height": 128, "width": 128, "num_inference_steps": 4}


def small() -> Any:
    return build(layers=2, heads=2, gain=2)


def test_the_same_twice_and_as_a_file(tmp_path: Path) -> None:
    pipe = small()
    COSTS.save(tmp_path / "costs.json")
    first = quick(pipe, "psnr>=30", **SHORT)
    again = quick(pipe, "psnr>=30", **{**SHORT, "costs": tmp_path / "costs.json"})  # a stored table
    assert not first.table.all_dense
    assert first.to_dict() == again.to_dict()
    first.save(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert Preset.load(tmp_path / "a.json").to_dict() == first.to_dict()


class Stop(BaseException):
    """As Ctrl-C does."""


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.tuning.run import Runner

    pipe = small()
    want = quick(pipe, "psnr>=30", **SHORT)
    made: list[str] = []
    plain = Runner.clips

    def counted(self: Any, prompts: list[str], seeds: list[int]) -> Any:
        made.extend(prompts)
        if len(made) == 3:
            raise Stop
        return plain(self, prompts, seeds)

    monkeypatch.setattr(Runner, "clips", counted)
    before = looks(pipe)
    with pytest.raises(Stop):
        quick(pipe, "psnr>=30", state=tmp_path, **SHORT)
    assert looks(pipe) == before
    whole = len(made) - 1
    shares: list[float] = []
    found = quick(pipe, "psnr>=30", state=tmp_path, progress=lambda share, text, left: shares.append(share), **SHORT)
    assert found.to_dict() == want.to_dict()
    assert shares == sorted(shares) and shares[-1] == 1.0
    rest = len(made) - whole - 1
    made.clear()
    assert quick(pipe, "psnr>=30", state=tmp_path, **SHORT).to_dict() == want.to_dict()
    assert rest > 0 and not made, "all is known by now"
    with pytest.raises(ValueError, match="belongs to another run: seed=0, not 7"):
        quick(pipe, "psnr>=30", state=tmp_path, seed=7, **SHORT)


def test_clips_made_together_are_those_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_sparse.tuning.run import Runner

    pipe, prompts = small(), [f"a {colour} circle" for colour in ("red", "blue", "green", "pink")]
    alone = tune(pipe, "psnr>=30", prompts, "quick", **SHORT)
    plain, sizes = Runner.clips, list[int]()

    def counted(self: Any, prompts: list[str], seeds: list[int]) -> Any:
        sizes.append(len(prompts))
        return plain(self, prompts, seeds)

    monkeypatch.setattr(Runner, "clips", counted)
    found = tune(pipe, "psnr>=30", prompts, "quick", batch=2, **SHORT)
    assert isinstance(found, TunedPreset) and isinstance(alone, TunedPreset)
    assert sizes[:4] == [1, 2, 2, 1], "one under the oracle, two dense, then a plan's three"
    assert found.evidence[0]["psnr"] == pytest.approx(alone.evidence[0]["psnr"], abs=0.05)
    assert (found.choices == alone.choices).all()
    for wrong, target in ((0, "psnr>=30"), (2.0, "psnr>=30"), (2, "speedup>=1.5")):
        with pytest.raises(ValueError, match="batch="):
            quick(pipe, target, batch=wrong, **SHORT)


def test_a_failure_leaves_the_pipe_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = small()
    enable(pipe, "sol", density=0.5, dense_steps=0.5)
    proc = binding_of(pipe.transformer).session.proc  # type: ignore[union-attr]
    scheduler = pipe.scheduler
    monkeypatch.setattr("dit_sparse.tuning.probe.probe_heads", lambda *a, **k: 1 / 0)
    with pytest.raises(ValueError, match="division by zero"):
        quick(pipe, "psnr>=30", **SHORT)
    assert binding_of(pipe.transformer).session.proc is proc and pipe.scheduler is scheduler  # type: ignore[union-attr]
    disable(pipe)
    untouched = small()
    calls = [call_host(p, {"prompt": "a red circle", **SMALL}, seed=0) for p in (pipe, untouched)]
    assert torch.equal(*calls)


@pytest.mark.parametrize("place", [
    "dit_sparse.tuning.steps.enable", "dit_sparse.tuning.steps.Watcher", "dit_sparse.tuning.probe.probe_heads",
    "dit_sparse.tuning.steps.measure_costs", "vae"])
def test_an_interrupt_anywhere_leaves_the_pipe_as_it_was(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    pipe = small()
    before = looks(pipe)
    monkeypatch.setattr(*((pipe.vae, "decode", stop) if place == "vae" else (place, stop)))
    with pytest.raises(KeyboardInterrupt):
        quick(pipe, "psnr>=30", **{**SHORT, "costs": None})
    assert looks(pipe) == before


def test_a_state_is_of_these_weights_alone(tmp_path: Path) -> None:
    call = {**SMALL, "num_inference_steps": 2, "guidance_scale": 1.0}
    pipe = small()
    quick(pipe, "psnr>=10", state=tmp_path, call=call)
    with torch.no_grad():
        pipe.transformer.blocks[1].ffn.net[2].weight.mul_(1.01)
    with pytest.raises(ValueError, match="belongs to another run: weights="):
        quick(pipe, "psnr>=10", state=tmp_path, call=call)


def test_a_cache_that_is_on_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = small()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="a step cache is on"):
        quick(pipe, "psnr>=30", **SHORT)
    assert pipe.transformer.is_cache_enabled


def test_it_works_with_group_offloading() -> None:
    want = quick(small(), "psnr>=30", **SHORT).to_dict()
    pipe = small()
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    assert quick(pipe, "psnr>=30", **SHORT).to_dict() == want


def test_standard_measures_the_ceiling_and_refuses_what_lies_above(tmp_path: Path) -> None:
    pipe = small()
    prompts = [*PROMPTS, "a blue star"]
    options: dict[str, Any] = {"call": FEW, "costs": COSTS, "patterns": "soft", "state": tmp_path}
    found = tune(pipe, "psnr>=30", prompts, **options)
    assert isinstance(found, TunedPreset) and found.ceiling_db is not None and 80 < found.ceiling_db < 200
    assert {c.pattern for c in found.candidates} <= {"dense", "soft"}
    assert found.buckets == (0, 1, 2, 3, 4)  # few steps: a bucket each, none forced
    with pytest.raises(ValueError, match=r"infeasible: rounding alone gives \d+\.\d dB$"):
        tune(pipe, "psnr>=200", prompts, **options)


def test_ssim_as_a_target_with_measured_costs() -> None:
    found = quick(small(), "ssim>=0.9", call={**SMALL, "num_inference_steps": 3}, costs=None, statistic="min")
    assert found.met and found.evidence[0]["ssim"] >= 0.9 and found.evidence[0]["speedup"] > 0


@pytest.mark.parametrize(("target", "options", "said"), [
    ("psnr>30", {}, "target='psnr>30' is not allowed"), ("psnr>=-3", {}, "is not allowed"),
    ("ssim>=2", {}, "number from 0 to 1"), ("psnr>=30", {"mode": "fast"}, "mode='fast'"),
    ("psnr>=30", {"statistic": "max"}, "statistic='max'"), ("psnr>=30", {"patterns": ["x"]}, "patterns='x'"),
    ("psnr>=30", {"prompts": ["one"]}, "too few"), ("psnr>=30", {"prompts": ["a", "a"]}, "repeated"),
    ("psnr>=30", {"seed": -1}, "seed=-1"), ("psnr>=30", {"call": {"colour": 3}}, "takes no argument 'colour'"),
])
def test_wrong_arguments_are_refused_in_one_line(target: str, options: dict[str, Any], said: str) -> None:
    pipe = small()
    before = looks(pipe)
    with pytest.raises(ValueError) as error:
        tune(pipe, target, **{"prompts": PROMPTS, "mode": "quick", **options})
    assert said in str(error.value) and "\n" not in str(error.value)
    assert looks(pipe) == before


def test_a_bare_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="use a Diffusers pipeline"):
        tune(small().transformer, "psnr>=30")


def test_as_found_keeps_an_enabled_method_through_an_exception() -> None:
    pipe = small()
    proc = SparseProc("svg")
    enable(pipe, proc)
    with pytest.raises(RuntimeError), as_found(pipe):
        assert binding_of(pipe.transformer) is None
        raise RuntimeError
    assert binding_of(pipe.transformer).session.proc is proc  # type: ignore[union-attr]


def test_as_found_knows_which_of_two_denoisers_was_enabled() -> None:
    from diffusers import WanPipeline

    one, two = small(), small()
    pipe = WanPipeline(one.tokenizer, one.text_encoder, one.vae, one.scheduler, one.transformer, two.transformer, 0.5)
    enable(pipe.transformer, "svg", density=0.5)
    with as_found(pipe):
        assert binding_of(pipe.transformer) is None
    assert [binding_of(m) is not None for m in (pipe.transformer, pipe.transformer_2)] == [True, False]


def test_two_denoisers_share_a_plan() -> None:
    from diffusers import WanPipeline

    one, two = small(), small()
    pipe = WanPipeline(one.tokenizer, one.text_encoder, one.vae, one.scheduler, one.transformer, two.transformer, 0.5)
    pipe.set_progress_bar_config(disable=True)
    call = {**SMALL, "num_inference_steps": 2, "guidance_scale": 1.0}
    found = quick(pipe, "psnr>=20", call=call)
    enable(pipe, preset=found)
    pipe("a red circle", **call, output_type="latent")
    assert summary(pipe).per_step.keys() == {0, 1} and not summary(pipe).fallbacks


def test_calls_that_stay_dense() -> None:
    """Leading steps and layers that are kept dense: the same calls as with `enable` and these settings."""
    pipe = small()
    found = quick(pipe, "psnr>=15", dense_steps=0.2, dense_layers=1, **SHORT)
    assert not found.table.all_dense and found.buckets[:2] == (0, 1)
    later = quick(pipe, "psnr>=15", dense_steps=3, **SHORT)
    assert later.buckets[:2] == (0, 3) and not later.choices[0].any() and later.choices[1:, 0].any()
    assert not found.choices[:, 0].any() and found.choices[1:, 1].any()
    for wrong in ({"dense_steps": 9}, {"dense_steps": 2.0}, {"dense_layers": -1}):
        with pytest.raises(ValueError, match="dense_"):
            quick(pipe, "psnr>=15", **wrong, **SHORT)


def test_buckets() -> None:
    assert bucket_edges(10, 2) == (0, 2, 3, 4, 8, 10) and forced_buckets(10, 2) == 1 and forced_buckets(10, 0) == 0
    assert bucket_edges(4, 2) == (0, 2, 3, 4) and bucket_edges(10, 0) == bucket_edges(10)
    assert bucket_edges(50) == (0, 5, 13, 20, 38, 50) and bucket_edges(20) == (0, 2, 5, 8, 15, 20)
    assert bucket_edges(4) == (0, 1, 2, 3, 4) and forced_buckets(4) == 0 and forced_buckets(50) == 1
