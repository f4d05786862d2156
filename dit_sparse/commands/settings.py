"""Default sizes, steps and methods of `generate` and `compare`, and the limits on what may be asked for."""

from __future__ import annotations

from typing import Any

# Sizes beyond these are refused before memory is spent.
MAX_SIDE = 2048
MIN_SIDE = 32
MAX_FRAMES = 257
MAX_TOKENS = 131_072
MAX_STEPS = 200
FPS = 8

# What `compare` does for the embedded model when nothing is said: sizes and steps that differ from the model's own
# preview settings (pipelines.embedded.DEFAULTS), and the method with its options.
COMPARE: dict[str, dict[str, Any]] = {
    "preview": {"method": None, "options": {}},
    "long": {
        "height": 512,
        "width": 512,
        "frames": 33,
        "steps": 8,
        "guidance_scale": 1.0,
        # Two quiet cores, November 2026: 2.1 to 2.2x the dense run. With layer 0 dense and density 0.15 instead, slower
        # and 2 dB further from dense: eight steps leave little to dense layers.
        "method": "svg",
        "options": {"density": 0.2, "dense_layers": 0},
    },
}
