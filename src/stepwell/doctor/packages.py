"""Which packages are here: those that every installation needs, and those of the extras, each with its use.

What is needed is read from the metadata of the installed package, which pip wrote from pyproject.toml. Needs
no torch, so that it can say that torch is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from platform import python_version
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from stepwell.folders import one_line

__all__ = ["FOR_DEVELOPERS", "PURPOSES", "Extra", "Package", "State", "extras", "required"]

State = Literal["ok", "missing", "unfit", "broken"]

PURPOSES = {
    "timm": "any network of timm as an encoder, timm:NAME",
    "heif": "HEIC, the photos of phones",
    "train": "stepwell train, stepwell draw, LoRA",
    "quantised": "weights of 4 or 8 bits",
    "eval": "curves and figures of stepwell evaluate, CIDEr",
    "serve": "stepwell serve",
    "demo": "stepwell demo, the page in a browser",
    "detect": "DINO, COCO's scores, masks of COCO files",
    "export": "stepwell export, and --runtime onnx or openvino",
    "scale": "stepwell extract, on one machine or by Ray",
    "lmms-eval": "our models in lmms-eval",
    "ms-swift": "our models in ms-swift",
    "docs": "make docs",
    "dev": "make test, make check",
    "mutants": "tests/mutants",
    "bench": "make bench",
}
"""What each extra is for."""

FOR_DEVELOPERS = frozenset({"bench", "dev", "docs", "mutants"})
"""Extras that only those who work on Stepwell need."""


@dataclass(frozen=True, slots=True)
class Package:
    """One that is needed. version: None where it is missing; reason: why it is broken, in one line."""

    name: str
    version: str | None
    needs: str  # such as >=2.11, or nothing
    state: State
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Extra:
    """Packages that are asked for together, `pip install 'stepwell[NAME]'`."""

    name: str
    purpose: str
    packages: tuple[Package, ...]

    @property
    def is_present(self) -> bool:
        return all(package.state == "ok" for package in self.packages)

    @property
    def pip(self) -> str:
        return f"pip install 'stepwell[{self.name}]'"


def required(of: str = "stepwell") -> list[Package]:
    """What every installation needs, Python first, each imported to see whether it can be.

    Raises importlib.metadata.PackageNotFoundError where the package is run and not installed.
    """
    python = metadata.metadata(of)["Requires-Python"] or ""
    fits = SpecifierSet(python).contains(python_version(), prereleases=True)
    first = Package("python", python_version(), python, "ok" if fits else "unfit")
    needs = [need for need in _requirements(of) if need.marker is None or need.marker.evaluate({"extra": ""})]
    return [first, *(_imported(_look_up(need)) for need in _by_name(needs))]


def extras(of: str = "stepwell") -> list[Extra]:
    """The extras by the order of PURPOSES, those that it does not know last. Nothing of them is imported:
    some take seconds.
    """
    names = metadata.metadata(of).get_all("Provides-Extra") or []
    places = list(PURPOSES)
    names.sort(key=lambda name: (places.index(name) if name in PURPOSES else len(places), name))
    return [
        Extra(name, PURPOSES.get(name, ""), tuple(_look_up(need) for need in _by_name(_of_extra(of, name))))
        for name in names
    ]


def _requirements(of: str) -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires(of) or []]


def _of_extra(of: str, extra: str) -> Iterator[Requirement]:
    """What an extra adds; an extra of its own package in it stands for what that one adds."""
    for need in _requirements(of):
        marker = need.marker
        if marker is None or marker.evaluate({"extra": ""}) or not marker.evaluate({"extra": extra}):
            continue
        if canonicalize_name(need.name) == canonicalize_name(of):
            for inner in need.extras:
                yield from _of_extra(of, inner)
        else:
            yield need


def _by_name(needs: Iterator[Requirement] | list[Requirement]) -> list[Requirement]:
    return sorted({canonicalize_name(need.name): need for need in needs}.values(), key=lambda need: need.name)


def _look_up(need: Requirement) -> Package:
    try:
        version = metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return Package(need.name, None, str(need.specifier), "missing")
    fits = need.specifier.contains(version, prereleases=True)
    return Package(need.name, version, str(need.specifier), "ok" if fits else "unfit")


def _imported(package: Package) -> Package:
    """The package, broken where it is there and cannot be imported: a torchvision of another torch is so."""
    if package.version is None:
        return package
    try:
        for module in _modules(package.name):
            import_module(module)
    except Exception as error:  # whatever is wrong with it is what is to be told
        reason = f"{type(error).__name__}: {one_line(error)}"
        return Package(package.name, package.version, package.needs, "broken", reason)
    return package


def _modules(name: str) -> list[str]:
    """What a distribution is imported as: its own name where it has a module of it, else all it brings."""
    distribution = metadata.distribution(name)
    listed = (distribution.read_text("top_level.txt") or "").split()
    if not listed:
        listed = [file.parts[0] for file in distribution.files or [] if file.name == "__init__.py"]
    own = canonicalize_name(name).replace("-", "_")
    return [own] if own in listed else sorted({module for module in listed if module[0] != "_"})
