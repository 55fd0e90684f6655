"""What is needed is read from the metadata of the installed package, and every extra has a purpose."""

from __future__ import annotations

import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from stepwell.doctor import packages
from stepwell.doctor.packages import FOR_DEVELOPERS, PURPOSES, extras, required

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

METADATA = """Metadata-Version: 2.4
Name: some-package
Version: 1.0
Requires-Python: {python}
Requires-Dist: pillow{pillow}
Requires-Dist: torch>=2
Requires-Dist: no-such-package>=3; extra == "serve"
Requires-Dist: pyyaml; extra == "serve"
Requires-Dist: some-package[serve]; extra == "demo"
Requires-Dist: numpy>=1; extra == "demo"
Requires-Dist: windows-only; sys_platform == "win32"
Requires-Dist: jinja2; python_version >= "3"
Provides-Extra: other
Provides-Extra: demo
Provides-Extra: serve
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs some_package, with these words in its metadata; whose name is returned."""

    def install(python: str = ">=3.11", pillow: str = ">=12") -> str:
        folder = tmp_path / "some_package-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(METADATA.format(python=python, pillow=pillow))
        monkeypatch.syspath_prepend(str(tmp_path))
        return "some-package"

    return install


def test_every_extra_has_a_purpose() -> None:
    assert PROJECT["optional-dependencies"].keys() <= PURPOSES.keys()
    assert PURPOSES.keys() >= FOR_DEVELOPERS


def test_versions_are_those_of_the_modules(installed) -> None:
    import PIL
    import torch

    python, _, pillow, torch_ = required(installed())
    assert (python.name, python.state) == ("python", "ok")
    assert (pillow.version, pillow.needs, pillow.state) == (PIL.__version__, ">=12", "ok")
    assert (torch_.version, torch_.state) == (metadata.version("torch"), "ok")
    assert str(torch.__version__).startswith(metadata.version("torch").split("+")[0])


def test_what_is_too_old_is_told(installed) -> None:
    python, _, pillow, _ = required(installed(python=">=3.99", pillow=">=9999"))
    assert (python.state, python.needs) == ("unfit", ">=3.99")
    assert pillow.state == "unfit"


def test_a_package_that_cannot_be_imported_is_broken(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)  # what Python makes an ImportError of
    _, _, pillow, torch_ = required(installed())
    assert pillow.state == "broken"
    assert pillow.reason is not None
    assert "PIL" in pillow.reason
    assert torch_.state == "ok"


def test_an_absent_extra_says_what_is_missing_and_how_to_get_it(installed) -> None:
    serve, *_ = extras(installed())
    assert (serve.name, serve.is_present) == ("serve", False)
    assert serve.pip == "pip install 'stepwell[serve]'"
    assert [(package.name, package.state) for package in serve.packages] == [
        ("no-such-package", "missing"),
        ("pyyaml", "ok"),
    ]


def test_an_extra_may_stand_for_others(installed) -> None:
    _, demo, other = extras(installed())
    assert [package.name for package in demo.packages] == ["no-such-package", "numpy", "pyyaml"]
    assert (other.packages, other.is_present) == ((), True)


def test_a_package_that_is_only_run_has_no_metadata() -> None:
    with pytest.raises(metadata.PackageNotFoundError):
        required("no-such-package")


def test_modules_are_found_by_top_level_or_by_files() -> None:
    assert packages._modules("pyyaml") == ["yaml"]
    assert packages._modules("pillow") == ["PIL"]
    assert packages._modules("huggingface-hub") == ["huggingface_hub"]
    assert packages._modules("torch") == ["torch"]
