"""Does sparse attention have something to lose in this model? Measured at the long size.

    python -m dit_sparse.pipelines.embedded.discriminate --folder pipelines/embedded/weights --out results

The same clips (same captions, same noise) are sampled with dense attention and with block masks of one density: the
key blocks with the largest exact attention mass, a random choice, and blocks near in the sequence; the query's own
block is always kept. PSNR is between final videos, against the dense one. It is measured twice: with every step and
layer sparse, and with the schedule that methods are compared on (a first share of the steps dense, and layer 0).
Beside it, for every layer and head, the share of the attention mass inside the own frame, at the own place over time,
and in the nearest fifth of the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from . import drawing, evaluate, sampling, train, whole, world


@contextmanager
def attention(replacement):
    """Let ``replacement(q, k, v, call)`` compute the self-attention of every Wan transformer.

    q, k and v are (B, S, H, D); `call` counts self-attention calls from 0. Cross-attention is left alone.
    """
    from diffusers.models.transformers import transformer_wan

    real, calls = transformer_wan.dispatch_attention_fn, [0]

    def dispatch(query, key, value, *args, **keywords):
        if query.shape[1] != key.shape[1]:
            return real(query, key, value, *args, **keywords)
        calls[0] += 1
        return replacement(query, key, value, calls[0] - 1)

    transformer_wan.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        transformer_wan.dispatch_attention_fn = real


def block_mass(q: torch.Tensor, k: torch.Tensor, block: int, rows: int = 2048) -> torch.Tensor:
    """Exact attention mass of every key block, for every query block: (B, H, n, n), rows summing to 1.

    q and k are (B, H, S, D) with S a multiple of `block`. Scores exist for `rows` queries at a time only.
    """
    b, h, s, d = q.shape
    count = s // block
    out = q.new_empty(b, h, count, count, dtype=torch.float32)
    for start in range(0, s, rows):
        scores = (q[:, :, start : start + rows] @ k.mT).float() * d**-0.5
        mass = scores.softmax(-1).view(b, h, -1, count, block).sum(-1)
        out[:, :, start // block : (start + rows) // block] = mass.view(b, h, -1, block, count).mean(3)
    return out


def choose(kind: str, q: torch.Tensor, k: torch.Tensor, block: int, density: float, generator) -> torch.Tensor:
    """Indices of the kept key blocks, (B, H, n, kept): "exact", "random" or "near" (in the sequence)."""
    b, h, s, _ = q.shape
    count = s // block
    kept = max(1, round(density * count))
    own = torch.arange(count, device=q.device)
    if kind == "exact":
        score = block_mass(q, k, block)
    elif kind == "random":
        score = torch.rand(b, h, count, count, device=q.device, generator=generator)
    elif kind == "near":
        score = -(own[:, None] - own).abs().float().expand(b, h, count, count).contiguous()
    else:
        raise ValueError(f"unknown choice of blocks: {kind!r}")
    score[..., own, own] = math.inf
    return score.topk(kept, dim=-1).indices


def gathered(q, k, v, index: torch.Tensor, block: int) -> torch.Tensor:
    """Attention of (B, H, S, D) tensors over the key blocks of `index`, by gathering them; (B, H, S, D)."""
    b, h, s, d = q.shape
    count, kept = s // block, index.shape[-1]
    place = index.view(b, h, count * kept, 1, 1).expand(-1, -1, -1, block, d)
    keys = k.view(b, h, count, block, d).gather(2, place).view(b, h * count, kept * block, d)
    values = v.view(b, h, count, block, d).gather(2, place).view(b, h * count, kept * block, d)
    out = F.scaled_dot_product_attention(q.view(b, h * count, block, d), keys, values)
    return out.view(b, h, s, d)


def sparse(kind: str, block: int, density: float, seed: int = 0):
    """A replacement for :func:`attention` that keeps the chosen blocks in every layer and step."""
    generators: dict = {}

    def run(query, key, value, layer):
        generator = generators.setdefault(query.device, torch.Generator(query.device).manual_seed(seed))
        outs = []
        # One clip at a time: gathered keys of a batch would not fit.
        for q, k, v in zip(query.split(1), key.split(1), value.split(1), strict=True):
            q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
            length = q.shape[2]
            if length % block:
                raise ValueError(f"{length} tokens do not fill blocks of {block}")
            outs.append(gathered(q, k, v, choose(kind, q, k, block, density, generator), block).transpose(1, 2))
        return torch.cat(outs).type_as(query)

    return run


def scheduled(replacement, layers: int, steps: int, dense_share: float):
    """The same replacement, but dense in layer 0 and in the first `dense_share` of the steps; 0 changes nothing."""
    dense_steps = math.ceil(dense_share * steps)

    def run(query, key, value, call):
        layer, step = call % layers, call // layers % steps
        if dense_share and (layer == 0 or step < dense_steps):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return replacement(query, key, value, layer)

    return run


def shares(seen: list, frames: int, height: int, width: int, rows: int = 256):
    """A replacement for :func:`attention` that is dense and records where each head's mass lies.

    Appends to `seen`, one tensor (4, heads) a call: own frame, own place in other frames, the nearest fifth of the
    tokens (by distance in the grid), and the share of the keys that carries nine tenths of the mass. Every 16th
    query is looked at.
    """

    def run(query, key, value, layer):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        s = q.shape[2]
        place = torch.arange(s, device=q.device)
        t, y, x = place // (height * width), place // width % height, place % width
        total, looked = torch.zeros(4, q.shape[1], device=q.device), 0
        picked = place[::16]
        for part in picked.split(rows):
            p = ((q[:, :, part] @ k.mT).float() * q.shape[-1] ** -0.5).softmax(-1)
            same = t[part, None] == t
            still = (y[part, None] == y) & (x[part, None] == x) & ~same
            away = (t[part, None] - t).square() + (y[part, None] - y).square() + (x[part, None] - x).square()
            near = away <= away.float().quantile(0.2, dim=-1, keepdim=True)
            total[0] += (p * same).sum((0, 2, 3))
            total[1] += (p * still).sum((0, 2, 3))
            total[2] += (p * near).sum((0, 2, 3))
            running = p.sort(-1, descending=True).values.cumsum(-1)
            total[3] += (running < 0.9).float().mean(-1).sum((0, 2))
            looked += p.shape[0] * p.shape[2]
        seen.append((total / looked).cpu())
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return run


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal to noise ratio in dB of clips (B, ...) in [-1, 1], one a clip."""
    return 10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-10))


def compare(run: evaluate.Evaluation, spec, a: argparse.Namespace) -> None:
    """Record mean PSNR to the dense clip of every choice of blocks, and what the random choice loses to the exact."""
    device, count, frames, size = run.device, len(spec["two"]), a.frames, a.size
    options = dict(frames=frames, size=size, steps=a.steps, guidance=a.guidance)
    layers = len(run.transformer.blocks)
    dense = run.clips(spec, 1, **options)
    for dense_share, block in [(share, block) for share in a.dense_share for block in a.blocks]:
        found, kinds = {}, ("exact", "random", "near")
        for kind in kinds:
            with attention(scheduled(sparse(kind, block, a.density), layers, a.steps, dense_share)):
                clips = run.clips(spec, 1, **options)
            found[kind] = psnr(clips, dense)
            name = f"sparse_{kind}_{block}_{round(100 * dense_share)}"
            print(name, found[kind].tolist(), flush=True)
            evaluate.sheet(clips[:8], world.captions(spec)[:8], run.out / f"{name}.jpg", edge=128)
        loss = found["exact"] - found["random"]
        run.add(
            f"blocks_of_{block}_dense_{round(100 * dense_share)}",
            density=a.density,
            steps=a.steps,
            guidance=a.guidance,
            dense_share=dense_share,
            clips=count,
            tokens=(frames // 2 + 1) * (size // 16) ** 2,
            psnr={kind: round(values.mean().item(), 2) for kind, values in found.items()},
            random_loses={"mean": round(loss.mean().item(), 2), "least": round(loss.min().item(), 2)},
            device=str(device),
        )


@torch.no_grad()
def look(run: evaluate.Evaluation, spec, frames: int, size: int, sigma: float = 0.7) -> None:
    """Record where every head of every layer looks, at one noise level of drawn clips."""
    seen: list = []
    with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
        clean = whole.encode(run.vae, drawing.draw(spec, frames, size))
        torch.manual_seed(4)
        mixed = (1 - sigma) * clean + sigma * torch.randn_like(clean)
        text = sampling.embed(run.text_encoder, run.tables(spec))
        edge = size // 16
        with attention(shares(seen, frames // 2 + 1, edge, edge)):
            run.transformer(mixed, torch.full((len(mixed),), sigma * 1000, device=run.device), text, return_dict=False)
    names = ("own_frame", "own_place_over_time", "nearest_fifth", "keys_for_nine_tenths")
    tables = {name: [[round(v, 3) for v in m[i].tolist()] for m in seen] for i, name in enumerate(names)}
    uniform = {
        "own_frame": 1 / (frames // 2 + 1),
        "own_place_over_time": (frames // 2) / ((frames // 2 + 1) * edge**2),
    }
    run.add("attention_shares", sigma=sigma, frames=frames, size=size, uniform=uniform, **tables)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", default="", help="folder of a training state")
    parser.add_argument("--folder", default="", help="a Diffusers folder instead")
    parser.add_argument("--out", default="results")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dense-share", type=float, nargs="+", default=[0.0, 0.2], help="of the first steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    if not 0 < a.density <= 1 or not all(0 <= share < 1 for share in a.dense_share) or a.clips < 1:
        parser.error("use --density in (0, 1], --dense-share in [0, 1) and --clips of at least 1")
    parts = evaluate.load_folder(a.folder, a.device) if a.folder else train.load_parts(a.state, a.device)
    run = evaluate.Evaluation(parts, a.out, time.time() + 600)
    spec = evaluate.held_out_specs(a.clips, run.device, seed=21)
    look(run, {name: values[:2] for name, values in spec.items()}, a.frames, a.size)
    compare(run, spec, a)
    (Path(a.out) / "discriminate.json").write_text(json.dumps(run.results, indent=1))


if __name__ == "__main__":
    main()
