"""Stage one of the training: the video VAE, by time budget, and the gate it has to pass."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import checks, drawing, whole, world
from .graphs import Replay


@dataclass(frozen=True)
class Part:
    """Windows of clips, from this share of the stage's time on: `window` pixels square out of frames of `size`."""

    start: float
    frames: int
    size: int
    window: int
    batch: int


# Windows first: a step costs what its pixels cost, and many small steps teach this network more than few large ones.
# Whole frames at the end, for the attention in the middle of the network, which sees a whole frame.
PARTS = (Part(0.0, 17, 256, 128, 8), Part(0.72, 17, 256, 256, 4))
GATES = ((256, 17, 96), (256, 33, 32), (512, 33, 16), (128, 17, 64))  # size, frames, clips


def loss_of(vae, clips: torch.Tensor, where: torch.Tensor, kl_weight: float = 3e-5, anchor=None):
    """Reconstruction loss of clips, weighted in and around objects, with edges and motion.

    `anchor` is a frozen VAE whose latents these are to stay close to. Returns (loss, mean squared error).
    """
    mean, log_variance = whole.moments(vae, clips)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    error = whole.reconstruct(vae, latents) - clips
    # Both sides of an outline weigh alike, or the objects would swell.
    near = F.max_pool3d(where, (1, 9, 9), 1, (0, 4, 4))
    weight = 1 + 5 * near
    loss = (error.abs() * weight).mean() + 2 * (error.square() * weight).mean()
    # Errors of the differences between neighbours: what keeps outlines sharp and colours from trailing in time.
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    if clips.shape[2] > 1:
        edges = edges + 0.5 * error.diff(dim=2).abs().mean()
    loss = loss + 0.5 * edges + kl_weight * kl
    if anchor is not None:
        with torch.no_grad():
            before = whole.moments(anchor, clips)[0]
        std = before.std((0, 2, 3, 4), keepdim=True)
        loss = loss + 0.05 * ((mean - before) / std).square().mean()
    return loss, error.detach().square().mean()


def draw_window(part: Part, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of random specs and where their objects are, seen through one random window."""
    times, centres, _ = drawing.grid(part.frames, part.size, device)
    room = part.size - part.window + 1
    places = (torch.rand(2, device=device) * room).floor() / part.size
    line = centres[: part.window]
    return drawing.paint(world.sample(part.batch, device=device), times, places[0] + line, places[1] + line)


def _stepper(vae, optimiser, part: Part, anchor=None) -> Replay:
    """One update of the VAE on fresh windows, replayed as a graph on a GPU."""
    device = next(vae.parameters()).device
    cuda = device.type == "cuda"

    def update():
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            clips, where = draw_window(part, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda, cache_enabled=False):
            loss, mse = loss_of(vae, clips, where, anchor=anchor)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        return loss.detach(), mse

    return Replay(update, device)


def train(vae, seconds: float, log: Callable, *, parts=PARTS, peak: float = 2e-3, anchor: bool = False) -> None:
    """Train the VAE for so many seconds and store the latents' mean and deviation in its configuration.

    Args:
        vae: ``AutoencoderKLWan`` on the device.
        log: called with a record (dict) now and then.
        anchor: hold the latents near where they are, for a transformer that knows them.
    """
    device = next(vae.parameters()).device
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)
    held = copy.deepcopy(vae).requires_grad_(False) if anchor else None
    cuda = device.type == "cuda"
    rate = torch.tensor(1e-5, device=device) if cuda else 1e-5
    optimiser = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=cuda, capturable=cuda
    )
    begin, step, part, stepper = time.time(), 0, None, None
    while (spent := (time.time() - begin) / max(seconds, 1e-6)) < 1:
        if part is not (now := [p for p in parts if p.start <= spent or p is parts[0]][-1]):
            stepper = None  # frees the graph of the part before
            part, stepper = now, _stepper(vae, optimiser, now, held)
        value = peak * min(1, (step + 1) / 100) * (0.01 + 0.99 * math.cos(math.pi / 2 * spent) ** 1.5)
        for group in optimiser.param_groups:
            if cuda:
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        loss, mse = stepper()
        if step % 20 == 0:  # keeps the host from running far ahead of the clock
            loss, mse = loss.item(), mse.item()
            if step % 400 == 0:
                psnr = round(10 * math.log10(4 / max(mse, 1e-9)), 2)
                record = dict(stage="vae", step=step, seconds=round(time.time() - begin, 1), loss=loss, psnr=psnr)
                log({**record, "frames": part.frames, "window": part.window})
        step += 1
    optimiser.zero_grad(set_to_none=True)
    normalise(vae, parts[-1])
    log(dict(stage="vae", step=step, seconds=round(time.time() - begin, 1), done=True))


@torch.no_grad()
def normalise(vae, part: Part, rounds: int = 32) -> None:
    """Measure the latents of fresh clips and write latents_mean and latents_std into the configuration."""
    device = next(vae.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        pieces = [whole.moments(vae, draw_window(part, device)[0])[0] for _ in range(rounds)]
    latents = torch.cat(pieces).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def gate(vae, log: Callable, gates=GATES, batch: int = 8) -> dict[str, dict[str, float]]:
    """Check held-out drawn clips, and the same through the VAE in float32; the stage passes at 0.95 everywhere.

    Returns:
        By "SIZExFRAMES": the checks of the reconstruction (with "psnr"), and under "drawn" those of the clips.
    """
    device = next(vae.parameters()).device
    out = {}
    for size, frames, count in gates:
        spec = world.sample(count, "held", device, generator=torch.Generator(device).manual_seed(7), small=size >= 256)
        drawn, rebuilt, psnr = [], [], []
        for start in range(0, len(spec["two"]), batch):
            piece = {name: values[start : start + batch] for name, values in spec.items()}
            clips = drawing.draw(piece, frames, size)
            again = whole.decode(vae, whole.encode(vae, clips))
            drawn += checks.check_all(clips, piece)
            rebuilt += checks.check_all(again, piece)
            psnr.append(10 * torch.log10(4 / F.mse_loss(again, clips, reduction="none").mean((1, 2, 3, 4))))
        result = {**checks.summarise(rebuilt), "psnr": round(torch.cat(psnr).mean().item(), 2)}
        out[f"{size}x{frames}"] = {**result, "drawn": checks.summarise(drawn)}
        log(
            dict(
                stage="gate",
                size=size,
                frames=frames,
                clips=len(rebuilt),
                **result,
                drawn=checks.summarise(drawn),
            )
        )
    return out


def passes(gates: dict[str, dict[str, float]], least: float = 0.95) -> bool:
    """Whether every check of the preview size and above is at least 0.95 on reconstructed clips."""
    big = [values for name, values in gates.items() if int(name.split("x")[0]) >= 256]
    return all(values[name] >= least for values in big for name in checks.NAMES if name in values)
