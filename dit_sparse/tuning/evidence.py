"""What presets say of clips and forwards that were measured: read from a file, checked, and told to people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["cache_lines", "check_text", "evidence_text", "is_cache", "is_checks", "is_evidence", "is_loop", "is_number",
           "is_text", "loop_text", "whole"]


def whole(low: int) -> Callable[[Any], bool]:
    """A test for whole numbers of at least `low`."""
    return lambda x: type(x) is int and low <= x < 2**31


def is_text(x: Any) -> bool:
    """Whether it is a short text of one line that a terminal can show."""
    return isinstance(x, str) and 0 < len(x) <= 200 and x.isprintable()


def is_number(x: Any) -> bool:
    """Whether it is a finite number."""
    return type(x) in (int, float) and math.isfinite(x)


def is_loop(x: Any) -> bool:
    """Whether it may stand for the clips of the closed loop; None does."""
    numbers = ("mean", "standard_error", "worst")
    return x is None or (isinstance(x, dict) and set(x) == {"clips", "measure", *numbers} and whole(1)(x["clips"])
                         and x["measure"] in ("psnr", "ssim", "lpips")
                         and all(is_number(x[name]) for name in numbers))


def is_evidence(x: Any) -> bool:
    """Whether it is a list of objects of numbers, short texts and lists of numbers."""
    def good(value: Any) -> bool:
        return value is None or isinstance(value, bool) or is_number(value) or is_text(value) or (
            isinstance(value, list) and all(map(is_number, value)))

    return isinstance(x, list) and all(
        isinstance(entry, dict) and all(map(is_text, entry)) and all(map(good, entry.values())) for entry in x)


def is_cache(x: Any) -> bool:
    """Whether it may stand for the clips beside a step cache; None does."""
    if x is None or not isinstance(x, dict) or not is_text(x.get("name")):
        return x is None
    if set(x) == {"name", "refused"}:
        return is_text(x["refused"])
    return set(x) == {"name", "met", "clips"} and isinstance(x["met"], bool) and is_evidence(x["clips"])


def is_checks(x: Any) -> bool:
    """Whether it may stand for what the teacher-forced check measured; None does."""
    def good(entry: Any) -> bool:
        lists = [entry.get(name) for name in ("buckets", "predicted", "measured")]
        return (set(entry) == {"patterns", "milliseconds", "buckets", "predicted", "measured"}
                and is_text(entry["patterns"])
                and is_number(entry["milliseconds"]) and all(isinstance(one, list) for one in lists)
                and len({len(one) for one in lists if one is not None}) == 1)

    return x is None or (is_evidence(x) and all(map(good, x)))


def evidence_text(entry: Mapping[str, Any]) -> str:
    """One clip that was verified."""
    parts = [str(entry.get("prompt_hash", "-"))]
    parts += [f"{name} {entry[name]:.{digits}f}" for name, digits in (("psnr", 2), ("ssim", 4), ("lpips", 4))
              if isinstance(entry.get(name), (int, float))]
    parts += [f"{entry[name]:.2f}x {text}" for name, text in (("speedup", "measured"), ("attention_speedup", "modelled "
              "attention")) if isinstance(entry.get(name), (int, float))]
    if is_number(entry.get("answered")):
        parts.append(f"{entry['answered']:.0%} of the attention calls answered by the cache")
    return ", ".join(parts)


def loop_text(loop: Mapping[str, Any]) -> str:
    """The clips of the closed loop."""
    digits = 2 if loop["measure"] == "psnr" else 4
    mean, error, worst = (f"{loop[name]:.{digits}f}" for name in ("mean", "standard_error", "worst"))
    if loop["clips"] == 1:
        return f"1 clip: {loop['measure']} {mean}"
    return f"{loop['clips']} clips: mean {loop['measure']} {mean} with a standard error of {error}, worst {worst}"


def cache_lines(held: Mapping[str, Any]) -> list[str]:
    """The clips beside a step cache, a line each, and before them what they say together."""
    name = held["name"]
    if "refused" in held:
        return [f"{name}: not run, {held['refused']}"]
    count = len(held["clips"])
    said = f"{name}: {'met' if held['met'] else 'NOT met'} on {count} held-out clip{'s' * (count != 1)}"
    return [said, *map(evidence_text, held["clips"])]


def check_text(check: Mapping[str, Any]) -> str:
    """What forwards with one plan made of the velocity, bucket by bucket."""
    which = "all patterns" if check["patterns"] == "all" else f"{check['patterns']} alone"
    numbers = [" ".join(f"{x:.2g}" for x in check[name]) for name in ("predicted", "measured")]
    return f"{which}: velocity error by bucket predicted {numbers[0]}, measured {numbers[1]}"
