"""What is installed from the wheel works alone: the model, the recipes and the command travel."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from stepwell.folders import SHIPPED_MODELS

ROOT = Path(__file__).parents[1]
RECEIPT = ROOT / "examples" / "receipt.jpg"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the project's own build backend, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, and no sight of the source tree.

    The libraries (torch and the like) are lent by a .pth line. Python does not follow .pth files found by way
    of such a line, so the editable install of this repository stays unseen.
    """
    folder = tmp_path_factory.mktemp("clean") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            str(wheel),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(clean: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(clean / "bin" / arguments[0]), *arguments[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_wheel_holds_assets_recipes_and_nothing_of_the_workshop(wheel: Path) -> None:
    files = zipfile.ZipFile(wheel).namelist()
    for model in SHIPPED_MODELS:
        assert {
            f"stepwell/assets/{model}/{file}" for file in ("config.json", "model.safetensors", "README.md")
        } <= {*files}
    assert any(name.startswith("stepwell/recipes/") and name.endswith(".yaml") for name in files)
    assert "stepwell/py.typed" in files
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stepwell"}
    assert {Path(name).name for name in files if "/licenses/" in name} == {"LICENSE", "NOTICE"}


@pytest.mark.slow
def test_the_installed_command_answers_a_question(clean: Path, tmp_path: Path) -> None:
    """The first question of the README, from a folder that is not ours."""
    answered = run(clean, "stepwell", "ask", str(RECEIPT), "How much is the total?", folder=tmp_path)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    assert answered.stderr == ""


def test_the_installed_package_is_the_one_from_the_wheel(clean: Path, tmp_path: Path) -> None:
    code = "import stepwell; print(stepwell.__file__)"
    asked = run(clean, "python", "-c", code, folder=tmp_path)
    assert Path(asked.stdout.strip()).is_relative_to(clean), asked.stderr


def test_a_shipped_recipe_is_found_by_its_name(clean: Path, wheel: Path, tmp_path: Path) -> None:
    refused = run(clean, "stepwell", "train", "no_such_recipe", folder=tmp_path)
    assert refused.returncode == 2
    shipped = [
        Path(name).stem for name in zipfile.ZipFile(wheel).namelist() if name.startswith("stepwell/recipes/")
    ]
    assert shipped
    assert all(recipe in refused.stderr for recipe in shipped), refused.stderr
