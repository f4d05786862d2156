"""A runner that can be killed at any moment and started again: one JSON line for each finished clip.

    python -m dit_sparse.eval.run --prompts prompts.txt --methods svg radial --output results.jsonl

makes each prompt dense and with every method, and notes PSNR, SSIM, seconds and densities against the dense clip.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

Job = Mapping[str, Any]
Result = dict[str, Any]
Work = Callable[[Job], "Mapping[str, Any] | Future[Any]"]


def job_key(job: Job) -> str:
    """The same text for the same settings, whatever their order."""
    return json.dumps(job, sort_keys=True, ensure_ascii=False, default=str)


def finished(path: str | Path) -> dict[str, Result]:
    """Results in a file by the key of their job; a last line that was cut off by a kill is left out.

    Raises:
        ValueError: a line that is not the last one is no result.
    """
    path = Path(path)
    if not path.exists():
        return {}
    lines = path.read_bytes().split(b"\n")
    results: dict[str, Result] = {}
    # A finished line ends in a newline, so the piece after the last newline is empty or was cut off.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            results[entry["key"]] = entry
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{path}, line {number} is no result of this runner; move the file away") from error
    return results


def run(
    jobs: Iterable[Job],
    work: Work,
    path: str | Path,
    *,
    enough: Callable[[Job], bool] | None = None,
) -> list[Result]:
    """Do every job that has no line in the file yet, and return the results of all finished jobs in order.

    Args:
        jobs: settings of one clip each, plain data; equal settings are done once.
        work: makes the clip of a job and returns plain data, or a future of it when the clip is measured elsewhere.
        path: file with one JSON line for each finished job: {"key": ..., "job": ..., "result": ...}.
        enough: asked before each job that is not done; True ends the run there, for the same call to go on later.

    Returns:
        The `result` entry of each finished job: of all of them unless `enough` said so.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    jobs = list(jobs)
    done = finished(path)
    begun = set(done)
    waiting: list[tuple[str, Job, Future[Any]]] = []
    _drop_cut_line(path)
    with path.open("ab") as stream:
        try:
            for job in jobs:
                key = job_key(job)
                if key in begun:
                    continue
                if enough is not None and enough(job):
                    break
                begun.add(key)
                given = work(job)
                if isinstance(given, Future):
                    waiting.append((key, job, given))
                else:
                    done[key] = _keep(stream, key, job, given)
                while waiting and waiting[0][2].done():
                    key, one, future = waiting.pop(0)
                    done[key] = _keep(stream, key, one, future.result())
        except BaseException:
            for key, job, future in waiting:  # a job failed, or the run was stopped: what is measured is kept
                if future.done() and not future.cancelled() and future.exception() is None:
                    _keep(stream, key, job, future.result())
            raise
        for key, job, future in waiting:
            done[key] = _keep(stream, key, job, future.result())
    return [done[job_key(job)]["result"] for job in jobs if job_key(job) in done]


def _keep(stream: IO[bytes], key: str, job: Job, result: Mapping[str, Any]) -> Result:
    """Write the line of a finished job, so that a kill does not lose it."""
    entry: Result = {"key": key, "job": dict(job), "result": dict(result)}
    stream.write(json.dumps(entry, ensure_ascii=False, default=str).encode() + b"\n")
    stream.flush()
    os.fsync(stream.fileno())
    return entry


def _drop_cut_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole != len(data):
            os.truncate(path, whole)


def fidelity_jobs(
    prompts: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    shape: Mapping[str, Any],
    *,
    model: str = "embedded",
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Job]:
    """One job for each prompt, seed and method, those of one dense clip next to each other.

    A job holds all that its result depends on: a file that was made with another model or other options (of the
    methods, by method name, as for `FidelityWork`) is not taken for this one.

    Raises:
        ValueError: unknown method or option.
    """
    from dit_sparse import SparseProc

    given = options or {}
    written = {method: repr(SparseProc(method, **given.get(method, {}))) for method in methods}
    return [
        {"prompt": prompt, "seed": seed, "method": method, "model": model, "options": written[method], **shape}
        for prompt in prompts
        for seed in seeds
        for method in methods
    ]


class FidelityWork:
    """Makes the clip of a job and compares it with the dense clip, which is kept for the following methods.

    Args:
        pipe: a text-to-video pipeline without sparse attention.
        options: options of the methods, by method name.
    """

    def __init__(self, pipe: Any, options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.pipe = pipe
        self.options = options or {}
        self._key = ""
        self._dense: Any = None

    def __call__(self, job: Job) -> Result:
        from dit_sparse import SparseProc

        from .compare import compare

        names = ("frames", "height", "width", "steps", "guidance_scale")
        shape = {name: job[name] for name in names if name in job}
        key = job_key({**shape, "prompt": job["prompt"], "seed": job["seed"]})
        known = self._dense if key == self._key else None
        proc = SparseProc(job["method"], **self.options.get(job["method"], {}))
        numbers, dense, _ = compare(self.pipe, job["prompt"], proc, seed=job["seed"], shape=shape, dense=known)
        self._key, self._dense = key, (dense, numbers.dense_seconds)
        result = numbers.to_dict()
        del result["summary"]
        return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate methods on a file of prompts; see the module's first lines.

    Returns:
        Exit code: 0 done, 2 wrong input (one line on standard error).
    """
    parser = argparse.ArgumentParser(prog="python -m dit_sparse.eval.run", description="Fidelity of sparse methods.")
    parser.add_argument("--prompts", type=Path, required=True, help="file with one prompt a line")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, required=True, help="file of results, made or continued")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--long", action="store_true", help="the embedded model's long size, 8 steps, no guidance")
    given = parser.parse_args(arguments)

    from dit_sparse.commands.console import UserError

    try:
        _evaluate(given)
    except (UserError, ValueError, OSError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _evaluate(given: argparse.Namespace) -> None:
    from dit_sparse.commands.request import check_seed, check_writable, read_prompts
    from dit_sparse.commands.settings import COMPARE
    from dit_sparse.pipelines.embedded import DEFAULTS
    from dit_sparse.pipelines.load import load

    prompts = read_prompts(None, given.prompts, "")
    base = {**DEFAULTS, **COMPARE["long" if given.long else "preview"]} if given.model == "embedded" else {}
    names = ("frames", "height", "width", "steps", "guidance_scale")
    shape = {n: base[n] for n in names if n in base}
    for seed in given.seeds:
        check_seed(seed)
    # All that can be refused is refused before the model is loaded.
    jobs = fidelity_jobs(prompts, given.methods, given.seeds, shape, model=given.model)
    check_writable(given.output)
    finished(given.output)
    pipe = load(given.model)
    pipe.set_progress_bar_config(disable=True)
    results = run(jobs, FidelityWork(pipe), given.output)
    for method in given.methods:
        mine = [result for result, job in zip(results, jobs, strict=True) if job["method"] == method]
        mean = {name: sum(r[name] for r in mine) / len(mine) for name in ("psnr", "ssim", "density", "speedup")}
        text = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
        print(f"{method}: {text} ({len(mine)} clips)")


if __name__ == "__main__":
    sys.exit(main())
