"""Everything that needs a GPU: checks, then speeds. Needs torch and triton only; the models of `methods` Diffusers too.

    python tests/gpu/run.py --out DIR                                           # all of it, one after the other
    python tests/gpu/run.py --out DIR --only checks --kernel hopper --part 1/8  # beside it 2/8 ... 8/8
    python tests/gpu/run.py --out DIR --only random --cases 20000 --part 1/4    # random calls of the attention kernels
    python tests/gpu/run.py --out DIR --only random --kernel cuda --part 1/4    # of the one in CUDA C++
    python tests/gpu/run.py --out DIR --only compile --part 1/4                 # what the speeds of hopper will need
    python tests/gpu/run.py --out DIR --only speeds --kernel hopper             # alone on the GPU; or --kernel peers
    compute-sanitizer --tool memcheck python tests/gpu/run.py --out DIR --only sanitizer

Prints what it finds, and writes a log and a JSON file of their own to DIR, named after the options; nothing is
overwritten. The last line is the total, also when a signal or --seconds cuts the run; a check that takes longer than
--limit seconds ends it with the place where it hangs. Exits with 1 when a check fails, 3 when it was cut.

Under compute-sanitizer set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own, and run
`--only random` first: what is compiled then is not compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import importlib
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from dit_sparse.eval import speed  # noqa: E402

# Kernel: the module whose all_checks() returns functions by name, and the function of speeds, called with a log.
KERNELS = {
    "portable": ("tests.gpu.checks", "tests.gpu.speeds:portable"),
    "hopper": ("tests.gpu.hopper_checks", "tests.gpu.speeds:hopper"),
    "cuda": ("tests.gpu.cuda_checks", "tests.gpu.cuda_checks:speeds"),
    "routing": ("tests.gpu.routing_checks", "tests.gpu.routing_checks:speeds"),
    "fp8": ("tests.gpu.fp8_checks", "tests.gpu.fp8_checks:speeds"),
    "gna": ("tests.gpu.gna_checks", ""),
    "soft": ("tests.gpu.soft_checks", "tests.gpu.soft_checks:costs"),
    "skip": ("tests.gpu.skip_checks", "tests.gpu.skip_checks:costs"),
    "methods": ("tests.gpu.method_checks", ""),
    "composition": ("tests.gpu.composition_checks", ""),
    "reuse": ("tests.gpu.reuse_checks", "tests.gpu.reuse_checks:speeds"),
    "linear8": ("tests.gpu.linear8_checks", "tests.gpu.linear8_checks:speeds"),
    "tuning": ("tests.gpu.tuning_checks", "tests.gpu.tuning_checks:speeds"),
    "peers": ("", "tests.gpu.speeds:peers"),
}
STAGES = ("checks", "compile", "speeds", "random", "sanitizer")
CUT = 3  # exit code of a run that was cut


class Run:
    """The log of one run, and its end, whatever that is."""

    def __init__(self, stem: pathlib.Path) -> None:
        self.path = next(path for path in itertools.chain(
            [stem], (stem.with_name(f"{stem.name}-{n}") for n in itertools.count(2)))
            if not path.with_name(path.name + ".log").exists())
        self.file = self.path.with_name(self.path.name + ".log").open("w")
        self.result: dict[str, Any] = {}
        self.passed: list[str] = []
        self.failed: list[str] = []
        self.left = 0
        self.unit = "checks"
        self._lock = threading.Lock()
        self._over = False

    def __call__(self, text: str) -> None:
        """Prints, and writes the same line to the file."""
        with self._lock:
            print(text, flush=True)
            self.file.write(text + "\n")
            self.file.flush()

    def total(self, why: str = "") -> None:
        """The last line, once."""
        if self._over:
            return
        self._over = True
        self((f"{len(self.passed)} {self.unit} passed, {len(self.failed)} failed" if self.unit else "speeds measured")
             + (f", {self.left} not run" if self.left else "") + (f": cut, {why}" if why else ""))
        self.result |= {"passed": len(self.passed), "failed": self.failed, "not_run": self.left, "cut": why}
        self.path.with_name(self.path.name + ".json").write_text(json.dumps(self.result, indent=1) + "\n")

    def cut(self, why: str) -> None:
        """Ends the process from any thread: a kernel that waits for itself cannot be interrupted."""
        faulthandler.dump_traceback(all_threads=True)
        self.total(why)
        os._exit(CUT)

    def listen(self) -> None:
        """From now on SIGTERM and SIGINT write the total before they end the process."""
        signals = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        threading.Thread(target=lambda: self.cut(signal.Signals(signal.sigwait(signals)).name), daemon=True).start()


def part_of(text: str) -> tuple[int, int]:
    """"2/8" as (2, 8)."""
    try:
        part, parts = (int(x) for x in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N") from None
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text!r}: I must be 1 to N")
    return part, parts


def checks_of(kernel: str | None) -> dict[str, Callable[[], Any]]:
    """The checks of one kernel, or of all, by name."""
    found = {}
    for name in KERNELS if kernel is None else (kernel,):
        checks = importlib.import_module(KERNELS[name][0]).all_checks() if KERNELS[name][0] else {}
        found.update({f"{name} {check}": function for check, function in checks.items()})
    return found


def run_checks(run: Run, checks: dict[str, Callable[[], Any]], limit: float, stop: Callable[[], bool]) -> None:
    """Runs checks; one that raises has failed, one that hangs ends the process.

    A check returns what is wrong, "" when nothing is, or that and numbers by name, which go to the log.
    """
    run.left = len(checks)
    found = run.result["checks"] = []
    for name, function in checks.items():
        if stop():
            return
        start = time.perf_counter()
        watch = threading.Timer(limit, run.cut, [f"{name} took longer than {limit:g} s"])
        watch.daemon = True
        watch.start()
        faulthandler.dump_traceback_later(limit + 20, exit=True)  # where no other thread gets a turn
        try:
            found_here = function()
            problem, numbers = found_here if isinstance(found_here, tuple) else (found_here, {})
            torch.cuda.synchronize()
        except Exception as error:
            traceback.print_exc()
            numbers = {}
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            watch.cancel()
            faulthandler.cancel_dump_traceback_later()
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        found.append({"check": name, "problem": problem, "seconds": round(seconds, 2), **numbers})
        run.left -= 1
        (run.failed if problem else run.passed).append(name)
        run(f"{'FAILED' if problem else 'ok':6} {seconds:6.2f} s  {name}" + (f": {problem}" if problem else "")
            + "".join(f"  {key} {value}" for key, value in numbers.items()))


def run_random(run: Run, cases: int, first: int, part: tuple[int, int], stop: Callable[[], bool],
               kernel: str | None = None) -> None:
    """Random calls whose seeds this part holds: those of every N-th kind, or every N-th call of the CUDA kernel."""
    from tests.gpu import random_cases

    kinds, chosen = len(random_cases.KINDS), {}
    if kernel == "cuda":
        seeds = random_cases.cuda_seeds(first, cases)[part[0] - 1 :: part[1]]
        chosen = {"kernels": random_cases.only_cuda}
    else:
        seeds = [seed for seed in range(first, first + cases) if seed % kinds % part[1] == part[0] - 1]
    run.unit, run.left = "random calls", len(seeds)
    start = time.perf_counter()
    wrong: list[str] = []

    def failure(line: str) -> None:
        wrong.append(line)
        if len(wrong) <= 50:
            run(line)

    for chunk in range(0, len(seeds), 250):
        if stop():
            break
        some = seeds[chunk : chunk + 250]
        totals = random_cases.run(some, "cuda", failure, **chosen)
        for name, total in totals.items():
            run.passed += [f"{name} {seed}" for seed in range(total["calls"] - len(total["failed"]))]
            run.failed += [f"{name} {seed}" for seed in total["failed"]]
            most = run.result.setdefault("random", {}).setdefault(name, {"calls": 0, "out": 0.0, "lse": 0.0})
            most["calls"] += total["calls"]
            most |= {key: max(most[key], total[key]) for key in ("out", "lse")}
        run.left -= len(some)
    for name, most in run.result.get("random", {}).items():
        run(f"{name}: {most['calls']} calls, error at most {most['out']:.2f} (output) and {most['lse']:.2f} (LSE) of "
            "what is allowed")
    run(f"{cases} calls from seed {first} on, part {part[0]} of {part[1]}, {time.perf_counter() - start:.0f} s")


def run_sanitizer(run: Run, cases: int | None, part: tuple[int, int], stop: Callable[[], bool],
                  kernel: str | None = None) -> None:
    """One small call of every kind, made and compared on the CPU, so that little else runs on the GPU."""
    from tests.gpu import random_cases

    if kernel == "soft":
        calls = importlib.import_module(KERNELS[kernel][0]).small_calls()
        names = list(calls)[:cases][part[0] - 1 :: part[1]]
        run.unit = "calls"
        for name in names:
            problem = "" if stop() else calls[name]()
            (run.failed if problem else run.passed).append(name)
            run(f"{'FAILED' if problem else 'ok':6} {name} {problem}")
        return
    kernels, every = random_cases.kernels_of, list(range(len(random_cases.KINDS)))
    if kernel == "cuda":
        kernels, every = random_cases.only_cuda, random_cases.cuda_seeds(0, 2 * len(every))
    seeds = every[:cases][part[0] - 1 :: part[1]]
    run.unit, run.left = "calls", len(seeds)
    for seed in seeds:
        if stop():
            return
        drawn = random_cases.draw(seed, "cpu", most=200)
        for name, attend in kernels(seed).items():
            out, lse = attend(dataclasses.replace(drawn, inputs=random_cases.moved(drawn.inputs, "cuda")))
            good, *_ = random_cases.verdict(drawn.inputs, out.cpu(), lse.cpu()).tolist()
            (run.passed if good else run.failed).append(f"{name} {seed}")
            run(f"{'ok' if good else 'FAILED':6} {name} seed {seed} ({drawn.kind.name})")
        run.left -= 1


def main(argv: list[str] | None = None) -> int:
    """Runs what the options name; 1 when a check fails, 3 when it was cut."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=os.environ.get("DIT_SPARSE_GPU_OUT"), help="folder")
    parser.add_argument("--only", choices=STAGES, help="default: checks, then speeds")
    parser.add_argument("--kernel", choices=list(KERNELS), help="default: all")
    parser.add_argument("--match", default="", metavar="TEXT", help="only checks whose name holds this text")
    parser.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="every N-th check, from the I-th")
    parser.add_argument("--cases", type=int, help="random calls (20,000), or kinds of calls under the sanitizer (all)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of random calls")
    parser.add_argument("--limit", type=float, default=300, help="seconds a check may take")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    options = parser.parse_args(argv)
    if options.out is None:
        parser.error("--out is missing (or the environment variable DIT_SPARSE_GPU_OUT)")
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing was run")
        return 0
    start = time.monotonic()
    out, part = pathlib.Path(options.out), options.part
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out / "-".join(["gpu", options.kernel or "all", options.only or "both",
                              *([f"{part[0]}-of-{part[1]}"] if part[1] > 1 else [])]))
    run.listen()
    reason = f"more than {options.seconds:g} s"

    def stop() -> bool:
        return time.monotonic() - start > options.seconds

    run.result["environment"] = speed.environment("cuda")
    run(", ".join(f"{name} {value}" for name, value in run.result["environment"].items()))
    if options.only == "random":
        cases = 20_000 if options.cases is None else options.cases
        run_random(run, cases, options.seed, part, stop, options.kernel)
    elif options.only == "sanitizer":
        run_sanitizer(run, options.cases, part, stop, options.kernel)
    elif options.only != "speeds":
        if options.only == "compile":
            from tests.gpu.speeds import compile_hopper
        found = compile_hopper() if options.only == "compile" else checks_of(options.kernel)
        every = [(name, function) for name, function in found.items() if options.match in name]
        if options.match and not every:
            parser.error(f"--match {options.match!r} is in the name of no check")
        run_checks(run, dict(every[part[0] - 1 :: part[1]]), options.limit, stop)
    if options.only in (None, "speeds"):
        run.unit = run.unit if options.only is None else ""
        for name, (_, speeds) in KERNELS.items():
            if speeds and options.kernel in (None, name) and not stop():
                module, function = speeds.split(":")
                run.result[f"{name}_speeds"] = getattr(importlib.import_module(module), function)(run)
    cut = reason if stop() and run.left else ""
    run.total(cut)
    return 1 if run.failed else CUT if cut else 0


if __name__ == "__main__":
    sys.exit(main())
