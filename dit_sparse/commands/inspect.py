"""`dit-sparse inspect`: what a method does to a grid, without a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .console import UserError, print_json, print_pairs, refusing
from .request import check_writable, parse_options

MAX_TOKENS = 1_000_000


def inspect(
    method: str,
    *,
    grid: str,
    text: int = 0,
    text_at: str = "back",
    density: float | None = None,
    options: list[str] | None = None,
    png: Path | None = None,
    query_tile: str | None = None,
    key_tile: str | None = None,
    as_json: bool = False,
) -> None:
    """Print density, blocks, memory and expected speed-up, draw the mask, and for `gna` simulate tiled kernels."""
    given = parse_options(options or []) | ({} if density is None else {"density": density})
    tiles = {"query_tile": _triple("--query-tile", query_tile), "key_tile": _triple("--key-tile", key_tile)}
    if method != "gna" and any(tiles.values()):
        raise UserError("--query-tile and --key-tile belong to method gna")
    if png is not None and png.suffix.lower() != ".png":
        raise UserError(f"--png {png}: a picture needs the suffix .png")
    with refusing(ValueError, TypeError):
        from ..grid import TokenGrid
        from ..methods import build

        build(method, **given)
        tokens = TokenGrid.parse(grid, text=text, text_at=text_at if text else "none")  # type: ignore[arg-type]
    if tokens.tokens > MAX_TOKENS:
        raise UserError(f"--grid {grid} has {tokens.tokens} tokens; the limit is {MAX_TOKENS}")
    target = png or Path(f"mask-{re.sub(r'[^a-z0-9-]', '', method.lower())}-{re.sub(r'[^0-9x]', '', grid)}.png")
    check_writable(target, argument="--png")
    with refusing(ValueError, TypeError):
        # The simulation refuses more than the report: it comes first, so that a refusal leaves no picture.
        simulation = _simulate(tokens, given, tiles) if method == "gna" else None
        report, drawn = _report(method, tokens, given, target, wanted=png is not None)
    if as_json:
        result: dict[str, Any] = {**report.to_dict(), "picture": str(target) if drawn else None}
        if simulation is not None:
            result["simulation"] = simulation.to_dict()
        print_json(result)
        return
    print_pairs(dict(_folded(report.rows())) | ({"picture": target} if drawn else {}))
    if simulation is not None:
        print("\nTiles that a kernel visits, without text:")
        print_pairs(dict(simulation.rows()))


def _report(method: str, tokens: Any, options: dict[str, Any], target: Path, wanted: bool) -> tuple[Any, bool]:
    """The report, and whether there was a mask to draw."""
    from ..inspect import inspect_method
    from ..pipelines.video_io import finished_file

    try:
        with refusing(OSError, prefix=f"{target} cannot be written: "), finished_file(target) as part:
            return inspect_method(method, tokens, options, part), True
    except ValueError:
        if wanted:
            raise
        # A method that is dense on this grid has no mask to draw; any other error comes again.
        return inspect_method(method, tokens, options), False


def _simulate(tokens: Any, options: dict[str, Any], tiles: dict[str, Any]) -> Any:
    """Key tiles that a tiled kernel visits for a window of `gna`; None when no window is given."""
    from ..inspect import simulate_gna
    from ..methods import build

    rule: Any = build("gna", **options)
    if rule.window is None:
        if any(tiles.values()):
            raise ValueError("--query-tile and --key-tile need a window, for example -o window=18x24x24")
        return None
    usual, _ = rule.tiles(tokens)
    query_tile, key_tile = tiles["query_tile"] or usual, tiles["key_tile"] or usual
    stride = tuple(min(s, w) for s, w in zip(rule.stride or usual, rule.window, strict=True))
    return simulate_gna(
        tokens, rule.window, stride, query_tile, key_tile, dilation=rule.dilation, causal=rule.causal
    )


def _triple(name: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise UserError(f"{name} {text!r} is not allowed; write frames x rows x columns, as 4x8x8")
    return tuple(int(part) for part in text.split("x"))


def _folded(rows: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows of the same name under one name."""
    folded: dict[str, list[str]] = {}
    for name, value in rows:
        folded.setdefault(name, []).append(value)
    return list(folded.items())
