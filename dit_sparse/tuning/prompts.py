"""Prompts that `tune` takes when none are given: fast motion first, since still clips flatter every method."""

from __future__ import annotations

# For the included model, whose words are few: growing and moving, on textured and moving backgrounds.
EMBEDDED = (
    "a large red heart growing on a drifting background",
    "a medium pink heart moving up on a cloudy background, camera panning left",
    "a large yellow diamond shrinking on a rippling background",
    "a large blue triangle standing still on a speckled background",
    "a medium green square moving left on a striped background",
    "a large purple circle growing on a checkered background",
)

# For any other model.
GENERAL = (
    "a racing car drifts through a tight corner in the rain, spray flying, the camera following closely",
    "a flock of birds takes off from a lake at sunrise, water splashing, slow pan to the right",
    "a woman walks through a crowded night market, neon signs, handheld camera",
    "a cup of coffee on a wooden table by a window, steam rising slowly, static shot",
    "a skateboarder jumps down a flight of stairs in a sunny plaza, low angle",
    "waves roll over black rocks under a cloudy sky, seen from above",
)
