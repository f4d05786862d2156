"""./dit-sparse and ./run-tests: what to install in one line, safe to repeat, nothing to do the second time.

The scripts run in a copy of the repository with stand-ins for Python and pip, so that nothing is downloaded.
"""

import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = "sh cat cksum cut dirname env flock grep ls mkdir mv nproc printf readlink rm sleep tail uname".split()

# Answers the version questions of scripts/setup.sh; `-m venv` makes a folder with another stand-in.
PYTHON = """#!/bin/sh
case "$*" in
    *exit*version_info*) exit {too_old} ;;
    *version_info*) echo {version} ;;
    *ensurepip*) exit {no_venv} ;;
    "-m venv "*)
        echo venv >>"$LOG"
        mkdir -p "$3/bin"
        cp "$STANDINS/pip-python" "$3/bin/python"
        cp "$STANDINS/command" "$3/bin/dit-sparse"
        ;;
esac
"""
PIP = """#!/bin/sh
case "$*" in
    "-m pytest "*) shift 2; echo "pytest: $*" ;;
    *) echo "pip $*" >>"$LOG"
       [ ! -e "$STANDINS/slow" ] || sleep "$(cat "$STANDINS/slow")"
       [ ! -e "$STANDINS/broken" ] || { echo "no such package"; exit 1; } ;;
esac
"""
COMMAND = """#!/bin/sh
for word in "$@"; do echo "<$word>"; done
"""


class Machine:
    """A checkout and a PATH that holds little more than a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.bin = folder / "bin"
        self.log = folder / "log"
        for place in (self.root, self.root / "scripts", self.root / "constraints", self.bin):
            place.mkdir()
        for name in ("dit-sparse", "run-tests", "scripts/setup.sh", "pyproject.toml", "constraints/tested.txt"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in [*TOOLS, "cp"]:
            path = shutil.which(tool)
            if path:
                (self.bin / tool).symlink_to(path)
        self.write("pip-python", PIP)
        self.write("command", COMMAND)
        self.env = {"PATH": str(self.bin), "LOG": str(self.log), "STANDINS": str(self.bin)}

    def write(self, name: str, text: str) -> None:
        file = self.bin / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def python(self, name: str = "python3", version: str = "3.11", too_old: int = 0, no_venv: int = 0) -> None:
        self.write(name, PYTHON.format(version=version, too_old=too_old, no_venv=no_venv))

    def run(self, *words: str, script: str = "dit-sparse") -> subprocess.CompletedProcess:
        command = [str(self.root / script), *words]
        return subprocess.run(command, env=self.env, cwd=self.bin, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[str]:
        return [line.split()[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("script", ["dit-sparse", "run-tests"])
def test_older_python_is_told_what_to_install(machine: Machine, script: str) -> None:
    machine.python(version="3.9", too_old=1)
    text = refusal(machine.run(script=script))
    assert "3.9" in text and "apt install python3.11 python3.11-venv" in text
    assert not (machine.root / ".dit-sparse").exists()


@pytest.mark.parametrize("script", ["dit-sparse", "run-tests"])
def test_python_without_venv_is_told_what_to_install(machine: Machine, script: str) -> None:
    machine.python(version="3.12", no_venv=1)
    assert "apt install python3.12-venv" in refusal(machine.run(script=script))


def test_no_python_is_told_what_to_install(machine: Machine) -> None:
    assert "apt install python3 python3-venv" in refusal(machine.run())


def test_a_newer_python_beside_an_old_one_is_found(machine: Machine) -> None:
    machine.python(version="3.9", too_old=1)
    machine.python("python3.12", version="3.12")
    assert machine.run("methods").returncode == 0


def test_first_run_sets_up_and_second_does_nothing(machine: Machine) -> None:
    machine.python()
    first = machine.run("generate", "a red  circle", "--seed", "1")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "<generate>\n<a red  circle>\n<--seed>\n<1>\n"
    assert machine.calls() == ["venv", "pip"]
    assert "-c" in machine.log.read_text() and "tested.txt" in machine.log.read_text()
    start = time.monotonic()
    second = machine.run("methods")
    assert time.monotonic() - start < 1
    assert (second.stdout, second.stderr) == ("<methods>\n", "")
    assert machine.calls() == ["venv", "pip"]


def test_changed_requirements_are_installed(machine: Machine) -> None:
    machine.python()
    machine.run()
    with (machine.root / "constraints/tested.txt").open("a") as stream:
        stream.write("# changed\n")
    assert machine.run().returncode == 0
    assert machine.calls() == ["venv", "pip", "pip"]


def test_failed_set_up_is_done_again_from_scratch(machine: Machine) -> None:
    machine.python()
    (machine.bin / "broken").touch()
    failed = machine.run()
    assert failed.returncode == 2
    assert "no such package" in failed.stderr and "setup.log" in failed.stderr
    (machine.bin / "broken").unlink()
    assert machine.run("methods").stdout == "<methods>\n"
    assert machine.calls() == ["venv", "pip", "venv", "pip"]


def test_interrupted_set_up_is_done_again(machine: Machine) -> None:
    machine.python()
    (machine.bin / "slow").write_text("30")
    process = subprocess.Popen(
        [str(machine.root / "dit-sparse")], env=machine.env, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 20
    while machine.calls() != ["venv", "pip"] and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (machine.bin / "slow").unlink()
    assert machine.run("methods").stdout == "<methods>\n"
    assert machine.calls() == ["venv", "pip", "venv", "pip"]


def test_two_at_once_set_up_once(machine: Machine) -> None:
    machine.python()
    (machine.bin / "slow").write_text("1")
    command = [str(machine.root / "dit-sparse"), "methods"]
    both = [subprocess.Popen(command, env=machine.env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=30)[0] for process in both] == ["<methods>\n"] * 2
    assert machine.calls() == ["venv", "pip"]


def test_tests_share_the_environment_and_add_to_it(machine: Machine) -> None:
    machine.python()
    machine.run()
    tests = machine.run("tests/cli", "-x", script="run-tests")
    assert tests.returncode == 0, tests.stderr
    assert tests.stdout.startswith("pytest: ") and tests.stdout.endswith("tests/cli -x\n")
    assert machine.calls() == ["venv", "pip", "pip"]
    assert "[dev,eval,app]" in machine.log.read_text()
    machine.run()
    machine.run(script="run-tests")
    assert machine.calls() == ["venv", "pip", "pip"]


def test_a_gpu_adds_its_extra(machine: Machine) -> None:
    machine.python()
    machine.write("nvidia-smi", "#!/bin/sh\n")
    machine.run()
    machine.run()
    assert machine.calls() == ["venv", "pip"]
    assert "[gpu]" in machine.log.read_text()


def test_a_moved_checkout_is_set_up_again(machine: Machine) -> None:
    machine.python()
    machine.run()
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    assert machine.run("methods").stdout == "<methods>\n"
    assert machine.calls() == ["venv", "pip", "venv", "pip"]


def test_a_link_to_the_command_works(machine: Machine) -> None:
    machine.python()
    (machine.bin / "link").symlink_to(machine.root / "dit-sparse")
    done = subprocess.run([str(machine.bin / "link"), "methods"], env=machine.env, capture_output=True, text=True)
    assert done.stdout == "<methods>\n"


def test_a_relative_home_is_that_of_the_caller(machine: Machine) -> None:
    machine.python()
    machine.env["DIT_SPARSE_HOME"] = "home"
    assert machine.run(script="run-tests").returncode == 0
    assert (machine.bin / "home/venv").is_dir() and not (machine.root / "home").exists()
