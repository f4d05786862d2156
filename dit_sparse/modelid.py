"""Which model a calibration or a preset was made for: a digest of its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_hash(model: Any) -> str:
    """A digest of a model's architecture, the same wherever and by whichever release it was saved.

    Entries whose names begin with an underscore (paths, versions) do not count. Two fine-tunings of one architecture
    have the same digest: their weights are not looked at.

    Args:
        model: a Diffusers model (a transformer), or its configuration as a mapping.

    Returns:
        16 hexadecimal digits: the beginning of the SHA-256 of the sorted configuration and the class name.

    Raises:
        ValueError: `model` has no configuration.
    """
    config = model if isinstance(model, Mapping) else getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no configuration: it is no Diffusers model")
    name = config.get("_class_name", "") if isinstance(model, Mapping) else type(model).__name__
    kept = {str(key): value for key, value in dict(config).items() if not str(key).startswith("_")}
    text = json.dumps([name, kept], sort_keys=True, default=str)  # tuples and lists read the same in JSON
    return hashlib.sha256(text.encode()).hexdigest()[:16]
