"""The house stands as it was drawn: imports go one way, names are declared, importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "stepwell"
MODULES = sorted(PACKAGE.rglob("*.py"))
WRITTEN = [path for path in MODULES if path.read_text().strip()]

# A room may import itself and every room of a group before its own; nothing else of ours.
GROUPS = [
    ["structures", "folders", "version"],
    ["ops", "keys"],
    ["layers"],
    ["images"],
    ["views", "encoders", "fuse", "heads", "language"],
    ["models"],
    ["data", "flops"],
    ["evaluate"],
    ["train"],
    ["reader"],
    ["weights"],
    ["export"],
    ["look", "extract"],
    ["serve", "integrations"],
    ["doctor"],
    ["commands"],
    ["cli", "__init__"],  # the command line, and the list of public names
    ["__main__"],
]
RANK = {room: rank for rank, group in enumerate(GROUPS) for room in group}

LONG: dict[str, str] = {}  # files past 400 lines, and why they are still one idea


def name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module of ours): wherever it stands, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            base = node.module or ""
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "stepwell" else [base]
        else:
            continue
        yield from ((node.lineno, module) for module in modules if module.split(".")[0] == "stepwell")


def public_definitions(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def other_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def declared_names(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [
            "__all__"
        ]:
            return list(ast.literal_eval(node.value))
    return None


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in MODULES} <= set(RANK)


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_imports_go_one_way(path: Path) -> None:
    here = room(path)
    for line, module in imports(path):
        there = module.split(".")[1] if "." in module else "__init__"
        assert there == here or RANK[there] < RANK[here] or here == "cli", (
            f"{name(path)}:{line} imports {module}: {here} may not look into {there}"
        )


@pytest.mark.parametrize(
    "path", [path for path in WRITTEN if path.stem not in ("__init__", "__main__")], ids=name
)
def test_public_names_are_declared(path: Path) -> None:
    tree = ast.parse(path.read_text())
    declared = declared_names(tree)
    assert declared is not None, f"{name(path)} has no __all__"
    assert declared == sorted(set(declared), key=declared.index), f"{name(path)} declares a name twice"
    defined = public_definitions(tree)
    assert defined <= set(declared), f"{name(path)} does not declare {sorted(defined - set(declared))}"
    unknown = set(declared) - defined - other_names(tree)
    assert not unknown, f"{name(path)} declares {sorted(unknown)} and does not define them"


@pytest.mark.parametrize("path", WRITTEN, ids=name)
def test_files_open_with_what_they_are(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name(path)} has no docstring"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_files_stay_short_and_named_after_something(path: Path) -> None:
    assert path.stem not in {"utils", "util", "misc", "common", "helpers", "tools"}
    lines = len(path.read_text().splitlines())
    assert lines <= 400 or name(path) in LONG, (
        f"{name(path)} has {lines} lines: look for the second idea in it"
    )


def test_the_list_of_long_files_is_true() -> None:
    for file in LONG:
        assert len((PACKAGE / file).read_text().splitlines()) > 400


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_rooms_open_with_an_empty_init(path: Path) -> None:
    if path.name == "__init__.py" and path.parent != PACKAGE:
        assert path.read_text() == ""


HYPHENATED = ("huggingface-hub", "lmms-eval", "pillow-heif", "faster-coco-eval", "prometheus-client")


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    """By what users install; the extra `dev` is for tests."""
    names = {"PIL": "pillow", "fontTools": "fonttools", "yaml": "pyyaml", "swift": "ms-swift"}
    names |= {name.replace("-", "_"): name for name in HYPHENATED}
    imported: set[str] = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    users = extras.keys() - {"docs", "dev", "mutants", "bench"}
    lines += [line for extra in users for line in extras[extra] if not line.startswith("stepwell[")]
    required = {re.split(r"[\[<>=]", line)[0] for line in lines}
    required -= {"onnx", "onnxscript"}  # torch imports them
    assert {names.get(name, name) for name in imported} - {"stepwell"} == required


def test_nothing_names_a_place_on_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    files = [
        ROOT / line
        for line in listed.splitlines()
        if line.endswith((".py", ".md", ".yaml", ".toml", "Makefile"))
    ]
    for path in files:
        if path.is_file():
            assert not re.search(r"(?<![\w.])/(home|root|Users|work)/\w", path.read_text()), path


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


IMPORT_EVERYTHING = """
import importlib, os, pkgutil, random, socket, threading
import gradio, numpy, ray, torch, torchvision, timm, transformers  # what these do when imported is not ours
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer

def refuse(*args, **kwargs):
    raise AssertionError("an import did more than import")

socket.socket.connect = torch.compile = torch.manual_seed = random.seed = numpy.random.seed = refuse

def state():
    return {
        "random": random.getstate(), "numpy": str(numpy.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ), "folder": os.getcwd(), "threads": threading.active_count(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch defaults": (torch.get_default_dtype(), torch.is_grad_enabled()),
        "matmul": torch.get_float32_matmul_precision(),
    }

before = state()
import stepwell
print([AutoModelForImageTextToText._model_mapping[type(config)].__name__
       for config in [AutoConfig.for_model("stepwell")]])
for module in pkgutil.walk_packages(stepwell.__path__, "stepwell."):
    importlib.import_module(module.name)
after = state()
print([what for what in before if before[what] != after[what]])
print([name for name in stepwell.__all__ if not hasattr(stepwell, name)])
"""


@pytest.mark.slow
def test_importing_registers_with_the_auto_classes_and_does_nothing_else() -> None:
    """Network cut, compiling and seeding forbidden, every module imported: nothing may have changed."""
    registered, changed, missing = run(IMPORT_EVERYTHING).splitlines()  # a fourth line would be a print
    assert registered == "['StepwellForConditionalGeneration']"
    assert changed == "[]"
    assert missing == "[]"


def test_the_version_is_written_the_same_twice() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tree = ast.parse((PACKAGE / "version.py").read_text())
    values = {
        target.id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert values["__version__"] == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


PATH_ALONE = """
import importlib, pkgutil, sys
import stepwell

rooms = ("structures", "folders", "ops", "keys", "layers", "images", "views", "encoders", "fuse", "heads")
rooms += ("language", "flops")
names = [module.name for module in pkgutil.walk_packages(stepwell.__path__, "stepwell.")]
names = [name for name in names if name.split(".")[1] in rooms]
of_models = ("ask", "ask_file", "light", "runs", "systems", "published.papers")
for name in [*names, *(f"stepwell.models.{name}" for name in of_models)]:
    importlib.import_module(name)

import torch
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig

branches = [BranchConfig(encoder="vit_nano", size=size, interactions=((0, 1), (2, 3))) for size in (32, 64)]
for settings in (PlainConfig(encoder="vit_nano", size=64), PiipConfig(branches=branches)):
    vision = settings.build(32)
    layouts = [vision.geometry.layout((40, 60))]
    vision([torch.zeros(3, *size) for size in layouts[0].inputs], layouts)
dense, classifier = DenseSettings(branches=branches), ClassifierSettings(branches=branches)
for network in (dense.build(), classifier.build(num_classes=3)):
    network(torch.zeros(1, 3, 64, 64))
heavy = ("transformers", "torchvision", "timm", "torch._dynamo", "sympy")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.slow
def test_the_path_needs_neither_transformers_nor_the_compiler() -> None:
    """Everything between an image and its visual tokens or maps, and the planner, imported and run."""
    assert run(PATH_ALONE).strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["ask", "--help"],
        ["ask", "missing.jpg", "What?"],
        ["ask", __file__, ""],
        ["ask", __file__, "?"],  # no image
        ["predict", "--help"],
        ["predict", "missing.jpg", "--model", "a_model"],
        ["predict", __file__, "--model", "./no/folder", "--tiles"],
        ["evaluate", "--help"],
        ["look", "--help"],
        ["look", "missing.jpg", "--what", "views"],
        ["look", __file__, "--what", "attention"],  # of what
        ["extract", "--help"],
        ["extract", "missing.jpg", "out", "--what", "predict"],
        ["data", "--help"],
        ["data", "missing.json"],
        ["data", str(ROOT / "docs"), "--show", "missing/sheet.png"],
        ["data", str(ROOT / "docs")],  # a folder of pictures, as if of a class
        ["evaluate", "reader_tiny", "missing.jsonl", "--metric", "anls"],
    ],
)
def test_the_command_answers_without_torch(arguments: list[str]) -> None:
    run(f"""
import sys
sys.argv = ["stepwell", *{arguments!r}]
from stepwell.cli import run
run()
heavy = {{"torch", "transformers", "timm", "torchvision"}} & set(sys.modules)
assert not heavy, heavy
""")


@pytest.mark.slow
def test_costs_are_told_without_transformers() -> None:
    """Importing it takes longer than the answer."""
    run("""
import sys
from stepwell.cli import main
assert main(["plan", "--branches", "deit:B,S,T", "--budget-gflops", "60"]) == 0
assert main(["flops", "piip_det_tsb_1120_896_448"]) == 0
assert "transformers" not in sys.modules
""")
