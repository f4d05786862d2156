"""The axes that are composed, what is refused and why, and a small set of cases that covers every pair."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

AXES: dict[str, tuple[str, ...]] = {
    "method": ("radial", "svg", "sol", "auto"),
    "step cache": ("none", "first_block", "taylorseer", "magcache", "pab", "fastercache", "teacache"),
    "run": ("eager", "compiled"),
    "LoRA": ("no LoRA", "LoRA"),
    "guidance": ("batched", "separate"),
    "offload": ("no offload", "group", "sequential"),
    "linear": ("bf16", "fp8"),
}
MOST = 60  # cases of the cover
Value = tuple[str, str]  # axis and value


class Case(NamedTuple):
    """One value of every axis, in the order of `AXES`."""

    method: str
    cache: str
    run: str
    lora: str
    guidance: str
    offload: str
    linear: str

    def __str__(self) -> str:
        return ", ".join(self)

    def values(self) -> list[Value]:
        """(axis, value) of every axis."""
        return list(zip(AXES, self, strict=True))

    def pairs(self) -> Iterator[frozenset[Value]]:
        """Every pair of values in it."""
        return map(frozenset, itertools.combinations(self.values(), 2))

    @property
    def exact(self) -> bool:
        """Whether a composed run has the plain one's bits; a LoRA that is not fused adds its part in another order."""
        return self.lora == "no LoRA" or self.linear == "fp8"


@dataclass(frozen=True)
class Refusal:
    """Values that cannot be used together.

    Args:
        values: of different axes.
        match: what the refusal says, a regular expression.
        reason: for the page.
    """

    values: frozenset[Value]
    match: str
    reason: str

    @property
    def name(self) -> str:
        """The values in words."""
        return " x ".join(value for _, value in sorted(self.values, key=lambda value: list(AXES).index(value[0])))

    def concerns(self, values: Iterable[Value]) -> bool:
        """Whether all of its values are among these."""
        return self.values <= set(values)


REFUSED = (
    Refusal(frozenset({("step cache", "fastercache"), ("guidance", "separate")}), "unconditional and the conditional",
            "FasterCache leaves out the unconditional half of a batch; with guidance in two forwards there is none"),
)


def product(axes: dict[str, tuple[str, ...]] = AXES) -> list[Case]:
    """The full product, without what is refused."""
    every = (Case(*values) for values in itertools.product(*axes.values()))
    return [case for case in every if not any(refusal.concerns(case.values()) for refusal in REFUSED)]


def all_pairs(axes: dict[str, tuple[str, ...]] = AXES) -> set[frozenset[Value]]:
    """Every pair of values of two axes, refused ones included."""
    named = [[(axis, value) for value in values] for axis, values in axes.items()]
    return {frozenset(pair) for axes_two in itertools.combinations(named, 2) for pair in itertools.product(*axes_two)}


def _effort(case: Case) -> int:
    """What a case costs: compiling takes longer than all the rest, and most where hooks break the graph."""
    broken = (case.cache != "none") + 2 * (case.offload == "sequential")
    return 1 + broken if case.run == "compiled" else 0


def cover(cases: Iterable[Case], effort: Callable[[Case], int] = _effort) -> list[Case]:
    """Few of the cases, with every pair of values that any of them has; greedy, the same every time.

    Args:
        cases: to choose from.
        effort: of several that cover as many new pairs the one of least effort is taken, then the one whose values
            were taken least.
    """
    left = {case: set(case.pairs()) for case in cases}
    used: Counter[Value] = Counter()
    chosen: list[Case] = []
    while left:
        best = max(left, key=lambda case: (len(left[case]), -effort(case), -sum(used[x] for x in case.values())))
        covered = left.pop(best)
        if not covered:
            break
        chosen.append(best)
        used.update(best.values())
        for pairs in left.values():
            pairs -= covered
    return chosen
