"""The later stages of the training: the transformer, by flow matching in the VAE's latents."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import drawing, graphs, sampling, whole, world
from .graphs import Replay
from .optimise import Optimiser

WIDE = 512  # text length that the pipeline pads to unless told otherwise


@dataclass(frozen=True)
class Source:
    """Clips of one shape, and how they are fed: kept as latents in a ring that is renewed a little at every step."""

    frames: int
    size: int
    batch: int
    ring: int
    fresh: int
    shift: float


@dataclass(frozen=True)
class Stage:
    """A part of the training: its sources with the share of the steps each gets, learning rates, average."""

    name: str
    seconds: float
    sources: tuple[tuple[Source, float], ...]
    first_rate: float
    last_rate: float
    average: float
    flat: float = 0.5  # share of the stage at the first rate, before it falls


IMAGE = Source(1, 256, 256, 16384, 32, 2.0)
PREVIEW = Source(17, 256, 64, 8192, 6, 3.0)
LONGER = Source(33, 256, 32, 1024, 3, 3.0)
LONG = Source(33, 512, 8, 512, 1, 4.0)
LARGE = Source(1, 512, 64, 4096, 8, 3.0)

# Single frames first and often: 256 of them cost less than half a step of 64 clips, and they teach all that does not
# move: which colour and shape a word means, which object stands where, and how large things are at 512x512. The last
# stage mixes all sizes while the rate falls to nothing, so that the long size (17,408 tokens) is learned without the
# others being forgotten. Rates are factors of the base rate.
STAGES = (
    Stage("images", 210, ((IMAGE, 0.7), (LARGE, 0.1), (PREVIEW, 0.2)), 1.0, 1.0, 0.998, 1.0),
    Stage("preview", 480, ((PREVIEW, 0.7), (IMAGE, 0.2), (LARGE, 0.05), (LONGER, 0.05)), 1.0, 0.8, 0.998),
    Stage(
        "joint",
        800,
        ((PREVIEW, 0.5), (LONG, 0.15), (IMAGE, 0.17), (LARGE, 0.12), (LONGER, 0.06)),
        0.8,
        0.01,
        0.998,
        0.3,
    ),
)


class Ring:
    """Latents and token ids of drawn clips on the device; :meth:`renew` writes new ones over the oldest."""

    def __init__(self, source: Source, vae, tables: world.TokenTables):
        self.source, self.vae, self.tables = source, vae, tables
        self.device = next(vae.parameters()).device
        self.scale = whole.scale(vae, self.device)
        self.grid = drawing.grid(source.frames, source.size, self.device)
        count = max(1, source.ring // source.fresh) * source.fresh
        first = self._fresh()
        self.latents = first[0].new_empty(count, *first[0].shape[1:])
        self.ids = first[1].new_empty(count, first[1].shape[1])
        self.at, self.filled = 0, 0
        self.make = Replay(self._fresh, self.device)

    @torch.no_grad()
    def _fresh(self) -> tuple[torch.Tensor, torch.Tensor]:
        spec = world.sample(self.source.fresh, device=self.device)
        if self.source.frames == 1:
            spec = world.still(spec)
        cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            mean = whole.moments(self.vae, drawing.paint(spec, *self.grid)[0])[0]
        return ((mean - self.scale[0]) / self.scale[1]).bfloat16(), self.tables(spec)

    def renew(self) -> None:
        """Write `source.fresh` new clips over the oldest."""
        place = slice(self.at, self.at + self.source.fresh)
        self.latents[place], self.ids[place] = self.make()
        self.at = (self.at + self.source.fresh) % len(self.latents)
        self.filled = min(self.filled + self.source.fresh, len(self.latents))

    def fill(self) -> None:
        """Draw until an eighth of the places holds a clip; training fills the rest as it goes."""
        while self.filled < max(len(self.latents) // 8, 1):
            self.renew()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A random batch of latents, fp32, and token ids."""
        rows = torch.randint(self.filled, (self.source.batch,), device=self.device)
        return self.latents[rows].float(), self.ids[rows]


def noise_levels(count: int, shift: float, device) -> torch.Tensor:
    """Sigmas in 0..1: logit-normal, one in ten uniform, shifted as the sampler shifts its own."""
    level = torch.sigmoid(torch.randn(count, device=device))
    level = torch.where(torch.rand_like(level) < 0.1, torch.rand_like(level), level)
    return shift * level / (1 + (shift - 1) * level)


def loss_of(transformer, text_encoder, latents, ids, shift: float, length: int | None = None) -> torch.Tensor:
    """Mean squared error of the velocity noise - latents, one caption in ten being dropped."""
    count, device = len(latents), latents.device
    dropped = torch.rand(count, 1, device=device) < 0.1
    ids = torch.where(dropped, world.empty_ids(count, device), ids)
    sigma = noise_levels(count, shift, device)
    noise = torch.randn_like(latents)
    level = sigma.view(-1, 1, 1, 1, 1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        text = sampling.embed(text_encoder, ids, length)
        mixed = (1 - level) * latents + level * noise
        velocity = transformer(mixed, sigma * 1000, text, return_dict=False)[0].float()
    return F.mse_loss(velocity, noise - latents)


class Step:
    """One update on a batch of one source: the batch is copied to a fixed place and a captured step replayed."""

    def __init__(self, parts: dict, optimiser: Optimiser, ring: Ring, length: int | None, pool):
        self.ring = ring
        self.latents, self.ids = ring.batch()

        def update() -> torch.Tensor:
            optimiser.zero()
            modules = parts["transformer"], parts["text_encoder"]
            loss = loss_of(*modules, self.latents, self.ids, ring.source.shift, length)
            loss.backward()
            optimiser.step()
            return loss.detach()

        self.update = Replay(update, ring.device, pool)

    def __call__(self) -> torch.Tensor:
        """Renew the ring a little, draw a batch from it and train on it; returns the loss."""
        self.ring.renew()
        latents, ids = self.ring.batch()
        self.latents.copy_(latents), self.ids.copy_(ids)
        return self.update().clone()


def rate_at(stage: Stage, share: float) -> float:
    """The learning rate's factor when this share of the stage is done: flat, then a cosine to the last rate."""
    fall = min(1.0, max(0.0, (share - stage.flat) / max(1 - stage.flat, 1e-9)))
    return stage.last_rate + (stage.first_rate - stage.last_rate) * 0.5 * (1 + math.cos(math.pi * fall))


@dataclass
class Session:
    """What one call of the training keeps between stages: modules, optimiser, rings and captured steps."""

    parts: dict
    optimiser: Optimiser
    log: Callable
    rates: tuple[float, float] = (1e-3, 2e-3)
    wide: float = 0.08
    seed: int = 0

    def __post_init__(self):
        self.rings: dict[Source, Ring] = {}
        self.steps: dict[tuple[Source, int | None], Step] = {}
        self.pool = graphs.pool(next(self.parts["vae"].parameters()).device)

    def step(self, source: Source, length: int | None = None) -> Step:
        """The step of a source at a text length, made when first asked for."""
        if (source, length) in self.steps:
            return self.steps[source, length]
        begin = time.time()
        if source not in self.rings:
            self.rings[source] = Ring(source, self.parts["vae"], self.parts["tables"])
            self.rings[source].fill()
        filled = time.time()
        self.steps[source, length] = Step(self.parts, self.optimiser, self.rings[source], length, self.pool)
        shape = f"{source.size}x{source.frames}" + (f" text {length}" if length else "")
        spans = dict(ring_seconds=round(filled - begin, 1), capture_seconds=_since(filled))
        self.log(dict(stage="prepare", source=shape, **spans))
        return self.steps[source, length]


def train(stage: Stage, spent: float, until: float, session: Session, keep: Callable | None = None) -> float:
    """Train one stage until its seconds are spent or the clock reads `until`.

    Args:
        spent: seconds that earlier calls spent on this stage.
        keep: called with the seconds spent, about every two minutes, to save the state.

    Returns:
        The seconds spent on the stage, earlier ones included.
    """
    begin, log, optimiser = time.time(), session.log, session.optimiser
    optimiser.prepare(0.0, 0.0, 1.0)  # the runs before a capture change nothing
    for source, _ in stage.sources:
        session.step(source)
    log(
        dict(
            stage=stage.name,
            filled=[session.rings[s].filled for s, _ in stage.sources],
            seconds=_since(begin),
        )
    )
    choose = random.Random(session.seed + int(spent))
    sources, weights = zip(*stage.sources, strict=True)
    losses: dict[Source, list] = {source: [] for source in sources}
    step, saved, mark, clips, warm = 0, time.time(), time.time(), 0, optimiser.updates > 1000
    while (total := spent + time.time() - begin) < stage.seconds and time.time() < until:
        source = choose.choices(sources, weights)[0]
        length = WIDE if source.size < 512 and choose.random() < session.wide else None
        factor = min(1.0, (step + 1) / (60 if warm else 200)) * rate_at(stage, total / stage.seconds)
        if (source, length) not in session.steps:
            optimiser.prepare(0.0, 0.0, 1.0)
        update = session.step(source, length)
        optimiser.prepare(session.rates[0] * factor, session.rates[1] * factor, stage.average)
        losses[source].append(update())
        step, clips = step + 1, clips + source.batch
        if step % 10 == 0:
            losses[source][-1].item()  # keeps the host from running far ahead of the clock
        if step in (1, 50) or step % 200 == 0:
            means = {f"{s.size}x{s.frames}": round(torch.stack(v).mean().item(), 4) for s, v in losses.items() if v}
            speed = round(clips / max(time.time() - mark, 1e-6), 1)
            log(dict(stage=stage.name, step=step, seconds=round(total, 1), loss=means, clips_per_s=speed))
            losses, mark, clips = {s: [] for s in sources}, time.time(), 0
        if keep and time.time() - saved > 120:
            keep(total)
            saved = time.time()
    log(dict(stage=stage.name, step=step, seconds=round(spent + time.time() - begin, 1), done=True))
    return spent + time.time() - begin


def _since(begin: float) -> float:
    return round(time.time() - begin, 1)
