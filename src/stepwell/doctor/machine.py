"""What models would run on here: the processor, its cores and memory, GPUs, threads, and half precision."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from stepwell.folders import one_line

__all__ = ["Device", "Threads", "bf16_slowdown", "devices", "threads"]

PROCESSOR_REPORT = Path("/proc/cpuinfo")  # on Linux
MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
SIDE = 256  # of the matrices that are multiplied: milliseconds where it is slow, and still no single cache


@dataclass(frozen=True, slots=True)
class Device:
    """One that torch can use. kind: cpu, cuda, mps or xpu; memory: bytes, None where it cannot be told.

    bf16_slowdown: the time of a product in bfloat16 by that in float32; None where there are none, which
    `error` explains.
    """

    kind: str
    name: str
    memory: int | None
    bf16_slowdown: float | None
    error: str | None = None
    cores: int | None = None  # of a processor, and so what follows
    instructions: str | None = None


@dataclass(frozen=True, slots=True)
class Threads:
    """How many torch uses, and what the environment says of them."""

    torch: int
    omp_num_threads: str | None


def devices() -> list[Device]:
    """The processor, then the GPUs that torch sees."""
    slowdown, error = _slowdown("cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = Device(
        *("cpu", _processor_name(), _memory(), slowdown, error),
        cores=cores,
        instructions=torch.backends.cpu.get_cpu_capability(),
    )
    return [processor, *(Device(*found, *_slowdown(found[0])) for found in _gpus())]


def threads() -> Threads:
    """Of this process, in which nothing has set them."""
    return Threads(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))


def bf16_slowdown(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """How many times longer a product of 256x256 matrices takes in bfloat16 than in float32, the best of
    three. Below 1 where bfloat16 is the faster one.
    """
    half, single = (_seconds(device, dtype, clock) for dtype in (torch.bfloat16, torch.float32))
    return half / single


def _seconds(device: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    x = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):  # the first prepares kernels, and is never the best
        start = clock()
        float((x @ x)[0, 0])  # waits for the device
        best = min(best, clock() - start)
    return best


def _slowdown(device: str) -> tuple[float | None, str | None]:
    """It, or why there is none: a GPU that is seen need not work."""
    try:
        return bf16_slowdown(device), None
    except Exception as error:
        return None, f"{type(error).__name__}: {one_line(error)}"


def _gpus() -> list[tuple[str, str, int | None]]:
    """(device, name, bytes) of each."""
    found: list[tuple[str, str, int | None]] = []
    for kind, library in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if library.is_available():
            for index in range(library.device_count()):
                about = library.get_device_properties(index)
                found.append((f"{kind}:{index}", str(about.name), int(about.total_memory)))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU", int(torch.mps.recommended_max_memory())))
    return found


def _processor_name() -> str:
    try:
        for line in PROCESSOR_REPORT.read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    """Bytes of the machine, or of the container where that has fewer."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in MEMORY_LIMITS:
        try:
            memory = min(memory, int(path.read_text("utf-8")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return memory
