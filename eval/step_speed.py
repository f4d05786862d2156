"""Seconds of one denoising step at a real model's geometry, dense and sparse: `dit-sparse bench step`.

    python -m dit_sparse.eval.step_speed --model wan-14b-720p --density 0.2

Weights are random and made on the device; they say nothing about quality. A few layers are timed, the same with more
of each kind, and the step is scaled to the real number of layers: the table says so. Dense is the model as it is,
with the same compilation and, on an NVIDIA GPU, with cuDNN's attention first.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import dit_sparse
from dit_sparse.eval.peers import first_line
from dit_sparse.eval.speed import DTYPES, environment, median_ms, misuse, table
from dit_sparse.methods import all_methods

COLUMNS = ("model", "tokens", "what", "backend", "density", "ms a layer", "rest ms", "step s", "x dense", "GiB")
FEW, MORE = 1, 3  # layers of a kind in the small and in the larger model
LONG_RUN = 1000  # steps that a timed run pretends to have, so that every call is a step of its own


@dataclass(frozen=True)
class Geometry:
    """A real model's shape.

    Args:
        name, title: what users write, and what it is.
        cls: transformer class of Diffusers.
        kinds: the configuration's layer counts and how many the model has.
        inputs: (device, dtype) -> the forward's arguments at the size named.
        tokens: in self-attention, text included.
        config: what differs from the class's defaults.
    """

    name: str
    title: str
    cls: str
    kinds: dict[str, int]
    inputs: Callable[[str, torch.dtype], dict[str, Any]]
    tokens: int
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRow:
    """One measured step; `layer_ms` by kind of layer, `step_seconds` scaled to the real number of layers.

    `short`: more layers took no longer than few, so the times were too short to tell what a layer takes.
    """

    model: str
    tokens: int
    what: str
    backend: str
    density: float
    layer_ms: dict[str, float]
    rest_ms: float
    step_seconds: float
    speedup: float
    peak_gib: float
    fallbacks: dict[str, int]
    short: bool = False

    def cells(self) -> list[str]:
        """The row as printed."""
        layers = " + ".join(f"{ms:.2f}" for ms in self.layer_ms.values())
        return [self.model, str(self.tokens), self.what, self.backend, f"{self.density:.3f}", layers,
                f"{self.rest_ms:.1f}", f"{self.step_seconds:.3f}" + "?" * self.short,
                f"{self.speedup:.2f}" + "?" * self.short, f"{self.peak_gib:.2f}"]


def _randn(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _wan(frames: int, height: int, width: int, text: int = 512, text_dim: int = 4096
         ) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        return {"hidden_states": _randn(1, 16, frames, height, width, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 999.0, device=device),
                "encoder_hidden_states": _randn(1, text, text_dim, **made)}  # type: ignore[arg-type]

    return inputs


def _hunyuan(frames: int, height: int, width: int) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        mask = torch.zeros(1, 256, dtype=torch.int64, device=device)
        mask[:, :40] = 1  # a caption of forty words; the rest is padding, as the pipeline gives it
        return {"hidden_states": _randn(1, 16, frames, height, width, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 999.0, device=device), "encoder_attention_mask": mask,
                "encoder_hidden_states": _randn(1, 256, 4096, **made),  # type: ignore[arg-type]
                "pooled_projections": _randn(1, 768, **made),  # type: ignore[arg-type]
                "guidance": torch.full((1,), 6000.0, device=device, dtype=dtype)}

    return inputs


def _flux(height: int, width: int) -> Callable[[str, torch.dtype], dict[str, Any]]:
    def inputs(device: str, dtype: torch.dtype) -> dict[str, Any]:
        made = dict(device=device, dtype=dtype)
        places = torch.zeros(height, width, 3, device=device)
        places[..., 1] += torch.arange(height, device=device)[:, None]
        places[..., 2] += torch.arange(width, device=device)
        return {"hidden_states": _randn(1, height * width, 64, **made),  # type: ignore[arg-type]
                "timestep": torch.full((1,), 0.999, device=device),
                "encoder_hidden_states": _randn(1, 512, 4096, **made),  # type: ignore[arg-type]
                "pooled_projections": _randn(1, 768, **made),  # type: ignore[arg-type]
                "guidance": torch.full((1,), 3.5, device=device),
                "img_ids": places.reshape(-1, 3), "txt_ids": torch.zeros(512, 3, device=device)}

    return inputs


GEOMETRIES = {g.name: g for g in (
    Geometry("wan-14b-720p", "Wan2.1-14B, 81 frames of 1280x720 (21x45x80)", "WanTransformer3DModel",
             {"num_layers": 40}, _wan(21, 90, 160), 21 * 45 * 80),
    Geometry("wan-1.3b-480p", "Wan2.1-1.3B, 81 frames of 832x480 (21x30x52)", "WanTransformer3DModel",
             {"num_layers": 30}, _wan(21, 60, 104), 21 * 30 * 52,
             {"num_attention_heads": 12, "ffn_dim": 8960}),
    Geometry("hunyuan-720p", "HunyuanVideo, 129 frames of 1280x720 (33x45x80 + 256 text)",
             "HunyuanVideoTransformer3DModel", {"num_layers": 20, "num_single_layers": 40}, _hunyuan(33, 90, 160),
             33 * 45 * 80 + 256),
    Geometry("flux-2048", "FLUX.1-dev at 2048x2048 (128x128 + 512 text)", "FluxTransformer2DModel",
             {"num_layers": 19, "num_single_layers": 38}, _flux(128, 128), 128 * 128 + 512,
             {"guidance_embeds": True}),
    Geometry("tiny", "a Wan of 4 heads of 64 at 5x16x16, for a CPU", "WanTransformer3DModel", {"num_layers": 8},
             _wan(5, 32, 32, 32, 128), 5 * 16 * 16,
             {"num_attention_heads": 4, "attention_head_dim": 64, "text_dim": 128, "ffn_dim": 768}),
)}


def build(geometry: Geometry, counts: dict[str, int], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model with these numbers of layers, random weights, made on the device."""
    import diffusers

    default = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)  # a layer of fp32 weights on the way would be twice the memory
        with torch.device(device):
            model = getattr(diffusers, geometry.cls)(**{**geometry.config, **counts})
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def best_dense(device: str) -> Iterator[None]:
    """Dense attention by cuDNN where it can run, on an NVIDIA GPU; PyTorch's own choice elsewhere."""
    if torch.device(device).type != "cuda" or torch.version.hip:
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


@dataclass
class _Timed:
    """One model's forward in milliseconds, its peak memory, and what the summary said of it."""

    ms: float
    peak: float
    density: float = 1.0
    backend: str = "dense"
    fallbacks: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def _time_model(geometry: Geometry, counts: dict[str, int], proc: Any, device: str, dtype: torch.dtype,
                compiled: bool, seconds: float) -> _Timed:
    """Times one forward; `proc` is a SparseProc, or None for dense."""
    cuda = torch.device(device).type == "cuda"
    model, inputs = build(geometry, counts, device, dtype), geometry.inputs(device, dtype)
    if proc is not None:
        dit_sparse.enable(model, proc)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)  # type: ignore[operator]
    unit = inputs["timestep"] / 999 * (1 if inputs["timestep"].max() > 1 else 0.999)
    calls = [0]

    def step() -> None:
        # Another timestep each time: the next step of one long run, not the other branch of guidance.
        calls[0] += 1
        model(**(inputs | {"timestep": unit * (999 - calls[0] % 990)}), return_dict=False)

    with best_dense(device):
        step()
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        took = median_ms(step, device, seconds=seconds, least=5)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0
    timed = _Timed(took, peak)
    if proc is not None:
        report = dit_sparse.summary(model)
        timed.density, timed.fallbacks = report.density, dict(report.fallbacks)
        timed.backend = "+".join(sorted(report.backends))
    return timed


def _release(device: str, compiled: bool) -> None:
    """Give the memory of the last model back, which its graphs hold too, before the next is built."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def bench_step(geometry: Geometry, methods: Sequence[str], *, density: float = 0.2, device: str = "cuda",
               dtype: str = "bf16", compiled: bool = True, backend: str | None = None, seconds: float = 1.0,
               on_row: Callable[[StepRow], None] = lambda row: None) -> list[StepRow]:
    """Times a step dense, then with every method, no step and no layer kept dense.

    Args:
        geometry: one of `GEOMETRIES`.
        methods: names; the density is given to those that have the option.
        density: share of the blocks that is computed.
        device, dtype: where and in which type ("bf16", "fp16", "fp32").
        compiled: compile the repeated blocks, dense and sparse alike.
        backend: kernel of the sparse calls; None: the fastest that can run.
        seconds: of timed calls for each number of layers.
        on_row: called with each row as it is measured.

    Returns:
        The rows, dense first.

    Raises:
        SparseFallbackError: a method's call could not run sparse: its row would tell of dense attention.
    """
    kinds = list(geometry.kinds)
    base = dict.fromkeys(kinds, FEW)
    rows: list[StepRow] = []
    for name in (None, *methods):
        def timed(counts: dict[str, int], name: str | None = name) -> _Timed:
            proc = None if name is None else _proc(name, density, backend)
            _release(device, compiled)
            return _time_model(geometry, counts, proc, device, DTYPES[dtype], compiled, seconds)

        few = timed(base)
        more = {kind: timed(base | {kind: MORE}) for kind in kinds}
        layer = {kind: max(0.0, (more[kind].ms - few.ms) / (MORE - FEW)) for kind in kinds}
        rest = max(0.0, few.ms - FEW * sum(layer.values()))
        fallbacks: Counter[str] = sum((Counter(m.fallbacks) for m in (few, *more.values())), Counter())
        step = (rest + sum(layer[kind] * geometry.kinds[kind] for kind in kinds)) / 1e3
        rows.append(StepRow(geometry.name, geometry.tokens, name or "dense", few.backend, few.density, layer, rest,
                            step, rows[0].step_seconds / step if rows else 1.0,
                            max(m.peak for m in more.values()), dict(fallbacks),
                            min(layer.values()) == 0 or (bool(rows) and rows[0].short)))
        on_row(rows[-1])
    return rows


def _proc(name: str, density: float, backend: str | None) -> Any:
    takes_density = "density" in getattr(all_methods().get(name), "__dataclass_fields__", {})
    options: dict[str, Any] = {"density": density} if takes_density else {}
    return dit_sparse.SparseProc(name, dense_steps=0, dense_layers=0, num_steps=LONG_RUN, backend=backend, strict=True,
                                 **options)


def default_models(device: str) -> list[str]:
    """What is timed where no model is named."""
    return ["wan-14b-720p" if torch.device(device).type == "cuda" else "tiny"]


def needs_gpu(models: Sequence[str], device: str) -> str:
    """Why a model cannot be timed on the device, in one line, or "": a step would take hours."""
    large = [name for name in models if name != "tiny"] if torch.device(device).type == "cpu" else []
    return f"--model {large[0]} needs a GPU; on a CPU use --model tiny" if large else ""


def note(rows: Sequence[StepRow]) -> str:
    """What the table's reader must know."""
    kinds = ", ".join(f"{GEOMETRIES[name].title}: {' + '.join(map(str, GEOMETRIES[name].kinds.values()))} layers"
                      for name in dict.fromkeys(row.model for row in rows) if name in GEOMETRIES)
    return (f"Random weights. Timed with {FEW} and {MORE} layers of each kind and scaled to the model's own ({kinds}); "
            "plan included, no step or layer kept dense. GiB: peak of the larger timed model, not of the whole one."
            + " ?: --seconds is too short to tell a layer's time." * any(row.short for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; `--out` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(GEOMETRIES))
    parser.add_argument("--method", action="append", help="default: svg, rainfusion2 and radial")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--backend")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(argv)
    why = misuse(options.device, [options.density], options.method, options.backend)
    models = options.model or ([] if why else default_models(options.device))
    if why := why or needs_gpu(models, options.device):
        parser.error(why)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    where, rows = environment(options.device), []
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    for name in models:
        try:
            rows += bench_step(GEOMETRIES[name], options.method or ["svg", "rainfusion2", "radial"],
                               density=options.density, device=options.device, dtype=options.dtype,
                               compiled=not options.eager, backend=options.backend, seconds=options.seconds,
                               on_row=lambda row: print("  ".join(row.cells()), flush=True))
        except dit_sparse.SparseFallbackError as error:
            parser.error(first_line(error))
        if options.out:  # after every model: a long run that is cut off keeps what it has
            options.out.write_text(json.dumps({"environment": where, "rows": [asdict(row) for row in rows]}, indent=1))
    print(table((row.cells() for row in rows), COLUMNS))
    print(note(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
