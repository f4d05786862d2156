"""Loading a pipeline from the embedded model, a folder or the hub, checked, and switched on."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import torch

EMBEDDED = "embedded"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def load(
    model: str | Path = EMBEDDED,
    *,
    method: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preset: Any = None,
    **options: Any,
) -> Any:
    """An ordinary Diffusers pipeline, with sparse attention switched on when a method or an option is given.

    Args:
        model: "embedded" (the model inside this package, no network), a Diffusers folder, or a hub id "owner/name".
        method: name of a sparse method or a SparseProc; None leaves the pipeline untouched unless options are given.
        device: None takes the first CUDA device, or the CPU when there is none.
        dtype: None takes bfloat16 on CUDA and float32 elsewhere.
        preset: a Preset, its name or its file; it names the method, see SparseProc.
        options: options of the method, see SparseProc.

    Returns:
        The pipeline on its device, in evaluation mode.

    Raises:
        ValueError: unknown model, missing or damaged weights, or a wrong method or option; one line.
    """
    from ..doctor import broken_torchvision

    problem = broken_torchvision()
    if problem:
        raise ValueError(problem)
    from diffusers import DiffusionPipeline

    place = locate(model)
    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    local = isinstance(place, Path)
    stored = check_folder(place) if isinstance(place, Path) else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(str(place), dtype=dtype, local_files_only=local)
    except Exception as error:
        raise ValueError(f"model {str(model)!r} cannot be loaded: {_first_line(error)}") from error
    _refuse_unfilled(pipe, stored, place)
    pipe.to(device)
    if method is not None or preset is not None or options:
        from .. import enable

        enable(pipe, method, **options, **({} if preset is None else {"preset": preset}))
    return pipe


def locate(model: str | Path) -> Path | str:
    """The folder of a model, or its hub id when it is none.

    Raises:
        ValueError: `model` is neither "embedded", nor a folder, nor looks like a hub id.
    """
    if model == EMBEDDED:
        from .embedded import folder

        return folder()
    path = Path(model)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        return path
    if _HUB_ID.fullmatch(str(model)):
        return str(model)
    raise ValueError(f"model {str(model)!r} is unknown; use 'embedded', a folder, or a hub id like owner/name")


def check_folder(folder: Path) -> dict[str, set[str]]:
    """Look whether a Diffusers folder is complete, without reading its tensors.

    Args:
        folder: holds model_index.json and one subfolder for each part.

    Returns:
        For each part stored as safetensors, the names of its tensors.

    Raises:
        ValueError: something is missing or damaged; the line names the file.
    """
    index = _read_json(folder / "model_index.json")
    stored: dict[str, set[str]] = {}
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list) or not value or value[0] is None:
            continue
        if not (folder / part).is_dir():
            raise ValueError(f"weights are missing: {folder / part} does not exist")
        for shards in (folder / part).glob("*.safetensors.index.json"):
            for name in sorted(set(_read_json(shards).get("weight_map", {}).values())):
                if not (folder / part / name).is_file():
                    raise ValueError(f"weights are missing: {folder / part / name} does not exist")
        files = sorted((folder / part).glob("*.safetensors"))
        if files:
            stored[part] = set().union(*(_tensor_names(file) for file in files))
        elif (folder / part / "config.json").is_file() and not list((folder / part).glob("*.bin")):
            raise ValueError(f"weights are missing: {folder / part} holds no safetensors file")
    return stored


def _tensor_names(file: Path) -> set[str]:
    """Names in a safetensors file, whose length must be what its header promises."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"weights are damaged: {file} has {size} bytes and no complete header")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            expected = 8 + length + max(entries.values(), default=0)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"weights are damaged: the header of {file} cannot be read") from error
    if expected != size:
        raise ValueError(f"weights are damaged: {file} has {size} bytes instead of {expected}")
    return set(entries)


def _refuse_unfilled(pipe: Any, stored: dict[str, set[str]], folder: Path | str) -> None:
    """Diffusers fills tensors that a file lacks with random numbers, and leaves out those that the configuration has
    no place for, and goes on; here both are errors."""
    from diffusers import ModelMixin

    for part, names in stored.items():
        module = getattr(pipe, part, None)
        if not isinstance(module, torch.nn.Module):
            continue
        state = module.state_dict()
        known = {state[name].data_ptr() for name in names if name in state}
        # a tensor under two names (tied weights) is stored once
        unfilled = [n for n, tensor in state.items() if n not in names and tensor.data_ptr() not in known]
        if unfilled:
            gone = f"{unfilled[0]} ({len(unfilled)} tensors missing)"
            raise ValueError(f"weights are damaged: {folder}/{part} lacks {gone}")
        # Text encoders are often stored with the decoder that they do without.
        ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []
        unused = [n for n in sorted(names - set(state)) if not any(re.search(pattern, n) for pattern in ignored)]
        if unused and isinstance(module, ModelMixin):
            more = f"{unused[0]} ({len(unused)} tensors too many)"
            raise ValueError(f"weights are damaged: {folder}/{part}/config.json has no place for {more}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"weights are missing: {file} does not exist") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"weights are damaged: {file} cannot be read: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"weights are damaged: {file} holds no JSON object")
    return value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
