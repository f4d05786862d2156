"""The wheel holds everything the package needs and nothing else; importing it costs nothing."""

import email
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {"dit_sparse": "dit_sparse", "kernels": "dit_sparse/kernels", "pipelines": "dit_sparse/pipelines",
         "eval": "dit_sparse/eval"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing appears in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ROOMS:
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def expected_files() -> set[str]:
    """Every module of the rooms, under its place in the package."""
    return {
        f"{place}/{file.relative_to(ROOT / room).as_posix()}"
        for room, place in ROOMS.items()
        for file in (ROOT / room).rglob("*.py")
    }


def test_wheel_is_pure_python(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name.endswith("-py3-none-any.whl")


def test_every_module_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.endswith(".py")}
    missing, extra = expected_files() - packed, packed - expected_files()
    assert not missing, f"list their folders under [tool.setuptools] packages: {sorted(missing)}"
    assert not extra


def test_data_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert "dit_sparse/py.typed" in names
    weights = ROOT / "pipelines/embedded/weights"
    for file in (file for file in weights.rglob("*") if file.is_file()):
        assert f"dit_sparse/pipelines/embedded/weights/{file.relative_to(weights).as_posix()}" in names
    assert "dit_sparse/eval/measures/niqe.json" in names
    assert {f"dit_sparse/kernels/cuda/{file.name}" for file in (ROOT / "kernels/cuda").iterdir()} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dit_sparse"}


def test_plain_install_is_lean(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    plain = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.split(">")[0].split("<")[0].split("=")[0].split(";")[0].strip() for line in plain}
    assert names == {
        "accelerate", "av", "diffusers", "numpy", "pillow", "rich", "safetensors", "torch", "transformers", "typer",
    }
    assert set(metadata.get_all("Provides-Extra")) == {"gpu", "app", "eval", "dev"}


def test_every_requirement_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints/tested.txt").read_text().splitlines()
        if "==" in line
    }
    extras = project["optional-dependencies"]
    for line in project["dependencies"] + extras["gpu"] + extras["dev"] + extras["eval"]:
        name = re.split(r"[<>=;]", line)[0].strip().lower()
        assert name in pinned, f"constraints/tested.txt has no line for {name}"


def test_the_rooms_shadow_nothing() -> None:
    for name in ("kernels", "pipelines", "eval"):
        assert not (ROOT / name / "__init__.py").exists()
    found = importlib.util.find_spec("kernels")
    assert found is None or found.origin is None or ROOT not in Path(found.origin).parents


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    loaded = run("import sys, dit_sparse, dit_sparse.cli; print(*sys.modules)").split()
    assert not {"torch", "diffusers", "transformers", "triton"} & set(loaded)


def test_package_works_without_triton_and_without_the_extras() -> None:
    code = """
import sys
for name in ("triton", "torchvision", "torchmetrics", "matplotlib", "cv2", "gradio", "peft", "ftfy", "imageio_ffmpeg"):
    sys.modules[name] = None  # importing it raises ImportError
import dit_sparse, dit_sparse.doctor
from dit_sparse import SparseProc, disable, enable, summary
from dit_sparse.pipelines.load import load
from dit_sparse.pipelines import hosts, text_to_image, text_to_video, video_io, video_to_video
from dit_sparse.eval import compare, fidelity, report, run
from dit_sparse.eval.measures import table
from dit_sparse.commands import compare, console, generate, listing, request
print(*(method.name for method in dit_sparse.methods()))
"""
    assert {"dense", "svg"} <= set(run(code).split())
