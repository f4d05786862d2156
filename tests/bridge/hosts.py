"""Tiny random models of every tested host, built from their configurations, with inputs that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Host:
    """One host: how to build it, how to call it, and what the bridge must find out about it.

    `text_inputs` name the inputs that hold text; `text` counts the text tokens in self-attention, at `text_at`.
    `layers` is the number of self-attention layers. `per_sample`: the model attends row by row of its batch.
    """

    name: str
    family: str
    cls: str
    config: dict[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    grid: tuple[int, int, int]
    layers: int
    text: int = 0
    text_at: str = "none"
    text_inputs: tuple[str, ...] = ("encoder_hidden_states",)
    per_sample: bool = False

    def build(self, seed: int = 0) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = getattr(diffusers, self.cls)(**self.config).eval()
        # Random instead of zero initialised gates and outputs: every token must be able to reach the result.
        gen = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.abs().sum() == 0:
                    parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.05)
        return model

    @property
    def video(self) -> int:
        t, y, x = self.grid
        return t * y * x


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def time(batch: int, value: float = 500.0) -> torch.Tensor:
    return torch.full((batch,), value)


def wan_config(**kw: Any) -> dict[str, Any]:
    return {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32, **kw}


def wan_inputs(batch: int, channels: int = 4, text: int = 7, **kw: Any) -> dict[str, Any]:
    return {"hidden_states": randn(batch, channels, 3, 8, 6), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, text, 16, seed=2), **kw}


def ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    out = torch.zeros(height, width, axes)
    out[..., 1] += torch.arange(height)[:, None]
    out[..., 2] += torch.arange(width)[None]
    return out.reshape(-1, axes)


def hunyuan_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    return {"hidden_states": randn(batch, 4, 3, 4, 6), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, 6, 16, seed=2), "encoder_attention_mask": mask,
            "pooled_projections": randn(batch, 8, seed=3), "guidance": torch.full((batch,), 6000.0)}


def hunyuan15_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 6, dtype=torch.int64)
    mask[:, 4:] = 0
    mask2 = torch.ones(batch, 5, dtype=torch.int64)
    mask2[:, 3:] = 0
    return {"hidden_states": randn(batch, 4, 3, 4, 5), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, 6, 16, seed=2), "encoder_attention_mask": mask,
            "encoder_hidden_states_2": randn(batch, 5, 12, seed=3), "encoder_attention_mask_2": mask2,
            "image_embeds": torch.zeros(batch, 2, 10)}


def mochi_inputs(batch: int) -> dict[str, Any]:
    mask = torch.ones(batch, 5, dtype=torch.bool)
    mask[-1, 4:] = False
    return {"hidden_states": randn(batch, 4, 2, 6, 8), "timestep": time(batch),
            "encoder_hidden_states": randn(batch, 5, 16, seed=2), "encoder_attention_mask": mask}


def rope_of(frames: int, height: int, width: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = randn(frames * height * width, dim // 2, seed=9).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def allegro_rope(frames: int, height: int, width: int, dim: int) -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    rope = get_3d_rotary_pos_embed_allegro(dim, ((0, 0), (height, width)), (height, width), frames)
    places = torch.cartesian_prod(*(axis.long() for axis in rope[3:])).T.reshape(3, 1, -1).contiguous()
    return rope[:3], tuple(places)


HOSTS = (
    Host("wan-t2v", "wan", "WanTransformer3DModel", wan_config(), wan_inputs, (3, 4, 3), 2),
    Host("wan-i2v", "wan", "WanTransformer3DModel",
         wan_config(in_channels=8, image_dim=10, added_kv_proj_dim=24, num_layers=1),
         lambda b: wan_inputs(b, 8, 512, encoder_hidden_states_image=randn(b, 4, 10, seed=3)), (3, 4, 3), 1),
    Host("wan-5b", "wan", "WanTransformer3DModel", wan_config(num_layers=1),
         lambda b: wan_inputs(b) | {"timestep": torch.cat((torch.zeros(b, 12), torch.full((b, 24), 500.0)), dim=1)},
         (3, 4, 3), 1),
    Host("hunyuan", "hunyuan", "HunyuanVideoTransformer3DModel",
         {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1,
          "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16,
          "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)}, hunyuan_inputs, (3, 4, 6), 2, 6, "back"),
    Host("hunyuan15", "hunyuan15", "HunyuanVideo15Transformer3DModel",
         {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
          "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 12, "image_embed_dim": 10,
          "rope_axes_dim": (4, 4, 4)}, hunyuan15_inputs, (3, 4, 5), 2, 13, "back"),
    Host("cogvideox", "cogvideox", "CogVideoXTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
          "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 6, "sample_frames": 9,
          "max_text_seq_length": 5, "use_rotary_positional_embeddings": True},
         lambda b: {"hidden_states": randn(b, 3, 4, 6, 8), "timestep": time(b).long(),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), "image_rotary_emb": rope_of(3, 3, 4, 16)},
         (3, 3, 4), 2, 5, "front"),
    Host("cogvideox1.5", "cogvideox", "CogVideoXTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
          "text_embed_dim": 16, "num_layers": 1, "sample_width": 8, "sample_height": 6, "sample_frames": 9,
          "max_text_seq_length": 5, "use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
         lambda b: {"hidden_states": randn(b, 4, 4, 6, 8), "timestep": time(b).long(),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), "image_rotary_emb": rope_of(2, 3, 4, 16)},
         (2, 3, 4), 1, 5, "front"),
    Host("ltx", "ltx", "LTXVideoTransformer3DModel",
         {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
          "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 16},
         lambda b: {"hidden_states": randn(b, 36, 8), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2),
                    "encoder_attention_mask": torch.ones(b, 5, dtype=torch.bool), "num_frames": 3, "height": 3,
                    "width": 4}, (3, 3, 4), 2),
    Host("mochi", "mochi", "MochiTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
          "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 5},
         mochi_inputs, (2, 3, 4), 2, 5, "back", per_sample=True),
    Host("cosmos", "cosmos", "CosmosTransformer3DModel",
         {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
          "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16),
          "concat_padding_mask": False},
         lambda b: {"hidden_states": randn(b, 4, 3, 6, 8), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), "fps": 16}, (3, 3, 4), 2),
    Host("allegro", "allegro", "AllegroTransformer3DModel",
         {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "num_layers": 2,
          "cross_attention_dim": 48, "sample_width": 8, "sample_height": 6, "sample_frames": 3,
          "caption_channels": 16},
         lambda b: {"hidden_states": randn(b, 4, 3, 6, 8), "timestep": time(b).long(),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2),
                    "encoder_attention_mask": torch.ones(b, 5), "image_rotary_emb": allegro_rope(3, 3, 4, 24)},
         (3, 3, 4), 2),
    Host("flux", "flux", "FluxTransformer2DModel",
         {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
          "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)},
         lambda b: {"hidden_states": randn(b, 24, 4), "timestep": time(b, 0.5),
                    "encoder_hidden_states": randn(b, 6, 16, seed=2), "pooled_projections": randn(b, 8, seed=3),
                    "img_ids": ids(4, 6), "txt_ids": torch.zeros(6, 3)}, (1, 4, 6), 2, 6, "front"),
    Host("qwen", "qwen", "QwenImageTransformer2DModel",
         {"in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
          "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
         lambda b: {"hidden_states": randn(b, 24, 8), "timestep": time(b, 0.5),
                    "encoder_hidden_states": randn(b, 6, 16, seed=2),
                    "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1, 0]] * b),
                    "img_shapes": [[(1, 4, 6)]] * b}, (1, 4, 6), 2, 6, "front"),
    Host("sd3", "sd3", "SD3Transformer2DModel",
         {"sample_size": 12, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2,
          "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8, "out_channels": 4,
          "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
         lambda b: {"hidden_states": randn(b, 4, 8, 12), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2), "pooled_projections": randn(b, 8, seed=3)},
         (1, 4, 6), 3, 5, "back"),
    Host("pixart", "pixart", "PixArtTransformer2DModel",
         {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2,
          "cross_attention_dim": 24, "sample_size": 8, "caption_channels": 16, "use_additional_conditions": False},
         lambda b: {"hidden_states": randn(b, 4, 8, 12), "timestep": time(b),
                    "encoder_hidden_states": randn(b, 5, 16, seed=2),
                    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, (1, 4, 6), 2),
)


def call(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The model's output tensor, without gradients."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]
