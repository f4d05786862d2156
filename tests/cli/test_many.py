"""`generate --prompts FILE` in several processes: every clip once, and a killed process loses only its own."""

from __future__ import annotations

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
from dit_sparse.commands.many import CLAIMS, Clip, Worker, claimed, finished, make_all, worker_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--size", "48x32", "--frames", "5", "--steps", "3", "--guidance", "1"]
COMMAND = ["-m", "dit_sparse.cli", "generate", "--prompts", "prompts.txt", "--output", "clips", "--size", "128",
           "--frames", "5", "--steps", "4", "--guidance", "1", "--method", "radial"]


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


def holders(folder: Path) -> dict[str, int]:
    """Process by clip, of the clips being made or lost."""
    found = {}
    for lock in (folder / CLAIMS).glob("0*.lock"):
        text = lock.read_text()
        if text and not (folder / f"{lock.stem}.json").exists():
            found[lock.stem] = json.loads(text)["pid"]
    return found


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `found` gives once it gives something, as long as the process runs."""
    while not (value := found()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    return value


@pytest.mark.slow
def test_killed_processes_lose_their_clips_and_a_restart_makes_them(tmp_path: Path) -> None:
    prompts = [f"a {colour} circle moving right" for colour in ("red", "blue", "green", "yellow")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    clips, log = tmp_path / "clips", tmp_path / "log.txt"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    with log.open("w") as said:
        process = subprocess.Popen([*launch, *COMMAND], cwd=tmp_path, env=environment, text=True, stdout=said,
                                   stderr=said, start_new_session=True)
        try:
            lost, pid = next(iter(wait_for(lambda: holders(clips), process).items()))
            os.kill(pid, signal.SIGKILL)
            # One process is gone; the others go on, and the launcher does not stop them.
            wait_for(lambda: list(clips.glob("*.json")), process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # the machine goes down
        process.wait()
    assert f"was ended by SIGKILL while it made {lost}" in log.read_text()
    made = {file.stem: file.stat().st_mtime_ns for file in clips.glob("*.json")}
    assert 1 <= len(made) < 4
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    again = subprocess.run([*launch, *COMMAND], cwd=tmp_path, env=environment, timeout=150, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert again.returncode == 0, again.stdout
    after = {file.stem: file.stat().st_mtime_ns for file in clips.glob("*.json")}
    assert len(after) == 4 and made.items() <= after.items(), "finished clips stay as they are"
    assert len(list(clips.glob("*.mp4"))) == 4 and not (clips / CLAIMS).exists()
