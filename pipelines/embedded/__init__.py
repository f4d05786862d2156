"""The embedded model: a small text-to-video Wan, trained on a procedural world, that needs no download."""

from __future__ import annotations

from pathlib import Path

from .vocabulary import unknown_words

__all__ = ["DEFAULTS", "EXAMPLES", "LONG", "folder", "unknown_words"]

# The preview size, which a CPU makes in seconds, and the long one that is worth sparsifying on a GPU.
DEFAULTS = dict(height=256, width=256, frames=17, steps=20, guidance_scale=3.0, max_sequence_length=32)
LONG = {**DEFAULTS, "height": 512, "width": 512, "frames": 33}

EXAMPLES: tuple[str, ...] = (
    "a large red heart growing on a drifting background",
    "a large purple circle shrinking on a checkered background",
    "a large yellow diamond growing on a rippling background",
    "a medium green square moving left on a black background",
    "a large blue triangle standing still on a speckled background",
    "a medium pink heart moving up on a cloudy background, camera panning left",
    "a red heart on the bottom of a white heart on a gray background",
    "a green triangle on the left of an orange triangle on a striped background",
)


def folder() -> Path:
    """The shipped Diffusers folder, for ``WanPipeline.from_pretrained(folder())``."""
    return Path(__file__).resolve().parent / "weights"
