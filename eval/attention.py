"""How near a method's attention is to dense attention, call by call: recall of mass, error, cosine, density.

The pipeline runs dense, so that every call sees the activations that it would see without the method; beside each call
that the method would run sparse, its mask is planned and its output computed, and both are compared. Errors do not add
up over layers and steps here: that is what the measures of clips show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.blockmask import BlockMask
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.kernels.soft import SoftMeans
from dit_sparse.operators import Attend
from dit_sparse.report import CallRecord
from dit_sparse.session import Run, RunSession, one_line

from .config import EvalConfig
from .run import Job, Result

ATTENTION = "attention.jsonl"
NAMES = ("density", "recall", "relative_error", "cosine")  # in the order of the numbers of a call
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


@dataclass(frozen=True)
class Quality:
    """One attention call under a mask, against the same call without; each float32 (H,), mean over the batch.

    Attributes:
        density: kept pairs over all pairs of tokens.
        recall: share of the dense attention's mass that lies on kept pairs, mean over the rows, 0 to 1.
        relative_error: ||sparse - dense|| / ||dense|| of the output of a head, over all rows and channels.
        cosine: between both outputs of a row, mean over the rows, -1 to 1.
    """

    density: Tensor
    recall: Tensor
    relative_error: Tensor
    cosine: Tensor

    def stacked(self) -> Tensor:
        """(4, H) in the order of `NAMES`."""
        return torch.stack([getattr(self, name) for name in NAMES])


def attention_quality(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scale: float,
    *,
    key_mask: Tensor | None = None,
    dense: tuple[Tensor, Tensor | None] | None = None,
    backend: str | None = None,
    operate: Callable[[BlockMask, Attend], tuple[Tensor, Tensor]] | None = None,
) -> Quality:
    """Compare attention under a mask with dense attention.

    Recall is exact, boundary blocks included: a row's mass on its kept pairs is exp(LSE under the mask - dense LSE).
    For masks without a window it equals `routing.listed_mass` summed over the lists.

    Args:
        query, key: (B, L, H, D); value: (B, L, H, Dv).
        mask: which pairs are kept.
        scale: softmax scale.

    Expert args:
        key_mask: bool (B, L), True where a token is real: others count neither as key nor as row.
        dense: what `dense_attention` gives, when it is known; the LSE may be None.
        backend: of the sparse kernel.
        operate: the output of a plan's operator, given the mask and the sparse kernel: it may hold more than the kept
            pairs. None: the kept pairs alone. The recall is theirs in any case.

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    out, lse = dense or dense_attention(query, key, value, scale=scale, key_mask=key_mask)
    attend = functools.partial(block_sparse_attention, scale=scale, key_mask=key_mask, backend=backend)
    kept: Tensor | None = None
    asked = False

    def listed(query_: Tensor, key_: Tensor, value_: Tensor, mask_: BlockMask, /, *, soft: SoftMeans | None = None
               ) -> tuple[Tensor, Tensor]:
        nonlocal kept, asked
        call, asked = (query_, key_, value_, mask_), True
        found = attend(*call, soft=soft)
        # With soft blocks the LSE is not of the kept pairs alone.
        if soft is None and all(a is b for a, b in zip(call, (query, key, value, mask), strict=True)):
            kept = found[1].clone()  # operators may merge into what they are given
        return found

    sparse, computed = operate(mask, listed) if operate else listed(query, key, value, mask)
    if kept is None:  # an operator with a kernel of its own asks for nothing; one may ask for other pairs only
        kept = attend(query, key, value, mask)[1] if asked else computed
    if lse is None:
        # On a GPU only the block kernels tell the LSE.
        full = BlockMask.full(mask.query, mask.key)
        lse = block_sparse_attention(query, key, value, full, scale=scale, key_mask=key_mask)[1]
    real = torch.isfinite(lse) if key_mask is None else torch.isfinite(lse) & key_mask[:, None]
    rows = real.sum((0, 2)).clamp(min=1)
    recall = ((kept - lse).exp().clamp(max=1) * real).nan_to_num(0).sum((0, 2)) / rows
    errors, cosines = [], []
    for head in range(query.shape[2]):  # one at a time: in float32 all heads of a long clip are gigabytes
        some = real[:, head, :, None]
        a, b = (x[:, :, head].float().masked_fill(~some, 0) for x in (out, sparse))
        errors.append((b - a).norm() / a.norm().clamp(min=1e-12))
        cosines.append(torch.cosine_similarity(a, b, dim=-1).sum() / rows[head])
    density = mask.head_density().expand(query.shape[0], query.shape[2]).mean(0)
    return Quality(density.float(), recall.float(), torch.stack(errors), torch.stack(cosines))


class AttentionProbe(RunSession):
    """A session that computes every call dense and notes what its method would have made of it."""

    def __init__(self, proc: Any, run: Run | None = None) -> None:
        super().__init__(proc, run)
        self._found: list[tuple[CallRecord, Tensor | None, int]] = []

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The dense output; see `RunSession.attention` for the shapes."""
        dense = self._dense(query, key, value, mask, scale)
        step, branch = (self.info.step, self.info.branch) if self.info else (0, "")
        record = CallRecord(layer, step, branch, "dense", self._planned_dense(layer))
        found = None if record.reason else self._look(record, query, key, value, mask, scale, dense)
        if self.method.observes and record.kind == "dense":
            self._observe(record, query, key, value, mask, scale, *dense)
        self._found.append((record, found, query.shape[2]))
        return dense[0].contiguous()

    def _dense(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]:
        """Dense attention's output and LSE."""
        return dense_attention(query, key, value, scale=scale, attn_mask=mask)

    def _look(
        self,
        record: CallRecord,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        dense: tuple[Tensor, Tensor | None],
    ) -> Tensor | None:
        """(4, H) numbers of a call that runs sparse; None when it would not, and `record` says why."""
        try:
            decided = self._decide(record, query, key, value, mask, scale)
            if decided is None:
                return None
            call, plan = decided
            assert plan.mask is not None  # else it would have been decided
            found = attention_quality(
                query,
                key,
                value,
                plan.mask,
                scale,
                key_mask=call.key_mask,
                dense=dense,
                backend=self.settings.backend,
                operate=functools.partial(plan.operator.run, call),
            ).stacked()
        except Exception as error:  # as in a run: whatever a method trips over, the call is dense and counted
            record.kind, record.reason = "fallback", one_line(error)
            return None
        record.kind = "sparse"
        return found

    def _refuse(self, reason: str) -> None:
        """Here every call runs dense: one that would not run sparse is noted, also under strict=True."""

    def fallback(self, layer: int, reason: str) -> None:
        """Note a call that stayed on the model's own dense path."""
        step, branch = (self.info.step, self.info.branch) if self.info else (0, "")
        self._found.append((CallRecord(layer, step, branch, "fallback", reason), None, 1))

    def calls(self, offset: int = 0) -> list[dict[str, Any]]:
        """One entry for each call: layer (from `offset`), step, branch, kind, reason, and a list over heads of each of
        `NAMES`. Dense calls have density, recall and cosine 1 and error 0, which is what they are."""
        exact = [1.0, 1.0, 0.0, 1.0]
        entries = []
        for record, found, heads in self._found:
            numbers = (
                [[one] * heads for one in exact]
                if found is None
                else [[float(f"{value:.5g}") for value in row] for row in found.tolist()]
            )
            entries.append(
                {
                    "layer": offset + record.layer,
                    "step": record.step,
                    "branch": record.branch,
                    "kind": record.kind,
                    "reason": record.reason,
                    **dict(zip(NAMES, numbers, strict=True)),
                }
            )
        return entries


def look(
    pipe: Any,
    prompt: str,
    proc: Any,
    *,
    seed: int = 0,
    shape: Mapping[str, Any] | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Make a clip dense, and look at what a method would have made of every attention call.

    Args:
        pipe: a text-to-video pipeline; left with sparse attention off.
        prompt: what to show.
        proc: a SparseProc.
        seed: of the clip.
        shape: frames, height, width, steps, guidance_scale; None leaves the host's defaults.
        callback: called as callback(done, steps) after every step.

    Returns:
        The calls as `AttentionProbe.calls` gives them; layers of a second denoiser count on behind the first's.

    Raises:
        ValueError: the pipeline is not supported.
    """
    from dit_sparse import bridge, disable
    from dit_sparse.pipelines.text_to_video import text_to_video

    disable(pipe)
    run = Run()
    probes: list[AttentionProbe] = []
    try:
        for _, model, scheduler in bridge.transformers_of(pipe):
            probes.append(AttentionProbe(proc, run))
            binding = bridge.bind(model, probes[-1], scheduler=scheduler)
            probes[-1].layers = sum(layer.index >= 0 for layer in binding.layers)
        text_to_video(pipe, prompt, seed=seed, callback=callback, **(shape or {}))
    finally:
        disable(pipe)
    calls: list[dict[str, Any]] = []
    offset = 0
    for probe in probes:
        calls += probe.calls(offset)
        offset += probe.layers
    return calls


def attention_jobs(config: EvalConfig, jobs: list[Job]) -> list[Job]:
    """The jobs of a run whose attention is looked into: the first prompts with the first seed, each method."""
    prompts = config.prompts[: config.attention]
    labels = [entry.label for entry in config.methods]
    left_out = ("measures", "fps", "networks")  # on which the attention does not depend
    return [
        {name: value for name, value in job.items() if name not in left_out}
        for job in jobs
        if job["prompt"] in prompts and job["seed"] == config.seeds[0] and job["label"] in labels
    ]


class AttentionWork:
    """Looks into the attention of a job's clip.

    Args:
        pipe: a text-to-video pipeline without sparse attention.
        config: what is made.
        bar: bar(label) is entered around each clip and yields its step callback.
    """

    def __init__(self, pipe: Any, config: EvalConfig, bar: Bar | None = None) -> None:
        self.pipe = pipe
        self.bar: Bar = bar or (lambda label: nullcontext())
        self._methods = {entry.label: entry for entry in config.methods}

    def __call__(self, job: Job) -> Result:
        from dit_sparse import SparseProc

        entry = self._methods[job["label"]]
        names = ("frames", "height", "width", "steps", "guidance_scale")
        shape = {name: job[name] for name in names if job.get(name) is not None}
        with self.bar(f"attention, {entry.label}: {job['prompt'][:30]}") as update:
            calls = look(
                self.pipe,
                job["prompt"],
                SparseProc(entry.name, **entry.options),
                seed=job["seed"],
                shape=shape,
                callback=update,
            )
        return {"calls": calls}


def density_map(pipe: Any) -> dict[str, Any]:
    """Mean density of the last sparse run by layer and step, as {"density_map": {layer: {step: density}}}.

    Args:
        pipe: a pipeline with sparse attention on.
    """
    from dit_sparse import bridge

    sums: dict[str, dict[str, list[float]]] = {}
    offset = 0
    for _, model, _ in bridge.transformers_of(pipe):
        binding = bridge.binding_of(model)
        session = binding.session if binding is not None else None
        if isinstance(session, RunSession):
            for record in session.report.records:
                row = sums.setdefault(str(offset + record.layer), {})
                row.setdefault(str(record.step), []).append(float(record.density))
            offset += session.layers
    return {
        "density_map": {
            layer: {step: float(f"{sum(found) / len(found):.4g}") for step, found in row.items()}
            for layer, row in sums.items()
        }
    }


def grids(
    calls: Sequence[Mapping[str, Any]], name: str
) -> tuple[dict[int, dict[int, float]], dict[int, dict[int, float]]]:
    """One of `NAMES` as two maps: {layer: {step: mean over heads}} and {layer: {head: mean over steps}}.

    Args:
        calls: as `look` returns them, of one or several clips.
        name: which number.
    """
    steps: dict[int, dict[int, list[float]]] = {}
    heads: dict[int, dict[int, list[float]]] = {}
    for call in calls:
        values = call[name]
        steps.setdefault(call["layer"], {}).setdefault(call["step"], []).extend(values)
        if call["kind"] == "sparse":
            for head, value in enumerate(values):
                heads.setdefault(call["layer"], {}).setdefault(head, []).append(value)
    by_step, by_head = (
        {
            layer: {place: sum(found) / len(found) for place, found in sorted(row.items())}
            for layer, row in sorted(table.items())
        }
        for table in (steps, heads)
    )
    return by_step, by_head


def means(calls: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the heads of all sparse calls of each of `NAMES`; empty when no call was sparse."""
    sparse = [call for call in calls if call["kind"] == "sparse"]
    values = {name: [value for call in sparse for value in call[name]] for name in NAMES}
    return {name: sum(found) / len(found) for name, found in values.items() if found}
