"""Every cache on every host, with the same input at every step: what is not computed must be what would have been."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from dit_sparse import disable, enable, summary
from dit_sparse.stepcache import NAMES, TeaCacheConfig
from tests.bridge.hosts import call
from tests.stepcache.runs import ALL, Pipe, deeper, two_branches

STEPS = 10
BRANCHES = {
    "first_block": FirstBlockCacheConfig(threshold=1e9),
    "magcache": MagCacheConfig(threshold=1e9, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "teacache": TeaCacheConfig(coefficients=(0.0,), threshold=1.0),
    "taylorseer": "taylorseer",
    "pab": "pab",
}
# Found by running every host of tests/bridge; here those that differ in their blocks.
RESIDUAL = ["wan-t2v", "hunyuan", "cogvideox", "ltx", "mochi", "flux"]
WORKS = {
    "first_block": [*RESIDUAL, "qwen"],
    "magcache": [*RESIDUAL, "qwen", "flux2", "kandinsky5"],
    "teacache": RESIDUAL,
    "taylorseer": [*RESIDUAL, "hunyuan15", "allegro", "wan-vace", "motif", "ltx2", "kandinsky5", "flux2"],
    "pab": [*RESIDUAL, "allegro", "wan-vace", "motif", "kandinsky5"],
    "fastercache": ["hunyuan", "flux", "cogvideox", "mochi", "allegro"],
}
REFUSED = {
    "first_block": ["hunyuan15", "wan-vace", "wan-animate", "motif", "kandinsky5", "flux2", "sd3"],
    "magcache": ["hunyuan15", "wan-vace", "wan-animate", "motif", "cosmos"],
    "teacache": ["hunyuan15", "wan-vace", "motif", "kandinsky5", "flux2", "qwen", "sd3"],
    "taylorseer": ["sd3", "cosmos"],
    "pab": ["sd3", "auraflow"],
    "fastercache": ["wan-t2v", "hunyuan15", "ltx", "qwen", "kandinsky5", "sd3"],
}
REASONS = ("block registry has no", "no enable_cache", "added twice", "decoder blocks", "knows no signal",
           "an argument hidden_states", "text and image apart", "in one forward")


def config_of(cache: str, host: str):
    if cache != "fastercache":
        return BRANCHES[cache]
    if host not in ("cogvideox", "mochi", "allegro"):
        return "fastercache"
    # Without its growing weights the unconditional half is exactly the remembered difference to the conditional one.
    return FasterCacheConfig(alpha_low_frequency=1.0, alpha_high_frequency=1.0, is_guidance_distilled=False,
                             tensor_format="BFCHW" if host.startswith("cog") else "BCFHW")


@pytest.mark.parametrize(("cache", "name"), [(cache, name) for cache in NAMES for name in WORKS[cache]])
def test_a_skipped_step_is_the_computed_one(cache: str, name: str) -> None:
    host = deeper(ALL[name])
    model = host.build()
    pipe = Pipe(model, do_classifier_free_guidance=True)
    inputs = two_branches(host) if cache != "fastercache" else {"cond_uncond": host.inputs(2)}
    plain = {branch: call(model, given) for branch, given in inputs.items()}
    enable(pipe, "dense", step_cache=config_of(cache, name))
    outputs = pipe.run(inputs, STEPS)
    allowed = {"taylorseer": 2e-3, "fastercache": 1e-4}.get(cache, 1e-6)  # factors in bfloat16; Fourier transforms
    for branch, found in outputs.items():
        size = float(plain[branch].abs().mean())
        assert max(float((x - plain[branch]).abs().mean()) for x in found) < allowed * size
    report = summary(pipe)
    assert report.step_cache == cache and report.skipped_calls > 0 and report.step_cache_bytes > 0
    assert report.steps == STEPS and 0 < report.skipped_steps < STEPS
    layers = report.layers * len(inputs) * STEPS
    assert cache == "fastercache" or host.per_sample or report.calls + report.skipped_calls == layers
    assert cache in str(report)
    disable(pipe)
    assert not model.is_cache_enabled
    for branch, given in inputs.items():
        assert torch.equal(call(model, given), plain[branch])


@pytest.mark.parametrize(("cache", "name"), [(cache, name) for cache in NAMES for name in REFUSED[cache]])
def test_what_would_spoil_the_result_is_refused_with_the_reason(cache: str, name: str) -> None:
    model = deeper(ALL[name]).build()
    with pytest.raises(ValueError, match="step_cache=") as error:
        enable(Pipe(model), "dense", step_cache=config_of(cache, name))
    text = str(error.value)
    assert "\n" not in text and any(reason in text for reason in REASONS), text
    assert not getattr(model, "is_cache_enabled", False)


def test_two_branches_share_nothing_where_diffusers_keeps_one_state() -> None:
    """Diffusers' PAB alone gives the unconditional forward what the conditional one computed a moment before."""
    host = ALL["wan-t2v"]
    inputs = two_branches(host)
    plain = call(host.build(), inputs["uncond"])
    alone = host.build()
    alone.enable_cache(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2,
                                                       spatial_attention_timestep_skip_range=(-1, 2000),
                                                       current_timestep_callback=lambda: 500))
    assert not torch.allclose(Pipe(alone).run(inputs, 2)["uncond"][0], plain, atol=1e-3)
    ours = Pipe(host.build())
    enable(ours, "dense", step_cache="pab")
    assert all(torch.allclose(x, plain, atol=1e-6) for x in ours.run(inputs, 4)["uncond"])


@pytest.mark.parametrize("cache", ["first_block", "magcache", "taylorseer", "teacache", "pab"])
def test_pipelines_that_name_no_branch(cache: str) -> None:
    """Without a cache context Diffusers' caches raise, or mix the branches; the position tells them apart."""
    host = ALL["wan-t2v"]
    inputs = two_branches(host)
    plain = {branch: call(host.build(), given) for branch, given in inputs.items()}
    pipe = Pipe(host.build())
    enable(pipe, "dense", step_cache=BRANCHES[cache])
    for branch, found in pipe.run(inputs, STEPS, named=False).items():
        assert all(float((x - plain[branch]).abs().mean()) < 2e-3 * float(plain[branch].abs().mean()) for x in found)
    assert summary(pipe).skipped_calls


def test_a_run_that_was_broken_off_leaves_nothing_behind() -> None:
    host = ALL["wan-t2v"]
    first, second = two_branches(host).values()
    pipe = Pipe(host.build())
    enable(pipe, "dense", step_cache=FirstBlockCacheConfig(threshold=1e9))
    pipe.run({"cond": first}, STEPS, reset=False)
    again = pipe.run({"cond": second}, STEPS)["cond"]
    assert all(torch.allclose(x, call(host.build(), second), atol=1e-6) for x in again)


@pytest.mark.parametrize("lite", [True, False])
def test_taylorseer_that_reaches_nothing_is_refused(lite: bool) -> None:
    host = ALL["kandinsky5"] if lite else ALL["wan-t2v"]
    config = TaylorSeerCacheConfig(use_lite_mode=lite, cache_identifiers=None if lite else ["nothing"])
    with pytest.raises(ValueError, match="proj_out" if lite else "match no module"):
        enable(Pipe(host.build()), "dense", step_cache=config)
    if not lite:  # Diffusers' own default, which finds no attn1 and attn2
        with pytest.raises(ValueError, match="reaches no layer"):
            enable(Pipe(host.build()), "dense", step_cache=TaylorSeerCacheConfig())
