"""The names of step caches that users write; nothing here imports Diffusers."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

FIRST_BLOCK, TAYLORSEER, MAGCACHE = "first_block", "taylorseer", "magcache"
PAB, FASTERCACHE, TEACACHE = "pab", "fastercache", "teacache"
NAMES = (FIRST_BLOCK, TAYLORSEER, MAGCACHE, PAB, FASTERCACHE, TEACACHE)
SEACACHE = "SeaCache"  # of Diffusers, by its configuration only
CALIBRATED = (MAGCACHE, TEACACHE)  # need numbers that were measured on the model

CONFIGS = {
    "FirstBlockCacheConfig": FIRST_BLOCK,
    "TaylorSeerCacheConfig": TAYLORSEER,
    "MagCacheConfig": MAGCACHE,
    "PyramidAttentionBroadcastConfig": PAB,
    "FasterCacheConfig": FASTERCACHE,
    "TeaCacheConfig": TEACACHE,
    "_WantedMagCache": MAGCACHE,
}


def name_of(config: Any) -> str:
    """The name of a configuration's cache; for one that we do not know, the name of its class."""
    found = next((CONFIGS[cls.__name__] for cls in type(config).__mro__ if cls.__name__ in CONFIGS), None)
    return found or type(config).__name__.removesuffix("Config")


def as_text(step_cache: Any) -> Any:
    """A path as text; anything else as it is."""
    return str(fspath(step_cache)) if isinstance(step_cache, PathLike) else step_cache


def check_name(step_cache: Any) -> None:
    """Refuse a text that names no step cache and no file of a calibration.

    Raises:
        ValueError: one line with what is allowed.
    """
    step_cache = as_text(step_cache)
    if not isinstance(step_cache, str) or step_cache in NAMES or step_cache.endswith(".json"):
        return
    if step_cache.partition(":")[0] not in CALIBRATED or ":" not in step_cache:
        raise ValueError(f"step_cache={step_cache[:80]!r} is unknown; use one of {', '.join(NAMES)}, the .json file "
                         "that `dit-sparse calibrate` wrote, or a configuration object")
