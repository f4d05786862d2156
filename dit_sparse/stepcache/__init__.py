"""Step caches: denoising steps that are answered from earlier ones instead of being computed.

    enable(pipe, "svg", step_cache="first_block")

Five are Diffusers' own; TeaCache is here, in the same four parts. docs/step-caches.md says what each does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .names import NAMES, check_name, name_of

if TYPE_CHECKING:
    from .active import ActiveCache, active_of, apply, remove, report, switch_on
    from .resolve import resolve
    from .teacache import TeaCacheConfig, apply_teacache, remove_teacache

_HOMES = {
    "ActiveCache": "active", "active_of": "active", "apply": "active", "remove": "active", "report": "active",
    "switch_on": "active",
    "resolve": "resolve", "TeaCacheConfig": "teacache", "apply_teacache": "teacache", "remove_teacache": "teacache",
}
__all__ = ["NAMES", "ActiveCache", "TeaCacheConfig", "active_of", "apply", "apply_teacache", "check_name", "name_of",
           "remove", "remove_teacache", "report", "resolve", "switch_on"]


def __getattr__(name: str) -> Any:
    """What needs Diffusers loads on first use."""
    if name in _HOMES:
        home = importlib.import_module(f".{_HOMES[name]}", __name__)
        globals().update({public: getattr(home, public) for public, module in _HOMES.items() if module == _HOMES[name]})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
