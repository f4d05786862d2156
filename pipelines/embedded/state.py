"""The state a training run resumes from: sharded safetensors and one JSON file, small enough to carry around.

Weights are kept in fp32, their moving average in bf16, optimiser moments not at all: about 52 MB in four files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHARD = 15_500_000  # bytes; below the 16 MiB of the largest file allowed


def save(path: Path | str, tensors: dict[str, torch.Tensor], facts: dict) -> list[Path]:
    """Write tensors and JSON-able facts into the folder, replacing an earlier state. Returns the files written.

    The JSON file is written last and names the shards, so a run that is cut off while saving leaves the shards of the
    state before it readable (every save uses new names).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    old = sorted(path.glob("state-*.safetensors"))
    serial = facts.get("serial", 0) + 1
    shards, size = [{}], 0
    for name, value in tensors.items():
        value = value.detach().contiguous().cpu()
        if size + value.nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    files = []
    for i, shard in enumerate(shards):
        files.append(path / f"state-{serial}-{i}.safetensors")
        save_file(shard, files[-1])
    facts["serial"] = serial
    fresh = path / "state.json.new"
    fresh.write_text(json.dumps({**facts, "shards": [file.name for file in files]}, indent=1))
    fresh.replace(path / "state.json")
    for file in old:
        if file not in files:
            file.unlink()
    return [*files, path / "state.json"]


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and facts of the folder's state; two empty dicts when there is none."""
    path = Path(path)
    if not (path / "state.json").exists():
        return {}, {}
    facts = json.loads((path / "state.json").read_text())
    tensors = {}
    for name in facts.pop("shards"):
        tensors.update(load_file(path / name, device=str(device)))
    return tensors, facts


def copy(path: Path | str, target: Path | str) -> None:
    """Copy the state into another folder, and drop older shards there."""
    path, target = Path(path), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    names = json.loads((path / "state.json").read_text())["shards"]
    for name in [*names, "state.json"]:
        shutil.copyfile(path / name, target / name)
    for file in target.glob("state-*.safetensors"):
        if file.name not in names:
            file.unlink()


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names start with "prefix.", without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}


def put(prefix: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's tensors as fp32 under "prefix.", each tied weight once, compiled or not."""
    seen, out = set(), {}
    for name, value in module.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            out[f"{prefix}.{name.replace('_orig_mod.', '')}"] = value
    return out
