"""Times two ways of doing one thing in turn, A B A B, so that a drifting machine slows both alike."""

from __future__ import annotations

import gc
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from statistics import median

import torch


@dataclass(frozen=True)
class Comparison:
    """Seconds (medians) of ours and the peer's, and the median of the ratios pair by pair: above 1, ours is
    faster."""

    name: str
    ours: float
    peer: float
    ratio: float

    def __str__(self) -> str:
        return f"| {self.name} | {1e3 * self.ours:.1f} | {1e3 * self.peer:.1f} | {self.ratio:.2f}x |"


def compare(
    name: str, ours: Callable[[], object], peer: Callable[[], object], *, rounds: int = 7
) -> Comparison:
    """One warm-up of each, then `rounds` pairs."""
    ours(), peer()
    pairs = [(_seconds(ours), _seconds(peer)) for _ in range(rounds)]
    return Comparison(
        name,
        median(a for a, _ in pairs),
        median(b for _, b in pairs),
        median(b / a for a, b in pairs),
    )


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def matmul_rate(dtype: torch.dtype = torch.float32, *, side: int = 2048, rounds: int = 7) -> float:
    """Operations a second (2 per multiply-accumulate) of a square matrix product on this machine, now."""
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    torch.mm(a, b)
    return 2 * side**3 / median(_seconds(lambda: torch.mm(a, b)) for _ in range(rounds))


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
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return int(next(line.split()[1] for line in file if line.startswith("VmHWM"))) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine() -> str:
    """One line: date, processor, threads, torch."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{date.today()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
