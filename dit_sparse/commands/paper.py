"""`dit-sparse eval paper`: make the repository's own tables."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import UserError, print_json, print_pairs, quiet_libraries, refusing
from .evaluation import prepare_folder, run_config
from .request import check_writable
from .run import check_device, open_pipeline, stay_offline

if TYPE_CHECKING:
    from ..eval.following import Following
    from ..eval.methods import Comparison
    from ..eval.paper import Done, Fidelity, Pair, Part


def paper(
    out: Path,
    *,
    quick: bool = False,
    names: list[str] | None = None,
    seconds: float | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> None:
    """Make what is missing of every part, then write all tables into one file.

    Args:
        out: folder, made or continued.
        quick: the size that a CPU makes in under a minute.
        names: of the parts to make; None makes all. The tables show what other calls made, too.
        seconds: about how long it may take; what it does not allow is made by the same command later.
        device: None takes the GPU when there is one.
        as_json: print files instead of a table.
    """
    stay_offline("embedded")
    with refusing(ValueError, OSError):
        from ..eval import paper as tables

        tables.check_folder(out)
    known = tables.parts(quick)
    for name in names or ():
        if name not in known:
            raise UserError(f"--part {name!r} is unknown; use one of {', '.join(known)}")
    check_device(device)
    for name, part in known.items():
        if isinstance(part, tables.Size):
            prepare_folder(out / tables.RUNS / name, make=False)
    with refusing(OSError, prefix=f"--out {out}: "):
        out.mkdir(parents=True, exist_ok=True)
    check_writable(out / tables.TABLES, argument="--out")
    words = ["dit-sparse", "eval", "paper", *(["--quick"] if quick else []), "--out", str(out)]
    words += [word for name in names or () for word in ("--part", name)]
    words += ["--device", device] if device else []
    maker = _Maker(out, words, device, seconds)
    done: dict[str, Done | str] = {}
    for name, part in known.items():
        done[name] = maker.make(name, part) if name in (names or known) else maker.kept(name, part)
        with refusing(OSError, prefix=f"--out {out}: "):  # after every part: a kill leaves the tables so far
            files = tables.write_tables(out, done, shlex.join(words), quick)
    _tell(out, files, done, as_json)


def _tell(out: Path, files: list[Path], done: dict[str, Done | str], as_json: bool) -> None:
    states = {name: entry if isinstance(entry, str) else entry.state for name, entry in done.items()}
    reports = sorted(str(path) for path in (out / "runs").glob("*/report.html"))
    if as_json:
        print_json({"files": [str(file) for file in files], "reports": reports, "parts": states})
    else:
        print_pairs({**states, "written": [*map(str, files), *reports]})


class _Maker:
    """Makes parts within the seconds that are left; a part begun last may end a little later.

    Args:
        out: folder of the command.
        words: the command.
        device: as given.
        seconds: for all parts; None: as long as it takes.
    """

    def __init__(self, out: Path, words: list[str], device: str | None, seconds: float | None) -> None:
        import torch

        self.out, self.words = out, words
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._end = None if seconds is None else time.monotonic() + seconds
        self._pipe: Any = None

    def left(self) -> float | None:
        """Seconds that are left; None without a limit."""
        return None if self._end is None else self._end - time.monotonic()

    def make(self, name: str, part: Part) -> Done | str:
        """One part, or why it was not begun."""
        from ..eval import paper as tables
        from ..eval.following import Following

        folder = self.out / tables.RUNS / name
        left = self.left()
        needs = 20 if isinstance(part, tables.Size) else part.seconds
        if left is not None and left < needs and name != "following":
            return f"{max(left, 0):.0f} seconds were left; the same command makes it"
        if isinstance(part, tables.Size):
            return self._size(part, folder, None if left is None else left * part.share)
        if isinstance(part, tables.Fidelity):
            return self._fidelity(part, folder, left)
        with self._refusing():
            if isinstance(part, Following):
                from ..eval.following import follow

                return self._single(name, part, follow(part, folder, self.device, self._weights()))
            return self._single(name, part, tables.compare_clips(part, self._pipeline(part), folder, self._weights()))

    @staticmethod
    def _single(name: str, part: Following | Pair, found: dict[str, Any]) -> Done:
        """The tables of a part that is one result."""
        from ..eval import following
        from ..eval import paper as tables

        place = f"{tables.RUNS}/{name}"
        if isinstance(part, following.Following):
            return tables.following_done(part, found, [f"{place}/{following.PICTURE}"])
        return tables.pair_done(part, found, [f"{place}/compare.{kind}" for kind in ("mp4", "jpg")])

    def kept(self, name: str, part: Part) -> Done | str:
        """A part as far as earlier calls made it with the present weights, or that none did."""
        from ..eval import paper as tables
        from ..eval.evaluation import RESULTS
        from ..eval.following import RESULT, Following

        folder = self.out / tables.RUNS / name
        if isinstance(part, tables.Size):
            return self._size_done(part, folder) if (folder / RESULTS).is_file() else "not asked for"
        if isinstance(part, tables.Fidelity):
            from ..eval.methods import Comparison

            run = Comparison(part.plan, folder, self._weights())
            run.load()
            return self._fidelity_done(part, folder, run) if run.results else "not asked for"
        file = folder / (RESULT if isinstance(part, Following) else tables.COMPARED)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            same = found["key"]["weights"] == self._weights()
        except (OSError, ValueError, LookupError, TypeError):
            return "not asked for"
        return self._single(name, part, found) if same else "not asked for"

    def _fidelity(self, part: Fidelity, folder: Path, seconds: float | None) -> Done:
        from ..eval.methods import MARK, RESULTS, TABLES
        from .methods_comparison import make_comparison, prepare, refuse_dead

        prepare(folder, MARK, RESULTS, TABLES)
        command, quick = shlex.join(self.words), "--quick" in self.words
        run, work, _ = make_comparison(part.plan, folder, command, quick, seconds, self.device)
        refuse_dead(work)
        return self._fidelity_done(part, folder, run)

    @staticmethod
    def _fidelity_done(part: Fidelity, folder: Path, run: Comparison) -> Done:
        from ..eval import paper as tables
        from ..eval.methods import TABLES
        from ..eval.methods_tables import read_environment

        place = f"{tables.RUNS}/{folder.name}/{TABLES}"
        return tables.fidelity_done(part, run, read_environment(folder), [place])

    def _size(self, size: Any, folder: Path, seconds: float | None) -> Done:
        from ..eval import paper as tables

        run_config(tables.config_of(size, self.device), folder, self.words, seconds=seconds)
        return self._size_done(size, folder)

    @staticmethod
    def _size_done(size: Any, folder: Path) -> Done:
        from ..eval import paper as tables
        from ..eval.results import load_evaluation

        return tables.size_done(size, load_evaluation(folder), [f"{tables.RUNS}/{folder.name}/report.html"])

    def _pipeline(self, pair: Any) -> Any:
        from .. import SparseProc

        return open_pipeline("embedded", self.device, SparseProc(pair.method, **pair.options))

    def _weights(self) -> str:
        from ..eval.evaluation import digest
        from ..pipelines.load import locate

        return digest(locate("embedded"))

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        import torch

        from .. import SparseFallbackError

        quiet_libraries()
        with refusing(ValueError, OSError, SparseFallbackError, MemoryError, torch.OutOfMemoryError):
            yield
