"""`generate --prompts FILE` in several processes, or taken up again: every clip once, whoever is killed in between.

`accelerate launch` and torchrun say which process is which; the processes never talk to each other. A clip belongs to
the process that holds the lock on its file in the folder `.claims`; a lock ends with its process, however that ends. A
clip is finished when its record lies beside it, which is written last. So the output folder is all that the processes
share, on one machine or on several, and a later start does what is left.

A launcher stops all processes when one of them fails. So each one works in a child: when the child is killed, another
goes on with the clips that are left, and only the clip that was being made is lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import typer

from .console import UserError, print_json, warn

__all__ = ["Clip", "Worker", "claimed", "finished", "forget", "make_all", "supervise", "worker_of"]

CLAIMS = ".claims"  # folder in the output folder
WORKER = "worker_"  # before the number of a process; names of clips have no underscore
_lost: set[str] = set()  # clips whose process was killed in this start: left to the next one


@dataclass(frozen=True)
class Worker:
    """One of the processes that a launcher started.

    Args:
        rank, world: which of how many, over all machines.
        local_rank: which on this machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def device(self, asked: str | None) -> str | None:
        """Where this process computes: with several GPUs each has its own; `asked` is the user's --device."""
        if self.world == 1 or asked not in (None, "cuda"):
            return asked
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else asked


@dataclass
class Clip:
    """One clip to make.

    Args:
        number: from 1, in the file of prompts.
        prompt: what to show.
        path: where it goes; its sheet and record lie beside it.
        asked: everything that decides about it, ready for JSON.
    """

    number: int
    prompt: str
    path: Path
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> Path:
        """The file that says that it is finished, and how it was made."""
        return self.path.with_suffix(".json")


def worker_of(environment: Mapping[str, str], resume: bool | None) -> Worker | None:
    """This process among those of a launcher (torchrun, accelerate launch, mpirun); None: alone, nothing to take up.

    Args:
        environment: os.environ.
        resume: the user's --resume or --no-resume; None: as it is launched.

    Raises:
        UserError: --no-resume in several processes.
    """
    def number(*names: str, default: int) -> int:
        return next((int(environment[n]) for n in names if environment.get(n, "").isdigit()), default)

    world = number("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", default=1)
    rank = number("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", default=0)
    local = number("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", default=rank)
    if world > 1 and resume is False:
        raise UserError("--no-resume: several processes know by finished clips what is left; give another --output")
    return Worker(rank, world, local) if world > 1 or resume else None


# -- what is done, and by whom -------------------------------------------------------------------------------------


def finished(clip: Clip) -> bool:
    """Whether the clip lies there, made of the same prompt with the same settings."""
    from .request import sheet_path

    try:
        record = json.loads(clip.record.read_text(encoding="utf-8"))
        whole = all(file.stat().st_size > 0 for file in (clip.path, sheet_path(clip.path)))
    except (OSError, ValueError):
        return False
    return bool(whole and isinstance(record, dict) and record.get("asked") == json.loads(json.dumps(clip.asked)))


def forget(clip: Clip) -> None:
    """Remove the record of an older clip that is about to be replaced: it would say that the new one is as asked."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(clip.record.read_text(encoding="utf-8"))
        if isinstance(record, dict) and "asked" in record:
            clip.record.unlink()


def _write_record(clip: Clip, result: Mapping[str, Any]) -> None:
    from ..pipelines.video_io import finished_file

    with finished_file(clip.record) as part:
        part.write_text(json.dumps({"asked": clip.asked, "result": result}, indent=2, default=str), encoding="utf-8")


@contextlib.contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Hold the lock of a name in a folder as long as the block runs; yields whether it could be had.

    The lock is the system's, on an open file: it ends with the process. On a file system without locks everybody gets
    it, and a clip may be made twice; the files are the same.
    """
    with _lock_file(folder / CLAIMS, name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                yield False
                return
            _warn_without_locks(folder, error.strerror)
        _sign(file, done=False)
        yield True
        _sign(file, done=True)


def _lock_file(place: Path, name: str) -> TextIO:
    for _ in range(100):  # another process, which found everything finished, may remove the folder in between
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return (place / f"{name}.lock").open("a+", encoding="utf-8")
    raise UserError(f"--output {place.parent}: the folder {place} is removed as soon as it is made")


def _sign(file: TextIO, done: bool) -> None:
    """Write down whose lock it is, and whether the work was ended."""
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "done": done}))
    file.flush()


@functools.cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    warn(f"{folder} has no locks ({reason}): processes may make the same clip")


def _held(folder: Path, prefix: str) -> bool:
    """Whether a living process holds a lock whose name begins so."""
    for place in (folder / CLAIMS).glob(f"{prefix}*.lock"):
        with contextlib.suppress(OSError), place.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def _claims_of(folder: Path, pid: int) -> dict[str, bool]:
    """Names of the clips that a process of this machine claimed last -> whether it was done with them."""
    found = {}
    for place in (folder / CLAIMS).glob("*.lock"):
        with contextlib.suppress(OSError, ValueError):
            claim = json.loads(place.read_text(encoding="utf-8"))
            if (claim["host"], claim["pid"]) == (socket.gethostname(), pid) and not place.stem.startswith(WORKER):
                found[place.stem] = bool(claim["done"])
    return found


# -- making --------------------------------------------------------------------------------------------------------


def make_all(worker: Worker, clips: Sequence[Clip], make: Callable[[Clip], dict[str, Any]], as_json: bool = False
             ) -> int:
    """Make the clips that are neither finished nor being made by others, and say so.

    Args:
        worker: this process.
        clips: all clips of the file, the same list in every process.
        make: makes a clip and its sheet; returns the document that --json prints.
        as_json: one line of JSON instead of text.

    Returns:
        Exit code: 0 when all are finished or in the hands of others, 1 when some were lost.
    """
    folder, made = clips[0].path.parent, list[dict[str, Any]]()
    kept = sum(finished(clip) for clip in clips)
    first = worker.rank * len(clips) // worker.world  # processes begin at different places
    order = [*clips[first:], *clips[:first]]
    with claimed(folder, f"{WORKER}{worker.rank}"):
        while True:
            before = len(made)
            for clip in order:
                if os.environ.get("DIT_SPARSE_PARENT", str(os.getppid())) != str(os.getppid()):
                    return 1  # the launcher is gone
                made += _try(clip, make, worker, as_json)
            if len(made) == before:  # what another process gave up in the meantime was looked for once more
                break
    left = [clip for clip in clips if not finished(clip)]
    lost = [clip.path.name for clip in left if clip.path.stem in _lost]
    _say(worker, made, kept, left, lost, as_json)
    if not left:
        _clean(folder, clips)
    return 1 if lost else 0


def _try(clip: Clip, make: Callable[[Clip], dict[str, Any]], worker: Worker, as_json: bool) -> list[dict[str, Any]]:
    """Make one clip unless it is finished, lost or claimed; the document in a list, or an empty list."""
    if clip.path.stem in _lost or finished(clip):
        return []
    with claimed(clip.path.parent, clip.path.stem) as ours:
        if not ours or finished(clip):
            return []
        forget(clip)
        result = make(clip)
        _write_record(clip, result)
    if not as_json:
        print(f"process {worker.rank}: {clip.path.name} in {result['seconds']['all']:.1f} s, density "
              f"{result['density']:.3f}", flush=True)
    return [result]


def _say(worker: Worker, made: list[dict[str, Any]], kept: int, left: Sequence[Clip], lost: Sequence[str],
         as_json: bool) -> None:
    """The summary of this process."""
    if as_json:
        print(json.dumps({"rank": worker.rank, "made": made, "kept": kept, "left": [c.path.name for c in left],
                          "lost": list(lost)}, default=str), flush=True) if worker.world > 1 else print_json(made)
        return
    seconds = sum(result["seconds"]["all"] for result in made)
    text = f"process {worker.rank} of {worker.world}: made {len(made)} clips in {seconds:.1f} s; {kept} were finished"
    others = len(left) - len(lost)
    text += f"; {others} in the hands of other processes" * bool(others)
    text += f"; lost with their process: {', '.join(lost)}: start the same command again" * bool(lost)
    print(text, flush=True)


def _clean(folder: Path, clips: Sequence[Clip]) -> None:
    """Everything is finished: the locks have done their work; those of another file's prompts are still at it."""
    names = {clip.path.stem for clip in clips}
    with contextlib.suppress(OSError):
        for place in (folder / CLAIMS).glob("*.lock"):
            if place.stem in names or (place.stem.startswith(WORKER) and not _held(folder, place.stem)):
                place.unlink(missing_ok=True)
        (folder / CLAIMS).rmdir()


# -- a child for the work ------------------------------------------------------------------------------------------


def supervise(worker: Worker, folder: Path) -> None:
    """Go on in a child process; the parent waits for it, replaces it when it is killed, and exits with its code.

    To be called before PyTorch is loaded: the child starts as a copy of this process. Returns in the child.

    Raises:
        typer.Exit: in the parent, when the work is over.
    """
    if worker.world == 1 or "torch" in sys.modules:
        return
    while True:
        parent = str(os.getpid())
        child = os.fork()
        if child == 0:
            os.environ["DIT_SPARSE_PARENT"] = parent
            return
        code = _wait(child)
        if code >= 0:
            break
        claims = _claims_of(folder, child)
        gone = [name for name, done in sorted(claims.items()) if not done]
        _lost.update(gone)
        said = f"while it made {', '.join(gone)}" if gone else "outside of a clip"
        warn(f"process {worker.rank} was ended by {signal.Signals(-code).name} {said}")
        if not claims:  # it would end again
            code = 1
            break
    if code not in (0, 130):
        # A launcher ends all processes when one fails: let the others finish first.
        while _held(folder, WORKER):
            time.sleep(1)
    raise typer.Exit(code)


def _wait(child: int) -> int:
    """Exit code of a child, negative for a signal; being told to stop is passed on to it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        raise
