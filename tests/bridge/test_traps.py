"""What else users do to a bound transformer: copies, saving, LoRA, fusing, offloading, casting, caches, guidance."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)
from diffusers.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dit_sparse import bridge
from dit_sparse.rebind import SparseMixin
from tests.bridge.hosts import HOSTS, Host, call, randn
from tests.bridge.sessions import Recorder, processors_of
from tests.tiny_wan import build_tiny_wan


def host(name: str) -> Host:
    return next(h for h in HOSTS if h.name == name)


@pytest.fixture
def wan():
    h = host("wan-t2v")
    model, inputs = h.build(), h.inputs(2)
    session = Recorder()
    untouched = call(model, inputs)
    return model, inputs, untouched, session, bridge.bind(model, session)


def sparse_layers(model) -> int:
    return sum(isinstance(p, SparseMixin) for p in processors_of(model).values())


def test_binding_again_equals_binding_once(wan) -> None:
    model, inputs, untouched, session, _ = wan
    originals = {path: p._dense[0] for path, p in processors_of(model).items() if isinstance(p, SparseMixin)}
    second = Recorder(scale=3.0)
    binding = bridge.bind(model, second)
    assert bridge.binding_of(model) is binding and len(model._forward_pre_hooks) == 1
    assert not torch.equal(call(model, inputs), untouched)
    assert len(second.calls) == 2 and not session.calls
    binding.unbind()
    assert all(model.get_submodule(path).processor is p for path, p in originals.items())


def test_deep_copies_have_weights_of_their_own(wan) -> None:
    model, inputs, untouched, session, binding = wan
    copied = copy.deepcopy(model)
    assert sparse_layers(copied) == 0, "a copy is the untouched model"
    assert torch.equal(call(copied, inputs), untouched) and not session.calls
    with torch.no_grad():
        copied.proj_out.bias += 1.0
    assert not torch.equal(call(copied, inputs), untouched) and torch.equal(call(model, inputs), untouched)
    assert bridge.binding_of(copied) is None
    binding.unbind()
    assert torch.isfinite(call(copied, inputs)).all()
    own = Recorder()
    bridge.bind(copied, own).unbind()
    assert sparse_layers(copied) == 0 and not copied._forward_pre_hooks
    bridge.bind(copied, own)
    call(copied, inputs)
    assert len(own.calls) == 2 and own.infos[0].step == 0


def test_release_cleans_a_copy_without_binding_it(wan) -> None:
    copied = copy.deepcopy(wan[0])
    bridge.release(copied)
    assert sparse_layers(copied) == 0 and not copied._forward_pre_hooks
    assert bridge.HOOK not in copied._diffusers_hook.hooks
    assert sparse_layers(wan[0]) == 2


def test_pickles_hold_the_untouched_model(wan) -> None:
    model, inputs, untouched, session, _ = wan
    loaded = pickle.loads(pickle.dumps(model))
    assert sparse_layers(loaded) == 0
    assert torch.equal(call(loaded, inputs), untouched) and not session.calls


def test_saving_and_state_dict_are_unaffected(wan, tmp_path) -> None:
    model, inputs, untouched, *_ = wan
    model.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).eval()
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(call(loaded, inputs), untouched)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_image_prompt_adapters_keep_their_weights_once() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    h = host("flux")
    model, inputs = h.build(), h.inputs(1)
    adapter = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32, num_tokens=(4,), scale=[1.0])
    attn = model.transformer_blocks[0].attn
    attn.set_processor(adapter)
    names = list(model.state_dict())
    assert any("to_k_ip" in name for name in names)
    prompt = {"joint_attention_kwargs": {"ip_hidden_states": [randn(1, 4, 32, seed=8)], "ip_adapter_masks": None}}
    untouched = call(model, inputs | copy.deepcopy(prompt))
    session = Recorder()
    binding = bridge.bind(model, session)
    assert list(model.state_dict()) == names and len(list(model.parameters())) == len(names)
    torch.testing.assert_close(call(model, inputs | copy.deepcopy(prompt)), untouched)
    assert len(session.calls) == 2 and not session.fallbacks, "attention to the image prompt is cross-attention"
    model.double().float()
    torch.testing.assert_close(call(model, inputs | copy.deepcopy(prompt)), untouched)
    binding.unbind()
    assert attn.processor is adapter and list(model.state_dict()) == names


def test_lora_loads_and_unloads_under_us(wan) -> None:
    from peft import LoraConfig

    model, inputs, untouched, session, binding = wan
    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(4)
    model.add_adapter(lora)
    sparse = call(model, inputs)
    assert len(session.calls) == 2 and not torch.allclose(sparse, untouched)
    model.delete_adapters("default")
    binding.unbind()
    plain = host("wan-t2v").build()
    torch.manual_seed(4)
    plain.add_adapter(lora)
    torch.testing.assert_close(sparse, call(plain, inputs))


def test_lora_before_or_after_switching_on_is_the_same() -> None:
    from peft import LoraConfig

    from dit_sparse import enable, summary

    lora = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    outputs = []
    for lora_first in (True, False):
        model = host("wan-t2v").build()
        steps = [lambda m=model: enable(m, "svg", dense_layers=0), lambda m=model: m.add_adapter(lora)]
        for step in reversed(steps) if lora_first else steps:
            torch.manual_seed(4)
            step()
        outputs.append(call(model, host("wan-t2v").inputs(1)))
        assert summary(model).sparse_calls == 2
    assert torch.equal(*outputs)


def test_fusing_projections_after_us_keeps_wan_bound(wan) -> None:
    model, inputs, untouched, session, _ = wan
    model.fuse_qkv_projections()
    torch.testing.assert_close(call(model, inputs), untouched, atol=1e-5, rtol=1e-5)
    assert len(session.calls) == 2 and model.blocks[0].attn1.fused_projections


@pytest.mark.parametrize(("name", "fused"), [("cogvideox", "FusedCogVideoXAttnProcessor2_0"),
                                            ("sd3", "FusedJointAttnProcessor2_0")])
def test_processors_wiped_by_fusing_are_bound_again(name: str, fused: str) -> None:
    h = host(name)
    if name == "sd3":  # Diffusers' fused processor cannot run the dual layers of SD3.5
        h = dataclasses.replace(h, config=h.config | {"dual_attention_layers": ()}, layers=2)
    model, inputs, session = h.build(), h.inputs(1), Recorder()
    before, untouched = processors_of(model), call(model, inputs)
    plain = h.build()
    plain.fuse_qkv_projections()
    binding = bridge.bind(model, session)
    model.fuse_qkv_projections()
    assert sparse_layers(model) == 0
    torch.testing.assert_close(call(model, inputs), call(plain, inputs))
    assert len(session.calls) == h.layers and sparse_layers(model) == h.layers
    assert {layer.processor for layer in binding.layers if layer.bound} == {fused}
    model.unfuse_qkv_projections()
    torch.testing.assert_close(call(model, inputs), untouched)
    assert len(session.calls) == 2 * h.layers
    model.fuse_qkv_projections()
    call(model, inputs)
    binding.unbind()
    model.unfuse_qkv_projections()
    after = processors_of(model)
    assert all(after[path] is before[path] for path in before), "no sparse processor comes back after unbinding"


def test_a_processor_put_in_later_is_bound_or_counted(wan) -> None:
    model, inputs, untouched, session, binding = wan

    class Odd:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return torch.zeros_like(hidden_states)

    model.blocks[0].attn1.set_processor(WanAttnProcessor())
    assert torch.equal(call(model, inputs), untouched) and len(session.calls) == 2
    odd = Odd()
    model.blocks[1].attn1.set_processor(odd)
    call(model, inputs)
    assert session.fallbacks == [(1, "Odd makes no attention call that can be replaced")]
    assert [layer.bound for layer in binding.layers if layer.index >= 0] == [True, False]
    binding.unbind()
    assert model.blocks[1].attn1.processor is odd


def test_attention_backends_set_under_us_reach_cross_attention_and_stay(wan) -> None:
    model, inputs, untouched, session, binding = wan
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(call(model, inputs), untouched, atol=1e-5, rtol=1e-5)
    assert len(session.calls) == 2
    assert model.blocks[0].attn2.processor._attention_backend is AttentionBackendName._NATIVE_MATH
    binding.unbind()
    assert model.blocks[0].attn1.processor._attention_backend is AttentionBackendName._NATIVE_MATH
    model.reset_attention_backend()
    assert model.blocks[0].attn1.processor._attention_backend is None


@pytest.mark.parametrize("first", ["bind", "offload"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(first: str, kind: str) -> None:
    h = host("wan-t2v")
    model, inputs, session = h.build(), h.inputs(1), Recorder()
    untouched = call(model, inputs)
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def offload() -> None:
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **groups)

    steps = [lambda: bridge.bind(model, session), offload]
    for step in steps if first == "bind" else reversed(steps):
        step()
    assert torch.equal(call(model, inputs), untouched) and len(session.calls) == 2


@pytest.mark.parametrize("first", ["bind", "cast"])
def test_layerwise_casting(first: str) -> None:
    h = host("wan-t2v")
    inputs, session = h.inputs(1), Recorder()
    outputs = []
    for ours in (False, True):
        model = h.build()
        steps = [lambda m=model: bridge.bind(m, session)] if ours else []
        steps.append(lambda m=model: m.enable_layerwise_casting(torch.bfloat16, torch.float32))
        for step in steps if first == "bind" else reversed(steps):
            step()
        outputs.append(call(model, inputs))
    assert torch.equal(*outputs) and len(session.calls) == 2


def test_hooks_of_others_come_and_go_around_ours() -> None:
    """Ours wraps no forward: others before and after it can be removed in any order."""
    h = host("wan-t2v")
    model, inputs, session = h.build(), h.inputs(1), Recorder()
    untouched = call(model, inputs)

    class Counting(ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            self.count += 1
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(model)
    early, late = Counting(), Counting()
    registry.register_hook(early, "early")
    binding = bridge.bind(model, session)
    registry.register_hook(late, "late")
    for removed, counts in ((None, (1, 1)), ("early", (1, 2)), ("late", (1, 2))):
        if removed:
            registry.remove_hook(removed)
        assert torch.equal(call(model, inputs), untouched)
        assert (early.count, late.count) == counts
    assert len(session.calls) == 6
    registry.register_hook(early, "early")
    registry.remove_hook("early")
    binding.unbind()
    assert torch.equal(call(model, inputs), untouched) and early.count == 1


SETTINGS = {"num_frames": 3, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 16,
            "num_inference_steps": 6, "guidance_scale": 3.0}
CACHES = {
    "first-block": lambda pipe: FirstBlockCacheConfig(threshold=0.3),
    "mag": lambda pipe: MagCacheConfig(num_inference_steps=6, mag_ratios=[1.0] * 6, threshold=0.5, retention_ratio=0.2),
    "pab": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe.current_timestep),
    "taylor": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2),
}


@pytest.fixture(scope="module")
def pipe():
    made = build_tiny_wan()
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe) -> torch.Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(3), **SETTINGS).frames


@pytest.mark.parametrize("name", CACHES)
def test_step_caches_in_both_orders(pipe, name: str) -> None:
    model = pipe.transformer
    model.enable_cache(CACHES[name](pipe))
    alone = generate(pipe)
    model.disable_cache()
    calls = []
    for first in ("cache", "bind"):
        session = Recorder()
        if first == "cache":
            model.enable_cache(CACHES[name](pipe))
        binding = bridge.bind(model, session, scheduler=pipe.scheduler)
        if first == "bind":
            model.enable_cache(CACHES[name](pipe))
        assert torch.equal(generate(pipe), alone)
        assert [i.step for i in session.infos if i.branch == "cond"] == list(range(6)), "steps that were skipped count"
        calls.append(len(session.calls))
        if first == "bind":
            model.disable_cache()
            binding.unbind()
        else:
            binding.unbind()
            model.disable_cache()
    assert calls[0] == calls[1] <= 2 * 6 * 2
    assert name == "taylor" or calls[0] < 2 * 6 * 2, "skipped steps make no calls"
    assert not model._diffusers_hook.hooks


def test_layer_skipping_finds_our_processors() -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    h = host("pixart")
    inputs, session, outputs = h.inputs(1), Recorder(), []
    for ours in (False, True):
        model = h.build()
        if ours:
            bridge.bind(model, session)
        config = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
        apply_layer_skip(model, config)
        outputs.append(call(model, inputs))
    torch.testing.assert_close(*outputs)
    assert len(session.calls) == 1


def test_a_grid_that_does_not_fit_is_counted_per_call() -> None:
    h = host("ltx")
    model, inputs, session = h.build(), h.inputs(1), Recorder()
    untouched = call(model, inputs)
    bridge.bind(model, session)
    inputs = inputs | {"num_frames": None, "video_coords": None}
    coordinates = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0), torch.arange(4.0)).T[None]
    inputs["video_coords"] = coordinates
    call(model, inputs)
    assert [layer for layer, _ in session.fallbacks] == [0, 1] and "video_coords" in session.fallbacks[0][1]
    assert session.infos[0].grid is None and torch.equal(call(model, h.inputs(1)), untouched)


@pytest.mark.parametrize(("name", "change", "reason"), [
    ("qwen", {"img_shapes": [[(1, 4, 3), (1, 4, 3)]]}, "reference image"),
    ("flux", {"hidden_states": randn(1, 36, 4), "img_ids": "reference"}, "reference image"),
    ("flux", {"img_ids": "shuffled"}, "raster order"),
])
def test_reference_images_are_dense_with_a_reason(name: str, change: dict, reason: str) -> None:
    h = host(name)
    model, inputs, session = h.build(), h.inputs(1), Recorder()
    change = dict(change)
    if change.get("img_ids") == "reference":
        extra = torch.ones(12, 3)
        change["img_ids"] = torch.cat((inputs["img_ids"], extra))
    elif change.get("img_ids") == "shuffled":
        change["img_ids"] = inputs["img_ids"].flip(0)
    untouched = call(model, inputs | change)
    bridge.bind(model, session)
    torch.testing.assert_close(call(model, inputs | change), untouched)
    assert not session.calls and reason in session.fallbacks[0][1] and reason in session.infos[0].reason


def test_text_refiners_and_cross_attention_are_left_alone() -> None:
    for name, path in (("hunyuan", "context_embedder.token_refiner.refiner_blocks.0.attn"),
                       ("wan-t2v", "blocks.0.attn2")):
        model = host(name).build()
        layers = {layer.path: layer for layer in bridge.bind(model, Recorder()).layers}
        assert not layers[path].bound and layers[path].index == -1 and "not self-attention" in layers[path].reason
        assert not isinstance(model.get_submodule(path).processor, SparseMixin)


def test_the_grid_follows_the_latent() -> None:
    h = host("wan-t2v")
    model, session = h.build(), Recorder()
    bridge.bind(model, session)
    for frames in (3, 1, 2):
        call(model, h.inputs(1) | {"hidden_states": randn(1, 4, frames, 6, 8)})
    assert [i.grid.sizes for i in session.infos] == [(3, 3, 4), (1, 3, 4), (2, 3, 4)]
    assert [c.query.shape[1] for c in session.calls[::2]] == [36, 12, 24]


def test_unsupported_models_are_refused_in_one_line() -> None:
    from diffusers import SanaVideoTransformer3DModel, UNet2DModel

    sana = SanaVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12,
                                       num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=12,
                                       cross_attention_dim=24, caption_channels=16)
    before = processors_of(sana)
    for refuse in (lambda: bridge.bind(sana, Recorder()), lambda: bridge.transformers_of(sana)):
        with pytest.raises(ValueError, match="linear attention") as error:
            refuse()
        assert "\n" not in str(error.value)
    assert processors_of(sana) == before and not sana._forward_pre_hooks
    with pytest.raises(ValueError, match="no entry in dit_sparse/families.py"):
        bridge.bind(torch.nn.Linear(2, 2), Recorder())
    with pytest.raises(ValueError, match="no supported diffusion transformer"):
        bridge.transformers_of(UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2))
    with pytest.raises(ValueError, match="target=int"):
        bridge.transformers_of(3)


def test_a_subclass_of_a_known_transformer_is_of_its_family() -> None:
    class Mine(WanTransformer3DModel):
        pass

    h = host("wan-t2v")
    model, session = Mine(**h.config).eval(), Recorder()
    bridge.bind(model, session)
    call(model, h.inputs(1))
    assert len(session.calls) == 2
