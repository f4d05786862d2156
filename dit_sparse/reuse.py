"""Reuse of attention between steps: the option `reuse` of every method, and attention to keys that stay fixed.

`reuse="complement"` and `reuse="heads"` wrap the operator of a plan (operators_reuse.py). `FlashBlock` is a part for
pipelines that denoise one group of tokens after another before a fixed context, as streaming video models do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .blockmask import BlockLayout, BlockMask
from .kernels.attention import block_sparse_attention
from .memory import Memory
from .operators import merge_parts
from .operators_reuse import ReuseComplement, ReuseHeads

if TYPE_CHECKING:
    from .methods.base import Method, Plan
    from .processor import Settings
    from .report import CallRecord

__all__ = ["REUSES", "FlashBlock", "check", "mask_age", "notes", "reason_against", "reusing"]

REUSES = ("complement", "heads")
_BLOCK = 128  # tokens of a block of the rectangular calls
_FEW_STEPS = 4  # runs of at most so many steps keep the fixed part to their end


def check(reuse: Any, every: Any, drift: Any) -> None:
    """Raise ValueError, in one line, unless `reuse`, `reuse_every` and `reuse_drift` have allowed values."""
    if reuse is not None and reuse not in REUSES:
        raise ValueError(f"reuse={reuse!r} is not allowed; use None or one of {', '.join(REUSES)}")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"reuse_every={every!r} is not allowed; use a whole number of at least 1")
    number = isinstance(drift, (int, float)) and not isinstance(drift, bool)
    if not number or not 0 <= drift <= 2:
        raise ValueError(f"reuse_drift={drift!r} is not allowed; use a number in [0, 2]")


def reason_against(method: Method, reuse: str | None) -> str:
    """Why a method cannot be used with a kind of reuse; empty when it can, or when its plans will tell."""
    if reuse is None or method.name == "dense":
        return ""
    if not method.lists:
        return f"reuse={reuse!r}: the masks of {method.name} are no plain lists of blocks; use reuse=None"
    operators = method.operators()
    if any(reuse in operator.reuses for operator in operators):
        return ""
    allowed = [kind for kind in REUSES if any(kind in operator.reuses for operator in operators)]
    return (f"reuse={reuse!r}: {method.name} has an operator of its own for what its masks leave out "
            f"({', '.join(operator.__name__ for operator in operators)}); use "
            + " or ".join(["reuse=None", *(f"reuse={kind!r}" for kind in allowed)]))


def reusing(plan: Plan, settings: Settings) -> Plan:
    """The plan with its operator wrapped as the options ask; the same plan where its operator cannot be."""
    if settings.reuse is None or settings.reuse not in plan.operator.reuses:
        return plan
    if settings.reuse == "complement":
        return dataclasses.replace(plan, operator=ReuseComplement(plan.operator, settings.reuse_every))
    return dataclasses.replace(
        plan, operator=ReuseHeads(plan.operator, settings.reuse_every, float(settings.reuse_drift))
    )


def mask_age(settings: Settings) -> int:
    """Steps that a scored method's plan serves: a kept complement belongs to a mask, which stays as long."""
    return max(settings.refresh, settings.reuse_every) if settings.reuse == "complement" else settings.refresh


def notes(settings: Settings, method: Method, records: Iterable[CallRecord]) -> list[str]:
    """Options of reuse that had no effect in a run, for its summary."""
    found = []
    reuse, every, drift = settings.reuse, settings.reuse_every, settings.reuse_drift
    plain = type(settings)()
    if reuse is None:
        given = [f"{name}={value}" for name, value, default in (
            ("reuse_every", every, plain.reuse_every), ("reuse_drift", drift, plain.reuse_drift)) if value != default]
        return [f"{' and '.join(given)} without effect: reuse is None"] if given else []
    if method.name == "dense":
        return [f"reuse={reuse!r} has no effect: dense calls are never reused"]
    if reuse == "complement" and drift != plain.reuse_drift:
        found.append(f"reuse_drift={drift} has no effect with reuse='complement'")
    if every == 1:
        effect = "every sparse call is dense" if reuse == "complement" else "nothing is reused"
        found.append(f"reuse={reuse!r} has no effect with reuse_every=1: {effect}")
    if reuse == "complement" and 1 < settings.refresh < every and method.scored:
        found.append(f"refresh={settings.refresh} has no effect: reuse='complement' keeps masks for {every} steps")
    other = Counter(record.operator for record in records if record.kind == "sparse" and not record.reusing)
    return found + [f"reuse={reuse!r} had no effect on {n} call(s): {title}" for title, n in other.items()]


class FlashBlock:
    """Attention to fixed keys and fresh ones; the part of the fixed keys is computed at some steps and kept.

    For pipelines that denoise one block of tokens (a chunk of frames) for several steps while its context, the keys and
    values of what came before, does not change. out = softmax over context and fresh keys together, as one; the only
    approximation is that the context's part belongs to the queries of the step that computed it. Where that is this
    step, the result is exact. Source: FlashBlock, arXiv 2602.05305; refresh periods for video are ours.

    Args:
        refresh_every: a kept part serves so many steps, the one that made it included; 1 keeps nothing, None: to the
            end of runs of at most 4 steps, else 2.
        start: first step whose part is kept; before it, where queries still change much, it is computed at every step.
        offload: keep the parts in CPU memory.
        backend: kernel to use, None for the fastest that can run.

    Attributes:
        external, internal: calls of attention to context, and to fresh keys, since the beginning.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self, refresh_every: int | None = None, *, start: int = 0, offload: bool = False, backend: str | None = None
    ) -> None:
        for name, value, least in (("refresh_every", refresh_every, 1), ("start", start, 0)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not whole and not (name == "refresh_every" and value is None):
                raise ValueError(f"FlashBlock: {name}={value!r} is not allowed; use a whole number of at least {least}"
                                 + (" or None" if name == "refresh_every" else ""))
        self.refresh_every, self.start, self.backend = refresh_every, start, backend
        self.external = self.internal = 0
        self._memory = Memory(offload=offload)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context_key: Tensor,
        context_value: Tensor,
        *,
        step: int,
        num_steps: int | None = None,
        layer: int = 0,
        branch: str = "",
        block: Hashable = 0,
        scale: float | None = None,
        key_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One attention call.

        Args:
            query: (B, Lq, H, D), of the block that is denoised.
            key, value: (B, Lk, H, D) and (B, Lk, H, Dv), fresh ones: of the block itself.
            context_key, context_value: (B, Lc, H, D) and (B, Lc, H, Dv), fixed while the block is denoised.
            step, num_steps: denoising step of this block, from 0, and their number, None when unknown.
            layer, branch: which kept part: they are kept apart by layer and guidance branch.
            block: number or name of the block of tokens; a new one starts anew. So does another shape.
            scale: factor of the scores; None: 1 / sqrt(D).
            key_mask, context_mask: bool (B, Lk) and (B, Lc), True where the key is a real token; None: all are.

        Returns:
            out (B, Lq, H, Dv) in the query's dtype and the natural-log LSE (B, H, Lq), float32. Queries without a key
            give 0 and -inf.
        """
        self.internal += 1
        fresh = self._all_keys(query, key, value, scale, key_mask)
        shape, place = (block, query.shape, query.dtype, context_key.shape), (layer, branch)
        most = self._age(num_steps) if step >= self.start else 1
        kept = [self._memory.get((name, place), step=step, max_age=most, shape=shape) for name in ("outputs", "LSE")]
        if any(part is None for part in kept):
            self.external += 1
            kept = list(self._all_keys(query, context_key, context_value, scale, context_mask))
            if most > 1:
                for name, part in zip(("outputs", "LSE"), kept, strict=True):
                    self._memory.put((name, place), part, step=step, shape=shape, kind=name)
        return merge_parts([(kept[0], kept[1]), fresh])

    def reset(self) -> None:
        """Forget the kept parts: a new run, prompt or context. The counts go on."""
        self._memory.reset()

    @property
    def nbytes(self) -> int:
        """Bytes of the kept parts, wherever they are: B * H * Lq * (Dv * item size + 4) per layer and branch."""
        return sum(held.total for kind, held in self._memory.kinds().items() if kind in ("outputs", "LSE"))

    def _age(self, num_steps: int | None) -> float:
        """Steps that a kept part serves."""
        if self.refresh_every is not None:
            return self.refresh_every
        return math.inf if num_steps is not None and num_steps <= _FEW_STEPS else 2

    def _all_keys(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Dense attention with its LSE; the dense kernels of a GPU give none, the block-sparse ones do."""
        B, Lq, H, _ = query.shape
        Lk = key.shape[1]
        if not Lk:
            nothing = torch.full((B, H, Lq), -torch.inf, device=query.device)
            return query.new_zeros(B, Lq, H, value.shape[3]), nothing
        mask = self._memory.static((Lq, Lk, str(query.device)), lambda: BlockMask.full(
            BlockLayout.raster(Lq, _BLOCK, query.device), BlockLayout.raster(Lk, _BLOCK, query.device)))
        return block_sparse_attention(query, key, value, mask, scale=scale, key_mask=key_mask, backend=self.backend)
