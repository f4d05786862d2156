"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from ..stepcache.names import NAMES

Prompt = Annotated[str | None, typer.Argument(help="What to show; left out, the model's first example.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps; the included model's own: 20.")]
Size = Annotated[
    str | None,
    typer.Option(help="256, 320x192 (width x height), 512x512x33 (and frames); the included model's own: 256x256x17."),
]
Frames = Annotated[int | None, typer.Option(help="Frames of the clip; 1 makes an image.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1: none; the included model's own: 3.")]
MethodName = Annotated[str | None, typer.Option(help="See `dit-sparse methods`; else auto; `dense` is none.")]
Density = Annotated[
    float | None,
    typer.Option(help="Share of the attention that is computed, in (0, 1]; the included model's own: 0.25."),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="Option of the method, as name=value; may be repeated.")
]
StepCache = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(NAMES)}, or a file of `calibrate`."),
]
PresetName = Annotated[str | None, typer.Option("--preset", help="Name of a preset, or a file that `tune` wrote.")]
Model = Annotated[str, typer.Option(help="'embedded', a Diffusers folder, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU when there is one.")]
Fps = Annotated[int, typer.Option(min=1, max=120, help="Frames per second of the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
