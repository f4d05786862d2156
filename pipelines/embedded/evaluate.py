"""Score samples of held-out captions by looking at pixels, beside shuffled captions and drawn clips.

    python -m dit_sparse.pipelines.embedded.evaluate --state .train --out results
    python -m dit_sparse.pipelines.embedded.evaluate --folder pipelines/embedded/weights --captions 16

Writes results.json (scores, and by kind what passed) and contact sheets. Every table is of dense attention.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from . import checks, drawing, sampling, train, whole, world

KINDS = {"shape": world.SHAPES, "motion": world.MOTIONS, "back": world.BACKGROUNDS, "rel": world.RELATIONS}


def load_folder(path: Path | str, device: torch.device | str = "cpu"):
    """VAE, text encoder and transformer of a Diffusers folder, in fp32 and eval mode."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    path = Path(path)
    parts = (
        AutoencoderKLWan.from_pretrained(path / "vae"),
        UMT5EncoderModel.from_pretrained(path / "text_encoder"),
        WanTransformer3DModel.from_pretrained(path / "transformer"),
    )
    return [part.to(device).eval() for part in parts]


def held_out_specs(count: int, device, seed: int = 11) -> dict[str, torch.Tensor]:
    """The specs of the evaluation: complete captions of held-out triples, half of them with two objects."""
    generator = torch.Generator(device).manual_seed(seed)
    return world.sample(count, "held", device, generator=generator)


def by_kind(rows: list[dict], spec: dict[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """Passed of asked for, by what was asked for: shape and motion and relation, and all checks by background."""
    out = {}
    judged = {"shape": "shape", "motion": "motion", "rel": "relation"}
    for field, names in KINDS.items():
        counts = {name: [0, 0] for name in names}
        for index, row in enumerate(rows):
            value = row[judged[field]] if field in judged else float(all(v for v in row.values() if v is not None))
            if value is not None:
                counts[names[int(spec[field][index])]][0] += int(value)
                counts[names[int(spec[field][index])]][1] += 1
        out[field] = {name: f"{good}/{asked}" for name, (good, asked) in counts.items()}
    return out


def sheet(clips: torch.Tensor, captions: Iterable[str], path: Path | str, frames: int = 5, edge: int = 96) -> None:
    """Save a contact sheet: two columns of clips, `frames` frames of each, under their captions."""
    from PIL import Image, ImageDraw

    captions, rows = list(captions), (len(clips) + 1) // 2
    picture = Image.new("RGB", (2 * frames * edge, rows * (edge + 14)))
    pen = ImageDraw.Draw(picture)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left, top = i // rows * frames * edge, i % rows * (edge + 14)
        chosen = torch.linspace(0, clip.shape[1] - 1, frames).round().long().tolist()
        for k, frame in enumerate(chosen):
            pixels = ((clip[:, frame].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()
            picture.paste(Image.fromarray(pixels).resize((edge, edge)), (left + k * edge, top + 14))
        pen.text((left + 2, top + 1), caption, fill=(255, 255, 255))
    picture.save(path, quality=88)


class Evaluation:
    """The parts, the results so far, and where they are written as they arrive."""

    def __init__(self, parts, out: Path | str, until: float):
        self.vae, self.text_encoder, self.transformer = parts
        self.device = next(self.vae.parameters()).device
        self.tables = world.TokenTables(self.device)
        self.out, self.until = Path(out), until
        self.out.mkdir(parents=True, exist_ok=True)
        self.results: dict = {}

    def has_time(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return time.time() + seconds < self.until

    def add(self, name: str, **values) -> None:
        """Record a result, print it and write results.json anew."""
        self.results[name] = values
        print(name, json.dumps(values), flush=True)
        (self.out / "results.json").write_text(json.dumps(self.results, indent=1))

    def clips(self, spec: dict, batch: int, **options) -> torch.Tensor:
        """Sampled clips of the specs' captions, in bf16 autocast on a GPU."""
        torch.manual_seed(5)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            ids = self.tables(spec)
            return sampling.generate(self.vae, self.transformer, self.text_encoder, ids, batch, **options)

    def score(self, name: str, spec: dict, batch: int, pictures: str = "", extras: bool = False, **options) -> None:
        """Sample, check and record one setting; with `extras` also by kind and against shuffled captions."""
        begin = time.time()
        clips = self.clips(spec, batch, **options)
        rows = checks.check_all(clips, spec)
        more = {}
        if extras:
            order = torch.randperm(len(clips), generator=torch.Generator().manual_seed(3)).to(self.device)
            more["shuffled"] = checks.score(clips, {key: values[order] for key, values in spec.items()})
            more["by_kind"] = by_kind(rows, spec)
        self.add(name, **checks.summarise(rows), clips=len(clips), seconds=round(time.time() - begin, 1), **more)
        if pictures:
            sheet(
                clips[:32],
                world.captions({key: values[:32] for key, values in spec.items()}),
                self.out / pictures,
            )

    @torch.no_grad()
    def ceiling(self, name: str, spec: dict, frames: int, size: int) -> None:
        """Record the checks of drawn clips, and of the same through the VAE."""
        drawn, rebuilt = [], []
        for start in range(0, len(spec["two"]), 8):
            piece = {key: values[start : start + 8] for key, values in spec.items()}
            clips = drawing.draw(piece, frames, size)
            drawn += checks.check_all(clips, piece)
            rebuilt += checks.check_all(whole.decode(self.vae, whole.encode(self.vae, clips)), piece)
        self.add(name, drawn=checks.summarise(drawn), through_vae=checks.summarise(rebuilt), clips=len(drawn))


def glance(run: Evaluation, count: int, scale: float = 1.0) -> None:
    """Scores of some preview clips and single frames: how far a training is."""
    size, frames = int(256 * scale), 17 if scale == 1 else 13
    spec = held_out_specs(count, run.device)
    run.score("preview", spec, 32, "preview.jpg", extras=True, frames=frames, size=size)
    run.score("image", spec, 64, extras=True, frames=1, size=size)


def evaluate(run: Evaluation, count: int, long_count: int, scale: float = 1.0) -> None:
    """The whole evaluation, the most wanted numbers first; what the time does not allow is left out."""
    size, frames, long_frames = int(256 * scale), 17 if scale == 1 else 13, 33 if scale == 1 else 13
    spec = held_out_specs(count, run.device)
    some = {key: values[: max(1, count * 2 // 5)] for key, values in spec.items()}
    few = {key: values[:long_count] for key, values in spec.items()}
    preview = dict(frames=frames, size=size)
    run.score("preview", spec, 32, "preview.jpg", extras=True, **preview)
    run.score("long", few, 8, "long.jpg", extras=True, frames=long_frames, size=2 * size)
    run.ceiling("preview_drawn", spec, frames, size)
    run.ceiling("long_drawn", few, long_frames, 2 * size)
    settings = {
        "preview_guidance_4": dict(guidance=4.0),
        "preview_8_steps": dict(steps=8),
        "preview_guidance_1": dict(guidance=1.0),
        "preview_text_512": dict(length=512),
        "preview_33_frames": dict(frames=long_frames),
        "image": dict(frames=1),
        "image_large": dict(frames=1, size=2 * size),
        "size_128": dict(size=size // 2),
    }
    for name, changes in settings.items():
        if run.has_time(12):
            run.score(name, some, 16, **{**preview, **changes})
    trained = world.sample(len(some["two"]), device=run.device, generator=torch.Generator(run.device).manual_seed(12))
    trained.update({name: torch.ones_like(trained[name]) for name in ("say_size", "say_motion", "say_back")})
    if run.has_time(12):
        run.score("preview_trained_triples", trained, 16, **preview)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", default="", help="folder of a training state")
    parser.add_argument("--folder", default="", help="a Diffusers folder instead")
    parser.add_argument("--out", default="results")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--long-captions", type=int, default=64)
    parser.add_argument("--glance", action="store_true", help="preview clips and single frames only")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: tiny clips, to rehearse on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    until = time.time() + a.seconds
    parts = load_folder(a.folder, a.device) if a.folder else train.load_parts(a.state, a.device)
    run = Evaluation(parts, a.out, until)
    if a.glance:
        glance(run, a.captions, a.scale)
    else:
        evaluate(run, a.captions, a.long_captions, a.scale)


if __name__ == "__main__":
    main()
