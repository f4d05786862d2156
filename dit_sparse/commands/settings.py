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

# What `generate` and `compare` ask of the default method for the included model: its error bound keeps .44 of the pairs
# of 2,304 tokens, and on two cores a clip takes 33 to 43 s (November 2026).
PREVIEW: dict[str, Any] = {"density": 0.25}

# What `compare` does for the embedded model when nothing is said: sizes and steps that differ from the model's own
# preview settings (pipelines.embedded.DEFAULTS), and the method with its options.
COMPARE: dict[str, dict[str, Any]] = {
    "preview": {"method": None, "options": PREVIEW},
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


def usual_options(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The usual options with what the user gave on top; a bound on the error comes in place of a usual density."""
    return {**({} if "max_error" in given else options), **given}
