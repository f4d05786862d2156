"""The dense run with the oracle: errors of all candidates at the probe steps, and the forwards kept for checks."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..bridge import binding_of, transformers_of
from ..grid import TokenGrid
from ..methods.base import Call, Method, Plan
from ..methods.tuned import kept_blocks
from ..schedule import Schedule
from .candidates import DENSE, KINDS, Candidate, candidates_of
from .oracle import Errors, ordered, probe_heads, sample_rows
from .preset import attention_layers

__all__ = ["FORCED", "Forward", "Probe", "ProbeResult", "Streams", "Watcher", "bucket_edges", "dense_count",
           "distinct", "probe_step"]

_SHARES = (0.0, 0.1, 0.25, 0.4, 0.75)
FEW_STEPS = 8  # a run of at most so many steps has one bucket for each, and none is forced dense
FORCED = 1  # buckets that are dense in longer runs
_NUMBERS = ("mass", "err", "a", "a_error")


def bucket_edges(steps: int, dense: int | None = None) -> tuple[int, ...]:
    """First step of every bucket, and the number of steps.

    Buckets begin at 0, .1, .25, .4 and .75 of the run; the first is dense. Runs of at most 8 steps: one bucket a step.

    Args:
        steps: of the run.
        dense: leading steps that stay dense, fewer than all: they are the first bucket; None: as above.
    """
    shares = range(steps + 1) if steps <= FEW_STEPS else (
        math.ceil(share * steps - 1e-9) for share in (*_SHARES, 1.0))
    edges = tuple(dict.fromkeys(shares))
    return edges if not dense else (0, dense, *(edge for edge in edges if edge > dense))


def forced_buckets(steps: int, dense: int | None = None) -> int:
    """How many leading buckets are dense; `dense` as in `bucket_edges`."""
    if dense is not None:
        return int(dense > 0)
    return 0 if steps <= FEW_STEPS else FORCED


def dense_count(dense_steps: float | int | None, steps: int) -> int | None:
    """Leading dense steps of a run, counted as everywhere else; None where none are asked for.

    Raises:
        ValueError: no step would be left to be sparse, or no such number; one line.
    """
    if dense_steps is None:
        return None
    found = Schedule(dense_steps=dense_steps).count(dense_steps, steps)
    if found >= steps:
        raise ValueError(f"dense_steps={dense_steps!r} is not allowed; leave one of {steps} steps to be sparse")
    return found


def probe_step(edges: Sequence[int], bucket: int) -> int:
    """The step in the middle of a bucket."""
    return (edges[bucket] + edges[bucket + 1] - 1) // 2


def probed_bucket(step: int, steps: int, dense: int | None = None) -> int | None:
    """The bucket that is probed at this step of a run of so many; None where none is. `dense` as in `bucket_edges`."""
    edges, first = bucket_edges(steps, dense), forced_buckets(steps, dense)
    return next((b for b in range(first, len(edges) - 1) if probe_step(edges, b) == step), None)


def distinct(candidates: Sequence[Candidate], grid: TokenGrid) -> tuple[Candidate, ...]:
    """The candidates that differ on this grid: on a short sequence small budgets keep the same blocks.

    Of equal ones the largest budget stays, which says best what is computed.
    """
    found: dict[Any, Candidate] = {}
    layouts = ordered(grid)
    for one in candidates:
        if one.is_dense:
            found[DENSE] = DENSE
            continue
        blocks = layouts[one.order]
        count = kept_blocks(one, blocks, grid)
        if count < blocks.blocks - (-(-grid.text // blocks.block_size)):
            found[(one.pattern, one.order, count)] = one
    return tuple(found.values())


@dataclass
class ProbeResult:
    """What the probes of one or several runs say.

    Args:
        grid: the tokens.
        steps: of the run.
        candidates: the distinct candidates, dense first.
        tables: "mass", "err", "a" and "a_error", float64 (buckets, layers, heads, candidates); 0 in forced buckets.
        head_dim: channels of a head.
        dense: leading steps that stay dense; None: the usual ones.
    """

    grid: TokenGrid
    steps: int
    candidates: tuple[Candidate, ...]
    tables: dict[str, np.ndarray]
    head_dim: int
    dense: int | None = None

    @property
    def edges(self) -> tuple[int, ...]:
        """Edges of the buckets."""
        return bucket_edges(self.steps, self.dense)

    @staticmethod
    def mean(results: Sequence[ProbeResult]) -> ProbeResult:
        """The mean over runs of equal size, with the standard errors that it has."""
        first = results[0]
        tables = {name: np.mean([r.tables[name] for r in results], axis=0) for name in _NUMBERS}
        squares = np.mean([r.tables["a_error"] ** 2 for r in results], axis=0)
        tables["a_error"] = np.sqrt(squares / len(results))
        return ProbeResult(first.grid, first.steps, first.candidates, tables, first.head_dim, first.dense)

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors, as the store keeps them."""
        data = {"grid": [self.grid.frames, self.grid.height, self.grid.width, self.grid.text, self.grid.text_at],
                "steps": self.steps, "candidates": [c.to_dict() for c in self.candidates], "head_dim": self.head_dim,
                "dense": self.dense}
        return data, {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in self.tables.items()}

    @staticmethod
    def of_parts(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ProbeResult:
        """The inverse of `to_parts`."""
        frames, height, width, text, text_at = data["grid"]
        return ProbeResult(TokenGrid(frames, height, width, text=text, text_at=text_at), data["steps"],
                           tuple(Candidate(**c) for c in data["candidates"]),
                           {name: tensors[name].numpy() for name in _NUMBERS}, data["head_dim"], data.get("dense"))


@dataclass(frozen=True, eq=False)
class Probe(Method):
    """Leaves every call dense and, at the probe steps, asks the oracle about every head.

    Args:
        patterns: which candidates to judge.
        streams: the residual streams of the forward under way, where the family gives them.
        rows: video rows that are sampled; the same for all candidates.
        seed: of the rows.
        dense_steps: leading steps that stay dense, a share or a number; None: the usual ones.
        seen: what was found: Errors by (bucket, layer), the grid, the number of steps, seconds spent.
    """

    patterns: tuple[str, ...]
    streams: Streams
    rows: int = 128
    seed: int = 0
    dense_steps: float | int | None = None
    seen: dict[str, Any] = field(default_factory=dict)

    observes: ClassVar[bool] = False

    def plan(self, call: Call) -> Plan:
        """Look at the call; it stays dense."""
        sizes = (call.grid, call.num_steps, call.layers, *call.query.shape[2:])
        if call.num_steps is None:
            raise ValueError("tune: the length of the run is unknown; use a pipeline whose scheduler tells its steps")
        if self.seen.setdefault("sizes", sizes) != sizes:
            raise ValueError(f"tune: calls differ in grid, steps, layers or heads: {self.seen['sizes']} and {sizes}")
        dense = dense_count(self.dense_steps, call.num_steps)
        bucket = None if call.step is None else probed_bucket(call.step, call.num_steps, dense)
        if bucket is not None:
            start = time.perf_counter()
            for row in range(call.query.shape[0]):
                self._keep((bucket, call.layer), self._errors(call, row))
            if call.device.type == "cuda":
                torch.cuda.synchronize(call.device)
            self.seen["seconds"] = self.seen.get("seconds", 0.0) + time.perf_counter() - start
        return Plan(None)

    def _errors(self, call: Call, batch: int) -> Errors:
        """What the oracle says of one batch element of a call."""
        rows = call.cached((self, "rows"), lambda: sample_rows(call.grid, self.rows, seed=self.seed).to(call.device))
        layouts = call.cached((self, "layouts"), lambda: ordered(call.grid, device=call.device))
        rankings = tuple(dict.fromkeys(KINDS[name][0] for name in self.patterns))
        gate, stream = self.streams.of(call, batch, rows)
        return probe_heads(call.query[batch], call.key[batch], call.value[batch], rows, scale=call.scale,
                           grid=call.grid, orders=layouts, rankings=rankings, gate_out=gate, stream=stream,
                           key_mask=None if call.key_mask is None else call.key_mask[batch])

    def _keep(self, place: tuple[int, int], errors: Errors) -> None:
        """Of the guidance branches the worse one counts."""
        found = self.seen.setdefault("errors", {})
        found[place] = found[place].worse(errors) if place in found else errors

    def result(self) -> ProbeResult:
        """What was seen, as tables.

        Raises:
            ValueError: a layer made no sparse-able call at a probe step; one line.
        """
        if "sizes" not in self.seen:
            raise ValueError("tune: no self-attention call was seen; the pipeline runs no layer that can be sparse")
        grid, steps, layers, heads, head_dim = self.seen["sizes"]
        candidates = distinct(candidates_of(self.patterns), grid)
        dense = dense_count(self.dense_steps, steps)
        edges, forced = bucket_edges(steps, dense), forced_buckets(steps, dense)
        tables = {name: np.zeros((len(edges) - 1, layers, heads, len(candidates))) for name in _NUMBERS}
        for bucket in range(forced, len(edges) - 1):
            for layer in range(layers):
                errors = self.seen["errors"].get((bucket, layer))
                if errors is None:
                    step = probe_step(edges, bucket)
                    raise ValueError(f"tune: layer {layer} made no self-attention call at step {step}")
                table = errors.table(candidates)
                for name in _NUMBERS:
                    tables[name][bucket, layer] = table[name].double().cpu().numpy()
        return ProbeResult(grid, steps, candidates, tables, head_dim, dense)


# -- what the block adds to the residual stream --------------------------------------------------------------------


class Streams:
    """The residual stream that enters each self-attention layer, with the block's gate and output projection.

    Known for Wan (`WanTransformerBlock`: the gate is the third row of its modulation). Elsewhere, and where text tokens
    are inside of the sequence, `of` gives None and the plain error of the head's output is used.
    """

    def __init__(self, pipe: Any) -> None:
        self._now: dict[int, tuple[Tensor, Tensor, Any, Any]] = {}  # stream, modulation, block, attention
        self._handles: list[Any] = []
        for _, model, _ in transformers_of(pipe):
            for layer, (path, module) in enumerate(attention_layers(model)):
                block = model.get_submodule(path.rpartition(".")[0])
                table, out = getattr(block, "scale_shift_table", None), getattr(module, "to_out", None)
                if type(block).__name__ == "WanTransformerBlock" and table is not None and out is not None:
                    self._handles.append(block.register_forward_pre_hook(self._reader(layer, module), with_kwargs=True))

    def _reader(self, layer: int, module: Any) -> Callable[..., None]:
        @torch.compiler.disable
        def read(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = {**dict(zip(("hidden_states", "encoder_hidden_states", "temb"), args, strict=False)), **kwargs}
            hidden, temb = given.get("hidden_states"), given.get("temb")
            self._now.clear()  # of the block before: activations of all layers would fill the memory
            if isinstance(hidden, Tensor) and isinstance(temb, Tensor) and temb.ndim == 3:
                self._now[layer] = hidden, temb, block, module

        return read

    def of(self, call: Call, batch: int, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gated output projection (H, D, C) of the call's heads, and the stream (R, C) at the rows; or None twice."""
        if call.layer not in self._now or call.grid.text:
            return None, None
        hidden, temb, block, module = self._now[call.layer]
        weight, table = module.to_out[0].weight, block.scale_shift_table
        heads, width = call.query.shape[2], call.value.shape[3]
        fits = weight.shape[-1] == heads * width and hidden.shape[1] == call.grid.tokens
        if not fits or "meta" in (weight.device.type, table.device.type) or not weight.is_floating_point():
            return None, None  # offloaded one by one, or another layout of the projection
        gate = table.detach().to(call.device, torch.float32)[0, 2] + temb[batch, 2].detach().float()
        out = weight.detach().to(call.device, torch.float32).T * gate
        return out.reshape(heads, width, -1), hidden[batch, rows].detach().float()

    def forget(self) -> None:
        """Drop the references to activations."""
        self._now.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self.forget()
        for handle in self._handles:
            handle.remove()


# -- forwards kept for teacher-forced checks -----------------------------------------------------------------------


@dataclass
class Forward:
    """One forward of a transformer at a probe step: what it was called with, and what it returned.

    Args:
        part: name of the transformer among the pipeline's components.
        inputs: keyword arguments; tensors in CPU memory.
        velocity: its output, in CPU memory.
    """

    part: str
    inputs: dict[str, Any]
    velocity: Tensor

    def plain(self) -> bool:
        """Whether all inputs are tensors or plain data, so that a file can hold them."""
        try:
            json.dumps([v for v in self.inputs.values() if not isinstance(v, Tensor)])
        except (TypeError, ValueError):
            return False
        return True

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors, as the store keeps them; only when `plain()`."""
        plain = {k: v for k, v in self.inputs.items() if not isinstance(v, Tensor)}
        tensors = {f"input.{k}": v for k, v in self.inputs.items() if isinstance(v, Tensor)}
        return {"part": self.part, "plain": plain}, {**tensors, "velocity": self.velocity}

    @staticmethod
    def of_parts(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Forward:
        """The inverse of `to_parts`."""
        inputs = {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}
        return Forward(data["part"], {**data["plain"], **inputs}, tensors["velocity"])

    def error(self, pipe: Any) -> float:
        """Squared difference of the velocity to the kept one over its square, with what is switched on now."""
        model = dict((name, m) for name, m, _ in transformers_of(pipe))[self.part]
        device = getattr(pipe, "_execution_device", None) or next(model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        with torch.no_grad():
            found = _first(model(**inputs)).detach().double().cpu()
        kept = self.velocity.double()
        return float((found - kept).square().sum() / kept.square().sum().clamp(min=1e-30))


class Watcher:
    """Keeps the first forward of every probe step of a run; made after the probe was switched on.

    Args:
        pipe: the pipeline, with a session bound.
        dense_steps: as in `Probe`.
    """

    def __init__(self, pipe: Any, dense_steps: float | int | None = None) -> None:
        self.forwards: dict[int, Forward] = {}
        self._dense_steps = dense_steps
        self._handles: list[Any] = []
        self._open: dict[str, tuple[int, dict[str, Any]]] = {}
        for name, model, _ in transformers_of(pipe):
            names = list(inspect.signature(type(model).forward).parameters)[1:]
            self._handles.append(model.register_forward_pre_hook(self._before(name, names), with_kwargs=True))
            self._handles.append(model.register_forward_hook(self._after(name), with_kwargs=True))

    def _before(self, part: str, names: list[str]) -> Callable[..., None]:
        @torch.compiler.disable
        def before(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            binding = binding_of(model)
            info = getattr(binding.session, "info", None) if binding is not None else None
            self._open.pop(part, None)
            if info is None or info.num_steps is None:
                return
            dense = dense_count(self._dense_steps, info.num_steps)
            bucket = probed_bucket(info.step, info.num_steps, dense)
            if bucket is not None and bucket not in self.forwards:
                given = {**dict(zip(names, args, strict=False)), **kwargs}
                self._open[part] = bucket, {k: _kept(v) for k, v in given.items()}

        return before

    def _after(self, part: str) -> Callable[..., None]:
        @torch.compiler.disable
        def after(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if part in self._open:
                bucket, inputs = self._open.pop(part)
                self.forwards[bucket] = Forward(part, inputs, _kept(_first(output)))

        return after

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
