"""Methods that start from another method's masks: which one it is, and with which options."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

from .methods.base import Method

__all__ = ["inner_method"]


@lru_cache(maxsize=64)
def _named(name: str) -> Method:
    """The method of a name, with its defaults: looking for it reads a folder, which no call should wait for."""
    from .methods import build

    return build(name)


def inner_method(
    outer: str, inner: str | Method, *, block_size: int | None = None, density: float | None = None
) -> Method:
    """The method whose masks another one starts from.

    Args:
        outer: name of the method that asks, for its errors.
        inner: name of a method, with its defaults, or a method.
        block_size: tokens of a block; None leaves the inner method's own.
        density: density of its masks; None leaves the inner method's own.

    Raises:
        ValueError: no such method, one without masks, or a density for a method that has no such option.
    """
    if isinstance(inner, str):
        try:
            inner = _named(inner)
        except ValueError as error:
            raise ValueError(f"{outer}: inner: {error}") from None
    if not isinstance(inner, Method) or inner.name in ("dense", outer):
        name = inner.name if isinstance(inner, Method) else inner
        raise ValueError(f"{outer}: inner={name!r} is not allowed; use another method that makes masks")
    if block_size is not None and "block_size" in {field.name for field in dataclasses.fields(inner)}:
        inner = dataclasses.replace(inner, block_size=block_size)  # type: ignore[call-arg]
    return inner if density is None else inner.at_density(density)
