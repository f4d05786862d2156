"""Steps for tests: times as a GPU has them, and a model that a CPU times in a second."""

from __future__ import annotations

import dataclasses

import torch

from dit_sparse.eval.generate_speed import Kinds, published_rate
from dit_sparse.eval.step_models import GEOMETRIES, Geometry
from dit_sparse.eval.step_speed import StepRow


def row(layer_ms: float, what: str = "dense", density: float = 1.0, rest_ms: float = 10.0) -> StepRow:
    """A step of a model of 40 layers."""
    step = (rest_ms + 40 * layer_ms) / 1e3
    return StepRow("wan-14b-720p", 75_600, what, "hopper", density, {"num_layers": layer_ms}, rest_ms, step, 1.0, 0.0,
                   {})


def kinds(model: str = "wan-14b-720p", cache: str = "magcache", eight: bool = True) -> Kinds:
    """About what an H200 takes; dense 11.346 s, sparse 4.21, dense with 8-bit linear layers 10.33, all of it 3.01."""
    found = (row(258.0), row(75.0, "svg, fp8 both", 0.15)) if eight else (None, None)
    return Kinds(GEOMETRIES[model], row(283.4), row(105.0, "svg", 0.15), *found, "attention and linear layers", 0.02,
                 published_rate(model, cache))


def small() -> Geometry:
    """The tiny model, smaller still."""

    def inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {"hidden_states": torch.randn(1, 16, 3, 10, 14, dtype=dtype), "timestep": torch.full((1,), 999.0),
                "encoder_hidden_states": torch.randn(1, 8, 16, dtype=dtype)}

    config = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    return dataclasses.replace(GEOMETRIES["tiny"], inputs=inputs, config=config, tokens=3 * 5 * 7)
