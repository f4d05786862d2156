"""Kernels that may not start on a machine, and what runs in their place: named once in a warning, and counted."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["Starting", "fallbacks"]

Result = TypeVar("Result")

# Why calls ran on a slower kernel than the one chosen for them, counted.
fallbacks: Counter[str] = Counter()


class Starting:
    """A kernel that is compiled on first use, and for which kinds of calls that failed.

    Args:
        kernel: the kernel, as sentences name it.
        other: what runs in its place.
    """

    def __init__(self, kernel: str, other: str) -> None:
        self.kernel, self.other = kernel, other
        # Kinds of calls that it failed to start for, with the error: the other kernel runs them since.
        self.failed: dict[tuple[object, ...], str] = {}
        self.started: set[tuple[object, ...]] = set()  # kinds of calls that ran

    def takes(self, asked: bool | None, reasons: Sequence[str], missing: str, words: str) -> bool:
        """Whether a call goes to the kernel. One that would, but for the machine, is counted in `fallbacks`.

        Args:
            asked: True: the kernel, False: the other one, None: the kernel where it can run.
            reasons: why it cannot run the call.
            missing: the one of them that is the machine's, "" on a machine that has all.
            words: how the kernel is asked for, as it stands in the error.

        Raises:
            ValueError: when the kernel is asked for and cannot run the call, with its reasons.
        """
        if asked and reasons:
            raise ValueError(f"{words} cannot run this call: {'; '.join(reasons)}; use cuda=None or False")
        if asked is None and missing and list(reasons) == [missing]:
            fallbacks[f"{self.kernel} cannot run here ({missing})"] += 1
        return asked is not False and not reasons

    def run(self, kind: tuple[object, ...], first: Callable[[], Result], second: Callable[[], Result],
            able: Callable[[], bool] = lambda: True) -> Result:
        """The result of the kernel; where it does not start, of the other one, counted in `fallbacks`.

        Only the first call of a kind compiles. An error of a kind that ran before is the caller's, and so is a lack of
        memory.

        Args:
            kind: what decides which variant is compiled.
            first, second: call the kernel, and the other one.
            able: whether the other one can run the call.
        """
        if kind not in self.failed:
            try:
                result = first()
                self.started.add(kind)
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # An error while a graph is captured says nothing of the kernel, and has spoilt the capture.
                capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
                if kind in self.started or capturing or not able():
                    raise
                words = str(error).strip().splitlines()
                self.failed[kind] = f"{self.kernel} did not start ({type(error).__name__}: {words[0] if words else ''})"
                warnings.warn(f"{self.failed[kind]}: such calls run on {self.other}", stacklevel=3)
        other = second()
        fallbacks[self.failed[kind]] += 1
        return other
