"""What `stepwell doctor` finds, for people and as JSON, and what to do about it.

torch is imported where it can be: without it, the rest is told all the same.
"""

from __future__ import annotations

import platform
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from stepwell.doctor.packages import FOR_DEVELOPERS, Extra, Package, extras, required
from stepwell.folders import SHIPPED_MODELS, model_type, one_line
from stepwell.version import __version__

if TYPE_CHECKING:
    from stepwell.doctor.checks import Result
    from stepwell.doctor.machine import Device, Threads

__all__ = ["Report", "ShippedModel", "examine"]

MUCH_SLOWER = 2.0  # times: by then float32 is the better choice, although it is twice as large
WIDTH = 110


@dataclass(frozen=True, slots=True)
class ShippedModel:
    """One that travels with the package. bytes: of its folder; error: why it cannot be loaded."""

    name: str
    bytes: int
    error: str | None = None


@dataclass(kw_only=True)
class Report:
    """What was found. errors: what could not be looked at, and why, in a line each."""

    stepwell: str = __version__
    platform: str = field(default_factory=platform.platform)
    packages: list[Package] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    threads: Threads | None = None
    models: list[ShippedModel] = field(default_factory=list)
    checks: list[Result] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        """Whether everything that is needed is there, and every fast path gives what its reference gives."""
        needed = [package.state == "ok" for package in self.packages]
        needed += [model.error is None for model in self.models] + [check.is_ok for check in self.checks]
        return all(needed) and not self.errors

    @property
    def advice(self) -> list[str]:
        """What to do, in a line each; empty where there is nothing."""
        return list(_advice(self))

    def as_json(self) -> dict[str, Any]:
        facts = {"stepwell": self.stepwell, "platform": self.platform, "ok": self.is_well}
        facts["packages"] = [asdict(package) for package in self.packages]
        facts["extras"] = [
            {**asdict(extra), "present": extra.is_present, "pip": extra.pip} for extra in self.extras
        ]
        facts["devices"] = [asdict(device) for device in self.devices]
        facts["threads"] = None if self.threads is None else asdict(self.threads)
        facts["models"] = [asdict(model) for model in self.models]
        facts["checks"] = [{**asdict(check), "ok": check.is_ok} for check in self.checks]
        return facts | {"errors": self.errors, "advice": self.advice}

    def as_text(self) -> str:
        """Aligned lines, headed by what they are about; what to do comes last."""
        rows: list[tuple[str, Iterable[str]]] = [
            ("packages", _package_lines(self)),
            ("extras", _extra_lines(self.extras)),
            ("devices", _device_lines(self)),
            ("models", (_model_line(model) for model in self.models)),
            ("self-check", _check_lines(self.checks)),
            ("errors", self.errors),
        ]
        lines = [f"{'' if i else head:<12}{line}" for head, body in rows for i, line in enumerate(body)]
        return "\n".join([*lines, *(f"to do: {line}" for line in self.advice or ["nothing"])])


def examine() -> Report:
    """Looks at this machine and this installation, which takes some seconds. What goes wrong is in the report
    and not raised.
    """
    report = Report(models=[_shipped(name) for name in SHIPPED_MODELS])
    try:
        report.packages, report.extras = required(), extras()
    except metadata.PackageNotFoundError:
        report.errors.append("stepwell is not installed, only run, so that nobody knows what it needs")
    try:
        from stepwell.doctor.checks import self_check
        from stepwell.doctor.machine import devices, threads

        report.devices, report.threads = devices(), threads()
        for device in report.devices:
            report.checks += self_check(device.kind)
    except Exception as error:  # torch is missing or broken: what is wrong with it is what is to be told
        report.errors.append(f"devices and fast paths are not looked at: {one_line(error)}")
    return report


def _shipped(name: str) -> ShippedModel:
    folder = SHIPPED_MODELS[name]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        model_type(folder)
    except ValueError as error:
        return ShippedModel(name, size, one_line(error))
    return ShippedModel(name, size)


# ---- what to do -----------------------------------------------------------------------------------------


def _advice(report: Report) -> Iterator[str]:
    for package in report.packages:
        if package.state == "broken":
            fits = " (torchvision's release must fit torch's)" if package.name == "torchvision" else ""
            yield f"{package.name} cannot be imported: pip install --force-reinstall {package.name}{fits}"
        elif package.name == "python" and package.state != "ok":
            yield f"use Python {package.needs}"
        elif package.state != "ok":
            yield f"pip install '{package.name}{package.needs}'"
    if any(model.error for model in report.models) or (report.errors and not report.packages):
        yield "install stepwell anew, in a clone of its repository: pip install --force-reinstall --no-deps ."
    if any(not check.is_ok for check in report.checks):
        yield (
            "report the failed self-checks with this output; in Python, `with stepwell.prefer('reference'):` "
            "goes round the fast paths meanwhile"
        )
    yield from _advice_on_speed(report)


def _advice_on_speed(report: Report) -> Iterator[str]:
    if not report.devices or report.threads is None:
        return
    used = report.devices[-1]  # a GPU where there is one
    if used.bf16_slowdown is not None and used.bf16_slowdown > MUCH_SLOWER:
        yield "bfloat16 is slow here: --dtype float32, and bf16: false in recipes"
    cores, threads = report.devices[0].cores or 1, report.threads.torch
    if threads > cores:
        yield f"torch starts {threads} threads on {cores} cores: OMP_NUM_THREADS={cores} is quicker"
    elif report.threads.omp_num_threads and threads < cores // 2:
        yield f"OMP_NUM_THREADS lets torch use {threads} of {cores} cores: unset it for more"


# ---- lines ----------------------------------------------------------------------------------------------


def _package_lines(report: Report) -> list[str]:
    words = [f"stepwell {report.stepwell}"]
    words += [f"{package.name} {package.version}" for package in report.packages if package.version]
    listed = textwrap.wrap(", ".join(word.replace(" ", "\0") for word in words), WIDTH - 12)
    return [
        *(line.replace("\0", " ") for line in listed),
        *(f"{_trouble(package)}" for package in report.packages if package.state != "ok"),
    ]


def _trouble(package: Package) -> str:
    if package.state == "missing":
        return f"{package.name}{package.needs} is missing"
    if package.state == "broken":
        return f"{package.name} {package.version} cannot be imported: {package.reason}"
    return f"{package.name} {package.version} does not fit: {package.needs} is needed"


def _extra_lines(found: list[Extra]) -> Iterator[str]:
    width = max((len(extra.purpose) for extra in found), default=0)
    for extra in found:
        if extra.name in FOR_DEVELOPERS:
            continue
        versions = ", ".join(f"{package.name} {package.version}" for package in extra.packages)
        lacks = ", ".join(_trouble(package) for package in extra.packages if package.state != "ok")
        about = versions if extra.is_present else f"{extra.pip}  ({lacks})"
        state = "present" if extra.is_present else "absent"
        yield f"{extra.name:<10} {state:<8} {extra.purpose:<{width}}  {about}"


def _device_lines(report: Report) -> Iterator[str]:
    for device in report.devices:
        about = [device.name]
        if device.cores is not None:
            about.append(f"{device.cores} cores, {device.instructions}")
        if device.memory is not None:
            about.append(f"{device.memory / 2**30:.1f} GiB")
        if device.bf16_slowdown is not None:
            about.append(f"a bfloat16 product takes {device.bf16_slowdown:.1f} times a float32 one")
        if device.error is not None:
            about.append(f"does not work: {device.error}")
        yield f"{device.kind:<10} {', '.join(about)}"
    if report.threads is not None:
        omp = report.threads.omp_num_threads or "not set"
        yield f"{'threads':<10} {report.threads.torch}, OMP_NUM_THREADS is {omp}"


def _model_line(model: ShippedModel) -> str:
    return f"{model.name:<12} {model.error or f'{model.bytes / 1e6:.1f} MB'}"


def _check_lines(checks: list[Result]) -> Iterator[str]:
    """One for all that are well, and one for each that is not."""
    for device in dict.fromkeys(check.device for check in checks):
        here = [check for check in checks if check.device == device]
        well = [check.difference for check in here if check.is_ok and check.difference is not None]
        largest = f", largest difference {max(well):.0e}" if well else ""
        yield f"{device:<10} {len(well)} of {len(here)} fast paths give what their references give{largest}"
        for check in here:
            if check.error is not None:
                yield f"{device:<10} {check.name}: {check.error}"
            elif not check.is_ok:
                yield f"{device:<10} {check.name} differs by {check.difference:.2g} of the largest value"
