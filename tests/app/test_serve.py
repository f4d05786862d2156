"""The endpoints for programs, the command line, and what the server gives away (nothing)."""

import base64
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from dit_sparse.app import models, serve
from dit_sparse.cli import main
from dit_sparse.commands.console import UserError

from .conftest import PROMPT, SMALL, jobs, until


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False, analytics_enabled=False)


def test_endpoints_have_stable_names(client: Any) -> None:
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(found) == {"/info", "/generate", "/inspect", "/cancel"}


def test_generate_by_a_program(client: Any, tmp_path: Path) -> None:
    info = client.predict(api_name="/info")
    assert info["models"] == ["embedded"] and info["device"].startswith("cpu")
    assert info["methods"]["svg"]["options"]["density"]["default"] == 0.25
    made = client.predict(prompt=PROMPT, **SMALL, options={"density": 0.4}, api_name="/generate")
    assert made["settings"]["options"]["density"] == 0.4 and made["numbers"]["psnr"] > 20
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(base64.b64decode(made["clips"]["sparse"]["base64"]))
    from dit_sparse.pipelines.video_io import read_video

    assert read_video(clip).shape == (5, 3, 64, 64)


def test_inspect_by_a_program(client: Any) -> None:
    found = client.predict(prompt=PROMPT, width=64, height=64, frames=5, steps=2, api_name="/inspect")
    assert found["grid"] == "3x4x4" and len(found["calls"]) == 2 * 8 * 2
    assert set(found["calls"][-1]) >= {"step", "layer", "method", "recall", "relative_error"}


def test_refusals_and_a_stop_come_in_words(client: Any) -> None:
    from gradio_client.exceptions import AppError

    for given, words in (({"method": "nope"}, "unknown; use one of"), ({"model": "/etc"}, "not offered"),
                         ({"options": {"rows": {"path": "/etc/passwd"}}}, "rows")):
        with pytest.raises(AppError, match=words):
            client.predict(prompt=PROMPT, **{**SMALL, **given}, api_name="/generate")
    for endpoint in ("/generate", "/inspect"):
        job = client.submit(prompt=PROMPT, steps=100, api_name=endpoint)
        until(jobs)
        assert client.predict(api_name="/cancel") == 1
        with pytest.raises(AppError, match="cancelled"):
            job.result(timeout=20)
        until(lambda: not jobs())


def test_the_server_hands_out_and_takes_no_files(address: str, tmp_path: Path) -> None:
    def status(path: str, data: bytes | None = None, kind: str = "") -> int:
        request = urllib.request.Request(address + path, data, {"Content-Type": kind} if kind else {})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status("") == 200
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    for file in (secret, Path("pyproject.toml").resolve(), Path("/etc/passwd")):
        assert status(f"gradio_api/file={file}") in (403, 404)
    body = (b"--b\r\nContent-Disposition: form-data; name=\"files\"; filename=\"a.bin\"\r\n\r\n" + b"x" * 999
            + b"\r\n--b--\r\n")
    assert status("gradio_api/upload", body, "multipart/form-data; boundary=b") in (400, 413)
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    assert folder.stat().st_mode & 0o077 == 0
    assert [file for file in folder.rglob("*") if file.is_file()] == []


def test_models_are_named_on_the_command_line_only(tmp_path: Path) -> None:
    (tmp_path / "one" / "wan").mkdir(parents=True)
    (tmp_path / "two" / "wan").mkdir(parents=True)
    shelf = models.Shelf(["embedded", str(tmp_path / "one" / "wan"), "Owner/name"], "cpu")
    assert shelf.names == ["embedded", "wan", "Owner/name"]  # a folder's place stays private
    with pytest.raises(UserError, match="another model of this page is called 'wan'"):
        models.Shelf([str(tmp_path / "one" / "wan"), str(tmp_path / "two" / "wan")], "cpu")
    with pytest.raises(UserError, match="is unknown"):
        models.Shelf(["nothing here"], "cpu")


@pytest.mark.parametrize("words, said", [
    (["--model", "nothing here"], "is unknown; use 'embedded', a folder, or a hub id"),
    (["--device", "toaster"], "cannot be used"),
    (["--port", "99999"], "--port"),
])
def test_wrong_command_lines(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'dit-sparse[app]'")
    for run in (lambda: serve.main(words), lambda: main(["app", *words])):
        assert run() == 2
        err = capsys.readouterr().err
        assert err.startswith("dit-sparse: error: ") and said in err and len(err.splitlines()) == 1


def test_an_address_that_is_taken_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 2
        assert f"--port {port}" in capsys.readouterr().err
    assert serve.main(["--host", "no.such.host.invalid", "--port", "0"]) == 2
    assert serve.open_port("127.0.0.1", 0) > 0


def test_without_gradio_one_line_says_what_to_install() -> None:
    code = ("import sys; sys.modules['gradio'] = None\n"
            "from dit_sparse.app import main\nsys.exit(main(['--port', '0']))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install 'dit-sparse[app]'" in done.stderr and "Traceback" not in done.stderr


def test_only_this_machine_is_served_unless_asked() -> None:
    asked = serve.arguments_of([])
    assert asked.host == "127.0.0.1" and not asked.share


def test_a_second_model_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    """A folder's own defaults fill the form; the model runs through the same checks and code."""
    from dit_sparse.app import wanted
    from dit_sparse.app.job import Job
    from dit_sparse.app.work import make
    from tests.tiny_wan import save_tiny_wan

    shelf = models.Shelf([str(save_tiny_wan(tmp_path / "tiny"))], "cpu")
    assert shelf.geometry("tiny") == {"height": 480, "width": 832, "frames": 81, "steps": 50, "guidance_scale": 5.0}
    assert wanted.check(shelf, prompt="x").shape.tokens == 41 * 30 * 52
    asked = wanted.check(shelf, prompt="a red circle", width=64, height=64, frames=5, steps=2, mode="sparse")
    job = Job(shelf.lock)
    job.start(lambda job: make(shelf, asked, job))
    assert job.join(60) and job.error is None, job.error
    assert job.result.numbers["frames"] == 5 and len(job.result.density) == 2
    assert models.host_defaults(None) == dict.fromkeys(models.HOST_NAMES)


def test_bench_on_a_gpu_has_its_fields(shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gr = pytest.importorskip("gradio", reason="needs Gradio: pip install 'dit-sparse[app]'")
    import threading

    from dit_sparse.app import bench_tab
    from dit_sparse.app.job import Job
    from dit_sparse.app.sessions import Sessions

    monkeypatch.setattr(models.Shelf, "cuda", True)
    monkeypatch.setattr(bench_tab, "SECONDS", 0.01)
    with gr.Blocks(analytics_enabled=False) as page:
        bench_tab.bench_tab(shelf, Sessions(threading.Lock()))
    assert {block.elem_id for block in page.blocks.values()} >= {"bench-kernels", "bench-step", "bench-state"}
    columns, rows, _ = bench_tab.kernel_rows(Job(threading.Lock()), "cpu", 256, 0.5)
    assert rows and all(len(row) == len(columns) for row in rows)
    for given, words in (((10**9, 0.5), "tokens"), ((256, 7), "density")):
        with pytest.raises(UserError, match=words):
            bench_tab.kernel_rows(Job(threading.Lock()), "cpu", *given)
    for given, words in ((("none", [], 0.5), "model"), (("wan-14b-720p", ["nope"], 0.5), "method")):
        with pytest.raises(UserError, match=words):
            bench_tab.step_rows(Job(threading.Lock()), "cpu", *given)
