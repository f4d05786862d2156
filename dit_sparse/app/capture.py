"""One dense run, looked into: attention at reduced resolution, and what methods would keep of it.

Everything that the Inspect tab shows later is taken here, once, while the queries and keys are there; what is kept is
small and bounded, so a click costs a picture and no model. Of each kept call: the attention of some queries over pooled
keys as bytes, the mass between frames, and for each method its mask at the same places, recall and error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..eval.attention import AttentionProbe
from ..grid import TokenGrid
from ..inspect import allowed_pairs
from ..kernels.attention import dense_attention
from ..report import CallRecord
from ..session import Run

if TYPE_CHECKING:
    from ..bridge import ForwardInfo

BUDGET = 96 * 2**20  # bytes of one recording
MOST_STEPS, MOST_LAYERS, MOST_HEADS = 4, 12, 8
# Queries along a side of a frame, frames with queries, keys along a side: the first that fits the budget is taken.
DETAILS = ((8, 9, 16), (8, 5, 16), (6, 5, 16), (6, 5, 12), (4, 5, 12), (4, 3, 8), (3, 3, 8), (2, 2, 8))
SIDE = 4  # rows along a side of every frame from which the mass between frames is taken
BLOCKS = 160  # most blocks along a side of the picture of a mask


@dataclass(frozen=True)
class Detail:
    """What of a run is kept: steps, layers, heads, the queries as (frame, row, column), the grid of pooled keys."""

    steps: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    queries: tuple[tuple[int, int, int], ...]
    keys: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the maps and of two methods' masks."""
        places = len(self.queries) * self.keys[0] * self.keys[1] * self.keys[2]
        return len(self.steps) * len(self.layers) * len(self.heads) * (places + 2 * (places // 8))


def choose_detail(grid: TokenGrid, steps: int, layers: int, heads: int, budget: int = BUDGET) -> Detail:
    """The finest detail whose bytes fit the budget; of long runs and large models some steps, layers and heads."""
    some = (spread(steps, MOST_STEPS), spread(layers, MOST_LAYERS), spread(heads, MOST_HEADS))
    found = None
    for side, frames, keys in DETAILS:
        queries = tuple((t, y, x) for t in spread(grid.frames, frames) for y in _centres(grid.height, side)
                        for x in _centres(grid.width, side))
        found = Detail(*some, queries, (grid.frames, min(grid.height, keys), min(grid.width, keys)))
        if found.nbytes <= budget:
            break
    assert found is not None
    return found


def spread(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of the numbers below `count`, the first and the last among them."""
    if count <= most:
        return tuple(range(count))
    return tuple(dict.fromkeys(round(i * (count - 1) / max(most - 1, 1)) for i in range(most)))


def _centres(length: int, parts: int) -> list[int]:
    parts = min(length, parts)
    return [(2 * i + 1) * length // (2 * parts) for i in range(parts)]


@dataclass
class View:
    """What a method makes of one call.

    Attributes:
        reason: why there is no mask, or "".
        numbers: (4, heads) in the order of `eval.attention.NAMES`.
        kept: bits, uint8 (heads, queries, ceil(keys / 8)): pooled keys of which at least half is kept.
        mass: float16 (heads, queries): share of a query's attention that is kept.
        blocks: uint8 (heads, n, m): 0 dropped, 1 tested pair by pair, 2 whole; in the mask's own order.
        operator: what is computed for the mask.
    """

    reason: str = ""
    numbers: Tensor | None = None
    kept: Tensor | None = None
    mass: Tensor | None = None
    blocks: Tensor | None = None
    operator: str = ""


@dataclass
class Moment:
    """One kept call.

    Attributes:
        maps: uint8 (heads, queries, keys): 255 * sqrt(mass / peak).
        peak: float32 (heads, queries).
        frames: float32 (heads, F, F): mean mass from a frame's queries to a frame's keys; what is missing is text's.
        views: by the method's label.
    """

    maps: Tensor
    peak: Tensor
    frames: Tensor
    views: dict[str, View] = field(default_factory=dict)

    def attention(self, head: int, query: int) -> Tensor:
        """float32 (keys,): the map of a query."""
        return (self.maps[head, query].float() / 255).square() * self.peak[head, query]


@dataclass
class Recording:
    """A run that was looked into.

    Attributes:
        labels: of the methods.
        pictures: (frames of the grid, 3, h, w) uint8: the clip at the size of a stamp.
    """

    prompt: str
    labels: tuple[str, ...]
    grid: TokenGrid | None = None
    detail: Detail | None = None
    moments: dict[tuple[int, int], Moment] = field(default_factory=dict)
    pictures: Tensor | None = None
    num_steps: int = 0
    size: tuple[int, int, int] = (0, 0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = [self.pictures] if self.pictures is not None else []
        for moment in self.moments.values():
            tensors += [moment.maps, moment.peak, moment.frames]
            for view in moment.views.values():
                tensors += [t for t in (view.kept, view.mass, view.blocks, view.numbers) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


class _Probe(AttentionProbe):
    """Plans at every call, so that what a method remembers is as in a run; measures where the recording asks."""

    def __init__(self, proc: Any, run: Run, owner: Recorder) -> None:
        super().__init__(proc, run)
        self._owner = owner
        self.decided: tuple[Any, Any] | None = None
        self.seen: tuple[CallRecord, Tensor | None] | None = None

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
               ) -> tuple[Tensor, Tensor | None]:
        return self._owner.dense(query, key, value, mask, scale)

    def _decide(self, *arguments: Any) -> tuple[Any, Any] | None:
        self.decided = super()._decide(*arguments)
        return self.decided

    def _look(self, record: CallRecord, *arguments: Any) -> Tensor | None:
        if self._owner.keeps(record.layer):
            found = super()._look(record, *arguments)
            self.seen = (record, found)
            return found
        try:
            self._decide(record, *arguments[:-1])
        except Exception:  # said where the recording looks
            self.decided = None
        return None

    def attention(self, *arguments: Any) -> Tensor:
        """See `AttentionProbe.attention`; the recording has the numbers, so the probe keeps no list of its own."""
        self.decided = self.seen = None
        out = super().attention(*arguments)
        self._found.clear()
        return out


class Recorder:
    """A session (see `bridge.Session`) that computes every call dense and fills a recording.

    Args:
        procs: SparseProcs by label, at most two.
        recording: to be filled.
        budget: bytes of the maps.
    """

    def __init__(self, procs: dict[str, Any], recording: Recording, budget: int = BUDGET) -> None:
        self.recording, self.budget = recording, budget
        self.probes = {label: _Probe(proc, Run(), self) for label, proc in procs.items()}
        self.info: ForwardInfo | None = None
        self._branch: str | None = None
        self._result: tuple[Tensor, Tensor | None] | None = None
        self._heads = 0

    def begin_forward(self, info: ForwardInfo) -> None:
        """See `bridge.Session`."""
        if info.new_run:
            self.recording.moments.clear()
            self._branch = info.branch
        self.info = info
        self.recording.num_steps = info.num_steps or 0
        for probe in self.probes.values():
            probe.begin_forward(info)

    def end_run(self) -> None:
        """The pipeline call is over."""
        for probe in self.probes.values():
            probe.end_run()

    def fallback(self, layer: int, reason: str) -> None:
        """A call on the model's own path is not looked into."""

    def bound(self, layers: int) -> None:
        """How many layers the transformer has."""
        for probe in self.probes.values():
            probe.layers = layers

    def keeps(self, layer: int) -> bool:
        """Whether the call that runs is one of the recording's."""
        detail, info = self.recording.detail, self.info
        return (detail is not None and info is not None and info.branch == self._branch
                and info.step in detail.steps and layer in detail.layers)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
              ) -> tuple[Tensor, Tensor | None]:
        """Dense attention of the call, computed once for all methods."""
        if self._result is None:
            self._result = dense_attention(query, key, value, scale=scale, attn_mask=mask)
        return self._result

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
                  ) -> Tensor:
        """The dense output; see `bridge.Session`."""
        self._result, info = None, self.info
        if self.recording.detail is None and info is not None and info.grid is not None:
            layers = next(iter(self.probes.values())).layers if self.probes else layer + 1
            self.recording.grid = info.grid
            self.recording.detail = choose_detail(info.grid, info.num_steps or 1, layers, query.shape[2], self.budget)
        for probe in self.probes.values():
            probe.attention(layer, query, key, value, mask, scale)
        if self.keeps(layer):
            assert info is not None
            self.recording.moments[info.step, layer] = self._moment(query, key, scale, layer)
        out = self.dense(query, key, value, mask, scale)[0]
        self._result = None
        return out.contiguous()

    def _moment(self, query: Tensor, key: Tensor, scale: float, layer: int) -> Moment:
        grid, detail = self.recording.grid, self.recording.detail
        assert grid is not None and detail is not None
        # Where the video begins in this sequence: behind text that leads.
        text = query.shape[1] - grid.video
        start = text if text and grid.text_at == "front" else 0
        tokens = torch.tensor([start + grid_token(grid, place) for place in detail.queries], device=query.device)
        rows = torch.tensor([start + grid_token(grid, (t, y, x)) for t in range(grid.frames)
                             for y in _centres(grid.height, SIDE) for x in _centres(grid.width, SIDE)],
                            device=query.device)
        every = torch.arange(query.shape[1], device=query.device)
        video = slice(start, start + grid.video)
        views = {label: self._view(probe, layer) for label, probe in self.probes.items()}
        maps, peaks, between = [], [], []
        for head in detail.heads:
            exact = _rows(query, key, tokens, head, scale)
            pooled = pool_keys(exact[:, video], grid, detail.keys)
            peak = pooled.amax(1).clamp(min=1e-12)
            maps.append((255 * (pooled / peak[:, None]).sqrt()).round().to(torch.uint8).cpu())
            peaks.append(peak.float().cpu())
            mass = _rows(query, key, rows, head, scale)[:, video].unflatten(1, (grid.frames, -1)).sum(2)
            between.append(mass.unflatten(0, (grid.frames, -1)).mean(1).float().cpu())
            for label, probe in self.probes.items():
                if views[label].numbers is not None and probe.decided is not None:
                    kept = allowed_pairs(probe.decided[1].mask, head, tokens, every)
                    _keep(views[label], kept, exact, pool_keys(kept[:, video].float(), grid, detail.keys, mean=True))
        for label, probe in self.probes.items():
            view = views[label]
            if view.kept is not None and view.mass is not None and probe.decided is not None:
                view.kept = view.kept.unflatten(0, (len(detail.heads), -1))
                view.mass = view.mass.unflatten(0, (len(detail.heads), -1))
                view.blocks = block_classes(probe.decided[1].mask, detail.heads)
        return Moment(torch.stack(maps), torch.stack(peaks), torch.stack(between), views)

    def _view(self, probe: _Probe, layer: int) -> View:
        """The numbers of the call that just ran, or why the method has none."""
        if probe.seen is None:
            return View(reason=f"dense by plan: {probe._planned_dense(layer)}")
        record, numbers = probe.seen
        if numbers is None:
            return View(reason=record.reason or "dense by the method's own choice")
        assert self.recording.detail is not None and probe.decided is not None
        some = numbers.cpu()[:, list(self.recording.detail.heads)]
        return View(numbers=some, operator=probe.decided[1].operator.title)


def grid_token(grid: TokenGrid, place: tuple[int, int, int]) -> int:
    """Number of a video token from its frame, row and column, the first being 0."""
    return (place[0] * grid.height + place[1]) * grid.width + place[2]


def _rows(query: Tensor, key: Tensor, tokens: Tensor, head: int, scale: float) -> Tensor:
    """float32 (rows, keys): softmax of some rows of the first batch element."""
    scores = query[0, tokens, head].float() @ key[0, :, head].float().T
    return (scores * scale).softmax(-1)


def pool_keys(rows: Tensor, grid: TokenGrid, keys: tuple[int, int, int], *, mean: bool = False) -> Tensor:
    """(n, video) -> (n, pooled keys): sums over the cells of a coarser grid, or means."""
    cells = rows.reshape(len(rows), grid.frames, grid.height, grid.width)
    pooled = torch.nn.functional.adaptive_avg_pool2d(cells, keys[1:])
    share = 1.0 if mean else grid.height * grid.width / (keys[1] * keys[2])
    return (pooled * share).flatten(1)


def _keep(view: View, kept: Tensor, exact: Tensor, pooled: Tensor) -> None:
    """Append one head's bits and kept mass."""
    bits = pack(pooled >= 0.5)
    mass = (exact * kept).sum(1).to(torch.float16).cpu()
    view.kept = bits if view.kept is None else torch.cat([view.kept, bits])
    view.mass = mass if view.mass is None else torch.cat([view.mass, mass])


def pack(bits: Tensor) -> Tensor:
    """bool (n, m) -> uint8 (n, ceil(m / 8)) on the CPU."""
    import numpy as np

    return torch.from_numpy(np.packbits(bits.cpu().numpy(), axis=-1))


def unpack(packed: Tensor, count: int) -> Tensor:
    """What `pack` packed: bool (n, count)."""
    import numpy as np

    return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=count).astype(bool))


def block_classes(mask: Any, heads: Sequence[int]) -> Tensor:
    """uint8 (heads, n, m): 0 dropped, 1 boundary, 2 whole; of many blocks at most `BLOCKS` along a side."""
    found = []
    for head in heads:
        kept, boundary = (x[0, head if x.shape[1] > 1 else 0] for x in (mask.to_dense(), mask.boundary_dense()))
        classes = 2 * kept.to(torch.uint8) - boundary.to(torch.uint8)
        n, m = (torch.tensor(spread(size, BLOCKS), device=classes.device) for size in classes.shape)
        found.append(classes[n][:, m].cpu())
    return torch.stack(found)


def record(pipe: Any, prompt: str, procs: dict[str, Any], *, seed: int, shape: dict[str, Any],
           budget: int = BUDGET) -> tuple[Recording, Tensor]:
    """Make a clip dense and look into it.

    Args:
        pipe: a text-to-video pipeline; left with sparse attention off.
        prompt, seed, shape: as `text_to_video` takes them.
        procs: SparseProcs by label.
        budget: bytes of the maps.

    Returns:
        The recording of the first denoiser, and the clip (F, 3, H, W) in [0, 1].
    """
    from .. import bridge, disable
    from ..pipelines.text_to_video import text_to_video

    disable(pipe)
    recording = Recording(prompt, tuple(procs))
    recorder = Recorder(procs, recording, budget)
    try:
        _, model, scheduler = bridge.transformers_of(pipe)[0]
        binding = bridge.bind(model, recorder, scheduler=scheduler)
        recorder.bound(sum(layer.index >= 0 for layer in binding.layers))
        clip = text_to_video(pipe, prompt, seed=seed, **shape)
    finally:
        disable(pipe)
    if recording.grid is not None:
        recording.pictures = stamps(clip, recording.grid)
    recording.size = (clip.shape[0], clip.shape[2], clip.shape[3])
    return recording, clip


def stamps(clip: Tensor, grid: TokenGrid, side: int = 160) -> Tensor:
    """One picture for each frame of the grid, uint8 (F, 3, h, w), the longer side at most `side` pixels."""
    frames = clip[torch.linspace(0, len(clip) - 1, grid.frames).round().to(torch.int64)]
    scale = min(1.0, side / max(frames.shape[2:]))
    size = [max(1, round(n * scale)) for n in frames.shape[2:]]
    return (torch.nn.functional.interpolate(frames, size, mode="area") * 255).round().to(torch.uint8)

