"""`generate --prompts FILE` in several processes: every clip once, and a killed process loses only its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.commands import many
from dit_sparse.commands.console import UserError
from dit_sparse.commands.generate import digest
from dit_sparse.commands.many import CLAIMS, Clip, Worker, claimed, finished, forget, make_all, worker_of
from dit_sparse.commands.request import plan_outputs

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--size", "48x32", "--frames", "5", "--steps", "3", "--guidance", "1"]


def clips_in(folder: Path, count: int, **asked: Any) -> list[Clip]:
    return [Clip(i, f"prompt {i}", folder / f"{i:03d}.mp4", {"prompt": f"prompt {i}", **asked})
            for i in range(1, count + 1)]


def write(clip: Clip) -> dict[str, Any]:
    clip.path.write_bytes(b"clip")
    clip.path.with_name(clip.path.stem + "-sheet.png").write_bytes(b"sheet")
    return {"prompt": clip.prompt, "seconds": {"all": 1.0}, "density": 0.5}


@pytest.mark.parametrize(("environment", "resume", "worker"), [
    ({}, None, None), ({}, False, None), ({}, True, Worker()), ({"WORLD_SIZE": "1", "RANK": "0"}, None, None),
    ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, None, Worker(3, 4, 1)),
    ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, True, Worker(1, 2, 1)),
])
def test_who_this_process_is(environment: dict[str, str], resume: bool | None, worker: Worker | None) -> None:
    assert worker_of(environment, resume) == worker


def test_several_processes_must_know_what_is_finished() -> None:
    with pytest.raises(UserError, match="give another --output"):
        worker_of({"WORLD_SIZE": "2", "RANK": "0"}, False)


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Worker(r, 4, r).device(None) for r in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Worker(1, 2, 1).device("cuda:0") == "cuda:0" and Worker(1, 2, 1).device("cpu") == "cpu"
    assert Worker().device(None) is None, "alone: as before"


def test_a_claim_has_one_holder(tmp_path: Path) -> None:
    with claimed(tmp_path, "a") as first, claimed(tmp_path, "a") as second, claimed(tmp_path, "b") as other:
        assert (first, second, other) == (True, False, True)
    with claimed(tmp_path, "a") as again:
        assert again


def test_finished_means_this_prompt_with_these_settings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    clips = clips_in(tmp_path, 3, seed=0, size=(48, 32))
    assert make_all(Worker(), clips, write) == 0
    assert all(map(finished, clips)) and not (tmp_path / CLAIMS).exists()
    assert "made 3 clips" in capsys.readouterr().out
    assert not any(map(finished, clips_in(tmp_path, 3, seed=1, size=(48, 32))))
    clips[0].path.unlink()
    clips[1].record.write_text("{")
    assert [finished(clip) for clip in clips] == [False, False, True]
    called = []
    make_all(Worker(), clips, lambda clip: called.append(clip.number) or write(clip))
    assert called == [1, 2] and "1 were finished" in capsys.readouterr().out


def test_what_others_make_is_left_to_them_and_taken_up_when_they_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    clips, called = clips_in(tmp_path, 4), []
    with claimed(tmp_path, "002"):
        assert make_all(Worker(1, 2, 1), clips, lambda clip: called.append(clip.number) or write(clip)) == 0
    assert called == [3, 4, 1], "begins in the middle"
    assert "1 in the hands of other processes" in capsys.readouterr().out
    assert make_all(Worker(0, 2, 0), clips, write, True) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["rank"], said["kept"], said["left"], len(said["made"])) == (0, 3, [], 1)


def test_lost_clips_are_left_to_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    clips = clips_in(tmp_path, 3)
    monkeypatch.setattr(many, "_lost", {"002"})
    assert make_all(Worker(), clips, write) == 1
    assert [finished(clip) for clip in clips] == [True, False, True]
    assert "lost with their process: 002.mp4: start the same command again" in capsys.readouterr().out


def test_resume_leaves_finished_clips_alone(dit_sparse, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    words = ["--prompts", "prompts.txt", "--output", "clips", "--model", tiny_folder, "--resume", *SMALL]
    assert dit_sparse("generate", *words).code == 0
    first, second = sorted((tmp_path / "clips").glob("*.mp4"))
    second.unlink()
    before = first.stat().st_mtime_ns
    done = dit_sparse("generate", *words)
    assert done.code == 0 and "made 1 clips" in done.out and "1 were finished" in done.out
    assert first.stat().st_mtime_ns == before and second.stat().st_size > 0
    assert {file.suffix for file in (tmp_path / "clips").iterdir()} == {".mp4", ".png", ".json"}
    assert "--prompts FILE" in dit_sparse("generate", "a red circle", "--resume").refusal()
    assert dit_sparse("generate", *words[:-1 - len(SMALL)], *SMALL, "--seed", "0", "--no-resume").code == 0
    assert not list((tmp_path / "clips").glob("*.json")), "a clip that was replaced has no record"


def holders(folder: Path) -> dict[str, int]:
    """Process by clip, of the clips being made or lost."""
    found = {}
    for lock in (folder / CLAIMS).glob("0*.lock"):
        text = lock.read_text()
        if text and not (folder / f"{lock.stem}.json").exists():
            found[lock.stem] = json.loads(text)["pid"]
    return found


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str], log: Path) -> Any:
    """What `found` gives once it gives something, as long as the process runs."""
    while not (value := found()):
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    return value


def end_all(folder: Path) -> None:
    """Kill every other process that works in this folder: launchers start workers in sessions of their own."""
    found = True
    while found:
        found = False
        for place in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if place.readlink() == folder and int(place.parent.name) != os.getpid():
                    os.kill(int(place.parent.name), signal.SIGKILL)
                    found = place.exists()
        time.sleep(0.01)


def test_killed_processes_lose_their_clips_and_a_restart_makes_them(
    dit_sparse, tiny_folder: Path, tmp_path: Path
) -> None:
    prompts = [f"a {colour} circle moving right" for colour in ("red", "blue", "green", "yellow")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    clips, log = tmp_path / "clips", tmp_path / "log.txt"
    words = ["generate", "--prompts", "prompts.txt", "--output", "clips", "--model", str(tiny_folder), *SMALL,
             "--steps", "60", "--method", "radial"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    with log.open("w") as said:
        process = subprocess.Popen([*launch, "-m", "dit_sparse.cli", *words], cwd=tmp_path, env=environment, text=True,
                                   stdout=said, stderr=said)
        try:
            lost, pid = next(iter(wait_for(lambda: holders(clips), process, log).items()))
            os.kill(pid, signal.SIGKILL)
            # One process is gone; the others go on, and the launcher does not stop them.
            wait_for(lambda: f"was ended by SIGKILL while it made {lost}" in log.read_text(), process, log)
            wait_for(lambda: list(clips.glob("*.json")), process, log)
        finally:
            end_all(tmp_path)  # the machine goes down
        process.wait()
    made = {file.stem: file.stat().st_mtime_ns for file in clips.glob("*.json")}
    assert 1 <= len(made) < 4
    again = dit_sparse(*words, "--resume")
    assert again.code == 0 and f"{len(made)} were finished" in again.out
    after = {file.stem: file.stat().st_mtime_ns for file in clips.glob("*.json")}
    assert len(after) == 4 and made.items() <= after.items(), "finished clips stay as they are"
    assert len(list(clips.glob("*.mp4"))) == 4 and not (clips / CLAIMS).exists()


# -- killed at any stage -------------------------------------------------------------------------------------------

WORK = """
import contextlib, os, signal, sys, types
from pathlib import Path

import typer

from dit_sparse.commands.many import Clip, Worker, make_all, supervise

@contextlib.contextmanager
def finished_file(path):
    yield path

# The real one would load PyTorch in every child.
sys.modules["dit_sparse.pipelines.video_io"] = types.SimpleNamespace(finished_file=finished_file)
sys.modules["dit_sparse.pipelines"] = types.ModuleType("dit_sparse.pipelines")
folder, stages = Path(sys.argv[1]), sys.argv[2:]
worker = Worker(0, 2, 0)

def reached(stage):
    died = folder / ("died at " + stage)
    if stage in stages and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)

def make(clip):
    reached(f"start {clip.number}")
    clip.path.write_bytes(b"clip")
    reached(f"sheet {clip.number}")
    clip.path.with_name(clip.path.stem + "-sheet.png").write_bytes(b"sheet")
    reached(f"record {clip.number}")
    return {"prompt": clip.prompt, "seconds": {"all": 1.0}, "density": 0.5}

try:
    supervise(worker, folder)
    reached("load")
    code = make_all(worker, [Clip(i, str(i), folder / f"{i:03d}.mp4") for i in range(1, 6)], make)
except typer.Exit as end:
    code = end.exit_code
raise SystemExit(code)
"""


@pytest.mark.parametrize(("stages", "lost"), [
    (["load"], []), (["start 1", "sheet 3", "record 4"], ["001", "003", "004"])])
def test_a_process_killed_at_any_stage(stages: list[str], lost: list[str], tmp_path: Path) -> None:
    """Its clip is reported and all others are made; the restart makes the rest, each once."""
    command = [sys.executable, "-c", WORK, str(tmp_path), *stages]
    first, second = (subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                                    timeout=60) for _ in range(2))
    assert first.returncode == 1 and first.stderr.count("was ended by SIGKILL") == len(stages), first.stderr
    for name in lost:
        assert f"while it made {name}\n" in first.stderr, "finished ones are not named"
    if lost:
        assert f"lost with their process: {', '.join(f'{name}.mp4' for name in lost)}: start" in first.stdout
    else:
        assert "outside of a clip" in first.stderr
    assert second.returncode == 0 and f"made {len(lost) or 5} clips" in second.stdout and not second.stderr
    assert len(list(tmp_path.glob("0*.json"))) == 5 and not (tmp_path / CLAIMS).exists()


# -- what once went wrong ------------------------------------------------------------------------------------------


def test_a_killed_clip_does_not_keep_the_record_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    old, new = clips_in(tmp_path, 1, steps=4), clips_in(tmp_path, 1, steps=8)
    make_all(Worker(), old, write)

    def killed(clip: Clip) -> dict[str, Any]:
        write(clip)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_all(Worker(), new, killed)
    assert not finished(old[0]) and not finished(new[0])


def test_records_of_others_are_left_alone(tmp_path: Path) -> None:
    clip, = clips_in(tmp_path, 1)
    for text in ('{"mine": 1}', "[1]", "3", "not JSON"):
        clip.record.write_text(text)
        forget(clip)
        assert clip.record.read_text() == text
    clip.record.unlink()
    forget(clip)


def test_a_prompt_named_like_a_process_is_made(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("worker")
    name, = plan_outputs(tmp_path / "clips", ["worker"], ".mp4", 0, into_folder=True)
    clip = Clip(1, "worker", tmp_path / name.name)
    assert make_all(Worker(), [clip], write) == 0 and finished(clip)


def test_a_file_system_without_locks_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def none(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(many.fcntl, "flock", none)
    assert make_all(Worker(), clips_in(tmp_path, 3), write) == 0
    assert capsys.readouterr().err.count("has no locks (No locks available)") == 1


def test_the_end_of_one_file_leaves_the_locks_of_another(tmp_path: Path) -> None:
    mine, theirs = clips_in(tmp_path, 2), Clip(3, "prompt 3", tmp_path / "003.mp4")
    with claimed(tmp_path, theirs.path.stem):
        assert make_all(Worker(), mine, write) == 0
        with claimed(tmp_path, theirs.path.stem) as free:
            assert not free
    assert make_all(Worker(), [*mine, theirs], write) == 0 and not (tmp_path / CLAIMS).exists()


def test_a_folder_that_is_removed_in_between_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = Path.mkdir, []

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.name == CLAIMS and not times:
            times.append(1)
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with claimed(tmp_path, "a") as ours:
        assert ours and times


def test_plans_of_one_shape_are_told_apart() -> None:
    one, other = {"plan": "AAAA", "layers": 8}, {"layers": 8, "plan": "AAAB"}
    assert digest(one) == digest(dict(reversed(one.items()))) != digest(other)
