"""Masks of one run used in another: `record(pipe)` collects them, `replay(pipe, recording)` gives them back.

    with record(pipe) as recording:
        pipe(prompt)
    pipe.transformer.compile_repeated_blocks()
    with replay(pipe, recording):
        pipe(prompt)                            # the method is not asked: the same masks, so the same result

A choice of blocks is a comparison: a difference in the last bit, which a compiler or another order of sums may make,
can turn it, and then two correct runs differ by more than rounding. With the masks of one run used in the other, what
is left is rounding. `overlap(first, second)` says how far two runs chose the same blocks.

Both are for tests and for looking into a run: recording waits for the device and holds every mask in CPU memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .blockmask import BlockLayout, BlockMask, storage_bytes
from .grid import TokenGrid
from .memory import State, map_tensors, tensors_of
from .methods.base import Call, Plan
from .operators import Operator
from .patterns import heads_of
from .session import RunSession

__all__ = ["Kept", "Overlap", "Place", "Recording", "ReplayError", "overlap", "record", "replay"]


class ReplayError(LookupError):
    """A call has no recorded mask that fits; counted as a fallback with this reason, or raised with `strict=True`."""


@dataclass(frozen=True)
class Place:
    """Where a sparse call happened.

    Args:
        transformer: component name in the pipeline ("transformer", "transformer_2").
        layer: index among the self-attention layers.
        step: denoising step, from 0.
        branch: name of the CFG branch.
    """

    transformer: str
    layer: int
    step: int
    branch: str


@dataclass(frozen=True)
class Kept:
    """The plan of one call, in CPU memory, and what it is for.

    Args:
        plan: mask and operator; a mask of None: dense by the method's own choice.
        grid: the tokens, text included.
        batch, heads: B and H of the call.
        state: what the method kept for its operator while it planned, by name.
    """

    plan: Plan
    grid: TokenGrid
    batch: int
    heads: int
    state: dict[str, Any] = field(default_factory=dict)


class Recording(dict[Place, Kept]):
    """The plans of a run by their place. Of several runs, and of several calls at one place, the last one counts."""

    @property
    def nbytes(self) -> int:
        """Bytes of CPU memory held, shared memory counted once."""
        return storage_bytes(t for kept in self.values() for t in tensors_of((kept.plan, kept.state)))


class _Noting(State):
    """Passes on to a state, and notes what is kept."""

    def __init__(self, inner: State) -> None:
        self.inner, self.step, self.noted = inner, inner.step, dict[str, Any]()

    def keep(self, name: str, value: Any, kind: str = "statistics") -> None:
        self.noted[name] = value
        self.inner.keep(name, value, kind)

    def recall(self, name: str, *, max_age: float = float("inf")) -> Any:
        return self.inner.recall(name, max_age=max_age)

    def age(self, name: str) -> int | None:
        return self.inner.age(name)


class _Recorder:
    """Notes the plans of one transformer; takes the place of a session's `plans`."""

    def __init__(self, name: str, recording: Recording) -> None:
        self._name, self._recording = name, recording
        # Layouts are shared by all calls of a shape: they are copied once, as long as the original lives.
        self._copies: Any = WeakTensorKeyDictionary()

    def __call__(self, call: Call, make: Callable[[], tuple[Plan, bool]]) -> tuple[Plan, bool]:
        call.state = noting = _Noting(call.state)
        plan, reused = make()
        call.state = noting.inner
        batch, _, heads, _ = call.query.shape
        self._recording[Place(self._name, call.layer, call.step, call.branch)] = Kept(
            map_tensors(plan, self._copy), call.grid, batch, heads, map_tensors(noting.noted, self._copy))
        return plan, reused

    def _copy(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            return x
        if x not in self._copies:
            self._copies[x] = x.to("cpu")
        return self._copies[x]


class _Replayer:
    """Gives recorded plans to one transformer; takes the place of a session's `plans`."""

    def __init__(self, name: str, recording: Recording, used: set[Place]) -> None:
        self._name, self._recording, self._used = name, recording, used
        self._last: dict[int, Tensor] = {}  # of the plan before, by the recorded tensor: what calls share moves once

    def __call__(self, call: Call, make: Callable[[], tuple[Plan, bool]]) -> tuple[Plan, bool]:
        place = Place(self._name, call.layer, call.step, call.branch)
        kept = self._recording.get(place)
        if kept is None:
            raise ReplayError("no mask was recorded for this layer, step and branch")
        batch = call.query.shape[0]
        if kept.grid != call.grid:
            raise ReplayError(f"the mask was recorded for {_name(kept.grid)}, the call has {_name(call.grid)}")
        if (kept.batch, kept.heads) != (batch, call.all_heads):
            raise ReplayError(f"the mask was recorded for a batch of {kept.batch} with {kept.heads} heads, "
                              f"the call has {batch} with {call.all_heads}")
        moved: dict[int, Tensor] = {}

        def move(x: Tensor) -> Tensor:
            there = moved.get(id(x), self._last.get(id(x)))
            moved[id(x)] = x.to(call.device) if there is None or there.device != call.device else there
            return moved[id(x)]

        plan, state = map_tensors(kept.plan, move), map_tensors(kept.state, move)
        self._last = moved
        for name, value in state.items():
            call.state.keep(name, value)
        self._used.add(place)
        if call.heads is not None and any(True for _ in tensors_of(plan.operator)):
            raise ReplayError(f"operator {plan.operator.name!r} holds masks of all heads, some of them on other ranks")
        if call.heads is not None and plan.mask is not None:  # the other heads are on other ranks
            plan = dataclasses.replace(plan, mask=heads_of(plan.mask, call.heads))
        return plan, False


def _name(grid: TokenGrid) -> str:
    return f"{grid.frames}x{grid.height}x{grid.width} tokens and {grid.text} of text"


def _sessions(target: Any) -> dict[str, RunSession]:
    """Component name -> session; refused in one line when there is none, or one records or replays already."""
    from . import bridge

    bound = {name: binding.session for name, model, _ in bridge.transformers_of(target)
             if (binding := bridge.binding_of(model)) is not None}
    found = {name: session for name, session in bound.items() if isinstance(session, RunSession)}
    if not found:
        raise ValueError("sparse attention is not enabled here; call enable(target) before record or replay")
    if any(session.plans is not None for session in found.values()):
        raise ValueError("target records or replays already; leave the other 'with' block first")
    return found


@contextmanager
def _use(sessions: dict[str, RunSession], sources: dict[str, Any]) -> Iterator[None]:
    for name, session in sessions.items():
        session.plans = sources[name]
    try:
        yield
    finally:
        for session in sessions.values():
            session.plans = None


@contextmanager
def record(target: Any) -> Iterator[Recording]:
    """Collects the plan (mask and operator) of every sparse call of the runs inside the `with` block.

    Args:
        target: a pipeline or transformer with sparse attention enabled; enabling it anew ends the recording.

    Yields:
        The recording, filled while the runs go on; all of it lies in CPU memory.

    Raises:
        ValueError: sparse attention is not enabled on `target`, or it records or replays already.
    """
    sessions, recording = _sessions(target), Recording()
    with _use(sessions, {name: _Recorder(name, recording) for name in sessions}):
        yield recording


@contextmanager
def replay(target: Any, recording: Recording) -> Iterator[set[Place]]:
    """Inside the `with` block sparse calls use recorded plans; the method is not asked.

    Which calls are sparse is still the run's own business (dense steps and layers, step caches). A call whose place was
    not recorded, or that has another grid, batch or number of heads, is a fallback with that reason; with `strict=True`
    it raises.

    Args:
        target: a pipeline or transformer with sparse attention enabled, with any method.
        recording: of the same model, or of one of the same shape.

    Yields:
        The places that were used so far.

    Raises:
        ValueError: sparse attention is not enabled on `target`, it records or replays already, or the recording holds
            nothing for one of its transformers.
    """
    sessions, used = _sessions(target), set[Place]()
    have = {place.transformer for place in recording}
    if not have.intersection(sessions):
        raise ValueError(f"recording holds masks of {', '.join(sorted(have)) or 'no transformer'}; target has "
                         f"{', '.join(sorted(sessions))}")
    with _use(sessions, {name: _Replayer(name, recording, used) for name in sessions}):
        yield used


@dataclass(frozen=True)
class Overlap:
    """How far two recordings agree.

    Args:
        share: of all pairs of blocks that either run computed at their common places, those that both computed, in
            [0, 1]; 1 without any. Blocks agree when they hold the same tokens and the operators are equal.
        common: places that both have.
        only_first, only_second: places that one of them has.
    """

    share: float
    common: int
    only_first: int
    only_second: int


def overlap(first: Recording, second: Recording) -> Overlap:
    """Compares the block lists of two runs, place by place.

    Args:
        first, second: recordings of the same model.

    Returns:
        The share of equal pairs of blocks over the common places, pooled, and how many places there are.
    """
    common = first.keys() & second.keys()
    both = either = 0
    for place in common:
        mine, theirs = first[place].plan, second[place].plan
        shared, all_pairs = _pairs(mine.mask, theirs.mask, mine.operator, theirs.operator)
        both, either = both + shared, either + all_pairs
    return Overlap(both / either if either else 1.0, len(common), len(first) - len(common), len(second) - len(common))


def _pairs(mine: BlockMask | None, theirs: BlockMask | None, one: Operator, other: Operator) -> tuple[int, int]:
    """Pairs of blocks that both masks list, and that at least one does."""
    if mine is None or theirs is None:
        return 0, sum(int(mask.work().sum()) for mask in (mine, theirs) if mask is not None)
    a, b = mine.to_dense(), theirs.to_dense()
    if a.shape[2:] != b.shape[2:] or one != other:
        return 0, int(a.sum() + b.sum())
    same = _same_blocks(mine.query, theirs.query) & _same_blocks(mine.key, theirs.key)
    a, b, same = torch.broadcast_tensors(a, b, same[..., None, None])
    # Lists over other blocks share nothing, so that all their pairs differ.
    return int((a & b & same).sum()), int(torch.where(same, a | b, a).sum() + torch.where(same, False, b).sum())


def _same_blocks(mine: BlockLayout, theirs: BlockLayout) -> Tensor:
    """bool (B|1, H|1): the heads in which every token sits in the same block."""
    if (mine.block_size, mine.tokens, mine.blocks) != (theirs.block_size, theirs.tokens, theirs.blocks):
        return torch.zeros(1, 1, dtype=torch.bool)
    a, b = (x.reshape(*[1] * (3 - x.dim()), *x.shape) for x in (mine.block_of_token, theirs.block_of_token))
    return (a == b).all(-1)
