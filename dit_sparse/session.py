"""One transformer under one SparseProc: takes every attention call, decides, computes, remembers, counts."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from . import reuse, ring, routing
from .balance import HeadBalance
from .grid import TokenGrid
from .kernels import attention as kernels
from .kernels.attention import block_sparse_attention, dense_attention
from .memory import Memory, State
from .methods.base import Call, Plan
from .report import CallRecord, Report, Stopwatch

if TYPE_CHECKING:
    from .bridge import ForwardInfo
    from .processor import SparseProc
    from .stepcache import ActiveCache


class SparseFallbackError(RuntimeError):
    """Raised instead of a dense fallback when `strict=True`."""


class Run:
    """What the sessions of one pipeline (the two denoisers of Wan 2.2) share: they report on the same run."""

    def __init__(self) -> None:
        self.sessions: list[RunSession] = []
        self.over = False

    def begin(self, session: RunSession) -> None:
        """A session saw its run begin; whether that is a new run for all, or its turn in the one that goes on."""
        if self.over or session.report.records or session.report.steps:
            for other in self.sessions:
                other.forget()
            self.over = False


class RunSession:
    """One transformer under one SparseProc: takes every call, decides, computes, remembers, counts.

    Implements the protocol that `bridge` calls. Holds no tensors of the model and nothing of Diffusers.
    """

    def __init__(self, proc: SparseProc, run: Run | None = None) -> None:
        self.run = run or Run()
        self.run.sessions.append(self)
        self.proc, self.settings, self.method = proc, proc.settings, proc.method
        self.schedule = proc.settings.schedule()
        self.memory = Memory(offload=proc.settings.offload)
        self.report = Report()
        self.info: ForwardInfo | None = None
        self.layers = 0
        self.device = ""
        self.grid: TokenGrid | None = None
        self.balance = HeadBalance()
        self.share: ring.Share | None = None  # set by `ring.attend` for one call
        self.plans: Callable[[Call, Callable[[], tuple[Plan, bool]]], tuple[Plan, bool]] | None = None  # see replay.py
        self.step_cache: ActiveCache | None = None  # set by `stepcache.switch_on`
        self._guard = FiniteGuard()
        self._slower = _slower_calls()

    # -- what the bridge calls ---------------------------------------------------------------------------------

    def begin_forward(self, info: ForwardInfo) -> None:
        """A forward of the transformer begins; called outside any compiled graph."""
        if info.new_run:
            self.run.begin(self)
            self.memory.reset()
        if self.info is not None and info.grid != self.info.grid:
            self.memory.reset()
        if info.step not in self.report.steps:
            self._guard.read()
            self.memory.note()
        self.report.begin(info.step)
        self.info = info
        sparse = self.method.name != "dense" and not self._planned_dense(1 << 30)
        self.balance.begin(info.parallel, info.step, new_run=info.new_run, sparse=sparse, remembers=self._remembers,
                           known=self.method.head_costs)

    def end_run(self) -> None:
        """The pipeline call is over: what was remembered between steps is freed, the report stays."""
        self.memory.reset()
        if self.step_cache is not None:
            self.step_cache.end_run()
        self.run.over = True

    def forget(self) -> None:
        """A new run begins: the report and the distrust of layers belong to the last one."""
        self.report.reset()
        self.memory.reset()
        self.memory.peaks.clear()
        self._guard.reset()
        self._slower = _slower_calls()

    def fallback(self, layer: int, reason: str) -> None:
        """Count a call that stayed on the model's own dense path."""
        self._refuse(reason)
        info = self.info
        self.report.add(CallRecord(layer, info.step if info else 0, info.branch if info else "", "fallback", reason))

    def attention(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                  mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """One self-attention call.

        Args:
            layer: index of the layer among the bound ones.
            query, key, value: (B, L, H, D).
            mask: the model's own mask, or None.
            scale: softmax scale.

        Returns:
            (B, L, H, D), a fresh contiguous tensor.

        Raises:
            SparseFallbackError: with `strict=True`, when the call cannot run sparse.
        """
        watch = Stopwatch(query.device)
        step, branch = (self.info.step, self.info.branch) if self.info else (0, "")
        record = CallRecord(layer, step, branch, "dense", watch=watch)
        self.grid = self._grid_of(query, key)[0] or self.grid
        record.reason = self._planned_dense(layer)
        out = None
        if not record.reason:
            out = self._sparse(record, query, key, value, mask, scale)
        if out is None:
            watch.mark()
            out, lse = self._dense(query, key, value, mask, scale)
            record.density, record.backend = 1.0, "dense"
            if self.method.observes and record.kind == "dense":
                self._observe(record, query, key, value, mask, scale, out, lse)
        out = out.contiguous()
        watch.mark()
        self.device = str(query.device)
        self.report.add(record)
        return out

    # -- the path of one call ----------------------------------------------------------------------------------

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
               scale: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Dense attention and its LSE; under ring parallelism this rank's rows, without the LSE."""
        if self.share is None:
            return dense_attention(query, key, value, scale=scale, attn_mask=mask)

        def rows(part: slice) -> torch.Tensor:
            own = mask[..., part, :] if mask is not None and mask.dim() > 2 and mask.shape[-2] > 1 else mask
            return dense_attention(query[:, part], key, value, scale=scale, attn_mask=own)[0]

        return self.share.dense(query, rows), None

    def _remembers(self, layer: int) -> bool:
        """Whether anything that belongs to the heads of a layer is kept for later steps."""
        return any(place in (layer, None) for place in (_layer_of(key) for key in self.memory.keys()))

    def _planned_dense(self, layer: int) -> str:
        """Why the plan of the run wants this call dense, or an empty text."""
        if self.method.name == "dense":
            return "method dense"
        if self.info is None:
            return ""
        num_steps = self.info.num_steps or self.settings.num_steps
        if layer < self.schedule.dense_layers:
            return f"first {self.schedule.dense_layers} layer(s) (dense_layers)"
        if self.schedule.is_dense(self.info.step, num_steps, layer):
            return "dense steps (dense_steps, dense_last_steps)"
        return ""

    def _observe(self, record: CallRecord, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                 mask: torch.Tensor | None, scale: float, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        """Show the method a call that ran dense by plan; one whose grid or mask it cannot read is passed over."""
        grid, _ = self._grid_of(query, key)
        key_mask, reason = key_mask_of(mask, query.shape[0], key.shape[1])
        if grid is None or reason:
            return
        try:
            self.method.observe(self._call(record, query, key, value, key_mask, scale, grid), out, lse)
        except Exception as error:  # as in `_sparse`: the run goes on, and it is counted
            self._fall_back(record, one_line(error))

    def _decide(self, record: CallRecord, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                mask: torch.Tensor | None, scale: float) -> tuple[Call, Plan] | None:
        """What a sparse call computes, or None when the call must run dense; `record` says why.

        Whatever the method trips over is raised.
        """
        grid, reason = self._grid_of(query, key)
        key_mask = None
        if not reason:
            key_mask, reason = key_mask_of(mask, query.shape[0], key.shape[1])
        if not reason and self._guard.is_bad(record.layer):
            reason = "non-finite output at an earlier step"
        reason = reason or ring.against(self.method, self.info.parallel if self.info else None)
        if reason or grid is None:
            self._fall_back(record, reason)
            return None
        call = self._call(record, query, key, value, key_mask, scale, grid)
        make = functools.partial(self._plan, record, call)
        plan, record.reused = make() if self.plans is None else self.plans(call, make)
        if plan.mask is None:
            record.reason = f"method {self.method.name}'s own choice"
            return None
        plan, own = reuse.reusing(plan, self.settings), plan
        record.reusing = plan is not own
        against = "" if self.share is None else self.share.refusal(plan.operator)
        if against:
            self._fall_back(record, against)
            return None
        return call, plan

    def _sparse(self, record: CallRecord, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                mask: torch.Tensor | None, scale: float) -> torch.Tensor | None:
        """The sparse result, or None when the call must run dense; `record` says what happened."""
        try:
            decided = self._decide(record, query, key, value, mask, scale)
            if decided is None:
                return None
            call, plan = decided
            assert plan.mask is not None  # else it would have been decided
            if record.watch is not None:
                record.watch.mark()
            attend = functools.partial(block_sparse_attention, scale=scale, key_mask=call.key_mask,
                                       backend=self.settings.backend,
                                       on_backend=lambda name: setattr(record, "backend", name))
            if self.share is not None:
                out = self.share.run(call, plan.operator, plan.mask, attend)
            else:
                out, _ = plan.operator.run(call, plan.mask, attend)
            record.operator = plan.operator.title
            self.balance.note(record.layer, plan.mask)
        except SparseFallbackError:
            raise
        except Exception as error:  # whatever a method or kernel trips over, the user's run goes on, and it is counted
            if self.share is not None and not isinstance(error, ValueError):
                raise  # the other ranks go on sparse, and would wait for rows that never come
            self._fall_back(record, one_line(error))
            return None
        if self.share is not None:  # what one rank's rows hold, the others do not know
            record.kind, record.density = "sparse", plan.operator.computed(call, plan.mask)
            return out
        if self.settings.check == "call" and not bool(torch.isfinite(out).all()):
            self._fall_back(record, "non-finite output")
            return None
        if self.settings.check == "step":
            self._guard.watch(record.layer, out, self.layers)
        record.kind, record.density = "sparse", plan.operator.computed(call, plan.mask)
        return out

    def _fall_back(self, record: CallRecord, reason: str) -> None:
        self._refuse(reason)
        record.kind, record.reason = "fallback", reason

    def _refuse(self, reason: str) -> None:
        if self.settings.strict:
            raise SparseFallbackError(f"{reason} (strict=True refuses to run this call dense)")

    def _grid_of(self, query: torch.Tensor, key: torch.Tensor) -> tuple[TokenGrid | None, str]:
        """The grid of this call, text included, or why there is none."""
        if self.info is None:
            return None, "attention called outside the transformer's forward"
        grid = self.info.grid
        if grid is None:
            return None, self.info.reason or "token grid unknown"
        length, text = query.shape[1], query.shape[1] - grid.video
        if key.shape[1] != length:
            return None, f"query length {length} differs from key length {key.shape[1]}"
        if text < 0:
            return None, f"{length} tokens are fewer than the grid's {grid.video}"
        if text and grid.text_at == "none":
            return None, f"{text} tokens beyond the grid's {grid.video} of unknown place"
        return (dataclasses.replace(grid, text=text) if text else dataclasses.replace(grid, text_at="none")), ""

    def _call(self, record: CallRecord, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              key_mask: torch.Tensor | None, scale: float, grid: TokenGrid) -> Call:
        generator = torch.Generator(device=query.device)
        generator.manual_seed(((self.settings.seed * 1_000_003 + record.step) * 1009 + record.layer) % 2**63)
        info = self.info
        place = (grid, str(query.device))

        def cached(name: Hashable, make: Any) -> Any:
            return self.memory.static((name, place), make)

        return Call(query, key, value, grid, scale, layer=record.layer, layers=self.layers, step=record.step,
                    num_steps=(info.num_steps if info else None) or self.settings.num_steps, branch=record.branch,
                    key_mask=key_mask, cached=cached, family=info.family if info else "", generator=generator,
                    state=State(self.memory, _place(record, query), step=record.step, shape=grid),
                    heads=self.balance.heads(record.layer, query.shape[2], query.device), ranks=self.balance.world,
                    host_heads=self.balance.host_heads(record.layer))

    def _plan(self, record: CallRecord, call: Call) -> tuple[Plan, bool]:
        """The method's plan, remembered for `refresh` steps when it depends on the activations."""
        age = reuse.mask_age(self.settings)
        if age == 1 or not self.method.scored:
            return self.method.plan(call), False
        place = _place(record, call.query)
        kept = self.memory.get(place, step=call.step, max_age=age, shape=call.grid)
        if kept is not None:
            return kept, True
        plan = self.method.plan(call)
        self.memory.put(place, plan, step=call.step, shape=call.grid, kind="masks")
        return plan, False

    # -- reporting ---------------------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """Options that could have no effect in this run, and what the reader should know."""
        notes = [self.proc.note] if self.proc.note else []
        if self.settings.refresh > 1 and not self.method.scored:
            notes.append(f"refresh={self.settings.refresh} has no effect: {self.method.name} masks never change")
        length = (self.info.num_steps if self.info else None) or self.settings.num_steps
        if self.info and length is None and self.settings.dense_steps:
            notes.append("dense_steps has no effect: the run's length is unknown; pass num_steps=")
        first = min(self.report.steps, default=0)
        if length and first and self.settings.dense_steps and not self.schedule.is_dense(first, length, 1 << 30):
            notes.append(f"dense_steps has no effect: the run began at step {first} of {length}, past the dense ones")
        notes += self.method.remarks(self.grid, length)
        notes += reuse.notes(self.settings, self.method, self.report.records)
        notes += self.balance.notes()
        # Counted for the process: what ran since this run began.
        notes += [f"{n} x {reason}" for reason, n in (_slower_calls() - self._slower).items()]
        return notes


def _place(record: CallRecord, query: torch.Tensor) -> Hashable:
    """What tells apart the calls of one step: layer, CFG branch, batch size and heads."""
    return record.layer, record.branch, query.shape[0], query.shape[2]


def _layer_of(key: Any) -> int | None:
    """The layer that a key of the memory names; None: not known."""
    if key[0] == "state":
        key = key[2]
    return key[0] if isinstance(key[0], int) else None


def _slower_calls() -> Counter[str]:
    """Calls of the process so far that a slower kernel ran than the one chosen for them, by reason."""
    return kernels.fallbacks + Counter({f"masks in plain PyTorch: {why}": n for why, n in routing.plain_calls.items()})


class FiniteGuard:
    """Finds layers whose sparse output is not finite, reading the device once per step without blocking."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Trust every layer again."""
        self._flags: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._event: Any = None
        self._bad: set[int] = set()

    def is_bad(self, layer: int) -> bool:
        """Whether an earlier step saw this layer produce a non-finite value."""
        return layer in self._bad

    def watch(self, layer: int, out: torch.Tensor, layers: int) -> None:
        """Note on the device whether `out` holds a non-finite value."""
        if self._flags is None or self._flags.device != out.device:
            self._flags = torch.zeros(max(layers, layer + 1), dtype=torch.bool, device=out.device)
        low, high = torch.aminmax(out)
        self._flags[layer] |= ~torch.isfinite(high - low)

    def read(self) -> None:
        """Take in what has arrived from the device; start the next copy."""
        if self._flags is None:
            return
        if self._copy is not None and (self._event is None or self._event.query()):
            self._bad.update(int(i) for i in self._copy.nonzero())
            self._copy = None
        if self._copy is None:
            cuda = self._flags.device.type == "cuda"
            self._copy = self._flags.to("cpu", non_blocking=True) if cuda else self._flags.clone()
            self._event = torch.cuda.Event() if cuda else None
            if self._event is not None:
                self._event.record()
            else:
                self._bad.update(int(i) for i in self._copy.nonzero())


def key_mask_of(mask: torch.Tensor | None, batch: int, length: int) -> tuple[torch.Tensor | None, str]:
    """Read a model's attention mask as "which keys are real".

    Args:
        mask: None, or bool of shape (B|1, L), (B|1, 1, L) or (B|1, 1, 1, L).
        batch, length: B and L of the keys.

    Returns:
        (B, L) bool or None, and why the mask cannot be read (empty when it can).
    """
    if mask is None:
        return None, ""
    if mask.dtype != torch.bool:
        return None, f"the model passes a {str(mask.dtype).removeprefix('torch.')} attention mask, not a bool one"
    shape = tuple(mask.shape)
    if shape[-1] != length or any(n != 1 for n in shape[1:-1]) or shape[0] not in (1, batch):
        return None, f"the model passes an attention mask of shape {shape}, which is not a mask of keys"
    return mask.reshape(shape[0], length).expand(batch, length), ""


def one_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]
