"""A head plan: for every stretch of a run, layer and head, which candidate it computes."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .candidates import BUDGETS, DENSE, Candidate

__all__ = ["HeadPlan"]


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The candidate of every bucket, layer and head.

    Args:
        candidates: what heads may compute.
        edges: first step of every bucket, and the number of steps the plan was made for; rising, from 0.
        choices: uint8 (buckets, layers, heads), indices into `candidates`.

    Raises:
        ValueError: parts that do not fit together; one line.
    """

    candidates: tuple[Candidate, ...]
    edges: tuple[int, ...]
    choices: np.ndarray

    def __post_init__(self) -> None:
        edges, choices = self.edges, self.choices
        if not 1 <= len(self.candidates) <= 256:
            raise ValueError(f"candidates: {len(self.candidates)} are not allowed; use 1 to 256")
        if len(edges) < 2 or edges[0] != 0 or any(a >= b for a, b in zip(edges, edges[1:], strict=False)):
            raise ValueError(f"buckets={list(edges)} is not allowed; use rising whole numbers from 0 to the steps")
        if choices.dtype != np.uint8 or choices.ndim != 3 or 0 in choices.shape:
            raise ValueError(f"plan is {choices.dtype} {choices.shape}; use uint8 (buckets, layers, heads)")
        if choices.shape[0] != len(edges) - 1:
            raise ValueError(f"plan holds {choices.shape[0]} buckets, buckets names {len(edges) - 1}")
        if int(choices.max()) >= len(self.candidates):
            raise ValueError(f"plan holds {int(choices.max())}; use 0 ... {len(self.candidates) - 1}, the candidates")

    def __repr__(self) -> str:
        buckets, layers, heads = self.choices.shape
        return f"<{buckets} buckets x {layers} layers x {heads} heads, {len(self.candidates)} candidates>"

    @property
    def steps(self) -> int:
        """Number of steps that the plan was made for."""
        return self.edges[-1]

    @property
    def buckets(self) -> int:
        """Number of buckets."""
        return len(self.edges) - 1

    @property
    def layers(self) -> int:
        """Number of self-attention layers."""
        return int(self.choices.shape[1])

    @property
    def heads(self) -> int:
        """Number of heads of a layer."""
        return int(self.choices.shape[2])

    @property
    def all_dense(self) -> bool:
        """Whether every head computes everything."""
        return all(self.candidates[i].is_dense for i in np.unique(self.choices))

    def bucket_of(self, step: int, num_steps: int) -> int:
        """The bucket of a step; a run of another length is mapped by the share of it that has passed."""
        place = step / max(1, num_steps) * self.steps
        return min(bisect.bisect_right(self.edges, place + 1e-9) - 1, self.buckets - 1)

    def steps_of(self, bucket: int) -> range:
        """The steps of a bucket, in a run of the length that the plan was made for."""
        return range(self.edges[bucket], self.edges[bucket + 1])

    def of(self, bucket: int, layer: int) -> tuple[Candidate, ...]:
        """The candidates of a layer's heads."""
        return tuple(self.candidates[i] for i in self.choices[bucket, layer])

    def densities(self) -> list[float]:
        """Mean kept fraction of every bucket, as the candidates name it."""
        density = np.array([c.density for c in self.candidates])
        return [float(density[chosen].mean()) for chosen in self.choices]

    def density(self) -> float:
        """Mean kept fraction over all steps, as the candidates name it."""
        lengths = np.diff(self.edges)
        return float(np.dot(self.densities(), lengths) / lengths.sum())

    def denser(self) -> HeadPlan:
        """The same plan with every sparse head at the next larger budget, dense after the largest."""

        def next_of(one: Candidate) -> Candidate:
            larger = [b for b in BUDGETS if one.density + 1e-9 < b < 1]
            return Candidate(one.pattern, one.order, larger[0]) if larger and not one.is_dense else DENSE

        return self.remapped([next_of(one) for one in self.candidates])

    def remapped(self, candidates: Sequence[Candidate]) -> HeadPlan:
        """The plan with candidate i replaced by `candidates[i]`; equal ones become one, those not used go."""
        used = [candidates[i] for i in range(len(candidates)) if (self.choices == i).any()]
        kept = tuple(dict.fromkeys((DENSE, *used)))
        place = np.array([kept.index(c) if c in kept else 0 for c in candidates], dtype=np.uint8)
        return HeadPlan(kept, self.edges, place[self.choices])

    def only(self, bucket: int) -> HeadPlan:
        """The plan of one bucket, for all steps."""
        return HeadPlan(self.candidates, (0, self.steps), self.choices[bucket : bucket + 1])
