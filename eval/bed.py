"""The included model as a test bed: many clips at a time, sparse or dense, and the queries, keys and values of a run.

Clips are sampled in batches with guidance in the same forward, since a GPU waits for launches with so small a model.
Noise belongs to a caption and a seed, not to the batch, so that every method starts from the same.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.kernels.attention import block_sparse_attention, dense_attention
from dit_sparse.report import CallRecord, Summary
from dit_sparse.session import RunSession

from .attention import AttentionProbe

SEED = 11  # of the captions, as in the model's own evaluation
DECODED = 4  # clips that are decoded at a time


@functools.cache
def held_out() -> tuple[dict[str, Tensor], list[str]]:
    """Specs and captions whose combination of colour, shape and third word was never drawn in training, no two alike.

    Returns:
        The specs as `world.sample` gives them, on the CPU, and the captions; a longer list begins as a shorter one.
    """
    from dit_sparse.pipelines.embedded import world

    # A longer sample would begin otherwise: always the same one.
    drawn = world.sample(256, "held", "cpu", generator=torch.Generator().manual_seed(SEED))
    texts = world.captions(drawn)
    first = [texts.index(text) for text in dict.fromkeys(texts)]
    return {name: values[first] for name, values in drawn.items()}, [texts[i] for i in first]


@dataclass
class Clips:
    """A batch of clips.

    Args:
        latents: (B, C, f, h, w), normalised, float32.
        clips: (B, F, 3, H, W) in [0, 1], float32.
        seconds: of the denoising, without text and decoding, the GPU's queue emptied at both ends.
        summary: what the sparse run did; None for a dense one.
    """

    latents: Tensor
    clips: Tensor
    seconds: float
    summary: Summary | None


@dataclass
class KeptCall:
    """One attention call of a dense run: what went in and came out; the LSE is None where the kernel gives none."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    out: Tensor
    lse: Tensor | None
    full_lse: Tensor


@dataclass
class Captured:
    """All attention calls of a dense run, by forward."""

    layers: int
    forwards: list[tuple[Any, list[KeptCall]]] = field(default_factory=list)


class Bed:
    """The model and what every clip of it has in common.

    Args:
        pipe: the included pipeline, as `load("embedded")` gives it.
        frames, side: size of the clips.
        steps, guidance: of the denoising; guidance of 1 or less runs without.
    """

    def __init__(self, pipe: Any, frames: int, side: int, steps: int, guidance: float) -> None:
        from dit_sparse.pipelines.embedded import world

        self.transformer, self.text_encoder = pipe.transformer, pipe.text_encoder
        self.vae = pipe.vae.float()  # small, and the clips are what is measured
        self.device = self.transformer.device
        self.frames, self.side, self.steps, self.guidance = frames, side, steps, guidance
        self.tables = world.TokenTables(self.device)

    def spec(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the captions of these rows of `held_out` ask for."""
        return {name: values[list(rows)].to(self.device) for name, values in held_out()[0].items()}

    def noise(self, rows: Sequence[int], seed: int) -> Tensor:
        """Noise of each caption and seed, whatever batch it stands in."""
        from dit_sparse.pipelines.embedded import model

        shape = model.latent_shape(1, self.frames, self.side)[1:]
        made = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + row)) for row in rows]
        return torch.stack(made).to(self.device)

    def latents(self, ids: Tensor, noise: Tensor) -> Tensor:
        """Latents of token ids (B, 32) from their noise, with whatever attention is bound to the transformer."""
        from dit_sparse.pipelines.embedded import sampling

        return sampling.generate_latents(
            self._forward, self.text_encoder, ids, frames=self.frames, size=self.side, steps=self.steps,
            guidance=self.guidance, noise=noise,
        )  # fmt: skip

    def _forward(self, x: Tensor, timestep: Tensor, text: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        kind = self.transformer.dtype
        return (self.transformer(x.to(kind), timestep, text.to(kind), return_dict=return_dict)[0],)

    @torch.no_grad()
    def sample(self, rows: Sequence[int], seed: int, proc: Any = None) -> Clips:
        """Make the clips of some captions; `proc` is a SparseProc, or None for dense."""
        from dit_sparse import disable, enable, summary
        from dit_sparse.pipelines.embedded import whole

        disable(self.transformer)
        if proc is not None:
            enable(self.transformer, proc)
        try:
            self._wait()
            start = time.perf_counter()
            latents = self.latents(self.tables(self.spec(rows)), self.noise(rows, seed))
            self._wait()
            seconds = time.perf_counter() - start
            report = None if proc is None else summary(self.transformer)
        finally:
            disable(self.transformer)
        clips = torch.cat([whole.decode(self.vae, piece) for piece in latents.split(DECODED)])
        return Clips(latents, (clips.transpose(1, 2) + 1) / 2, seconds, report)

    def capture(self, ids: Tensor, noise: Tensor, *, layer: int | None = None, last: int | None = None) -> Captured:
        """The attention calls of a dense run, those of the captions without those of the guidance's empty ones.

        Args:
            ids: (B, 32), of the captions.
            noise: as `noise` gives it.
            layer: keep the calls of this layer only.
            last: step after which the run ends.
        """
        from dit_sparse import SparseProc, bridge, disable

        disable(self.transformer)
        session = _Keeper(SparseProc("dense", num_steps=self.steps), len(ids), layer, last)
        try:
            binding = bridge.bind(self.transformer, session)
            session.kept.layers = sum(layer.index >= 0 for layer in binding.layers)
            self.latents(ids, noise)
        except _EnoughError:
            pass
        finally:
            disable(self.transformer)
        return session.kept

    def check(self, clips: Tensor, rows: Sequence[int]) -> list[dict[str, float | None]]:
        """What of its caption each clip (B, F, 3, H, W) shows; see `checks.check`."""
        from dit_sparse.pipelines.embedded import checks

        return checks.check_all(clips.transpose(1, 2) * 2 - 1, self.spec(rows))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _EnoughError(Exception):
    """Ends a run whose further steps nobody needs."""


class _Keeper(RunSession):
    """Runs everything dense and keeps the calls of the first rows of the batch."""

    def __init__(self, proc: Any, rows: int, layer: int | None = None, last: int | None = None) -> None:
        super().__init__(proc)
        self.kept, self._rows, self._layer, self._last = Captured(0), rows, layer, last

    def begin_forward(self, info: Any) -> None:
        """A forward begins."""
        if self._last is not None and info.step > self._last:
            raise _EnoughError
        super().begin_forward(info)
        self.kept.forwards.append((info, []))

    def attention(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """The dense output; see `RunSession.attention` for the shapes."""
        out, lse = dense_attention(query, key, value, scale=scale, attn_mask=mask)
        if self._layer not in (None, layer):
            return out.contiguous()
        query, key, value, made = (x[: self._rows].clone() for x in (query, key, value, out))
        full = lse
        if full is None:
            layout = BlockLayout.raster(query.shape[1], 128, query.device)
            full = block_sparse_attention(query, key, value, BlockMask.full(layout, layout), scale=scale)[1]
        cut = [None if x is None else x[: self._rows].clone() for x in (mask, lse)]
        call = KeptCall(layer, query, key, value, cut[0], scale, made, cut[1], full[: self._rows].clone())
        self.kept.forwards[-1][1].append(call)
        return out.contiguous()


class Replay(AttentionProbe):
    """Shows a method the calls of a dense run again, in their order, and compares what it makes of them.

    Attributes:
        planned: (record, call, plan) of every call that runs sparse, for those who set `keep`.
    """

    def __init__(self, proc: Any, layers: int, *, keep: bool = False) -> None:
        super().__init__(proc)
        self.layers, self.keep = layers, keep
        self.planned: list[tuple[CallRecord, Any, Any]] = []
        self._now: KeptCall | None = None

    def replay(self, captured: Captured) -> list[dict[str, Any]]:
        """The calls, as `AttentionProbe.calls` gives them."""
        for info, calls in captured.forwards:
            self.begin_forward(info)
            for self._now in calls:
                x = self._now
                self.attention(x.layer, x.query, x.key, x.value, x.mask, x.scale)
        return self.calls()

    def _dense(self, *_: Any) -> tuple[Tensor, Tensor | None]:
        assert self._now is not None
        return self._now.out, self._now.full_lse

    def _observe(self, record: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float,
                 out: Tensor, lse: Tensor | None) -> None:
        # A run on this device may tell no LSE, and the method does without it there.
        assert self._now is not None
        super()._observe(record, query, key, value, mask, scale, out, self._now.lse)

    def _decide(self, record: Any, *call: Any) -> Any:
        decided = super()._decide(record, *call)
        if decided is not None and self.keep:
            self.planned.append((record, *decided))
        return decided
