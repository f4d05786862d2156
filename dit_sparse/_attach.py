"""Gives Diffusers' classes `set_attn_processor` for a SparseProc as soon as Diffusers is imported, before or after us.

Importing Diffusers takes seconds, so `import dit_sparse` does not do it: the few modules that define the classes are
watched, and attached to when they load.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .entry import attach

# module -> the class in it that receives or recognises a SparseProc
WATCHED = {
    "diffusers.models.attention": "AttentionMixin",
    "diffusers.models.modeling_utils": "ModelMixin",
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}


class _After(importlib.abc.Loader):
    """Runs a module's own loader, then attaches."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        _attach(module)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds only the watched modules, through the other finders."""

    def find_spec(self, name: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _After(spec.loader)
                return spec
        return None


def _enable(target: Any, proc: Any) -> None:
    from .processor import enable

    enable(target, proc)


def _attach(module: ModuleType) -> None:
    """Patch the class that this module defines."""
    owner = getattr(module, WATCHED[module.__name__], None)
    if owner is not None:
        attach(owner, _enable)


def install() -> None:
    """Attach to what is loaded already, and watch for the rest; twice equals once."""
    for name in WATCHED:
        if name in sys.modules:
            _attach(sys.modules[name])
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
