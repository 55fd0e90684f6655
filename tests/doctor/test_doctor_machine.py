"""Devices, threads and half precision as this machine has them."""

from __future__ import annotations

import os
from itertools import accumulate

import pytest
import torch

from stepwell.doctor import machine
from stepwell.doctor.machine import bf16_slowdown, devices, threads


def test_the_processor_comes_first_as_torch_sees_it() -> None:
    processor = devices()[0]
    assert processor.kind == "cpu"
    assert processor.instructions == torch.backends.cpu.get_cpu_capability()
    assert processor.cores is not None
    assert 1 <= processor.cores <= (os.cpu_count() or 1)
    assert processor.memory is not None
    assert processor.memory > 2**28
    assert processor.name


def test_a_container_has_no_more_memory_than_it_is_given(tmp_path, monkeypatch) -> None:
    (tmp_path / "limit").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(
        machine, "MEMORY_LIMITS", (tmp_path / "none", tmp_path / "limit", tmp_path / "absent")
    )
    assert devices()[0].memory == 123456


def test_a_slowdown_is_the_best_time_in_bfloat16_by_that_in_float32() -> None:
    durations = [9, 6, 8, 7, 5, 2, 3, 4]  # four products in bfloat16, then four in float32
    readings = accumulate((step for seconds in durations for step in (0, seconds)), initial=0.0)
    next(readings)
    assert bf16_slowdown("cpu", clock=lambda: next(readings)) == 6 / 2


def test_a_gpu_that_does_not_work_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_gpus", lambda: [("cuda:7", "Some GPU", 2**33)])
    gpu = devices()[-1]
    assert (gpu.kind, gpu.name, gpu.memory, gpu.bf16_slowdown) == ("cuda:7", "Some GPU", 2**33, None)
    assert gpu.error
    assert "\n" not in gpu.error


def test_threads_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads().torch == torch.get_num_threads()
    assert threads().omp_num_threads == "3"
