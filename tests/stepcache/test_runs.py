"""Step caches in runs of a tiny pipeline: true steps and counts, methods whose own refresh is skipped, offloading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig, WanPipeline
from diffusers.hooks.hooks import HookRegistry

from dit_sparse import disable, enable, summary
from dit_sparse.modelid import config_hash
from dit_sparse.stepcache import TeaCacheConfig, active_of
from dit_sparse.stepcache.clock import Clock
from tests.stepcache.runs import Pipe
from tests.tiny_wan import build_tiny_wan

STEPS = 12
# The steps that MagCache computes are known: 2 skipped after each computed one, from step 3 on.
EVERY_THIRD = MagCacheConfig(threshold=9.0, max_skip_steps=2, retention_ratio=0.25, num_inference_steps=STEPS,
                             mag_ratios=[1.0] * STEPS)
CACHES: dict[str, Any] = {
    "first_block": FirstBlockCacheConfig(threshold=0.5),
    "taylorseer": "taylorseer",
    "magcache": EVERY_THIRD,
    "pab": "pab",
    "teacache": TeaCacheConfig(coefficients=(0.0, 0.1), threshold=0.25),  # every third step
}


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: WanPipeline, steps: int = STEPS, **kw: Any) -> torch.Tensor:
    return pipe("a red circle", height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=3.0,
                generator=torch.Generator().manual_seed(0), output_type="latent", max_sequence_length=16, **kw).frames


@pytest.mark.parametrize("name", CACHES)
def test_counts_bytes_and_steps(pipe: WanPipeline, name: str) -> None:
    untouched = run(pipe)
    enable(pipe, "radial", dense_steps=2, dense_layers=0, step_cache=CACHES[name])
    first, again = run(pipe), run(pipe)
    assert torch.equal(first, again), "the second run begins afresh"
    report = summary(pipe)
    layers = len(pipe.transformer.blocks)
    assert report.step_cache == name and report.steps == report.num_steps == STEPS
    assert report.calls + report.skipped_calls == STEPS * 2 * layers and report.skipped_calls > 0
    assert report.skipped_steps == len(report.skipped_per_step) and all(0 < x <= 1 for x in
                                                                        report.skipped_per_step.values())
    assert 0 not in report.skipped_per_step, "the first step is computed by every cache"
    whole = {step for step, share in report.skipped_per_step.items() if share == 1}
    assert whole.isdisjoint(report.per_step) and whole | set(report.per_step) == set(range(STEPS))
    assert all(density == 1 for step, density in report.per_step.items() if step < 2)
    assert all(density < 1 for step, density in report.per_step.items() if step >= 2)
    assert report.step_cache_bytes > 0 and not report.fallbacks
    assert active_of(pipe.transformer).nbytes == 0, "nothing is held once the run is over"
    assert f"{name}: answered {report.skipped_calls} of" in str(report)
    disable(pipe)
    assert not pipe.transformer.is_cache_enabled and torch.equal(run(pipe), untouched)


def test_magcache_skips_these_steps_for_both_branches(pipe: WanPipeline) -> None:
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache=EVERY_THIRD)
    run(pipe)
    assert summary(pipe).skipped_per_step == dict.fromkeys((3, 4, 6, 7, 9, 10), 1.0)
    assert summary(pipe).skipped_calls == 6 * 2 * len(pipe.transformer.blocks)
    disable(pipe)


def test_magcache_keeps_to_the_true_step_of_a_run_that_begins_late() -> None:
    from tests.bridge.hosts import HOSTS

    host = HOSTS[0]
    own = Pipe(host.build())
    enable(own, "dense", step_cache=EVERY_THIRD)
    own.run({"cond": host.inputs(1)}, STEPS, begin=5)
    assert set(summary(own).skipped_per_step) == {6, 7, 9, 10}, "step 5 has nothing to reuse"


@pytest.mark.parametrize("method", ["svg2", "sparsed", "rettention", "adaspa", "svg", "sparge"])
def test_a_skipped_step_was_the_one_to_refresh(pipe: WanPipeline, method: str) -> None:
    """Patterns, centroids and shares that were due at skipped steps are made at the next computed one."""
    options: dict[str, Any] = {"svg2": {"iter_init": 2}, "rettention": {"period": 3}, "sparsed": {"every": 3}}.get(
        method, {})
    # The first sparse step, 3, is skipped, and so is every other on which something is due.
    enable(pipe, method, dense_steps=3, dense_layers=0, step_cache=EVERY_THIRD, **options)
    result = run(pipe)
    report = summary(pipe)
    assert torch.isfinite(result).all() and not report.fallbacks
    assert set(report.per_step) == {0, 1, 2, 5, 8, 11} and report.sparse_calls == 3 * 2 * len(pipe.transformer.blocks)
    disable(pipe)


def test_remembered_masks_age_by_steps_not_by_calls(pipe: WanPipeline) -> None:
    layers = 2 * len(pipe.transformer.blocks)
    for refresh, reused in ((3, 0), (4, 1), (7, 2)):  # computed, sparse: 5, 8, 11
        enable(pipe, "sparge", dense_steps=3, dense_layers=0, refresh=refresh, step_cache=EVERY_THIRD)
        run(pipe)
        assert summary(pipe).reused_masks == reused * layers
    disable(pipe)


def test_the_share_of_rettention_grows_by_steps() -> None:
    """Steps 5 and 8 are computed, 6 and 7 skipped: three steps on, not one use."""
    from dit_sparse.memory import Memory, State
    from dit_sparse.operators_statistics import ReuseShare

    class Call:
        state: State
        query = key = value = torch.zeros(1, 4, 1, 2)

    memory, seen = Memory(), []
    call = Call()
    call.state = State(memory, "place", step=5)
    call.state.keep("share", torch.full((1, 1, 4), 0.5))
    call.state.keep("residual", torch.zeros(1, 4, 1, 2))
    for step in (6, 9):
        call.state = State(memory, "place", step=step)
        attended = torch.ones(1, 4, 1, 2), torch.zeros(1, 1, 4)
        _, shifted = ReuseShare(0.1).run(call, None, lambda *_, attended=attended: attended)
        seen.append(float(shifted[0, 0, 0].neg().exp()))
    assert seen == pytest.approx([0.5, 0.5 + 3 * 0.1])


@pytest.mark.parametrize("name", CACHES)
def test_every_cache_with_our_offloading(pipe: WanPipeline, name: str) -> None:
    results = []
    for offload in (False, True):
        enable(pipe, "svg", density=0.5, dense_steps=1, dense_layers=0, refresh=3, offload=offload,
               step_cache=CACHES[name])
        results.append(run(pipe))
        assert summary(pipe).skipped_calls and not summary(pipe).fallbacks
    assert torch.equal(*results)
    disable(pipe)


def test_two_denoisers(pipe: WanPipeline) -> None:
    both = WanPipeline(**{**pipe.components, "transformer_2": build_tiny_wan(1).transformer}, boundary_ratio=0.7)
    both.set_progress_bar_config(disable=True)
    for refused in (EVERY_THIRD, TeaCacheConfig(coefficients=(0.0,), threshold=1.0)):
        with pytest.raises(ValueError, match="takes turns with two"):
            enable(both, "radial", step_cache=refused)
    assert not both.transformer.is_cache_enabled
    enable(both, "radial", dense_steps=0, dense_layers=0, step_cache=FirstBlockCacheConfig(threshold=9.0))
    run(both)
    report = summary(both)
    layers = len(both.transformer.blocks)
    assert report.steps == STEPS and report.calls + report.skipped_calls == STEPS * 2 * layers
    assert report.skipped_calls == (STEPS - 2) * 2 * (layers - 1), "each denoiser computes its first step"
    disable(both)
    assert not both.transformer.is_cache_enabled and not both.transformer_2.is_cache_enabled


def test_short_runs_and_wrong_lengths_are_noted(pipe: WanPipeline) -> None:
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache=EVERY_THIRD)
    run(pipe, steps=6)
    notes = " ".join(summary(pipe).notes)
    assert "with 6 every skipped one shows" in notes and "num_inference_steps is 12, the run has 6 steps" in notes
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache=FirstBlockCacheConfig(threshold=0.0))
    run(pipe)
    assert any("answered no attention call" in note for note in summary(pipe).notes)
    disable(pipe)


def test_the_users_configuration_is_not_changed(pipe: WanPipeline) -> None:
    config = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)
    enable(pipe, "radial", step_cache=config)
    assert config.current_timestep_callback is None
    assert isinstance(pipe.transformer._cache_config.current_timestep_callback, Clock)
    disable(pipe)
    with pytest.raises(ValueError, match="enable it on the pipeline"):
        enable(pipe.transformer, "radial", step_cache=config)


def test_a_compiler_does_not_look_at_how_the_clock_finds_its_run(pipe: WanPipeline) -> None:
    """Its guards would name every transformer that is bound in this process, and fail when one of them is gone."""
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache="pab")
    clock = pipe.transformer._cache_config.current_timestep_callback
    torch._dynamo.reset()
    told = torch._dynamo.explain(lambda x: x.sin() * clock())(torch.ones(3))
    assert told.out_guards and not any("_bindings" in str(guard.name) for guard in told.out_guards)
    torch._dynamo.reset()
    disable(pipe)


def test_the_clock_tells_the_timestep_and_copies_the_list_once(pipe: WanPipeline) -> None:
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache="pab")
    clock, values = pipe.transformer._cache_config.current_timestep_callback, []
    assert clock() == 1000.0, "before a run nothing is skipped"
    run(pipe, callback_on_step_end=lambda pipe, i, t, kw: (values.append((clock(), float(t))), kw)[1])
    assert values and all(a == b for a, b in values)
    assert len(values) == STEPS and clock._timesteps is pipe.scheduler.timesteps
    disable(pipe)


def test_a_cache_of_the_user_stays_and_is_counted(pipe: WanPipeline) -> None:
    model = pipe.transformer
    model.enable_cache(FirstBlockCacheConfig(threshold=9.0))
    with pytest.raises(ValueError, match="already enabled"):
        enable(pipe, "radial", step_cache="first_block")
    enable(pipe, "radial", dense_steps=0, dense_layers=0)
    run(pipe)
    assert summary(pipe).step_cache == "first_block" and summary(pipe).skipped_steps == STEPS - 1
    disable(pipe)
    assert model.is_cache_enabled
    model.disable_cache()
    assert not any(HookRegistry.check_if_exists_or_initialize(m).hooks for m in (model, *model.blocks))


@pytest.mark.parametrize(("wrong", "text"), [
    ("cache", "first_block, taylorseer"), ("first_block:x", "unknown"), ("teacache:wan3", "wan2.1-t2v-1.3b"),
    ("no.json", "No such file"), (object(), "object"), (TeaCacheConfig(coefficients=(1.0,)), "threshold"),
    (TeaCacheConfig(coefficients=(1.0,), threshold=1.0, signal="sound"), "modulation or embedding"),
    (TeaCacheConfig(coefficients=(1.0,), threshold=1.0, first_steps=-1), "first_steps"),
    (TeaCacheConfig(coefficients=(float("nan"),), threshold=1.0), "use finite numbers"),
    (TeaCacheConfig(coefficients=(), threshold=1.0), "use finite numbers"),
    (TeaCacheConfig(coefficients=5, threshold=float("nan")), "threshold, a number >= 0"),
    (TeaCacheConfig(coefficients=torch.ones(2), threshold=1.0), "use finite numbers"),
    (TeaCacheConfig(coefficients=(1.0,), threshold=1.0, num_inference_steps="many"), "num_inference_steps"),
    (TeaCacheConfig(coefficients=Path("no.json")), "No such file"), (Path("no.json"), "No such file"),
    ("teacache", "dit-sparse calibrate teacache --model MODEL --prompts FILE"),
    ("magcache", "dit-sparse calibrate magcache"),
])
def test_what_is_wrong_is_refused_in_one_line(pipe: WanPipeline, wrong: Any, text: str) -> None:
    with pytest.raises(ValueError, match="step_cache") as error:
        enable(pipe, "radial", step_cache=wrong)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not pipe.transformer.is_cache_enabled


def test_coefficients_of_numpy_are_numbers(pipe: WanPipeline) -> None:
    enable(pipe, "radial", step_cache=TeaCacheConfig(coefficients=np.array([0.0, 0.1], np.float32), threshold=0.25))
    assert active_of(pipe.transformer).config.coefficients == (0.0, pytest.approx(0.1))
    disable(pipe)


def test_a_signal_without_a_change_that_can_be_told_computes_the_step() -> None:
    """A signal of zeros divides by nothing: no estimate stays below a threshold by being no number."""
    from dit_sparse.stepcache.teacache import TeaCacheState

    state, config = TeaCacheState(), TeaCacheConfig(coefficients=(1.0, 0.0), threshold=1.0)
    for step in range(4):
        assert not state.decide(config, step, 9, torch.zeros(1, 3))
        state.residual = torch.zeros(1), None


def test_seacache_is_refused_where_the_sum_of_the_stack_would_not_fit() -> None:
    """Diffusers' SeaCache, by its configuration, puts one sum in the place of the stack too."""
    from diffusers import SeaCacheConfig

    from tests.stepcache.runs import ALL

    pipe = Pipe(ALL["wan-vace"].build())
    with pytest.raises(ValueError, match="added twice"):
        enable(pipe, "radial", step_cache=SeaCacheConfig())


def test_fastercache_needs_the_unconditional_half() -> None:
    from tests.bridge.hosts import HOSTS

    host = next(h for h in HOSTS if h.name == "cogvideox")
    for batch, guided in ((1, True), (2, False)):
        pipe = Pipe(host.build(), do_classifier_free_guidance=guided)
        enable(pipe, "dense", step_cache="fastercache")
        with pytest.raises(ValueError, match="raise guidance_scale"):
            pipe.run({"cond_uncond": host.inputs(batch)}, 2)
    flux = next(h for h in HOSTS if h.name == "flux")
    pipe = Pipe(flux.build())
    enable(pipe, "dense", step_cache="fastercache")
    with pytest.raises(ValueError, match="one after the other"):
        pipe.run({"cond": flux.inputs(1), "uncond": flux.inputs(1)}, 2)


def test_a_controlnet_is_refused_when_it_is_called() -> None:
    from tests.bridge.hosts import HOSTS, randn

    flux = next(h for h in HOSTS if h.name == "flux")
    pipe = Pipe(flux.build())
    enable(pipe, "dense", step_cache="first_block")
    with pytest.raises(ValueError, match="ControlNet"):
        pipe.run({"cond": flux.inputs(1) | {"controlnet_block_samples": [randn(1, 24, 32)]}}, 2)


def test_a_copy_that_would_run_the_original_is_refused(pipe: WanPipeline) -> None:
    enable(pipe, "radial", step_cache="pab")
    with pytest.raises(ValueError, match="call disable"):
        copy.deepcopy(pipe.transformer)
    disable(pipe)
    copy.deepcopy(pipe.transformer)


def test_compiled_transformers(pipe: WanPipeline) -> None:
    enable(pipe, "radial", dense_steps=0, dense_layers=0, step_cache="pab")
    eager, skipped = run(pipe), summary(pipe).skipped_per_step
    pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(run(pipe), eager)
    assert summary(pipe).skipped_per_step == skipped
    pipe.transformer._compiled_call_impl = None
    torch._dynamo.reset()
    disable(pipe)


def test_the_digest_of_a_configuration(pipe: WanPipeline) -> None:
    own = config_hash(pipe.transformer)
    assert len(own) == 16 and int(own, 16) >= 0 and own == config_hash(build_tiny_wan(3).transformer)
    stored = {**dict(pipe.transformer.config), "_class_name": "WanTransformer3DModel", "_name_or_path": "elsewhere"}
    stored["patch_size"] = list(stored["patch_size"])
    assert config_hash(stored) == own and config_hash({**stored, "num_layers": 9}) != own
    with pytest.raises(ValueError, match="no configuration"):
        config_hash(object())


@pytest.mark.parametrize(("name", "allowed"), [("taylorseer", 0), ("pab", 0), ("first_block", 1), ("teacache", 1)])
def test_what_is_read_from_the_device(name: str, allowed: int) -> None:
    """One number in a forward where it decides what runs, nothing elsewhere."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from tests.bridge.hosts import HOSTS
    from tests.waits import WAITING

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func.overloadpacket.__name__ in WAITING
            return func(*args, **(kwargs or {}))

    counts = []
    for step_cache in (None, CACHES[name]):
        pipe = Pipe(HOSTS[0].build())
        enable(pipe, "dense", step_cache=step_cache)
        with Counting() as mode:
            pipe.run({"cond": HOSTS[0].inputs(1)}, STEPS)
        counts.append(mode.count)
    assert counts[0] <= counts[1] <= counts[0] + allowed * STEPS
