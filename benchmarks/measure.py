"""Times two ways of doing one thing in turn, A B A B, so that a drifting machine slows both alike.

Each way lives in a process of its own, so that the memory of one is not the other's: a worker imports a file
of this folder, calls a function of it that builds what is timed and returns it as a callable, and then waits
on its standard input. Every line there is an order: "go" runs the thing and answers with its seconds and the
peak of the process's memory so far, "keep PATH" writes what the last run returned. The end of the input ends
the worker. Whoever waits, waits in a read and takes no processor time.
"""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from pathlib import Path
from statistics import median
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor

STEADY = 1.5  # the slowest of the repeats over the quickest, at most; else they are run again
LARGE = 4  # GiB that an idle worker may hold without giving back what it does not use
CLOSE = {"float32": 1e-3, "bfloat16": 0.2}  # largest relative difference of things that are worth timing

Command = tuple[str, ...]  # a file of this folder, a function of it, and its arguments
Row = tuple[str, Callable[[], Iterable[str]]]  # what is measured, and what prints its lines of the table


class Worker:
    """A process that has built one thing and runs it when told to."""

    def __init__(self, command: Command) -> None:
        self.command = command
        # A session of its own: Ctrl-C reaches the bench alone, which then ends its workers.
        self.process = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def ready(self) -> list[float]:
        """Waits until the thing is built; peak GiB after importing and after building."""
        return self._answer()

    def go(self) -> tuple[float, float]:
        """Seconds of one run, and peak GiB so far."""
        seconds, peak = self._order("go")
        return seconds, peak

    def keep(self, path: Path) -> None:
        self._order(f"keep {path}")

    def _order(self, order: str) -> list[float]:
        assert self.process.stdin is not None
        print(order, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with code {self.process.wait()}")
        return [float(number) for number in line.split()]


def work(file: str, function: str, *arguments: str) -> None:
    """The worker's side."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not look like an answer
    module = import_module(file)
    imports = own_peak_gib()
    run = getattr(module, function)(*arguments)
    built = own_peak_gib()
    gc.collect()
    _release()
    print(imports, built, file=answers, flush=True)
    output: object = None
    for order in sys.stdin:
        match order.split(maxsplit=1):
            case ["go"]:
                output = None
                gc.collect()
                start = time.perf_counter()
                output = run()
                seconds, peak = time.perf_counter() - start, own_peak_gib()
                _release()
                print(seconds, peak, file=answers, flush=True)
            case ["keep", path]:
                torch.save(output, path.strip())
                output = None
                print(0, file=answers, flush=True)


@dataclass(frozen=True)
class Comparison:
    """Seconds of ours and the other's, pair by pair, and the peak GiB of either process. The ratio is the
    median of the pairs' ratios: above 1, ours is the faster."""

    name: str
    pairs: list[tuple[float, float]]
    peaks: tuple[float, float]
    target: float | None = None  # the least ratio
    difference: float | None = None  # of what they return, the largest, relative to the largest value

    @property
    def ours(self) -> float:
        return median(a for a, _ in self.pairs)

    @property
    def ratio(self) -> float:
        return median(b / a for a, b in self.pairs)

    @property
    def spread(self) -> float:
        """Slowest over quickest, of whichever of the two varies more."""
        return max(max(side) / min(side) for side in zip(*self.pairs, strict=True))

    def __str__(self) -> str:
        other = median(b for _, b in self.pairs)
        target = ""
        if self.target is not None:
            target = f"{self.target:.2f}x, {'met' if self.ratio >= self.target else 'missed'}"
        cells = [
            self.name,
            f"{1e3 * self.ours:.1f}",
            f"{1e3 * other:.1f}",
            f"{self.ratio:.2f}x",
            target,
            "" if self.difference is None else f"{self.difference:.0e}",
            " and ".join(f"{peak:.2f}" for peak in self.peaks),
            f"varies {self.spread:.1f}x" if self.spread > STEADY else "",
        ]
        return "| " + " | ".join(cells) + " |"


HEADER = (
    "| what | ours, ms | other, ms | ratio | target | difference | peak GiB, each | |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def compare(
    name: str,
    ours: Command,
    other: Command,
    *,
    target: float | None = None,
    close: float | None = CLOSE["float32"],
    rounds: int = 7,
    seconds: float = 40,
) -> Comparison:
    """One warm-up of each, whose values must lie within `close` of each other (None: they return nothing),
    then up to `rounds` pairs: at least three, and none begun after so many seconds. Repeats that vary are
    made once more."""
    with Worker(ours) as a, Worker(other) as b:
        a.ready(), b.ready()
        peaks = (a.go()[1], b.go()[1])
        difference = None if close is None else _difference(a, b)
        if close is not None and not difference <= close:  # or not a number
            raise ValueError(f"{name}: the values differ by {difference:.1e}, more than {close}; not timed")
        for _ in range(2):
            pairs, start = [], time.perf_counter()
            while len(pairs) < rounds and (len(pairs) < 3 or time.perf_counter() - start < seconds):
                (a_seconds, a_peak), (b_seconds, b_peak) = a.go(), b.go()
                pairs.append((a_seconds, b_seconds))
                peaks = (max(peaks[0], a_peak), max(peaks[1], b_peak))
            row = Comparison(name, pairs, peaks, target, difference)
            if row.spread <= STEADY:
                break
    return row


def _difference(a: Worker, b: Worker) -> float:
    """Of what their last runs returned: the largest of all tensors, each relative to its largest value."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ours", "other")]
        a.keep(paths[0]), b.keep(paths[1])
        outputs: list[list[Tensor]] = [torch.load(path) for path in paths]
    pairs = [(x.float(), y.float()) for x, y in zip(*outputs, strict=True)]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


def matrix_rates(dtype: torch.dtype = torch.float32, *, side: int = 2048, rounds: int = 7) -> list[float]:
    """Operations a second (2 per multiply-accumulate) of a square matrix product on this machine, now: by
    `F.linear`, and as a 1x1 convolution on channels-last memory, which is oneDNN's."""
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    pixels, kernel = a.view(1, 32, side // 32, side).permute(0, 3, 1, 2), b.view(side, side, 1, 1)
    kernels = (lambda: F.linear(a, b), lambda: F.conv2d(pixels, kernel))
    rates = []
    with torch.inference_mode():
        for run in kernels:
            run()
            rates.append(2 * side**3 / median(_seconds(run) for _ in range(rounds)))
    return rates


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_gib(*arguments: str) -> float:
    """Peak resident memory, in GiB, of this interpreter run with `arguments`."""
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", code, sys.executable, *arguments]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def own_peak_gib() -> float:
    """Peak resident memory of this process so far; on Linux without what its parent held before exec."""
    return _status_gib("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _status_gib(key: str) -> float:
    """A line of Linux's report on this process; 0 elsewhere."""
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return int(next(line.split()[1] for line in file if line.startswith(key))) / 2**20
    except (OSError, StopIteration):
        return 0.0


def _release() -> None:
    """Gives freed memory back to the system where there is much of it: after a large training step glibc
    keeps gigabytes, which the other worker needs while this one waits. Small things keep theirs, as in any
    loop."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and _status_gib("VmRSS") > LARGE:
        trim(0)


def has_bf16() -> bool:
    """Whether this processor has instructions for bf16."""
    return bool(_features() & {"avx512_bf16", "amx_bf16"})


def _features() -> set[str]:
    """The processor's flags, as Linux tells them; none elsewhere."""
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith(key))
    except (OSError, StopIteration):
        return ""


def machine() -> str:
    """Date, processor, threads, torch, what the processor has for half precision, and its matrix rates."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine()
    has = ", ".join(
        f"{'has' if feature in _features() else 'no'} {feature}" for feature in ("avx512_bf16", "amx_bf16")
    )
    linear, convolution = (rate / 1e9 for rate in matrix_rates())
    return (
        f"{datetime.now():%Y-%m-%d %H:%M}, {name}, {has}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; matrix product, fp32, GFLOP/s: {linear:.0f} by F.linear, "
        f"{convolution:.0f} as a 1x1 convolution"
    )


if __name__ == "__main__":
    work(*sys.argv[1:])
