"""The first stage of the training: the text encoder learns who is who in a caption, before anything is painted.

Trained by the pictures alone, a small encoder stays a bag of words: every colour and shape appears, on whichever
object. So it is taught as large models' encoders are, on text: from the features of each object's two words, linear
readouts must tell that object's colour, shape, size, motion and place, and from every word the ground and the camera.
The readouts are thrown away; the encoder is frozen from then on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import graphs, sampling, world

# What is read, and how many answers there are; the last answer of the optional ones is "the caption does not say".
OBJECT = {
    "colour": len(world.COLOURS),
    "shape": len(world.SHAPES),
    "size": len(world.SIZES) + 1,
    "motion": len(world.MOTIONS) + 1,
    "place": len(world.RELATIONS) + 1,
}
SCENE = {"back": len(world.BACKGROUNDS) + 1, "cam": len(world.CAMERAS)}


def answers(spec: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the captions of the specs tell: OBJECT's answers as (B, 2), one column an object, SCENE's as (B, 1)."""
    two, alone = spec["two"] == 1, torch.full_like(spec["rel"], len(world.RELATIONS))

    def said(name: str, unsaid: int, told: torch.Tensor) -> torch.Tensor:
        return torch.where(told, spec[name], torch.full_like(spec[name], unsaid))

    size = said("size", OBJECT["size"] - 1, ~two & (spec["say_size"] == 1))
    motion = said("motion", OBJECT["motion"] - 1, ~two & (spec["say_motion"] == 1))
    # Of "A on the left of B", A is at the left and B at the right: relations come in opposite neighbours.
    places = torch.where(two, spec["rel"], alone), torch.where(two, spec["rel"] ^ 1, alone)
    return {
        "colour": torch.stack([spec["colour"], spec["colour2"]], 1),
        "shape": torch.stack([spec["shape"], spec["shape2"]], 1),
        "size": torch.stack([size, size], 1),
        "motion": torch.stack([motion, motion], 1),
        "place": torch.stack(places, 1),
        "back": said("back", SCENE["back"] - 1, spec["say_back"] == 1)[:, None],
        "cam": spec["cam"][:, None],
    }


class Readouts(torch.nn.Module):
    """Linear readouts of token features, and the losses and hits of their answers."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        super().__init__()
        heads = {name: torch.nn.Linear(width, count) for name, count in (OBJECT | SCENE).items()}
        self.heads = torch.nn.ModuleDict(heads).to(device)
        words = {word: i for i, word in enumerate(world.vocabulary())}
        self.register_buffer("colours", torch.tensor([words[name] for name in world.COLOURS], device=device))
        self.register_buffer("shapes", torch.tensor([words[name] for name in world.SHAPES], device=device))

    def judge(self, features, ids, spec) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Mean loss and share of right answers by name. `features` (B, L, width) of the token ids (B, L)."""
        ids = ids[:, : features.shape[1]]
        shape = torch.isin(ids, self.shapes)
        # Each object's colour and shape word: the shape ends it, so shapes before a word count the objects before it.
        owner = (shape.long().cumsum(1) - shape.long()).clamp(max=1)
        own = (shape | torch.isin(ids, self.colours)).float()
        every = (ids != 0).float()
        out = {}
        for name, wanted in answers(spec).items():
            weight = own if name in OBJECT else every
            target = wanted.gather(1, owner) if name in OBJECT else wanted.expand_as(ids)
            guess = self.heads[name](features.float())
            loss = F.cross_entropy(guess.transpose(1, 2), target, reduction="none")
            right = (guess.argmax(-1) == target).float()
            out[name] = ((loss * weight).sum() / weight.sum(), (right * weight).sum() / weight.sum())
        return out


def train(text_encoder, seconds: float, log: Callable, batch: int = 512, rate: float = 2e-3, steps: int = 4000) -> None:
    """Train the encoder in place until the steps or the seconds are over; logs the share of right answers.

    The rate warms up over 100 steps and falls to nothing as a cosine over whichever of the two ends first.
    """
    device = next(text_encoder.parameters()).device
    tables, readouts = world.TokenTables(device), Readouts(text_encoder.config.d_model, device)
    speed, cuda = torch.tensor(0.0, device=device), device.type == "cuda"
    parameters = [*text_encoder.parameters(), *readouts.parameters()]
    optimiser = torch.optim.AdamW(parameters, speed, (0.9, 0.98), weight_decay=0.01, fused=cuda, capturable=cuda)

    def update() -> torch.Tensor:
        for parameter in parameters:
            parameter.grad = None
        spec = world.sample(batch, device=device)
        ids = tables(spec)
        found = readouts.judge(sampling.embed(text_encoder, ids), ids, spec)
        torch.stack([loss for loss, _ in found.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        return torch.stack([right for _, right in found.values()])

    begin, names = time.time(), list(OBJECT | SCENE)
    replay = graphs.Replay(update, device)
    for step in range(1, steps + 1):
        done = max(step / steps, (time.time() - begin) / seconds)
        if done >= 1 and step > 1:
            break
        speed.fill_(rate * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        right = replay()
        if step % 20 == 0:
            right.sum().item()  # keeps the host from running far ahead of the clock
        if step in (1, 100) or step % 500 == 0:
            values = dict(zip(names, [round(v, 3) for v in right.tolist()], strict=True))
            log(dict(stage="words", step=step, seconds=round(time.time() - begin, 1), right=values))
    log(dict(stage="words", done=True, step=step, held_out=score(text_encoder, readouts, tables)))


@torch.no_grad()
def score(text_encoder, readouts: Readouts, tables: world.TokenTables, count: int = 2000) -> dict[str, float]:
    """Share of right answers on captions of held-out triples, by name."""
    device = next(text_encoder.parameters()).device
    spec = world.sample(count, "held", device, generator=torch.Generator(device).manual_seed(31))
    ids = tables(spec)
    found = readouts.judge(sampling.embed(text_encoder, ids), ids, spec)
    return {name: round(right.item(), 4) for name, (_, right) in found.items()}
