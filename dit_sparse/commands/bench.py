"""`dit-sparse bench kernels | routing | step | ladder | generate`: dense and sparse side by side on this machine."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from .console import UserError, print_json, print_table, progress, refusing
from .request import check_writable, parse_options

MAX_TOKENS = 1_000_000
Update = Callable[[int, int], None]
# Rows, column names, the lines below the table, what --json has beside the rows.
Measured = tuple[list[Any], Sequence[str], str, dict[str, Any]]
# Where nothing is said: a size that shows the kernel, in seconds on two cores and in milliseconds on a GPU.
CPU = {"tokens": 4096, "heads": 4, "head_dim": 64, "dtype": "fp32", "block_size": 64}
CUDA = {"tokens": 32768, "heads": 12, "head_dim": 128, "dtype": "bf16", "block_size": 128}


TOPICS = ("kernels", "routing", "step", "ladder", "generate")
OPTIONS = {  # which options a topic takes, beside --density, --device, --seconds and --json
    "kernels": ("tokens", "heads", "head_dim", "dtype", "block_size", "backend"),
    "routing": ("heads", "head_dim", "dtype", "grid", "methods"),
    "step": ("dtype", "backend", "models", "methods", "fp8", "profile"),
    "ladder": ("heads", "head_dim", "dtype", "grid", "out"),
    "generate": ("dtype", "models", "methods", "dense_steps", "dense_layers", "step_cache", "out"),
}


def bench(
    what: str = "kernels",
    *,
    densities: list[float] | None = None,
    device: str | None = None,
    seconds: float = 0.4,
    as_json: bool = False,
    **options: Any,
) -> None:
    """Measure and print one of the topics; `options` are the command's other options, None where not given."""
    import torch

    from ..eval.speed import DTYPES, environment
    from ..kernels.attention import backends
    from .run import check_device

    if what not in TOPICS:
        raise UserError(f"bench {what!r} is unknown; use one of {', '.join(TOPICS)}")
    for name, value in options.items():
        if value is not None and name not in OPTIONS[what]:
            flag = {"models": "model", "methods": "method"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{flag} is not an option of bench {what}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if options.get("dtype") not in (None, *DTYPES):
        raise UserError(f"--dtype {options['dtype']!r} is not allowed; use one of {', '.join(DTYPES)}")
    if any(not 0 < density <= 1 for density in densities or ()):
        raise UserError(f"--density: {densities} is not allowed; use numbers in (0, 1]")
    names = [known.name for known in backends()]
    if options.get("backend") not in (None, *names):
        raise UserError(f"--backend {options['backend']!r} is unknown; use one of {', '.join(names)}")
    given = {name: value for name, value in options.items() if value is not None}
    measure = {"kernels": _kernels, "routing": _routing, "step": _step, "ladder": _ladder,
               "generate": _generate}[what]
    with refusing(ValueError, RuntimeError), progress("measuring") as update:
        rows, columns, notes, more = measure(given, densities, device, seconds, update)
    where = environment(device)
    if as_json:
        print_json({"environment": where, "rows": [dataclasses.asdict(row) for row in rows], **more})
        return
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print_table(columns, [row.cells() for row in rows])
    print(notes)


def _cuda(device: str) -> bool:
    return device.split(":")[0] == "cuda"


def _kernels(
    given: dict[str, Any], densities: list[float] | None, device: str, seconds: float, update: Update
) -> Measured:
    from ..eval.peers import available
    from ..eval.speed import COLUMNS, DTYPES, bench_attention

    defaults = CUDA if _cuda(device) else CPU
    densities = densities or [0.5, 0.25, 0.1]
    sizes = given.pop("tokens", None) or [int(str(defaults["tokens"]))]
    if any(not 1 <= size <= MAX_TOKENS for size in sizes):
        raise UserError(f"--tokens: {sizes} is not allowed; use numbers from 1 to {MAX_TOKENS}")
    backend = given.pop("backend", None)
    shape = {name: given.get(name, value) for name, value in defaults.items() if name != "tokens"}
    rows: list[Any] = []
    _check_memory("--tokens", max(sizes), shape, device)
    peers, missing = available(device, DTYPES[str(shape["dtype"])])
    failed: dict[str, str] = {}
    extra = sum(not peer.sparse for peer in peers), sum(peer.sparse for peer in peers)
    expected, done = len(sizes) * (2 + extra[0] + (3 + extra[1]) * len(densities)), itertools.count(1)
    for size in sizes:
        rows += bench_attention(
            tokens=size,
            densities=densities,
            device=device,
            backend=backend,
            seconds=seconds,
            peers=True,
            on_row=lambda _row: update(next(done), expected),
            on_failure=failed.setdefault,
            **shape,
        )
    notes = ["TFLOP/s count the blocks that are computed; the mask has its own row."]
    listed = {**missing, **failed} if _cuda(device) else failed  # on a CPU every one of them is missing
    notes += [f"Not measured: {name}, {reason}." for name, reason in listed.items()]
    return rows, COLUMNS, "\n".join(notes), {"not_measured": {**missing, **failed}}


def _routing(
    given: dict[str, Any], densities: list[float] | None, device: str, seconds: float, update: Update
) -> Measured:
    from ..eval.method_speed import COLUMNS, bench_methods
    from ..grid import TokenGrid

    cuda = _cuda(device)
    grid = TokenGrid.parse(given.get("grid") or ("21x45x80" if cuda else "5x16x16"))
    methods = _known_methods(given.get("methods"))
    shape: dict[str, Any] = {
        "heads": given.get("heads", 40 if cuda else 4),
        "head_dim": given.get("head_dim", 128 if cuda else 64),
        "dtype": given.get("dtype", "bf16" if cuda else "fp32"),
    }
    if grid.tokens > MAX_TOKENS:
        raise UserError(f"--grid {given.get('grid')} has {grid.tokens} tokens; the limit is {MAX_TOKENS}")
    _check_memory("--grid", grid.tokens, shape, device)
    rows: list[Any] = []
    for done, density in enumerate(densities or [0.2]):
        update(done, len(densities or [0.2]))
        rows += bench_methods(
            grid,
            density=density,
            device=device,
            names=methods,
            seconds=seconds,
            **shape,
        )
    return rows, COLUMNS, f"{grid}: random activations; the plan is a method's scores, selection and lists.", {}


def _step(
    given: dict[str, Any], densities: list[float] | None, device: str, seconds: float, update: Update
) -> Measured:
    from ..eval import step_speed
    from .run import check_backend

    cuda = _cuda(device)
    models = given.get("models") or step_speed.default_models(device)
    known = step_speed.GEOMETRIES
    if unknown := [name for name in models if name not in known]:
        raise UserError(f"--model {unknown[0]!r} is unknown; use one of {', '.join(known)}")
    fp8 = given.get("fp8") or []
    if why := step_speed.needs_gpu(models, device) or step_speed.fp8_missing(fp8, device):
        raise UserError(why)
    methods = _known_methods(given.get("methods")) or ["svg", "rainfusion2", "radial"]
    check_backend(given.get("backend"), device)
    rows: list[Any] = []
    variants = len(step_speed.variants(methods, fp8))
    expected, done = len(models) * len(densities or [0.2]) * variants, itertools.count(1)
    for name in models:
        for density in densities or [0.2]:
            rows += step_speed.bench_step(
                known[name],
                methods,
                density=density,
                device=device,
                dtype=given.get("dtype", "bf16" if cuda else "fp32"),
                compiled=cuda,
                backend=given.get("backend"),
                seconds=seconds,
                fp8=fp8,
                profiled=bool(given.get("profile")),
                on_row=lambda _row: update(next(done), expected),
            )
    profiles = [line for row in rows for line in row.profile_lines]
    return rows, step_speed.COLUMNS, "\n".join([step_speed.note(rows), *profiles]), {}


def _ladder(
    given: dict[str, Any], densities: list[float] | None, device: str, seconds: float, update: Update
) -> Measured:
    from ..eval import ladder
    from ..grid import TokenGrid

    cuda = _cuda(device)
    grid = TokenGrid.parse(given.get("grid") or ("21x45x80" if cuda else "3x18x20"))
    shape = {
        "heads": given.get("heads", 40 if cuda else 2),
        "head_dim": given.get("head_dim", 128 if cuda else 64),
        "dtype": given.get("dtype", "bf16" if cuda else "fp32"),
    }
    if len(densities or ()) > 1:
        raise UserError("--density: bench ladder takes one")
    if grid.tokens > MAX_TOKENS:
        raise UserError(f"--grid {given.get('grid')} has {grid.tokens} tokens; the limit is {MAX_TOKENS}")
    _check_memory("--grid", grid.tokens, shape, device)
    if out := given.get("out"):
        _prepare(pathlib.Path(out), "ladder", "csv", "json", "png")
    density, failed = (densities or [0.25])[0], dict[str, str]()
    rounds = max(2, round(30 * seconds))
    rows = ladder.bench_ladder(
        grid, density=density, device=device, rounds=rounds, on_failure=failed.setdefault, **shape
    )
    title, footer = ladder.titles(grid, density=density, device=device, **shape)
    notes = [f"{title}: random activations and lists; the rungs take turns."]
    notes += [f"Not measured: {name}, {reason}." for name, reason in failed.items()]
    if out:
        notes += _told(ladder.write(rows, pathlib.Path(out), title, footer))
    return rows, ladder.COLUMNS, "\n".join(notes), {"not_measured": failed}


def _generate(
    given: dict[str, Any], densities: list[float] | None, device: str, seconds: float, update: Update
) -> Measured:
    from ..eval import generate_speed as speed
    from ..eval.step_speed import default_models, needs_gpu

    cuda = _cuda(device)
    names, methods = given.get("models") or default_models(device), _known_methods(given.get("methods"))
    for flag, values in (("density", densities), ("model", names), ("method", methods)):
        if len(values or ()) > 1:
            raise UserError(f"--{flag}: bench generate takes one")
    if names[0] not in speed.models():
        raise UserError(f"--model {names[0]!r} is not allowed; use one of {', '.join(speed.models())}")
    if why := needs_gpu(names, device):
        raise UserError(why)
    cache = given.get("step_cache", speed.CACHES[0])
    if cache not in speed.CACHES:
        raise UserError(f"--step-cache {cache!r} is not allowed; use one of {', '.join(speed.CACHES)}")
    method = (methods or [speed.METHOD])[0]
    steps = parse_options([f"dense_steps={given.get('dense_steps', speed.DENSE_STEPS)}"])["dense_steps"]
    asked = speed.warmups(method, steps, given.get("dense_layers", speed.DENSE_LAYERS))
    if out := given.get("out"):
        _prepare(pathlib.Path(out), "generate", "csv", "json", "md", "png")
    done = itertools.count(1)
    kinds = speed.measure(
        speed.GEOMETRIES[names[0]],
        method,
        density=(densities or [speed.DENSITY])[0],
        device=device,
        dtype=given.get("dtype", "bf16" if cuda else "fp32"),
        compiled=cuda,
        seconds=seconds,
        cache=cache,
        on_row=lambda _what: update(next(done), 5),
    )
    ladders = [speed.rungs(kinds, warmup) for warmup in asked]
    notes = speed.notes(kinds, ladders)
    more = {"notes": list(notes), "rate": dataclasses.asdict(kinds.rate)}
    if out:
        notes += _told(speed.write(kinds, asked, ladders, pathlib.Path(out), device))
    return [row for rows in ladders for row in rows], speed.COLUMNS, "\n".join(notes), more


def _prepare(folder: pathlib.Path, stem: str, *kinds: str) -> None:
    """Make the folder and see that its files can be written, before the minutes that the measuring takes."""
    with refusing(OSError, prefix=f"--out {folder}: "):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(*(folder / f"{stem}.{kind}" for kind in kinds), argument="--out")


def _told(written: Sequence[pathlib.Path]) -> list[str]:
    """Lines that say what was written."""
    lines = [f"Written: {path}" for path in written]
    if not any(path.suffix == ".png" for path in written):
        lines.append("No picture: matplotlib is missing (pip install 'dit-sparse[eval]').")
    return lines


def _check_memory(flag: str, tokens: int, shape: dict[str, Any], device: str) -> None:
    """Refuse what cannot fit: query, key, value and the output alone, whatever a mask takes beside them."""
    import torch

    from ..eval.speed import DTYPES

    needed = 4 * tokens * int(shape["heads"]) * int(shape["head_dim"]) * DTYPES[str(shape["dtype"])].itemsize
    if _cuda(device):
        there = torch.cuda.mem_get_info(device)[0]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else needed
    if needed > there:
        raise UserError(f"{flag}: {tokens} tokens need {needed / 2**30:.0f} GiB; {device} has {there / 2**30:.0f} GiB")


def _known_methods(names: list[str] | None) -> list[str] | None:
    from ..methods import all_methods

    if unknown := [name for name in names or [] if name not in all_methods()]:
        raise UserError(f"--method {unknown[0]!r} is unknown; use one of {', '.join(sorted(all_methods()))}")
    if "dense" in (names or []):
        raise UserError("--method dense is not needed: dense leads every table; leave it out")
    return names
