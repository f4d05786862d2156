"""Draw the loss curve of a training from its log.

    python -m dit_sparse.pipelines.embedded.curve .train/log.jsonl docs/embedded_loss.png

Needs matplotlib (the extra ``eval``).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

NAMES = {
    "256x1": "256x256, single frame",
    "512x1": "512x512, single frame",
    "256x17": "256x256x17",
    "256x33": "256x256x33",
    "512x33": "512x512x33",
}


def points(log: Path | str) -> tuple[dict[str, list[tuple[float, float]]], list[tuple[float, str]]]:
    """The losses of a log by source, and where stages begin.

    Returns:
        ({source: [(minute, loss)]}, [(minute, stage)]); minutes count through all calls, compiling included.
    """
    losses: dict[str, list[tuple[float, float]]] = {}
    stages: list[tuple[float, str]] = []
    earlier, call, last = 0.0, None, 0.0
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        if record["call"] != call:
            earlier, call = earlier + last, record["call"]
        last = record["at"]
        minute = (earlier + last) / 60
        if isinstance(record.get("loss"), dict) and record["step"] > 1:
            if not stages or stages[-1][1] != record["stage"]:
                stages.append((minute, record["stage"]))
            for source, loss in record["loss"].items():
                losses.setdefault(source, []).append((minute, loss))
    return losses, stages


def draw(log: Path | str, path: Path | str) -> None:
    """Save the curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, stages = points(log)
    figure, axes = pyplot.subplots(figsize=(8.8, 4))
    for source, name in NAMES.items():
        if source in losses:
            axes.plot(*zip(*losses[source], strict=True), label=name)
    for minute, stage in stages:
        axes.axvline(minute, color="0.7", linewidth=0.8)
        axes.text(minute, 0.97, " " + stage, transform=axes.get_xaxis_transform(), fontsize=8, va="top")
    axes.set(yscale="log", xlabel="minutes of training, compiling included", ylabel="velocity loss")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", help="a state's log.jsonl")
    parser.add_argument("picture", help="the PNG to write")
    a = parser.parse_args()
    draw(a.log, a.picture)


if __name__ == "__main__":
    main()
