"""What a step cache's name stands for in each model family: data, with its source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .names import FASTERCACHE, FIRST_BLOCK, MAGCACHE, PAB, TAYLORSEER, TEACACHE

# Attention of the block stack, wherever a family puts it. Diffusers' own pattern for TaylorSeer ends in "attn" and so
# finds nothing where the layers are called attn1 and attn2.
ATTENTION = r"(\w+_)?blocks\.\d+\.(attn\d?|self_attention|cross_attention)"

# Under "" what holds for every family: the defaults of Diffusers 0.42.
DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    FIRST_BLOCK: {"": {"threshold": 0.05}},
    # arXiv 2503.06923: every fifth step, order 1, for HunyuanVideo and Wan.
    TAYLORSEER: {"": {"cache_interval": 5, "disable_cache_before_step": 3, "max_order": 1,
                      "cache_identifiers": [ATTENTION]}},
    # The authors' defaults (arXiv 2506.09045) for Wan 1.3B, HunyuanVideo and FLUX; larger models have theirs in data/.
    MAGCACHE: {"": {"threshold": 0.06, "max_skip_steps": 3, "retention_ratio": 0.2},
               "wan": {"threshold": 0.12, "max_skip_steps": 4, "retention_ratio": 0.2},
               "hunyuan": {"threshold": 0.24, "max_skip_steps": 6, "retention_ratio": 0.2},
               "flux": {"threshold": 0.24, "max_skip_steps": 5, "retention_ratio": 0.1}},
    # Ours, for coefficients that `dit-sparse calibrate` made; published ones have their own.
    TEACACHE: {"": {"threshold": 0.1}},
    # arXiv 2408.12588; cross-attention and temporal attention have no module of their own in these families.
    PAB: {"": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)},
          "cogvideox": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 850)}},
    # arXiv 2410.19355. Models whose guidance is distilled have no unconditional half to leave out.
    FASTERCACHE: {"": {"tensor_format": "BCFHW"},
                  "cogvideox": {"tensor_format": "BFCHW"},
                  "hunyuan": {"is_guidance_distilled": True},
                  "flux": {"is_guidance_distilled": True, "tensor_format": "BCHW"}},
}


def defaults(name: str, family: str) -> dict[str, Any]:
    """The arguments of a cache's configuration in a family."""
    return {**DEFAULTS[name][""], **DEFAULTS[name].get(family, {})}
