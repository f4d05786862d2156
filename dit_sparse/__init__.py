"""dit-sparse: makes Diffusers diffusion transformers faster by not computing the attention that does not matter.

    from dit_sparse import SparseProc
    pipe.set_attn_processor(SparseProc())
"""

from __future__ import annotations

import importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout or an editable install the rooms kernels/, pipelines/ and eval/ lie beside this package; a wheel
# has them inside. They hold no __init__.py of their own so that they shadow no other top-level package.
_root = _Path(__file__).resolve().parent.parent
_checkout = (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir()
if _checkout and not (_root / "dit_sparse" / "kernels").exists():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from .grid import TokenGrid
    from .processor import SparseProc, disable, enable, methods, summary
    from .report import Summary
    from .session import SparseFallbackError
    from .tuning.preset import Preset, presets
    from .tuning.tune import tune

_HOMES = {
    "SparseProc": "processor", "enable": "processor", "disable": "processor", "summary": "processor",
    "SparseFallbackError": "session", "Summary": "report", "TokenGrid": "grid",
    "Preset": "tuning.preset", "presets": "tuning.preset", "tune": "tuning.tune",
}
__all__ = ["Preset", "SparseFallbackError", "SparseProc", "Summary", "TokenGrid", "disable", "enable", "methods",
           "presets", "summary", "tune"]


def __getattr__(name: str) -> Any:
    """Public names load on first use: importing dit_sparse costs neither torch nor Diffusers."""
    if name == "methods":
        return importlib.import_module(".methods", __name__)  # a package that can be called: see there
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


from . import _attach  # noqa: E402

_attach.install()
