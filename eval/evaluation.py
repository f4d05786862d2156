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
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .attention import ATTENTION, AttentionWork, attention_jobs, density_map
from .compare import timed, warm_up
from .config import DENSE, EvalConfig
from .measures.reference import latent_error
from .measuring import Measuring, Task, workers_for
from .run import Job, Result, finished, job_key, run

RESULTS, RUN, ENVIRONMENT, REPORT, VIDEOS = "results.jsonl", "run.json", "environment.json", "report.html", "videos"
SHAPE = ("frames", "height", "width", "steps", "guidance_scale")
_CLIPS_SHARE = 0.8  # of the seconds of a run that also looks into attention
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
        measuring: where clips are measured; None: here, each before the next is made.
    """

    def __init__(
        self, pipe: Any, config: EvalConfig, folder: Path, bar: Bar | None = None, measuring: Measuring | None = None
    ) -> None:
        self.pipe, self.config, self.folder = pipe, config, folder
        self.measuring = measuring or Measuring(folder)
        self.bar: Bar = bar or (lambda label: nullcontext())
        self._options = {entry.label: (entry.name, entry.options) for entry in config.methods}
        self._key = ""
        self._dense: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._dense_step: dict[str, float] = {}
        self._warm: set[str] = set()

    def __call__(self, job: Job) -> Result | Future[Any]:
        label = job["label"]
        key = job_key({name: value for name, value in job.items() if name not in ("label", "options")})
        if label != DENSE and (key != self._key or self._dense is None):
            # After a kill only the dense clip's file is left, and H.264 is not what the model made.
            self._make(job, DENSE, key)
        clip, result = self._make(job, label, key)
        reference = self._dense[0] if self._dense is not None and label != DENSE else None
        number = self.config.prompts.index(job["prompt"]) + 1
        path = Path(VIDEOS) / label / f"{number:03d}-{job['seed']}.mp4"
        task = Task(job["prompt"], job["fps"], self.folder / path, self.config.measures, self.config.networks)
        return self.measuring.submit(clip, reference, task, {**result, "video": path.as_posix()})

    def _make(self, job: Job, label: str, key: str) -> tuple[torch.Tensor, Result]:
        """The clip, and what its making cost."""
        from dit_sparse import SparseProc, disable, enable, summary

        shape = {name: job[name] for name in SHAPE if job.get(name) is not None}
        method = self._options.get(label)
        proc = SparseProc(method[0], **method[1]) if method else None
        disable(self.pipe)
        if label not in self._warm:
            warm_up(self.pipe, job["prompt"], proc, shape)
            if label == DENSE:
                self._dense_step = dense_step(self.pipe, job["prompt"], shape)
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
        if report is None:
            steps = watch.steps or shape.get("steps") or 0
            return clip, result | {"density": 1.0, **{name: value * steps for name, value in self._dense_step.items()}}
        return clip, result | _cost(self.pipe, report)


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


def _cost(pipe: Any, report: Mapping[str, Any]) -> Result:
    """What a sparse run's summary tells."""
    names = ("tokens", "density", "sparse_density", "attention_seconds", "routing_seconds", "calls", "fallbacks",
             "density_map")
    result: Result = {name: report[name] for name in names}
    result["per_layer"] = {str(layer): value for layer, value in report["per_layer"].items()}
    return result | _flops(pipe, report)


def _flops(pipe: Any, report: Mapping[str, Any]) -> dict[str, float]:
    """Operations of the attention: those computed, and those that dense attention would have computed."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    width = int(config.get("num_attention_heads", 0) or 0) * int(config.get("attention_head_dim", 0) or 0)
    if not width:
        return {}
    # 4 L^2 H D for each self-attention call: the scores and the weighted sum, a multiply and an add each
    dense = 4.0 * report["tokens"] ** 2 * width * report["calls"]
    return {"flops_dense_equivalent": dense, "flops_computed": dense * report["density"]}


def dense_step(pipe: Any, prompt: str, shape: Mapping[str, Any]) -> dict[str, float]:
    """What attention costs in one step of the untouched model: seconds and operations, from two steps of it.

    The untouched pipeline has no clock in its attention: here the same dense attention runs where sparse attention
    would, and is timed as that is.
    """
    from dit_sparse import SparseProc, disable, enable, summary
    from dit_sparse.pipelines.text_to_video import text_to_video

    enable(pipe, SparseProc("dense"))
    try:
        text_to_video(pipe, prompt, **{**shape, "steps": 2})
        report = summary(pipe).to_dict()
    finally:
        disable(pipe)
    return {name: value / 2 for name, value in
            {"attention_seconds": report["attention_seconds"], **_flops(pipe, report)}.items()}  # fmt: skip


def evaluate(
    config: EvalConfig,
    shape: Mapping[str, Any],
    pipe: Any,
    folder: Path,
    *,
    command: str,
    bar: Bar | None = None,
    weights: str = "",
    workers: int | None = None,
    seconds: float | None = None,
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
        workers: processes that measure while the next clip is made; None: none on a CPU, else what the cores allow.
        seconds: after about which no further prompt is begun, the report's time apart; one prompt at least is made.

    Returns:
        The results of the finished clips in the order of the jobs.
    """
    from .report import write_report

    jobs = jobs_of(config, shape, weights)
    looks = attention_jobs(config, jobs)
    for name in (RESULTS, ATTENTION):
        finished(folder / name)  # refuses a foreign file before anything is written
    keys = {"jobs": [job_key(job) for job in jobs], "attention": [job_key(job) for job in looks]}
    _write_json(folder / RUN, {"command": command, "config": config.to_dict(), **keys})
    _write_json(folder / ENVIRONMENT, environment(pipe))
    workers = workers_for(str(pipe.device)) if workers is None else workers
    known = finished(folder / RESULTS)
    begun = any(key in known for key in keys["jobs"])
    start = time.monotonic()

    def late(share: float, behind: float = 0.0) -> bool:
        return seconds is not None and time.monotonic() - start + behind > share * seconds

    with Measuring(folder, workers) as measuring:
        # A prompt that was begun is finished for every method: all rows of a table stand on the same prompts.
        results = run(
            jobs,
            EvaluationWork(pipe, config, folder, bar, measuring),
            folder / RESULTS,
            enough=lambda job: job["label"] == DENSE
            and (begun or job is not jobs[0])
            and late(_CLIPS_SHARE if looks else 1.0, measuring.behind()),
        )
    if looks:
        first = looks[0]["label"]
        work = AttentionWork(pipe, config, bar)
        run(looks, work, folder / ATTENTION, enough=lambda job: job["label"] == first and late(1.0))
    write_report(folder)
    return results


def environment(pipe: Any) -> dict[str, Any]:
    """Versions, device and date that the numbers belong to."""
    return {**dated(str(pipe.device)), "processors": os.cpu_count() or 0, "pipeline": type(pipe).__name__}


def dated(device: str) -> dict[str, Any]:
    """The same for a device alone."""
    from dit_sparse import __version__

    from .speed import environment as of_device

    packages = ("diffusers", "transformers", "numpy", "torchmetrics", "opencv-python-headless", "imageio-ffmpeg")
    found: dict[str, Any] = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), **of_device(device)}
    found["dit-sparse"] = __version__
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


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

