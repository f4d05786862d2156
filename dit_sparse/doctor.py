"""What works on this machine and what does not, each with the next step to take."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]

NEEDED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow", "av", "rich", "typer")
# package -> what it adds
OPTIONAL = {
    "triton": "GPU kernels; extra gpu",
    "torchmetrics": "further image metrics; extra eval",
    "matplotlib": "plots; extra eval",
    "opencv-python-headless": "optical flow; extra eval (opencv-python serves as well)",
    "gradio": "the app; extra app",
    "peft": "LoRA in Diffusers",
    "ftfy": "cleaning of prompts in Diffusers",
}


@dataclass(frozen=True)
class Check:
    """One finding: "ok", "note" (something optional is missing) or "problem", with details and the next step."""

    name: str
    status: Status
    detail: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """The same as plain data."""
        return asdict(self)


def broken_torchvision() -> str:
    """A line that says what to do when torchvision is present but cannot be imported, else "".

    A torchvision built for another PyTorch raises when it is imported, and then so do Diffusers' pipelines.
    """
    if importlib.util.find_spec("torchvision") is None:
        return ""
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        version = _version("torchvision") or "unknown version"
        return (
            f"torchvision {version} is present but broken ({_first_line(error)}), so Diffusers cannot be imported; "
            "dit-sparse does not need it: pip uninstall torchvision"
        )
    return ""


def examine() -> list[Check]:
    """Look at everything; nothing is raised, every failure becomes a finding."""
    checks: list[Check] = []
    for part in (_python, _packages, _torchvision, _diffusers, _devices, _backends, _methods, _model, _video):
        try:
            checks += part()
        except Exception as error:
            name = part.__name__.lstrip("_")
            checks.append(Check(name, "problem", f"{type(error).__name__}: {_first_line(error)}"))
    return checks


def _python() -> list[Check]:
    good = sys.version_info >= (3, 11)
    detail = f"{platform.python_version()} ({sys.executable}), {platform.system()} {platform.machine()}"
    return [Check("Python", "ok" if good else "problem", detail, "" if good else "install Python 3.11 or newer")]


def _packages() -> list[Check]:
    checks = []
    for name in NEEDED:
        version = _version(name)
        advice = "" if version else f"pip install {name}"
        checks.append(Check(name, "ok" if version else "problem", version or "not installed", advice))
    for name, use in OPTIONAL.items():
        version = _version(name)
        if name == "opencv-python-headless" and not version:
            version = _version("opencv-python")
        checks.append(Check(name, "ok" if version else "note", version or f"not installed ({use})"))
    return checks


def _torchvision() -> list[Check]:
    problem = broken_torchvision()
    if problem:
        detail, _, advice = problem.rpartition(": ")
        return [Check("torchvision", "problem", detail, advice)]
    version = _version("torchvision")
    return [Check("torchvision", "ok", version or "not installed (not needed)")]


def _diffusers() -> list[Check]:
    from . import bridge

    problem = bridge.check_diffusers()
    if problem:
        return [Check("Diffusers support", "problem", problem, "pip install 'diffusers>=0.42,<0.43'")]
    from diffusers import WanPipeline  # noqa: F401  (the import itself is the check)

    return [Check("Diffusers support", "ok", "this version is supported")]


def _devices() -> list[Check]:
    import torch

    checks = [Check("CPU", "ok", f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")]
    if not torch.cuda.is_available():
        advice = ""
        if torch.version.cuda is not None:
            advice = "this PyTorch is built for CUDA but sees no GPU: see whether nvidia-smi works"
        return [*checks, Check("GPU", "note", "none that PyTorch can use; everything runs on the CPU", advice)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
        checks.append(Check(f"GPU {index}", "ok", detail))
    return checks


def _backends() -> list[Check]:
    from . import routing
    from .kernels.attention import device_backends

    checks = [
        Check(f"backend {name}", "ok" if available else "note", reason or "can run")
        for name, available, reason in device_backends()
    ]
    used, words = routing.state()
    return [*checks, Check("routing kernels", "ok" if used else "note", words)]


def _methods() -> list[Check]:
    from .processor import methods

    return [Check("methods", "ok", ", ".join(method.name for method in methods()))]


def _model() -> list[Check]:
    from .pipelines.embedded import folder
    from .pipelines.load import check_folder

    try:
        check_folder(folder())
    except ValueError as error:
        return [Check("embedded model", "problem", str(error), "install dit-sparse again")]
    size = sum(file.stat().st_size for file in folder().rglob("*") if file.is_file())
    return [Check("embedded model", "ok", f"complete, {size / 2**20:.1f} MiB in {folder()}")]


def _video() -> list[Check]:
    import av

    if "libx264" in av.codecs_available:
        return [Check("H.264", "ok", "PyAV can encode it")]
    return [Check("H.264", "problem", "this PyAV has no libx264", "pip install --force-reinstall av")]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

