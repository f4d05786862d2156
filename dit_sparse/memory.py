"""What survives from one call to the next: masks kept for some steps, and static parts kept for a shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")

STATIC = "layouts and tables"  # kind of the static parts, shared by layers, steps and runs
COUNTERS = "counters"  # kind of a number that says what a call did, and belongs to no head


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a value: tensors themselves, and those in dataclasses, dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor changed; parts in which nothing changes stay the very same objects."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        made = {name: map_tensors(part, change) for name, part in parts.items()}
        changed = any(made[name] is not part for name, part in parts.items())
        return dataclasses.replace(value, **made) if changed else value
    if isinstance(value, dict):
        made = {name: map_tensors(part, change) for name, part in value.items()}
        return made if any(made[name] is not part for name, part in value.items()) else value
    if isinstance(value, (list, tuple)):
        items = [map_tensors(part, change) for part in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _to_host(x: Tensor) -> Tensor:
    """x in CPU memory; from a GPU into pinned memory, without waiting for the copy.

    Only the copy back reads it, on the same stream, so the order of the two is safe.
    """
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


@dataclass
class _Entry:
    """A kept value, when and for what shape it was made, and where its offloaded tensors (by id) came from."""

    value: Any
    step: int
    shape: Hashable
    homes: dict[int, torch.device]
    kind: str


@dataclass(frozen=True)
class Held:
    """Bytes of one kind of remembered values.

    Args:
        device: bytes on the device of the activations (0 when that is the CPU).
        cpu: bytes in CPU memory.
    """

    device: int = 0
    cpu: int = 0

    @property
    def total(self) -> int:
        """Bytes, wherever they are."""
        return self.device + self.cpu


class Memory:
    """State of a run, keyed by (layer, branch); and static parts, shared by layers, steps and runs.

    The owner calls `reset` when a run starts and when it ends. A value made for another shape is never returned.

    Args:
        offload: keep what `put` stores in CPU memory, and bring it back at `get`. Tensors that are also part of a
            static value stay where they are: all layers share them.

    Attributes:
        peaks: the most bytes of every kind that `note` met since the owner last cleared it.
    """

    def __init__(self, *, offload: bool = False) -> None:
        self.offload = offload
        self.peaks: dict[str, Held] = {}
        self._kept: dict[Hashable, _Entry] = {}
        self._static: dict[Hashable, Any] = {}
        self._used: set[Hashable] = set()

    def put(
        self, key: Hashable, value: Any, *, step: int, shape: Hashable = None, kind: str = "statistics"
    ) -> None:
        """Keep a value, in place of an earlier one.

        Args:
            key: usually (layer, branch).
            value: anything; tensors are found in dataclasses, dicts, lists and tuples.
            step: the denoising step at which it was made.
            shape: what it was made for; `get` with another shape drops it.
            kind: what the summary counts it as: "masks", "LSE", "outputs", "statistics", or `COUNTERS`.
        """
        homes: dict[int, torch.device] = {}
        if self.offload:
            shared = {id(t) for v in self._static.values() for t in tensors_of(v)}

            def away(x: Tensor) -> Tensor:
                if id(x) in shared or x.device.type == "cpu":
                    return x
                copy = _to_host(x)
                homes[id(copy)] = x.device
                return copy

            value = map_tensors(value, away)
        self._kept[key] = _Entry(value, step, shape, homes, kind)

    def get(self, key: Hashable, *, step: int, max_age: float, shape: Hashable = None) -> Any:
        """The value kept under the key, or None when there is none, or it is too old or of another shape.

        Args:
            key: as in `put`.
            step: the denoising step now. Steps may be skipped; age is the difference of steps, not the number of
                calls.
            max_age: a value made at step s serves the steps s ... s + max_age - 1.
            shape: as in `put`.
        """
        entry = self._kept.get(key)
        if entry is None or entry.shape != shape or not 0 <= step - entry.step < max_age:
            self._kept.pop(key, None)
            return None
        homes = entry.homes
        return map_tensors(entry.value, lambda t: t.to(homes[id(t)], non_blocking=True) if id(t) in homes else t)

    def age(self, key: Hashable, *, step: int) -> int | None:
        """Steps since the kept value was made; None without one."""
        entry = self._kept.get(key)
        return None if entry is None else step - entry.step

    def static(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """The value built once for a key, which names the shape and device too.

        It outlives `reset` as long as it is used: of two shapes that take turns only the one in use stays.
        """
        self._used.add(key)
        if key not in self._static:
            self._static[key] = build()
        return self._static[key]

    def reset(self) -> None:
        """Forget what belongs to a run; and static values that were not asked for since the last reset.

        A stretch in which no static value was asked for at all drops none.
        """
        self.note()
        self._kept.clear()
        if self._used:
            self._static = {key: value for key, value in self._static.items() if key in self._used}
            self._used.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self._static.clear()
        self._used.clear()
        self.peaks.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def keys(self) -> list[Hashable]:
        """What is kept at the moment, by its keys, without counters."""
        return [key for key, entry in self._kept.items() if entry.kind != COUNTERS]

    @property
    def nbytes(self) -> int:
        """Bytes held, wherever they are, static parts included; memory shared by several values counts once."""
        return sum(held.total for held in self.kinds().values())

    @property
    def device_nbytes(self) -> int:
        """As nbytes, without what lies in CPU memory."""
        return sum(held.device for held in self.kinds().values())

    def kinds(self) -> dict[str, Held]:
        """Bytes by kind; memory that several kinds share counts for the first, static parts before all others."""
        values = [(STATIC, value) for value in self._static.values()]
        values += [(entry.kind, entry.value) for entry in self._kept.values()]
        found: dict[str, Held] = {}
        seen: set[tuple[torch.device, int]] = set()
        for kind, value in values:
            for tensor in tensors_of(value):
                store = tensor.untyped_storage()
                if (tensor.device, store.data_ptr()) in seen:
                    continue
                seen.add((tensor.device, store.data_ptr()))
                held, bytes_more = found.get(kind, Held()), store.nbytes()
                on_cpu = tensor.device.type == "cpu"
                found[kind] = Held(held.device + (0 if on_cpu else bytes_more), held.cpu + on_cpu * bytes_more)
        return found

    def note(self) -> None:
        """Take what is held now into the peaks: once a step, and before anything is forgotten."""
        for kind, held in self.kinds().items():
            most = self.peaks.get(kind, Held())
            self.peaks[kind] = Held(max(most.device, held.device), max(most.cpu, held.cpu))


def totals(memories: Iterable[Memory]) -> dict[str, dict[str, int]]:
    """The most that memories held during a run, added up by kind: bytes on the "device" and in "cpu" memory."""
    found: dict[str, dict[str, int]] = {}
    for memory in memories:
        memory.note()
        for kind, held in memory.peaks.items():
            sums = found.setdefault(kind, {"device": 0, "cpu": 0})
            sums["device"] += held.device
            sums["cpu"] += held.cpu
    return found


class State:
    """What a method keeps from step to step of one layer and CFG branch: named values in the run's memory.

    They are reset with the run and when the shape changes, counted in the summary's bytes, and offloaded with the rest.

    Args:
        memory: where they are kept; a memory of its own where there is no run.
        place: the layer, the branch and what else tells apart.
        step: the denoising step now.
        shape: what the values are made for; values made for another are never returned.
    """

    def __init__(
        self, memory: Memory | None = None, place: Hashable = (), *, step: int = 0, shape: Hashable = None
    ) -> None:
        self._memory = Memory() if memory is None else memory
        self._place, self.step, self._shape = place, step, shape

    def keep(self, name: str, value: Any, kind: str = "statistics") -> None:
        """Keep a value under a name, in place of an earlier one; `kind` as in `Memory.put`."""
        self._memory.put(("state", name, self._place), value, step=self.step, shape=self._shape, kind=kind)

    def recall(self, name: str, *, max_age: float = math.inf) -> Any:
        """The value kept under the name less than `max_age` steps ago, or None."""
        return self._memory.get(("state", name, self._place), step=self.step, max_age=max_age, shape=self._shape)

    def age(self, name: str) -> int | None:
        """Steps since the value was kept; None without one."""
        return self._memory.age(("state", name, self._place), step=self.step)
