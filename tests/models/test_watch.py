"""Auto classes find our models in whatever order libraries are imported, and importing stepwell loads none of
them. Every order is a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stepwell
from stepwell.folders import SHIPPED

HEAVY = ("torch", "transformers", "torchvision", "timm", "numpy", "PIL")


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED)], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_loads_no_library() -> None:
    assert run(f"import stepwell, sys; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


MODEL = "from transformers import AutoModelForImageTextToText as Auto"
PROCESSOR = "from transformers import AutoProcessor as Auto"
LOAD = "print(type(Auto.from_pretrained(sys.argv[1])).__name__)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["import stepwell", MODEL, LOAD], "StepwellForConditionalGeneration"),
        (["import stepwell", PROCESSOR, LOAD], "StepwellProcessor"),
        (
            [
                "import stepwell",
                "from transformers import pipeline",
                "print(type(pipeline('image-text-to-text', sys.argv[1]).model).__name__)",
            ],
            "StepwellForConditionalGeneration",
        ),
        ([MODEL, "import stepwell", LOAD], "StepwellForConditionalGeneration"),
        (["import transformers", "import stepwell", PROCESSOR, LOAD], "StepwellProcessor"),
        (["import stepwell", "import transformers.generation.utils", PROCESSOR, LOAD], "StepwellProcessor"),
        (["import stepwell.models.assistant", MODEL, LOAD], "StepwellForConditionalGeneration"),
        (
            ["import stepwell", "from transformers import AutoConfig as Auto", LOAD],
            "StepwellConfig",
        ),
        (
            ["import stepwell", "from transformers import AutoImageProcessor as Auto", LOAD],
            "StepwellImageProcessor",
        ),
    ],
    ids=lambda value: " ; ".join(value) if isinstance(value, list) else "",
)
def test_auto_classes_find_ours_in_any_order(lines: list[str], expected: str) -> None:
    assert run("\n".join(["import sys", *lines])) == expected


@pytest.mark.slow
def test_modules_are_left_as_they_would_be_without_us() -> None:
    """The watch is gone once it has done its work, and modules keep their own loaders."""
    code = """
import sys, stepwell
from transformers import AutoConfig
modules = [sys.modules[name] for name in list(sys.modules) if name.startswith(("transformers.", "stepwell."))]
watched = [*sys.meta_path, *(module.__spec__.loader for module in modules if module.__spec__)]
print(len(modules) > 50, [thing for thing in watched if type(thing).__module__.startswith("stepwell")])
"""
    assert run(code) == "True []"


@pytest.mark.slow
def test_an_import_that_fails_leaves_the_next_one_to_be_watched() -> None:
    code = """
import sys, stepwell
try:
    import transformers.no_such_module
except ImportError:
    pass
from transformers import AutoConfig
print(type(AutoConfig.for_model("stepwell")).__name__)
"""
    assert run(code) == "StepwellConfig"


def test_public_names_are_listed_and_arrive() -> None:
    assert set(stepwell.__all__) <= set(dir(stepwell))
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        stepwell.laod  # noqa: B018
