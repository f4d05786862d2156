"""Dense attention: leaves every call as it is, for comparison and for switching off by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Call, Method, Plan


@dataclass(frozen=True)
class Dense(Method):
    """Every query sees every key, through the fastest dense kernel there is."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "Dense attention"
    parts: ClassVar[dict[str, str]] = {
        "order": "as the model has it",
        "score": "none",
        "select": "everything",
        "operate": "dense kernel",
        "remember": "nothing",
    }

    def plan(self, call: Call) -> Plan:
        """No mask: the call is dense."""
        return Plan(None)
