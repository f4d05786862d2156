"""The verbs on real Diffusers objects: on, off, twice, two denoisers, wrong targets, step caches, import order."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKLWan, FirstBlockCacheConfig, MagCacheConfig, MochiTransformer3DModel, WanPipeline

from dit_sparse import SparseProc, disable, enable, summary
from dit_sparse.bridge import binding_of

from .tiny_wan import build_tiny_wan


@pytest.fixture
def pipe() -> WanPipeline:
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def run(pipe: WanPipeline, steps: int = 4, **kw) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", height=64, width=64, num_frames=9, num_inference_steps=steps, guidance_scale=3.0,
                generator=generator, output_type="latent", max_sequence_length=16, **kw).frames


def test_pipeline_has_the_method_and_off_is_bit_identical(pipe):
    before, processors = run(pipe), dict(pipe.transformer.attn_processors)
    pipe.set_attn_processor(SparseProc("radial", dense_steps=1, dense_layers=0))
    sparse = run(pipe)
    assert not torch.equal(before, sparse)
    report = summary(pipe)
    layers = len(pipe.transformer.blocks)
    assert report.calls == 4 * 2 * layers and report.sparse_calls == 3 * 2 * layers and not report.fallbacks
    assert report.density < 1 and report.attention_seconds > 0 and report.num_steps == 4
    assert all(word in str(report) for word in ("radial", "tokens", "density", "backend", "per step"))
    disable(pipe)
    after = pipe.transformer.attn_processors
    assert all(after[name] is old for name, old in processors.items())
    assert torch.equal(run(pipe), before)
    with pytest.raises(ValueError, match="not enabled"):
        summary(pipe)


def test_twice_equals_once_and_the_model_takes_it_too(pipe):
    enable(pipe, "radial", dense_steps=0, dense_layers=0)
    once = run(pipe)
    pipe.transformer.set_attn_processor(SparseProc("radial", dense_steps=0, dense_layers=0))
    assert torch.equal(run(pipe), once)
    assert summary(pipe.transformer).calls == summary(pipe).calls


def test_method_dense_is_the_untouched_model(pipe):
    before = run(pipe)
    enable(pipe, "dense")
    torch.testing.assert_close(run(pipe), before, atol=1e-5, rtol=1e-5)
    assert summary(pipe).density == 1.0 and not summary(pipe).fallbacks


def test_repeated_runs_are_bit_equal(pipe):
    enable(pipe, "svg", density=0.3, dense_steps=1, dense_layers=0)
    assert torch.equal(run(pipe), run(pipe))


@pytest.mark.parametrize("order", ["method", "cache"])
@pytest.mark.parametrize("config", [FirstBlockCacheConfig(threshold=0.9),
                                    MagCacheConfig(threshold=0.9, num_inference_steps=8, mag_ratios=[1.0] * 8)],
                         ids=["FirstBlockCache", "MagCache"])
def test_step_cache_skips_calls_and_the_step_count_stays_true(pipe, config, order):
    enable(pipe, "radial", dense_steps=2, dense_layers=0)
    run(pipe, steps=8)
    full = summary(pipe)
    enable(pipe, "radial", dense_steps=2, dense_layers=0, step_cache=config)
    run(pipe, steps=8)
    cached = summary(pipe)
    assert cached.calls < full.calls and cached.steps == full.steps == 8
    assert all(density == 1.0 for step, density in cached.per_step.items() if step < 2)
    assert all(density < 1.0 for step, density in cached.per_step.items() if step >= 2)
    disable(pipe)
    assert not pipe.transformer.is_cache_enabled


def test_wrong_targets_and_configurations_leave_the_pipe_as_it_was(pipe):
    with pytest.raises(ValueError, match="AutoencoderKLWan|transformer"):
        enable(pipe.vae)
    with pytest.raises(ValueError, match="nothing"):
        pipe.set_attn_processor(SparseProc("nothing"))
    with pytest.raises(ValueError, match="step_cache"):
        enable(pipe, "radial", step_cache=object())
    assert binding_of(pipe.transformer) is None
    assert isinstance(pipe.vae, AutoencoderKLWan)


def test_transformers_without_a_setter_of_their_own_take_it_too():
    model = MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, text_embed_dim=16,
                                    time_embed_dim=8, pooled_projection_dim=16, max_sequence_length=8, in_channels=4)
    model.set_attn_processor(SparseProc("radial"))
    assert binding_of(model) is not None
    disable(model)
    assert binding_of(model) is None


@pytest.mark.parametrize("first", ["dit_sparse", "diffusers"])
def test_import_order_does_not_matter_and_import_is_light(first):
    other = {"dit_sparse": "diffusers", "diffusers": "dit_sparse"}[first]
    code = f"""
import sys
import {first}
if {first!r} == "dit_sparse":
    assert "torch" not in sys.modules and "triton" not in sys.modules and "diffusers" not in sys.modules
from diffusers import DiffusionPipeline
import {other}
assert hasattr(DiffusionPipeline, "set_attn_processor")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_enable_leaves_what_was_on(pipe):
    enable(pipe, "radial", dense_steps=0, dense_layers=0)
    with pytest.raises(ValueError, match="step_cache"):
        enable(pipe, "svg", step_cache=object())
    run(pipe)
    assert "radial" in summary(pipe).method and summary(pipe).sparse_calls


def test_a_deep_copy_is_the_untouched_pipeline(pipe):
    before = run(pipe)
    enable(pipe, "radial", dense_steps=0, dense_layers=0)
    run(pipe)
    calls = summary(pipe).calls
    copied = copy.deepcopy(pipe)
    assert torch.equal(run(copied, steps=4), before) and summary(pipe).calls == calls
    disable(copied)
    assert torch.equal(run(copied), before)
    enable(copied, "radial", dense_steps=0, dense_layers=0)
    assert not torch.equal(run(copied), before) and summary(copied).calls == calls


def test_an_unbound_self_attention_layer_keeps_the_numbering_true(pipe):
    class Mean:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return hidden_states.mean(1, keepdim=True).expand_as(hidden_states)

    pipe.transformer.blocks[0].attn1.set_processor(Mean())
    enable(pipe, "radial", dense_steps=0, dense_layers=0)
    run(pipe)
    report = summary(pipe)
    assert report.per_layer[1] < 1 and any("attn1" in path for path in report.coverage) and report.fallbacks


@pytest.mark.parametrize("seed", [10**11, 2**63 - 1, 10**30])
def test_any_seed_stays_sparse(pipe, seed):
    enable(pipe, "svg", density=0.3, dense_steps=0, dense_layers=0, seed=seed)
    run(pipe, steps=2)
    assert summary(pipe).sparse_calls and not summary(pipe).fallbacks


def test_two_denoisers_report_on_one_run(pipe):
    torch.manual_seed(1)
    second = build_tiny_wan(1).transformer
    both = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.7)
    both.set_progress_bar_config(disable=True)
    enable(both, "radial", dense_steps=0, dense_layers=0)
    run(both, steps=6)
    layers = len(second.blocks)
    assert summary(both).steps == 6 and summary(both).calls == 6 * 2 * layers * 1
    run(both, steps=1)
    assert summary(both).steps == 1 and summary(both).calls == 2 * layers


def test_video_to_video_counts_its_steps_from_where_it_starts(pipe):
    from dit_sparse.pipelines.video_to_video import video_to_video

    enable(pipe, "radial", dense_steps=0.2, dense_layers=0)
    clip = torch.rand(9, 3, 64, 64)
    video_to_video(pipe, clip, "a red circle", strength=0.6, steps=10)
    report = summary(pipe)
    assert min(report.per_step) == 4 and report.sparse_calls == report.calls
    assert any("began at step 4 of 10" in note for note in report.notes)
