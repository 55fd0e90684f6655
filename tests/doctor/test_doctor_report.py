"""`stepwell doctor`: what it prints, its exit code, and what it tells people to do."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from stepwell import cli
from stepwell.doctor import report as module
from stepwell.doctor.checks import Result
from stepwell.doctor.machine import Device, Threads
from stepwell.doctor.packages import Extra, Package
from stepwell.doctor.report import Report, ShippedModel, examine

TORCH = Package("torch", "2.11.0", ">=2.11", "ok")
CPU = Device("cpu", "A processor", 2**34, 0.9, cores=8, instructions="AVX2")
GPU = Device("cuda:0", "A GPU", 2**36, 0.2)


def well(**changes: object) -> Report:
    facts = {
        "packages": [TORCH],
        "extras": [Extra("serve", "stepwell serve", (Package("uvicorn", "1.0", "", "ok"),))],
        "devices": [CPU],
        "threads": Threads(4, None),
        "models": [ShippedModel("reader_tiny", 12_000_000)],
        "checks": [Result("linear", "cpu", 1e-6)],
    }
    return Report(**{**facts, **changes})


def test_where_all_is_well_nothing_is_to_be_done() -> None:
    assert well().is_well
    assert well().advice == []
    assert well().as_text().endswith("\nto do: nothing")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"packages": [Package("torch", None, ">=2.11", "missing")]}, "pip install 'torch>=2.11'"),
        ({"packages": [Package("torch", "2.1", ">=2.11", "unfit")]}, "pip install 'torch>=2.11'"),
        ({"packages": [Package("python", "3.9", ">=3.11", "unfit")]}, "use Python >=3.11"),
        (
            {"packages": [Package("torchvision", "0.1", "", "broken", "no nms")]},
            "pip install --force-reinstall torchvision (torchvision's release must fit torch's)",
        ),
        ({"models": [ShippedModel("reader_tiny", 0, "holds no weights")]}, "install stepwell anew"),
        ({"checks": [Result("linear", "cpu", 0.5)]}, "report the failed self-checks"),
        ({"checks": [Result("linear", "cpu", None, "RuntimeError: no")]}, "report the failed self-checks"),
        ({"packages": [], "errors": ["stepwell is not installed"]}, "install stepwell anew"),
    ],
)
def test_what_is_wrong_is_unwell_and_says_what_to_do(changes, line) -> None:
    report = well(**changes)
    assert not report.is_well
    assert [line in advice for advice in report.advice] == [True]
    assert f"to do: {report.advice[0]}" == report.as_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("devices", "threads", "line"),
    [
        ([replace(CPU, bf16_slowdown=70.0)], Threads(4, None), "--dtype float32, and bf16: false in recipes"),
        ([CPU], Threads(16, None), "torch starts 16 threads on 8 cores: OMP_NUM_THREADS=8"),
        ([CPU], Threads(1, "1"), "OMP_NUM_THREADS lets torch use 1 of 8 cores"),
        ([replace(CPU, bf16_slowdown=70.0), GPU], Threads(4, None), None),  # the GPU is used, and is quick
        ([CPU], Threads(4, "4"), None),  # a thread for every core that is whole
        ([CPU], Threads(1, None), None),
    ],
)
def test_what_is_slow_is_advice_and_not_a_failure(devices, threads, line) -> None:
    report = well(devices=devices, threads=threads)
    assert report.is_well
    assert len(report.advice) == (line is not None)
    assert line is None or line in report.advice[0]


def test_an_absent_extra_is_told_with_its_use_and_is_no_failure() -> None:
    extra = Extra("serve", "stepwell serve", (Package("uvicorn", None, ">=1", "missing"),))
    report = well(extras=[extra])
    assert report.is_well
    (line,) = (line for line in report.as_text().splitlines() if "uvicorn" in line)
    assert "absent" in line
    assert "stepwell serve" in line
    assert "pip install 'stepwell[serve]'  (uvicorn>=1 is missing)" in line


def test_extras_of_developers_are_told_in_json_alone() -> None:
    report = well(extras=[Extra("dev", "make test", ())])
    assert "make test" not in report.as_text()
    assert report.as_json()["extras"][0]["purpose"] == "make test"


def test_heads_stand_above_their_lines_and_lines_are_aligned() -> None:
    text = well(checks=[Result("linear", "cpu", 1e-6), Result("double_map", "cpu", 0.25)]).as_text()
    assert [line for line in text.splitlines() if "double_map" in line or "1 of 2" in line] == [
        "self-check  cpu        1 of 2 fast paths give what their references give, largest difference 1e-06",
        "            cpu        double_map differs by 0.25 of the largest value",
    ]


def test_the_command_prints_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in (f"torch {metadata.version('torch')}", "reader_tiny", "boards_tiny", "12 of 12 fast paths"):
        assert word in text
    assert text.splitlines()[-1].startswith("to do: ")


def test_json_is_json_and_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["ok"] is True
    assert {model["name"] for model in facts["models"]} == {"reader_tiny", "boards_tiny"}
    assert {check["name"] for check in facts["checks"] if check["ok"]} >= {"deform_attn", "adaptive_conv"}
    assert {package["name"]: package["state"] for package in facts["packages"]}["torch"] == "ok"
    assert facts["devices"][0]["bf16_slowdown"] > 0


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]])
def test_a_broken_fast_path_is_reported_and_the_exit_code_1(
    arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepwell.ops import deform_attn

    right = deform_attn.deform_attn_fast
    monkeypatch.setattr(deform_attn, "deform_attn_fast", lambda *args: 2 * right(*args))
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "deform_attn" in printed.out
    assert "report the failed self-checks" in printed.out
    assert printed.err == ""


def test_without_torch_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("stepwell.doctor.")]:
        if name.endswith((".checks", ".machine")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    report = examine()
    assert [package.state for package in report.packages if package.name == "torch"] == ["broken"]
    assert report.models
    assert report.checks == []
    assert report.errors[0].startswith("devices and fast paths are not looked at: ")
    assert "pip install --force-reinstall torch" in report.as_text()


def test_a_shipped_model_without_weights_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "stepwell"}')
    monkeypatch.setattr(module, "SHIPPED_MODELS", {"one": tmp_path})
    (model,) = examine().models
    assert model.error is not None
    assert "holds no weights" in model.error


def test_what_is_run_and_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> list[Package]:
        raise metadata.PackageNotFoundError("stepwell")

    monkeypatch.setattr(module, "required", refuse)
    report = examine()
    assert report.errors == ["stepwell is not installed, only run, so that nobody knows what it needs"]
    assert report.checks
