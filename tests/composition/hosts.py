"""Two tiny pipelines to compose things on: Wan runs guidance in two forwards, CogVideoX in one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_sparse import enable
from tests.composition.cases import Case
from tests.tiny_hosts import build_tiny_host

STEPS, DENSE = 6, 1  # steps of a run, the first ones dense
CLASSES = {"separate": "WanPipeline", "batched": "CogVideoXPipeline"}
CALLS: dict[str, dict[str, Any]] = {
    "separate": {"height": 96, "width": 160, "num_frames": 9, "max_sequence_length": 16},  # 5x6x10 tokens
    "batched": {"height": 96, "width": 128, "num_frames": 17, "max_sequence_length": 16},  # 16 of text, 5x6x8
}
TIME_CHANNELS = {"separate": 12, "batched": 4}  # of a head that rotate with the frame; the others with row and column
GAIN = {"separate": 2.0, "batched": 4.0}  # of values and outputs of self-attention
# Of the LoRA's weights. With 4 one head of CogVideoX stands between its two modes, .8 % apart, and rounding turns it to
# the other: a choice of svg that says nothing. With 11 every head is 5 % or more from such a choice.
LORA_SEEDS = {"WanPipeline": 4, "CogVideoXPipeline": 11}
ATTENTION = (".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn1.to_out.0")


@functools.cache
def _model(guidance: str) -> Any:
    """The pipeline with random weights, made so that attention matters and heads differ, as in trained models.

    Biases turn half of the heads to tokens that are near in time, the other half to tokens that are near in space;
    random weights alone would make every block as good as any other, and a choice between them a matter of rounding.
    """
    pipe = build_tiny_host(CLASSES[guidance])
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    config = pipe.transformer.config
    heads, width = config.num_attention_heads, config.attention_head_dim
    time = torch.arange(width) < TIME_CHANNELS[guidance]
    with torch.no_grad():
        for name, weight in pipe.transformer.named_parameters():
            if not any(part in name for part in ATTENTION):
                continue
            if name.endswith("weight"):
                gain = 1.0 if "to_q" in name or "to_k" in name else GAIN[guidance]
                weight.normal_(generator=generator).mul_(gain * weight.shape[1] ** -0.5)
            elif "to_q" in name or "to_k" in name:
                rows = [(time if head % 2 else ~time).float() * 2.0 for head in range(heads)]
                weight.copy_(torch.cat(rows) + 0.2 * torch.randn(heads * width, generator=generator))
    return pipe


def build(guidance: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """A fresh copy of the pipeline: "separate" or "batched" guidance; the same weights every time."""
    pipe = copy.deepcopy(_model(guidance)).to(device)
    pipe.transformer.to(dtype)
    return pipe


@functools.cache
def _prompt(guidance: str, dtype: torch.dtype) -> dict[str, Tensor]:
    pipe = _model(guidance)
    length = CALLS[guidance]["max_sequence_length"]
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a red circle moving right", "", True, max_sequence_length=length)
    return {"prompt_embeds": positive.to(dtype), "negative_prompt_embeds": negative.to(dtype)}


@functools.cache
def _noise(guidance: str) -> Tensor:
    """Float32, of numbers that bfloat16 has, so that runs in either begin with the same. A generator that is asked for
    bfloat16 gives other numbers in some versions of PyTorch: the run in float32 would be of another clip."""
    pipe, call = _model(guidance), CALLS[guidance]
    shape = {name: call[name] for name in ("height", "width", "num_frames")}
    noise: Tensor = pipe.prepare_latents(
        batch_size=1, num_channels_latents=pipe.transformer.config.in_channels, dtype=torch.float32,
        device=torch.device("cpu"), generator=torch.Generator().manual_seed(0), **shape)
    return noise.to(torch.bfloat16).to(torch.float32)


def run(pipe: Any, guidance: str) -> Tensor:
    """Latents of one run, float32; always the same noise."""
    prompt = {name: x.to(pipe._execution_device) for name, x in _prompt(guidance, pipe.transformer.dtype).items()}
    return pipe(**CALLS[guidance], **prompt, num_inference_steps=STEPS, guidance_scale=3.0,
                latents=_noise(guidance).to(prompt["prompt_embeds"]), output_type="latent").frames.float().cpu()


# -- what is composed ----------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {"radial": {}, "svg": {"density": 0.3}, "sol": {}, "auto": {"max_error": 0.3}}


def step_cache(name: str, guidance: str) -> Any:
    """A configuration that skips some of the few steps here, far from its threshold; None for "none"."""
    from diffusers import hooks

    from dit_sparse.stepcache import TeaCacheConfig

    everywhere = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    makers: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "first_block": lambda: hooks.FirstBlockCacheConfig(threshold={"separate": 0.45, "batched": 0.795}[guidance]),
        "taylorseer": lambda: hooks.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, cache_identifiers=[r".*blocks\.\d+\.attn\d"]),
        "magcache": lambda: hooks.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS, threshold=0.5,
                                                 max_skip_steps=1),
        "pab": lambda: hooks.PyramidAttentionBroadcastConfig(**everywhere),
        "fastercache": lambda: hooks.FasterCacheConfig(
            **everywhere, unconditional_batch_skip_range=2, unconditional_batch_timestep_skip_range=(-1, 1001),
            attention_weight_callback=lambda _: 0.5, tensor_format="BFCHW"),
        "teacache": lambda: TeaCacheConfig(coefficients=(0.0, 1.0), threshold=1.5),  # every step is estimated at 1
    }
    return makers[name]()


def add_lora(pipe: Any, *, fuse: bool) -> None:
    """A LoRA of random weights on the self-attention: loaded, or fused into the weights and unloaded."""
    from peft import LoraConfig

    torch.manual_seed(LORA_SEEDS[type(pipe).__name__])
    layers = [f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    pipe.transformer.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers, init_lora_weights=False))
    if fuse:
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()


class Graphs:
    """The "eager" backend of torch.compile, counting the graphs that compute something.

    Where a cache keeps the compiler out of a block, it still gets what group offloading does before it: tensors moved.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += any(node.op in ("call_function", "call_module", "call_method") and node.target != "to"
                          for node in graph.graph.nodes)
        return graph.forward


def compile_blocks(model: Any, backend: Any) -> None:
    """What `compile_repeated_blocks` does, also for classes that do not name their blocks (CogVideoX)."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(backend=backend)
    else:
        for block in model.transformer_blocks:
            block.compile(backend=backend)


def switch_on(pipe: Any, case: Case, **options: Any) -> Any:
    """8-bit layers, method and step cache of a case, in this order."""
    from dit_sparse.linear8 import fp8_linears

    if case.linear == "fp8":
        fp8_linears(pipe)
    options = METHODS.get(case.method, {}) | options
    return enable(pipe, case.method, dense_steps=DENSE, dense_layers=0, strict=True,
                  step_cache=step_cache(case.cache, case.guidance), **options)


def compose(case: Case, dtype: torch.dtype = torch.bfloat16, backend: Any = "eager", device: str = "cpu",
            **options: Any) -> Any:
    """The pipeline of a case, switched on in the order that docs/compatibility.md names.

    Args:
        case: what to compose.
        dtype: of the transformer.
        backend: for torch.compile.
        device: where it runs.
        options: for the method.
    """
    pipe = build(case.guidance, dtype, device)
    if case.lora == "LoRA":
        add_lora(pipe, fuse=case.linear == "fp8")
    switch_on(pipe, case, **options)
    if case.offload == "group":
        pipe.transformer.enable_group_offload(torch.device(device), torch.device("cpu"), offload_type="block_level",
                                              num_blocks_per_group=1, use_stream=device != "cpu")
    elif case.offload == "sequential":
        _offload_sequentially(pipe, device)
    if case.run == "compiled":
        compile_blocks(pipe.transformer, backend)
    return pipe


def _offload_sequentially(pipe: Any, device: str) -> None:
    """On a CPU what `enable_sequential_cpu_offload` does to the transformer, as it asks for a GPU."""
    import accelerate

    if device != "cpu":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        model = pipe.transformer
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
