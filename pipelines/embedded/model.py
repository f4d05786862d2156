"""The embedded model's parts in plain Diffusers classes, and the folder an unmodified ``WanPipeline`` loads."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import vocabulary, world

LATENT_CHANNELS = 16
TEXT_WIDTH = 128
SPATIAL, TEMPORAL = 8, 2  # the VAE's compression
SHIFT = 3.0
FILE_LIMIT = 16 * 2**20


def build_vae():
    """The video VAE: 8x8x2 compression, 16 channels, small enough that a CPU decodes a preview clip in a second."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        is_residual=False,
        scale_factor_spatial=SPATIAL,
        scale_factor_temporal=TEMPORAL,
    )


def build_text_encoder():
    """The text encoder: two layers of UMT5 over the word-level vocabulary, trained together with the transformer."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = UMT5Config(
        vocab_size=len(world.vocabulary()),
        d_model=TEXT_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
    )
    return UMT5EncoderModel(config)


def build_transformer(layers: int = 8, heads: int = 4, feed_forward: int = 768):
    """The denoiser: ``WanTransformer3DModel`` with heads of 64, about 8 M parameters at the default size."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=64,
        ffn_dim=feed_forward,
        num_layers=layers,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=256,
    )


def build_scheduler():
    """Flow matching with a fixed shift, as the training's noise levels expect it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def token_count(frames: int, height: int, width: int) -> int:
    """Tokens the transformer sees for a clip: its patches are 1x2x2 latents."""
    return ((frames - 1) // TEMPORAL + 1) * (height // (2 * SPATIAL)) * (width // (2 * SPATIAL))


def latent_shape(count: int, frames: int, size: int) -> tuple[int, int, int, int, int]:
    """Shape of the latents of `count` square clips."""
    return (count, LATENT_CHANNELS, (frames - 1) // TEMPORAL + 1, size // SPATIAL, size // SPATIAL)


def save_folder(path: Path | str, vae, text_encoder, transformer) -> None:
    """Write the folder that ``WanPipeline.from_pretrained`` loads: bf16 safetensors, each below 16 MiB.

    The text encoder's configuration keeps float32 as its compute type, so that loading without a dtype gives all
    three models in float32, which is what a CPU runs fastest.

    Raises:
        ValueError: when a file would be larger than the limit.
    """
    from diffusers import WanPipeline

    path = Path(path)
    halves = [_half(part) for part in (vae, text_encoder, transformer)]
    pipe = WanPipeline(
        tokenizer=vocabulary.build_tokenizer(),
        text_encoder=halves[1],
        vae=halves[0],
        scheduler=build_scheduler(),
        transformer=halves[2],
    )
    pipe.save_pretrained(path, safe_serialization=True, max_shard_size="12MB")
    _edit(path / "text_encoder" / "config.json", {"dtype": "float32"})
    # transformers 5 names its own class here; the older name loads in every version.
    _edit(path / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    _edit(path / "model_index.json", {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    for file in path.rglob("*.safetensors"):
        file.chmod(0o644)
    large = [str(file) for file in path.rglob("*") if file.is_file() and file.stat().st_size >= FILE_LIMIT]
    if large:
        raise ValueError(f"files of {FILE_LIMIT} bytes or more: {large}")


def _half(module):
    """A bf16 copy on the CPU, rebuilt from the configuration so that compiled or trained modules stay as they are."""
    if hasattr(module, "_internal_dict"):
        copy = type(module).from_config(dict(module.config))
    else:
        copy = type(module)(module.config)
    state = {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}
    copy.load_state_dict(state)
    return copy.to(torch.bfloat16).eval()


def _edit(file: Path, values: dict) -> None:
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
