"""Geometries of real models for `bench step`: the transformer, random weights, and inputs of a named size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Geometry:
    """A real model's shape.

    Args:
        name, title: what users write, and what it is.
        cls: transformer class of Diffusers.
        kinds: the configuration's layer counts and how many the model has.
        inputs: (device, dtype) -> the forward's arguments at the size named.
        tokens: in self-attention, text included.
        config: what differs from the class's defaults.
    """

    name: str
    title: str
    cls: str
    kinds: dict[str, int]
    inputs: Callable[[str, torch.dtype], dict[str, Any]]
    tokens: int
    config: dict[str, Any] = field(default_factory=dict)


def _randn(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _wan(frames: int, height: int, width: int, text: int = 512, text_dim: int = 4096
         ) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        return {"hidden_states": _randn(1, 16, frames, height, width, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 999.0, device=device),
                "encoder_hidden_states": _randn(1, text, text_dim, **made)}  # type: ignore[arg-type]

    return inputs


def _hunyuan(frames: int, height: int, width: int) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        mask = torch.zeros(1, 256, dtype=torch.int64, device=device)
        mask[:, :40] = 1  # a caption of forty words; the rest is padding, as the pipeline gives it
        return {"hidden_states": _randn(1, 16, frames, height, width, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 999.0, device=device), "encoder_attention_mask": mask,
                "encoder_hidden_states": _randn(1, 256, 4096, **made),  # type: ignore[arg-type]
                "pooled_projections": _randn(1, 768, **made),  # type: ignore[arg-type]
                "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype)}

    return inputs


def _cogvideox(frames: int, height: int, width: int) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        tokens = frames // 2 * (height // 2) * (width // 2)
        angles = torch.randn(tokens, 32, device=device).repeat_interleave(2, -1)
        return {"hidden_states": _randn(1, frames, 16, height, width, **made),  # type: ignore[arg-type]
                "encoder_hidden_states": _randn(1, 226, 4096, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 999.0, device=device), "image_rotary_emb": (angles.cos(), angles.sin())}

    return inputs


def _flux(height: int, width: int) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        places = torch.zeros(height, width, 3, device=device)
        places[..., 1] += torch.arange(height, device=device)[:, None]
        places[..., 2] += torch.arange(width, device=device)
        return {"hidden_states": _randn(1, height * width, 64, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 0.999, device=device),
                "encoder_hidden_states": _randn(1, 512, 4096, **made),  # type: ignore[arg-type]
                "pooled_projections": _randn(1, 768, **made),  # type: ignore[arg-type]
                "guidance": torch.full((1,), 3.5, device=device),
                "img_ids": places.reshape(-1, 3), "txt_ids": torch.zeros(512, 3, device=device)}

    return inputs


GEOMETRIES = {g.name: g for g in (
    Geometry("wan-14b-720p", "Wan2.1-14B, 81 frames of 1280x720 (21x45x80)", "WanTransformer3DModel",
             {"num_layers": 40}, _wan(21, 90, 160), 21 * 45 * 80),
    Geometry("wan-1.3b-480p", "Wan2.1-1.3B, 81 frames of 832x480 (21x30x52)", "WanTransformer3DModel",
             {"num_layers": 30}, _wan(21, 60, 104), 21 * 30 * 52,
             {"num_attention_heads": 12, "ffn_dim": 8960}),
    Geometry("hunyuan-720p", "HunyuanVideo, 129 frames of 1280x720 (33x45x80 + 256 text)",
             "HunyuanVideoTransformer3DModel", {"num_layers": 20, "num_single_layers": 40}, _hunyuan(33, 90, 160),
             33 * 45 * 80 + 256),
    # 21 latent frames, and one more: the pipeline fills up patches of two.
    Geometry("cogvideox1.5-768p", "CogVideoX1.5-5B, 81 frames of 1360x768 (226 text + 11x48x85)",
             "CogVideoXTransformer3DModel", {"num_layers": 42}, _cogvideox(22, 96, 170), 11 * 48 * 85 + 226,
             {"num_attention_heads": 48, "patch_size_t": 2, "patch_bias": False, "sample_frames": 81,
              "sample_height": 96, "sample_width": 170, "use_rotary_positional_embeddings": True}),
    Geometry("flux-2048", "FLUX.1-dev at 2048x2048 (128x128 + 512 text)", "FluxTransformer2DModel",
             {"num_layers": 19, "num_single_layers": 38}, _flux(128, 128), 128 * 128 + 512,
             {"guidance_embeds": True}),
    Geometry("tiny", "a Wan of 4 heads of 64 at 5x16x16, for a CPU", "WanTransformer3DModel", {"num_layers": 8},
             _wan(5, 32, 32, 32, 128), 5 * 16 * 16,
             {"num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 128, "ffn_dim": 768}),
)}


def build(geometry: Geometry, counts: dict[str, int], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model with these numbers of layers, random weights, made on the device."""
    import diffusers

    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)  # a layer of fp32 weights on the way would be twice the memory
        with torch.device(device):
            model = getattr(diffusers, geometry.cls)(**{**geometry.config, **counts})
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)
