"""`dit-sparse eval run`: every prompt with every seed, dense and with every method, measured into one folder.

    results.jsonl      one line for each finished clip; killed at any moment, the next run goes on behind the last line
    attention.jsonl    one line for each prompt and method whose attention was looked into
    videos/            LABEL/001-SEED.mp4
    run.json           the configuration, the jobs it stands for, and the command
    environment.json   versions, device, date
    report.html        one self-contained page
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .attention import ATTENTION, AttentionWork, attention_jobs, density_map
from .compare import timed, warm_up
from .config import DENSE, EvalConfig
from .measures.reference import latent_error
from .measures.table import measure
from .run import Job, Result, finished, job_key, run

RESULTS, RUN, ENVIRONMENT, REPORT, VIDEOS = "results.jsonl", "run.json", "environment.json", "report.html", "videos"
SHAPE = ("frames", "height", "width", "steps", "guidance_scale")
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


def jobs_of(config: EvalConfig, shape: Mapping[str, Any], weights: str = "") -> list[Job]:
    """One job for each clip, those of one prompt and seed next to each other, the dense one first.

    A job holds all that its result depends on: results of another configuration, of other weights or of another list
    of measures are never taken for this one.

    Args:
        config: what to make.
        shape: frames, height, width, steps, guidance_scale; None leaves the host's default.
        weights: digest of the model's files.
    """
    from dit_sparse import SparseProc

    options = {DENSE: "", **{entry.label: repr(SparseProc(entry.name, **entry.options)) for entry in config.methods}}
    fixed = {"pipeline": config.pipeline, "weights": weights, "fps": config.fps, **{n: shape.get(n) for n in SHAPE}}
    # Only where there are some, so that runs without them go on as they began.
    networks = {name: digest(path) for name, path in vars(config.networks).items() if path is not None}
    if networks:
        fixed["networks"] = networks
    measures = None if config.measures is None else list(config.measures)
    return [
        {"prompt": prompt, "seed": seed, "label": label, "options": text, "measures": measures, **fixed}
        for prompt in config.prompts
        for seed in config.seeds
        for label, text in options.items()
    ]


class EvaluationWork:
    """Makes and measures the clip of a job; the dense clip and its latents are kept for the methods that follow.

    Args:
        pipe: a text-to-video pipeline without sparse attention.
        config: what is made.
        folder: where the videos go.
        bar: bar(label) is entered around each clip and yields its step callback.
    """

    def __init__(self, pipe: Any, config: EvalConfig, folder: Path, bar: Bar | None = None) -> None:
        self.pipe, self.config, self.folder = pipe, config, folder
        self.bar: Bar = bar or (lambda label: nullcontext())
        self._options = {entry.label: (entry.name, entry.options) for entry in config.methods}
        self._key = ""
        self._dense: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._warm: set[str] = set()

    def __call__(self, job: Job) -> Result:
        label = job["label"]
        key = job_key({name: value for name, value in job.items() if name not in ("label", "options")})
        if label != DENSE and (key != self._key or self._dense is None):
            # After a kill only the dense clip's file is left, and H.264 is not what the model made.
            self._make(job, DENSE, key)
        clip, result = self._make(job, label, key)
        reference = self._dense[0] if self._dense is not None and label != DENSE else None
        values, reasons = measure(
            clip, reference=reference, prompt=job["prompt"], fps=job["fps"], names=self.config.measures,
            networks=self.config.networks,
        )
        path = self._write(job, clip)
        shape = {"frames": len(clip), "height": clip.shape[2], "width": clip.shape[3]}
        return {**result, "values": values, "reasons": reasons, "video": path, **shape}

    def _make(self, job: Job, label: str, key: str) -> tuple[torch.Tensor, Result]:
        """The clip, and what its making cost."""
        from dit_sparse import SparseProc, disable, enable, summary

        shape = {name: job[name] for name in SHAPE if job.get(name) is not None}
        method = self._options.get(label)
        proc = SparseProc(method[0], **method[1]) if method else None
        disable(self.pipe)
        if label not in self._warm:
            warm_up(self.pipe, job["prompt"], proc, shape)
            self._warm.add(label)
        watch = _Latents(self._dense[1] if proc is not None and self._dense is not None else None)
        if proc is not None:
            enable(self.pipe, proc)
        try:
            with self.bar(f"{label}: {job['prompt'][:40]}") as update, _peak_memory(self.pipe) as peak:
                clip, seconds = timed(self.pipe, job["prompt"], job["seed"], shape | watch.hook(self.pipe, update),
                                      nullcontext())
            report = summary(self.pipe).to_dict() | density_map(self.pipe) if proc is not None else None
        finally:
            disable(self.pipe)
        if label == DENSE:
            self._key, self._dense = key, (clip, watch.kept)
        result: Result = {"seconds": seconds, "steps": watch.steps or None, "latent_errors": watch.errors, **peak}
        return clip, result | _cost(self.pipe, report)

    def _write(self, job: Job, clip: torch.Tensor) -> str:
        from dit_sparse.pipelines.video_io import write_video

        number = self.config.prompts.index(job["prompt"]) + 1
        path = Path(VIDEOS) / job["label"] / f"{number:03d}-{job['seed']}.mp4"
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        height, width = (side // 2 * 2 for side in clip.shape[2:])
        write_video(self.folder / path, clip[..., :height, :width], job["fps"])
        return path.as_posix()


class _Latents:
    """Keeps the latents of every step, or compares them with those of the dense run as they come."""

    def __init__(self, reference: list[torch.Tensor] | None) -> None:
        self.reference = reference
        self.kept: list[torch.Tensor] = []
        self.errors: list[float] = []
        self.steps = 0

    def hook(self, pipe: Any, update: Callable[[int, int], None] | None) -> dict[str, Any]:
        """The argument that a host calls after every step; none where the host has no such argument."""
        from dit_sparse.pipelines.hosts import accepted

        if "callback_on_step_end" not in accepted(pipe):
            return {}

        def at_step_end(host: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors.get("latents")
            if isinstance(latents, torch.Tensor):
                self._take(latents.detach().float().cpu())
            self.steps += 1
            if update is not None:
                update(step + 1, len(host.scheduler.timesteps))
            return tensors

        return {"callback_on_step_end": at_step_end}

    def _take(self, latents: torch.Tensor) -> None:
        if self.reference is None:
            self.kept.append(latents)
        elif self.steps < len(self.reference) and self.reference[self.steps].shape == latents.shape:
            self.errors.append(latent_error(self.reference[self.steps], latents))


@contextlib.contextmanager
def _peak_memory(pipe: Any) -> Iterator[dict[str, int]]:
    """The most bytes that PyTorch held on the GPU inside the block, when it ends; nothing on a CPU."""
    found: dict[str, int] = {}
    cuda = pipe.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    yield found
    if cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(pipe.device)


def _cost(pipe: Any, report: Mapping[str, Any] | None) -> Result:
    """What a sparse run's summary tells; a dense run has density 1 and nothing else."""
    if report is None:
        return {"density": 1.0}
    names = ("tokens", "density", "sparse_density", "attention_seconds", "routing_seconds", "calls", "fallbacks",
             "density_map")
    result: Result = {name: report[name] for name in names}
    result["per_layer"] = {str(layer): value for layer, value in report["per_layer"].items()}
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    width = int(config.get("num_attention_heads", 0) or 0) * int(config.get("attention_head_dim", 0) or 0)
    if width:
        # 4 L^2 H D for each self-attention call: the scores and the weighted sum, a multiply and an add each
        dense = 4.0 * report["tokens"] ** 2 * width * report["calls"]
        result |= {"flops_dense_equivalent": dense, "flops_computed": dense * report["density"]}
    return result


def evaluate(
    config: EvalConfig,
    shape: Mapping[str, Any],
    pipe: Any,
    folder: Path,
    *,
    command: str,
    bar: Bar | None = None,
    weights: str = "",
) -> list[Result]:
    """Make and measure all clips that have no result yet, then write the report.

    Args:
        config: what to make.
        shape: of every clip, for text_to_video.
        pipe: the pipeline, without sparse attention.
        folder: exists; holds the run.
        command: that made this run, as typed.
        bar: as for `EvaluationWork`.
        weights: digest of the model's files, see `digest`.

    Returns:
        The results in the order of the jobs.
    """
    from .report import write_report

    jobs = jobs_of(config, shape, weights)
    looks = attention_jobs(config, jobs)
    for name in (RESULTS, ATTENTION):
        finished(folder / name)  # refuses a foreign file before anything is written
    keys = {"jobs": [job_key(job) for job in jobs], "attention": [job_key(job) for job in looks]}
    _write_json(folder / RUN, {"command": command, "config": config.to_dict(), **keys})
    _write_json(folder / ENVIRONMENT, environment(pipe))
    results = run(jobs, EvaluationWork(pipe, config, folder, bar), folder / RESULTS)
    if looks:
        run(looks, AttentionWork(pipe, config, bar), folder / ATTENTION)
    write_report(folder)
    return results


def environment(pipe: Any) -> dict[str, Any]:
    """Versions, device and date that the numbers belong to."""
    from dit_sparse import __version__

    from .speed import environment as device

    packages = ("diffusers", "transformers", "numpy", "torchmetrics", "opencv-python-headless", "imageio-ffmpeg")
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **device(str(pipe.device))}
    found["dit-sparse"] = __version__
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return {**found, "processors": os.cpu_count() or 0, "pipeline": type(pipe).__name__}


def digest(folder: Path | str) -> str:
    """A short digest of a local model: names, sizes and both ends of its files; empty for a hub id."""
    if not isinstance(folder, Path):
        return ""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        total.update(f"{file.relative_to(folder).as_posix()} {size}\n".encode())
        with file.open("rb") as stream:
            total.update(stream.read(2**16))
            stream.seek(max(size - 2**16, 0))
            total.update(stream.read(2**16))
    return total.hexdigest()[:16]


def _write_json(path: Path, content: Any) -> None:
    from dit_sparse.pipelines.video_io import finished_file

    with finished_file(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

