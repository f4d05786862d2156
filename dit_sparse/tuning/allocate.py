"""Which candidate every head takes: least time within a predicted error, or least error within a time.

The predicted error is E = sum over (bucket, layer) of weight * sum over heads of a; the time T = sum over (bucket,
layer) of steps * (sum over heads of tau + what the used orders cost). For a multiplier x every head takes the candidate
of least time + x * error (Lagrange); bisection finds x, and what the limit leaves is spent greedily.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MOST_ERROR", "Allocation", "allocate", "allowed_by"]

MOST_ERROR = 0.5  # of one head's output
LEAST_DENSITY = 0.02
_ROUNDS = 40
_MOST_SUBSETS = 8
_SPAN = 2.0**60  # multipliers looked at, on either side of (time of all / error of all)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Allocation:
    """A plan, and what it is predicted to cost.

    Args:
        choice: int64 (buckets, layers, heads), a candidate's number.
        time: predicted, in the unit of the times given.
        error: predicted.
        met: whether the limit, or the budget, is kept.
        multiplier: the one that the plan started from.
        bisected_time, bisected_error: of the plan before what was left was spent.
    """

    choice: NDArray[np.int64]
    time: float
    error: float
    met: bool
    multiplier: float
    bisected_time: float
    bisected_error: float


def allowed_by(err: ArrayLike, densities: ArrayLike, *, most: float = MOST_ERROR, least: float = LEAST_DENSITY
               ) -> NDArray[np.bool_]:
    """Candidates that a head may take: neither too wrong, nor below the least density.

    Args:
        err: (..., C), squared error of the head's output over its square.
        densities: (C,), of the candidates.
        most: largest err.
        least: smallest density.
    """
    return (np.asarray(err) <= most) & (np.asarray(densities) >= least)


def allocate(
    times: ArrayLike, errors: ArrayLike, weights: ArrayLike, fixed: Mapping[str, float] | None = None, *,
    limit: float | None = None, budget: float | None = None, orders: Sequence[str] | None = None,
    steps: ArrayLike = 1.0, allowed: ArrayLike | None = None, tie: float = 0.02, fill: bool = True,
) -> Allocation:
    """Choose a candidate for every (bucket, layer, head).

    Args:
        times: of one head and step, (C,) or anything that broadcasts to the errors.
        errors: (buckets, layers, heads, C), `a` with its standard error added; 0 for candidates that change nothing.
        weights: of a layer's errors, what broadcasts to (buckets, layers): steps of the bucket included.
        fixed: time that each order costs a layer and step in which some head uses it.
        limit: largest predicted error; the time is made least.
        budget: largest predicted time; the error is made least. Exactly one of the two is given.
        orders: of the candidates, "" for those that need none (dense); None: none needs one.
        steps: of each bucket, what broadcasts to (buckets,).
        allowed: bool, what broadcasts to the errors; candidates without any error are always allowed.
        tie: share of the least cost within which the choice of the bucket before is kept.
        fill: spend what the limit leaves.

    Returns:
        The plan. Where nothing keeps the limit (or budget) it is the one of least error (or time), and `met` is False.

    Raises:
        ValueError: neither or both of limit and budget, or a head without an allowed candidate; one line.
    """
    if (limit is None) == (budget is None):
        raise ValueError("give either limit (an error) or budget (a time)")
    problem = _Problem.build(times, errors, weights, fixed or {}, orders, steps, allowed, tie)
    target = float(limit if limit is not None else budget)  # type: ignore[arg-type]
    first = _bisected(problem, target, by_error=limit is not None)
    if not (fill and first.met):
        return first
    choice = _filled(problem, first, target, by_error=limit is not None)
    time, error = problem.cost(choice)
    return replace(first, choice=choice, time=time, error=error)


@dataclass(frozen=True)
class _Problem:
    """What is to be chosen, with times and errors of whole buckets.

    Args:
        times, errors: (B, L, H, C); errors are infinite where a candidate is not allowed.
        uses: (C,), number of the order a candidate needs, -1 for none.
        fixed: (B, orders), time of an order in a layer.
        tie: as in `allocate`.
    """

    times: Floats
    errors: Floats
    uses: NDArray[np.int64]
    fixed: Floats
    tie: float

    @classmethod
    def build(
        cls, times: ArrayLike, errors: ArrayLike, weights: ArrayLike, fixed: Mapping[str, float],
        orders: Sequence[str] | None, steps: ArrayLike, allowed: ArrayLike | None, tie: float,
    ) -> _Problem:
        """Checks shapes and multiplies weights and steps in."""
        plain = np.asarray(errors, dtype=float)
        if plain.ndim != 4:
            raise ValueError(f"errors has shape {plain.shape}; use (buckets, layers, heads, candidates)")
        buckets, layers, _, count = plain.shape
        weight = np.broadcast_to(np.asarray(weights, dtype=float), (buckets, layers))[..., None, None]
        length = np.broadcast_to(np.asarray(steps, dtype=float), (buckets,))
        good = np.ones(plain.shape, bool) if allowed is None else np.broadcast_to(np.asarray(allowed), plain.shape)
        good = (good | (plain == 0)) & np.isfinite(plain)
        if not good.any(-1).all():
            raise ValueError("allowed leaves a head without a candidate; add one without error (dense)")
        names = [""] * count if orders is None else list(orders)
        if len(names) != count:
            raise ValueError(f"orders has {len(names)} names for {count} candidates")
        used = [name for name in dict.fromkeys(names) if name]
        uses = np.array([used.index(name) if name else -1 for name in names])
        price = length[:, None] * np.array([float(fixed.get(name, 0.0)) for name in used])
        spent = np.broadcast_to(np.asarray(times, dtype=float), plain.shape) * length[:, None, None, None]
        return cls(spent, np.where(good, plain * weight, np.inf), uses, price, tie)

    def subsets(self) -> Iterator[tuple[int, ...]]:
        """Orders that a layer may use together, fewer first; at most 8 subsets."""
        every = range(self.fixed.shape[1])
        found = (s for size in range(len(every) + 1) for s in itertools.combinations(every, size))
        return itertools.islice(found, _MOST_SUBSETS)

    def choose(self, x: float) -> NDArray[np.int64]:
        """The candidate of least time + x * error of every head, with the cheapest subset of orders of every layer."""
        buckets, layers, heads, _ = self.times.shape
        cost = self.times + x * np.where(np.isfinite(self.errors), self.errors, 0)
        cost[~np.isfinite(self.errors)] = np.inf
        choice = np.zeros((buckets, layers, heads), dtype=np.int64)
        subsets = [(s, np.isin(self.uses, [-1, *s])) for s in self.subsets()]
        for b in range(buckets):
            least = np.full(layers, np.inf)
            for subset, usable in subsets:
                part = np.where(usable, cost[b], np.inf)
                pick = self._tied(part, choice[b - 1] if b else None)
                total = np.take_along_axis(part, pick[..., None], -1)[..., 0].sum(-1)
                total += self.fixed[b, list(subset)].sum()
                better = total < least
                choice[b][better], least = pick[better], np.where(better, total, least)
        return choice

    def _tied(self, cost: Floats, before: NDArray[np.int64] | None) -> NDArray[np.int64]:
        """The cheapest candidate (layers, heads), or that of the bucket before where it costs hardly more."""
        best = cost.argmin(-1)
        if before is None:
            return best
        least, kept = (np.take_along_axis(cost, c[..., None], -1)[..., 0] for c in (best, before))
        return np.where(kept <= least * (1 + self.tie), before, best)

    def cost(self, choice: NDArray[np.int64]) -> tuple[float, float]:
        """Time and error of a plan."""
        time, error = (float(np.take_along_axis(x, choice[..., None], -1).sum()) for x in (self.times, self.errors))
        for order in range(self.fixed.shape[1]):
            used = (self.uses[choice] == order).any(-1)
            time += float((used * self.fixed[:, order, None]).sum())
        return time, error


def _bisected(problem: _Problem, target: float, *, by_error: bool) -> Allocation:
    """The plan of the best multiplier: the smallest that keeps an error, or the largest that keeps a time."""
    finite = problem.errors[np.isfinite(problem.errors)]
    unit = problem.times.sum() / max(float(finite.sum()), 1e-30)
    low, high = unit / _SPAN, unit * _SPAN

    def at(x: float) -> Allocation:
        choice = problem.choose(x)
        time, error = problem.cost(choice)
        # A hair of rounding is not a miss.
        met = (error if by_error else time) <= target * (1 + 1e-9) + 1e-15
        return Allocation(choice, time, error, met, x, time, error)

    easy, hard = (at(high), at(low)) if by_error else (at(low), at(high))
    if hard.met or not easy.met:
        return hard if hard.met else easy
    best = easy
    for _ in range(_ROUNDS):
        middle = at(math.sqrt(low * high))
        if middle.met:
            gain = best.time - middle.time if by_error else best.error - middle.error
            best = middle if gain >= 0 else best
        if middle.met == by_error:
            high = middle.multiplier
        else:
            low = middle.multiplier
    return best


def _filled(problem: _Problem, plan: Allocation, target: float, *, by_error: bool) -> NDArray[np.int64]:
    """The plan with what the target leaves spent: the largest gain that still fits, again and again.

    Only candidates whose order the layer already uses are looked at, so that no order is paid for here.
    """
    buckets, layers, _, count = problem.times.shape
    gains, prices = (problem.times, problem.errors) if by_error else (problem.errors, problem.times)
    choice, left = plan.choice.copy(), target - (plan.error if by_error else plan.time)
    open_to = np.zeros((buckets, layers, count), dtype=bool)
    open_to |= problem.uses == -1
    for order in range(problem.fixed.shape[1]):
        used = (problem.uses[choice] == order).any(-1)
        open_to |= used[..., None] & (problem.uses == order)
    gains, prices = gains.reshape(-1, count), prices.reshape(-1, count)
    usable = (open_to[:, :, None] & np.isfinite(problem.errors)).reshape(-1, count)
    flat = choice.reshape(-1)

    def moves(items: NDArray[np.int64]) -> Iterator[tuple[float, int, int, int]]:
        """(minus the gain, item, from, to) of all moves of some items that fit what is left."""
        now = flat[items]
        with np.errstate(invalid="ignore"):
            gain = gains[items, now][:, None] - gains[items]
            price = prices[items] - prices[items, now][:, None]
        good = usable[items] & (gain > 0) & (price <= left + 1e-15)
        for item, to in zip(*np.nonzero(good), strict=True):
            yield -float(gain[item, to]), int(items[item]), int(now[item]), int(to)

    queue = list(moves(np.arange(len(flat))))
    heapq.heapify(queue)
    while queue:
        _, item, start, to = heapq.heappop(queue)
        price = prices[item, to] - prices[item, start]
        if flat[item] != start or price > left + 1e-15:
            continue
        flat[item] = to
        left -= float(price)
        for move in moves(np.array([item])):
            heapq.heappush(queue, move)
    return choice
