"""What a run did: every attention call counted, with density, backend, seconds and the reason of each fallback."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Kind = Literal["sparse", "dense", "fallback"]


class Stopwatch:
    """Times a stretch of work on its own device: wall time on the CPU, events (no synchronisation) on a GPU.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Note this moment."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, first: int = 0, last: int = -1) -> float:
        """Seconds between two marks; on a GPU this waits for the later one, so only reports call it."""
        if len(self._marks) < 2:
            return 0.0
        start, end = self._marks[first], self._marks[last]
        if self._cuda:
            end.synchronize()
            return start.elapsed_time(end) / 1000
        return end - start


@dataclass
class CallRecord:
    """One self-attention call.

    Args:
        layer, step, branch: where it happened.
        kind: "sparse", "dense" (scheduled, or the method's own decision) or "fallback" (could not run sparse).
        reason: why it was not sparse; empty for sparse calls.
        density: kept fraction of the (query, key) pairs; a tensor is read only by `Report.summary`.
        reused: the mask was remembered from an earlier step.
        reusing: the option `reuse` was at work.
        backend: the kernel that ran.
        operator: what was computed for the mask.
        watch: marks at start, after routing, at the end.
    """

    layer: int
    step: int
    branch: str
    kind: Kind
    reason: str = ""
    density: float | torch.Tensor = 1.0
    reused: bool = False
    reusing: bool = False
    backend: str = ""
    operator: str = ""
    watch: Stopwatch | None = None


@dataclass
class Summary:
    """What happened since the run began; `str()` gives the text that `summary(pipe)` prints.

    Attributes:
        method: name and options of the method.
        density: `run_density`, the mean over all self-attention calls, dense ones as 1, skipped steps left out.
        sparse_density: mean over the sparse calls alone, or None when there were none.
        calls, sparse_calls, dense_calls, reused_masks: counts.
        dense_reasons: why scheduled dense calls were dense, counted.
        fallbacks: reasons of the calls that could not run sparse, counted.
        per_layer, per_step: mean density by layer and by step.
        attention_seconds, routing_seconds: time inside the attention calls, and the part spent on masks.
        backends: kernels that ran, counted.
        operators: what the sparse calls computed for their masks, counted.
        memory_bytes: the most that cross-step memory held during the run.
        memory: the same by kind ("masks", "LSE", "outputs", "statistics", "layouts and tables"): bytes on the
            "device" of the activations and in "cpu" memory.
        coverage: attention layers left untouched, with the reason.
        step_cache: name of the step cache, empty without one.
        skipped_calls, skipped_steps: self-attention calls that the step cache answered, and steps that have some.
        skipped_per_step: share of a step's self-attention calls that it answered, for steps that have some.
        step_cache_bytes: the most that it held during the run.
        notes: remarks on options that had no effect.
    """

    method: str
    device: str = ""
    grid: str = ""
    tokens: int = 0
    steps: int = 0
    num_steps: int | None = None
    density: float = 1.0
    sparse_density: float | None = None
    calls: int = 0
    sparse_calls: int = 0
    dense_calls: int = 0
    reused_masks: int = 0
    dense_reasons: dict[str, int] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    per_layer: dict[int, float] = field(default_factory=dict)
    per_step: dict[int, float] = field(default_factory=dict)
    attention_seconds: float = 0.0
    routing_seconds: float = 0.0
    backends: dict[str, int] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    memory_bytes: int = 0
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    layers: int = 0
    coverage: dict[str, str] = field(default_factory=dict)
    step_cache: str = ""
    skipped_calls: int = 0
    skipped_steps: int = 0
    skipped_per_step: dict[int, float] = field(default_factory=dict)
    step_cache_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, ready for JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        rows = [
            ("method", self.method),
            ("device", self.device or "-"),
            ("backend", ", ".join(f"{name} ({n} calls)" for name, n in self.backends.items()) or "-"),
            ("operator", "; ".join(f"{name} ({n} calls)" for name, n in self.operators.items()) or "-"),
            ("tokens", f"{self.tokens} ({self.grid})" if self.tokens else "-"),
            ("density", self._density_text()),
            ("calls", f"{self.calls}: {self.sparse_calls} sparse, {self.dense_calls} dense by plan, "
                      f"{sum(self.fallbacks.values())} fallbacks, {self.reused_masks} with a remembered mask"),
            ("attention", f"{self.attention_seconds:.2f} s, of which masks {self.routing_seconds:.2f} s"),
            ("per layer", _ladder(self.per_layer)),
            ("per step", _ladder(self.per_step)),
        ]
        rows += [("dense by plan", f"{n} x {reason}") for reason, n in self.dense_reasons.items()]
        rows += [("fallback", f"{n} x {reason}") for reason, n in self.fallbacks.items()]
        rows += [("untouched", f"{len(paths)} x {reason} ({_some(paths)})") for reason, paths in self._untouched()]
        if self.memory_bytes:
            rows.append(("memory", f"{self.memory_bytes / 2**20:.1f} MiB kept across steps: {self._memory_text()}"))
        if self.step_cache:
            rows.append(("step cache", self._step_cache_text()))
        rows += [("note", note) for note in self.notes]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _untouched(self) -> list[tuple[str, list[str]]]:
        """The untouched layers by reason."""
        found: dict[str, list[str]] = {}
        for path, reason in self.coverage.items():
            found.setdefault(reason, []).append(path)
        return list(found.items())

    def _memory_text(self) -> str:
        """What is kept by kind, the largest first, and where, when that is not the device of the activations."""
        parts = []
        for kind, held in sorted(self.memory.items(), key=lambda item: -sum(item[1].values())):
            place = ""
            if self.device != "cpu" and held["cpu"]:
                place = f" ({held['cpu'] / 2**20:.1f} MiB of it in CPU memory)" if held["device"] else " in CPU memory"
            parts.append(f"{kind} {sum(held.values()) / 2**20:.1f} MiB{place}")
        return ", ".join(parts)

    def _step_cache_text(self) -> str:
        where = " (" + ", ".join(str(step) for step in self.skipped_per_step) + ")" if self.skipped_steps else ""
        calls = self.calls + self.skipped_calls
        return (f"{self.step_cache}: answered {self.skipped_calls} of {calls} attention calls, in "
                f"{self.skipped_steps} of {self.steps} steps{where}; held {self.step_cache_bytes / 2**20:.1f} MiB")

    def _density_text(self) -> str:
        if not self.calls:
            return "no call yet"
        own = "" if self.sparse_density is None else f" ({self.sparse_density:.3f} in sparse calls)"
        return f"{self.density:.3f} of the run{own}"


def _some(names: list[str]) -> str:
    """One or two names as they are, more as first ... last."""
    return ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]}"


def _ladder(values: dict[int, float]) -> str:
    """Densities by index on one line, equal neighbours folded together."""
    folded: list[tuple[int, int, str]] = []
    for index, value in sorted(values.items()):
        text = f"{value:.2f}"
        if folded and folded[-1][2] == text and folded[-1][1] == index - 1:
            folded[-1] = (folded[-1][0], index, text)
        else:
            folded.append((index, index, text))
    parts = [f"{a}: {t}" if a == b else f"{a}-{b}: {t}" for a, b, t in folded]
    return "  ".join(parts) or "-"


class Report:
    """Collects the records of one run of one transformer."""

    def __init__(self) -> None:
        self.records: list[CallRecord] = []
        self.steps: set[int] = set()
        self._forwards: list[tuple[int, set[int]]] = []  # step, and the layers that were called

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.records.clear()
        self.steps.clear()
        self._forwards.clear()

    def begin(self, step: int) -> None:
        """A forward begins."""
        self.steps.add(step)
        self._forwards.append((step, set()))

    def skipped(self, layers: int) -> dict[int, tuple[int, int]]:
        """For each step: layers that were not called, and all, counted over its forwards.

        Args:
            layers: self-attention layers of the transformer.
        """
        found: dict[int, tuple[int, int]] = {}
        for step, seen in self._forwards:
            missed, total = found.get(step, (0, 0))
            found[step] = missed + max(0, layers - len(seen)), total + layers
        return found

    def add(self, record: CallRecord) -> None:
        """Count one call."""
        self.records.append(record)
        if self._forwards:
            self._forwards[-1][1].add(record.layer)


def summarize(method: str, reports: Iterable[Report]) -> Summary:
    """Fold the records of one run (of one or several transformers) into a Summary.

    Args:
        method: text naming the method and its options.
        reports: one per bound transformer.

    Returns:
        A Summary without the fields that only the session knows (device, grid, coverage, notes).
    """
    result = Summary(method=method)
    dense, fallbacks, backends, operators = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    by_layer: dict[int, list[float]] = {}
    by_step: dict[int, list[float]] = {}
    sparse: list[float] = []
    offset = 0
    for report in reports:
        result.steps += len(report.steps)
        for record in report.records:
            density = float(record.density)
            by_layer.setdefault(offset + record.layer, []).append(density)
            by_step.setdefault(record.step, []).append(density)
            if record.kind == "sparse":
                sparse.append(density)
                result.reused_masks += record.reused
                operators[record.operator] += 1
            elif record.kind == "dense":
                dense[record.reason] += 1
            else:
                fallbacks[record.reason] += 1
            if record.backend:
                backends[record.backend] += 1
            if record.watch is not None:
                result.attention_seconds += record.watch.seconds()
                if record.kind == "sparse":
                    result.routing_seconds += record.watch.seconds(0, 1)
        offset = max(by_layer, default=-1) + 1
    result.sparse_calls, result.dense_calls = len(sparse), sum(dense.values())
    result.calls = len(sparse) + sum(dense.values()) + sum(fallbacks.values())
    result.dense_reasons, result.fallbacks, result.backends = dict(dense), dict(fallbacks), dict(backends)
    result.operators = {name: n for name, n in operators.items() if name}
    result.sparse_density = sum(sparse) / len(sparse) if sparse else None
    if result.calls:
        result.density = (sum(sparse) + result.calls - len(sparse)) / result.calls
    result.per_layer = {i: sum(v) / len(v) for i, v in sorted(by_layer.items())}
    result.per_step = {i: sum(v) / len(v) for i, v in sorted(by_step.items())}
    return result
