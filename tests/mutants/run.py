"""Which wrong lines would the tests see? Mutants of our rooms, drawn by a seed, against the tests near them.

A mutant is a file with one small change: a number plus one, `and` for `or`, an operator for another. The
changes are those of cosmic-ray's operators that take no arguments, all of them. Left out is what is never
evaluated: annotations of parameters, results and variables (`from __future__ import annotations`), but not of
a class's fields, which pydantic reads; and what is no Python any more, such as `def f(x, **, y)`.

    python -m pip install -e ".[mutants]"
    python tests/mutants/run.py              # mutants that results.csv lacks, or whose file has changed since
    python tests/mutants/run.py --again      # and those that survived
    python tests/mutants/run.py --wide       # survivors against the whole suite: minutes each

A mutant's rank is a hash of the seed and of what it changes, so that an edit moves no mutant but those of its
line. results.csv is written by the script, but for what a person makes of survivors: `equivalent` where no
test could tell them apart, and a sentence either way.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import hashlib
import importlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

import pytest
from by_hand import BY_HAND
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

LIBRARIES = (
    *(
        "accelerate",
        "hypothesis.strategies",
        "pydantic",
        "safetensors.torch",
        "timm",
        "torch",
        "torch._dynamo",
    ),
    *("torchvision", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"),
    *("transformers.pipelines", "transformers.trainer", "yaml"),
)
"""What tests import, once for all mutants: it takes longer than most of their tests."""

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.csv")
ROOMS = ("ops", "fuse", "layers", "language", "train")
SEED, DRAWN = 2026, 200
MOST_SECONDS = 300  # of a mutant's tests, which take some on a busy machine: longer is an endless loop
MOST_BYTES = 24 * 2**30  # of address space: a mutant may ask for any shape

NEAR = {
    "ops": ("ops", "layers", "fuse", "heads"),
    "layers": ("layers", "encoders", "fuse", "models/test_starting_values.py"),
    "fuse": ("fuse", "models/test_piip.py", "models/test_starting_values.py", "models/test_light.py"),
    "language": (
        *("language", "models/test_processor.py", "models/test_assistant_model.py", "models/test_light.py"),
        *("train/test_collate.py", "models/test_ask.py"),
    ),
    "train": ("train", "reader/test_task.py"),
    "models": ("models/test_assistant_model.py",),
    "reader": ("reader",),
    "views": ("views",),
}
"""A room's tests: they run where a file's own have passed."""

OWN = {
    "ops/derivatives.py": ("ops/test_derivatives.py", "ops/test_deform_attn.py"),
    "ops/ragged.py": ("ops/test_pack.py",),
    "layers/norm.py": ("layers/test_attention.py",),
    "language/light_tokenizer.py": ("models/test_light.py",),
    "language/template.py": ("language/test_template.py", "language/test_prompt.py"),
    "models/assistant.py": ("models/test_assistant_model.py",),
    "reader/task.py": ("reader/test_task.py", "reader/test_start.py"),
    "train/chat.py": ("train/test_chat.py", "train/test_steps.py", "models/test_load_parts.py"),
    "train/metrics.py": ("train/test_run.py",),
    "train/run.py": ("train/test_run.py", "train/test_steps.py"),
    "train/shipped.py": ("train/test_recipe.py",),
    "train/tasks.py": ("train/test_recipe.py",),
}
"""A file's own tests, where they are not those of its name."""


@dataclass
class Mutant:
    key: str
    file: str
    function: str
    operator: str
    line: str
    becomes: str
    code: str  # of the whole mutated file, as a hash
    result: str = ""  # died, survived or equivalent
    why: str = ""  # the test that failed, or a sentence


def candidates(path: Path) -> Iterator[tuple[str, str, str, int]]:
    """(rank, function, operator, occurrence) of every mutation of a file."""
    source = path.read_text("utf-8")
    lines = source.splitlines()
    tree = ast.parse(source)
    functions, unread = dict(_functions(tree)), list(_annotations(tree))
    nodes = list(ast_nodes(get_ast(source)))
    for operator in operator_names():
        kind = get_operator(operator)
        if kind.arguments():
            continue
        alike: Counter[tuple[str, str]] = Counter()
        changed = (place for node in nodes for place in kind().mutation_positions(node))
        for occurrence, (start, _) in enumerate(changed):
            function, line = functions.get(start[0], ""), lines[start[0] - 1].strip()
            number = alike[function, line]
            alike[function, line] += 1
            if not any(first <= start < last for first, last in unread):
                what = (SEED, path.relative_to(ROOT).as_posix(), function, operator, line, number)
                yield hashlib.sha256(repr(what).encode()).hexdigest()[:12], function, operator, occurrence


def _functions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name of what it stands in), outer ones first."""

    def walk(node: ast.AST, name: str) -> Iterator[tuple[int, str]]:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".removeprefix(".")
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                yield from ((line, inner) for line in range(first, child.end_lineno + 1))
            yield from walk(child, inner)

    return walk(tree, "")


def _annotations(tree: ast.Module) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(start, end), as (line, column), of annotations that nothing reads."""
    of_fields = {id(node) for kind in ast.walk(tree) if isinstance(kind, ast.ClassDef) for node in kind.body}
    for node in ast.walk(tree):
        found = [getattr(node, "returns", None), getattr(node, "annotation", None)]
        for note in found if id(node) not in of_fields or isinstance(node, ast.FunctionDef) else []:
            if note is not None:
                yield (note.lineno, note.col_offset), (note.end_lineno, note.end_col_offset)


def draw() -> list[tuple[Mutant, str]]:
    """The mutants, and the mutated text of each file."""
    files = [file for room in ROOMS for file in (ROOT / "src/stepwell" / room).glob("*.py")]
    ranked = sorted((*each, str(file)) for file in files for each in candidates(file))
    mutants: list[tuple[Mutant, str]] = []
    for key, function, operator, occurrence, name in ranked:
        if len(mutants) == DRAWN:
            break
        file = Path(name)
        text = mutate_code(file.read_text("utf-8"), get_operator(operator)(), occurrence)
        assert text is not None, f"{operator} changed nothing"
        if _is_python(text):
            mutants.append((_mutant(file, text, operator.partition("/")[2], function, key), text))
    for place, says, would_say in BY_HAND:
        file = ROOT / "src/stepwell" / place
        source = file.read_text("utf-8")
        if source.count(says) != 1:
            raise ValueError(f"by_hand.py: {place} holds {says!r} {source.count(says)} times")
        text = source.replace(says, would_say)
        key = hashlib.sha256(repr((place, says, would_say)).encode()).hexdigest()[:12]
        mutants.append((_mutant(file, text, "by hand", "", key), text))
    return mutants


def _mutant(file: Path, text: str, operator: str, function: str, key: str) -> Mutant:
    before, after = (lines.splitlines() for lines in (file.read_text("utf-8"), text))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "-+"]
    line, becomes = (" ".join(x[2:].strip() for x in changes if x[0] == sign) for sign in "-+")
    place, code = file.relative_to(ROOT).as_posix(), hashlib.sha256(text.encode()).hexdigest()[:12]
    return Mutant(key, place, function, operator, line, becomes, code)


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def near_tests(file: str) -> tuple[list[str], ...]:
    """Test files for a source file: those of its name, and the others of its room."""
    _, _, room, name = file.split("/")
    named = OWN.get(f"{room}/{name}", (f"{room}/test_{name}",))
    places = [ROOT / "tests" / place for place in NEAR[room]]
    others = [test for place in places for test in (sorted(place.glob("test_*.py")) or [place])]
    own = [ROOT / "tests" / test for test in named if (ROOT / "tests" / test).is_file()]
    return tuple(
        [test.relative_to(ROOT).as_posix() for test in tests]
        for tests in (own, [test for test in others if test not in own])
    )


def run_tests(tree: Path, tests: list[str], seconds: int) -> str:
    """The first test that fails, or what else went wrong; "" where all pass."""
    process = os.fork()
    if process == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
        os.chdir(tree)
        for stream in (1, 2):
            os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree / "src")
        sys.argv = ["pytest"]
        os._exit(pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not slow", "--tb=no", *tests]))
    until = time.monotonic() + seconds
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return f"more than {seconds} s"
        time.sleep(0.1)
    if ended[1] == 0:
        return ""
    output = (tree / "output.txt").read_text("utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return failed[1].partition("[")[0] if failed else f"pytest ended with {ended[1]}"


@contextmanager
def changed(file: Path, text: str) -> Iterator[None]:
    """The file holds `text`, and no bytecode tells otherwise."""
    before = file.read_text("utf-8")
    for content in (text, before):
        for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
            compiled.unlink()
        file.write_text(content, "utf-8")
        if content is text:
            yield


def copy_tree(tree: Path) -> None:
    """What git knows of and what is new, as it lies in the worktree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def read_results() -> dict[str, Mutant]:
    if not RESULTS.is_file():
        return {}
    with RESULTS.open(encoding="utf-8", newline="") as file:
        return {row["key"]: Mutant(**row) for row in csv.DictReader(file)}


def write_results(mutants: list[Mutant]) -> None:
    part = RESULTS.with_suffix(".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Mutant)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(mutant) for mutant in sorted(mutants, key=lambda m: (m.file, m.key)))
    part.replace(RESULTS)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--again", action="store_true", help="survivors too")
    arguments.add_argument("--wide", action="store_true", help="survivors, against the whole suite")
    arguments.add_argument("--only", metavar="TEXT", default="", help="mutants whose key or file holds this")
    options = arguments.parse_args()
    known, drawn = read_results(), draw()
    for mutant, _ in drawn:
        before = known.get(mutant.key)
        if before and (before.code == mutant.code or before.result == "equivalent"):
            mutant.result, mutant.why = before.result, before.why
        elif before and before.result == "survived":
            mutant.why = before.why
    for library in LIBRARIES:
        importlib.import_module(library)
    repeat = ("", "survived") if options.again or options.wide else ("",)
    left = [
        (mutant, text)
        for mutant, text in sorted(drawn, key=lambda each: each[0].file)  # training takes longest
        if mutant.result in repeat and options.only in f"{mutant.key} {mutant.file} {mutant.operator}"
    ]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for widest in (True,) if options.wide else (False, True):
            for mutant, text in left.copy():
                own, near = near_tests(mutant.file)
                tests = ["tests"] if options.wide else near if widest else own
                started = time.monotonic()
                with changed(tree / mutant.file, text):
                    failed = run_tests(tree, tests, MOST_SECONDS * (5 if options.wide else 1))
                if failed:
                    mutant.result, mutant.why = "died", failed
                    left.remove((mutant, text))
                elif widest:
                    mutant.result = "survived"  # and what was noted about it stays
                write_results([mutant for mutant, _ in drawn])
                took, what = (
                    time.monotonic() - started,
                    mutant.result if failed or widest else "passed its own tests",
                )
                print(f"{mutant.key} {took:3.0f} s {what}: {mutant.file}: {mutant.becomes}")
    write_results([mutant for mutant, _ in drawn])
    for operator, group in (("drawn", drawn[:DRAWN]), ("by hand", drawn[DRAWN:])):
        print(operator, dict(Counter(mutant.result for mutant, _ in group)))


if __name__ == "__main__":
    main()
