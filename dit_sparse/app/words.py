"""What the page shows, as HTML text: progress, clips, numbers, density maps, looks into attention. All text escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..eval import charts
from .job import Progress
from .work import GAIN, Outcome, address

PHASES = {
    "waiting": "Waiting for the device",
    "loading": "Loading the model",
    "warming up": "Warming up",
    "dense": "Dense run",
    "sparse": "Sparse run",
    "recording": "Recording a dense run",
    "measuring": "Decoding and measuring",
    "encoding": "Writing the video",
}
EMPTY = "The clip appears here."
PAUSE = "Pause"


def card(text: str, kind: str = "") -> str:
    """A box with one line of text."""
    return f'<div class="ds"><div class="ds-card {kind}">{escape(text)}</div></div>'


def refusal(text: str) -> str:
    """Why something was not done; read out by screen readers."""
    return f'<div class="ds" role="alert"><div class="ds-card ds-bad">{escape(text)}</div></div>'


def progress_card(progress: Progress) -> str:
    """Phase, steps, elapsed and expected time, and the preview."""
    share = progress.share
    left = progress.remaining()
    if progress.phase in ("measuring", "encoding") and progress.done >= progress.steps:
        left = None
    expected = "" if left is None else f", about {seconds(left)} to go"
    steps = f"step {progress.done} of {progress.steps}" if progress.steps else ""
    picture = (f'<img class="ds-strip" alt="Preview of some frames" src="{progress.preview}">'
               if progress.preview else "")
    name = escape(PHASES.get(progress.phase, progress.phase))
    return (
        f'<div class="ds"><div class="ds-card"><div class="ds-row"><b>{name}</b><span>{steps}</span></div>'
        f'<div class="ds-bar" role="progressbar" aria-label="{name}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><div style="width:{100 * share:.1f}%"></div></div>'
        f'<div class="faint">{seconds(progress.elapsed())} elapsed{expected}</div>{picture}</div></div>'
    )


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {int(value % 60)} s"


def outcome(result: Outcome) -> str:
    """Everything about a finished job."""
    numbers = result.numbers
    parts = [clips(result), figures(result)]
    if result.density:
        rows = {f"layer {layer}": {int(step): share for step, share in row.items()}
                for layer, row in result.density.items()}
        parts.append(heat("Density by layer and step", rows, "step", "density",
                          "Share of the pairs that were computed; dense calls count 1, skipped steps are empty."))
    if result.summary is not None:
        parts.append(_calls(result.summary))
    notes = [*result.wanted.notes, *(result.summary or {}).get("notes", [])]
    parts += [f'<p class="faint">Note: {escape(note)}.</p>' for note in notes]
    size = f"{numbers['width']}x{numbers['height']}, {numbers['frames']} frames, seed {result.wanted.seed}"
    parts.append(f'<p class="faint">{escape(result.wanted.prompt)} ({size})</p>')
    return f'<div class="ds" data-state="done"><div class="ds-card">{"".join(parts)}</div></div>'


def clips(result: Outcome) -> str:
    """The clips side by side, which play together, and the downloads."""
    words = {
        "dense": "<b>Dense</b>, every pair computed",
        "sparse": f"<b>Sparse</b>, {escape(result.wanted.proc.method.name)}",
        "difference": f"<b>Difference</b>, {GAIN} times",
    }
    shown, moving = [], False
    for name, (data, kind) in result.clips.items():
        place = address(data, kind)
        moving = kind.startswith("video")
        media = (f'<video src="{place}" aria-label="{name} clip" autoplay loop muted playsinline></video>'
                 if moving else f'<img src="{place}" alt="{name} image">')
        shown.append(f"<figure>{media}<figcaption>{words[name]}</figcaption></figure>")
    data, kind = result.clips[result.kept]
    suffix = "mp4" if kind == "video/mp4" else "png"
    written = json.dumps(result.wanted.settings, indent=2, default=str).encode()
    stem = f"dit-sparse-{result.kept}-{result.wanted.seed}"
    control = (f'<button type="button" class="ds-play">{PAUSE}</button>'
               '<input type="range" class="ds-seek" min="0" max="1" step="0.001" value="0" '
               'aria-label="Place in the clips">' if moving else "")
    return (
        f'<div class="ds-clips">{"".join(shown)}</div><div class="ds-tools">{control}'
        f'<a download="{stem}.{suffix}" href="{address(data, kind)}">Download the {"video" if moving else "image"}</a>'
        f'<a download="{stem}.json" href="{address(written, "application/json")}">Download the settings</a></div>'
    )


def figures(result: Outcome) -> str:
    """The numbers of a run."""
    numbers = result.numbers
    rows: list[tuple[str, str]] = []
    for key, name, text in (
        ("psnr", "PSNR", "{:.1f} dB"), ("ssim", "SSIM", "{:.3f}"),
        ("dense_seconds", "dense run", "{:.1f} s"), ("sparse_seconds", "sparse run", "{:.1f} s"),
        ("speedup", "speed-up", "{:.2f}x"), ("density", "run density", "{:.2f}"),
        ("sparse_density", "sparse calls", "{:.2f}"), ("tokens", "tokens", "{:,}"),
    ):
        if numbers.get(key) is not None:
            rows.append((name, text.format(numbers[key])))
    return number_list(rows)


def number_list(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values as tiles."""
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<dl class="ds-numbers">{tiles}</dl>'


def heat(title: str, rows: Mapping[str, Mapping[int, float]], columns: str, value: str, note: str = "") -> str:
    """A heat map under its title."""
    large = len(rows) > 16 or len({column for row in rows.values() for column in row}) > 24
    picture = charts.heat_map(rows, columns=columns, value=value, title=title, compact=large)
    more = f'<p class="faint">{escape(note)}</p>' if note else ""
    return f'<h3>{escape(title)}</h3><div class="ds-scroll">{picture}</div>{more}'


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose cells are text."""
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="ds-scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _calls(summary: Mapping[str, Any]) -> str:
    """How the attention calls were computed, and every fallback with its reason."""
    rows = [["sparse", summary["sparse_calls"], "; ".join(summary["operators"]) or "-"]]
    rows += [["dense by plan", count, reason] for reason, count in summary["dense_reasons"].items()]
    rows += [["fallback to dense", count, reason] for reason, count in summary["fallbacks"].items()]
    none = "" if summary["fallbacks"] else '<p class="faint">No call fell back to dense.</p>'
    backends = ", ".join(f"{name} ({count})" for name, count in summary["backends"].items())
    return (f"<h3>Attention calls</h3>{table(['call', 'count', 'what or why'], rows)}{none}"
            f'<p class="faint">{escape(summary["method"])}; kernels: {escape(backends or "-")}; '
            f'{summary["attention_seconds"]:.2f} s in attention, of which masks {summary["routing_seconds"]:.2f} s</p>')


# All clips of the element play, pause and seek together.
PLAYER = """
const clips = () => [...element.querySelectorAll('video')];
const button = () => element.querySelector('.ds-play');
const show = () => { const b = button(); if (b) b.textContent = clips()[0]?.paused ? 'Play' : 'Pause'; };
element.addEventListener('click', e => { if (!e.target.closest('.ds-play')) return;
  const stop = !clips()[0].paused; clips().forEach(v => stop ? v.pause() : v.play()); setTimeout(show, 50); });
element.addEventListener('input', e => { if (!e.target.matches('.ds-seek')) return;
  clips().forEach(v => { v.pause(); v.currentTime = e.target.value * (v.duration || 0); }); setTimeout(show, 50); });
setInterval(() => { const [first, ...others] = clips(), seek = element.querySelector('.ds-seek');
  show(); if (!first || !seek || first.paused) return;
  others.forEach(v => { if (Math.abs(v.currentTime - first.currentTime) > .1) v.currentTime = first.currentTime; });
  if (first.duration) seek.value = first.currentTime / first.duration; }, 100);
watch('value', () => { if (matchMedia('(prefers-reduced-motion: reduce)').matches) clips().forEach(v => v.pause());
  show(); });
"""
