"""Seconds that imports take, by package, as `python -X importtime` counts them.

python benchmarks/imports.py [SRC]      prints the table, of another checkout's src if one is given
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from ask import ENTRY, QUESTION, RECEIPT
from measure import Row

PACKAGES = ("torch", "torch._dynamo", "transformers", "numpy", "PIL")
PLAN = ["plan", "--branches", "deit:B,S,T", "--budget-gflops", "243"]
COMMANDS = {
    "import stepwell": ["-c", "import stepwell"],
    "stepwell ask": ["-c", ENTRY, "ask", str(RECEIPT), QUESTION],
    "stepwell plan": ["-c", ENTRY, *PLAN],
}
HEADER = (
    f"| imports, s | {' | '.join(PACKAGES)} | stepwell's own files | all |\n"
    f"| --- {'| --- ' * (len(PACKAGES) + 2)}|"
)


def rows() -> list[Row]:
    return [(f"imports of {name}", partial(_row, name)) for name in COMMANDS]


def _row(name: str) -> Iterator[str]:
    command = [sys.executable, "-X", "importtime", *COMMANDS[name]]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    modules = _modules(result.stderr)
    cells = [f"{_outermost(modules, package):.2f}" for package in PACKAGES]
    own = sum(seconds for path, seconds, _ in modules if path[-1].split(".")[0] == "stepwell")
    everything = sum(seconds for _, seconds, _ in modules)
    yield f"| {name} | {' | '.join(cells)} | {own:.2f} | {everything:.2f} |"


def _modules(report: str) -> list[tuple[tuple[str, ...], float, float]]:
    """Each module as (those that import it, outermost first, and itself), its own seconds, and with what it
    imports. The report lists a module after what it imports, and indents the latter by two."""
    modules: list[tuple[tuple[str, ...], float, float]] = []
    path: list[str] = []
    for line in reversed(report.splitlines()):
        own, _, rest = line.removeprefix("import time:").partition("|")
        total, _, name = rest.partition("|")
        if not line.startswith("import time:") or not own.strip().isdigit():
            continue
        depth = (len(name) - len(name.lstrip()) - 1) // 2
        path[depth:] = [name.strip()]
        modules.append((tuple(path), int(own) / 1e6, int(total) / 1e6))
    return modules


def _outermost(modules: list[tuple[tuple[str, ...], float, float]], package: str) -> float:
    """A package with what it imports: each of its modules that no other of its modules imports."""

    def inside(name: str) -> bool:
        return f"{name}.".startswith(f"{package}.")

    return sum(total for (*above, name), _, total in modules if inside(name) and not any(map(inside, above)))


if __name__ == "__main__":
    if sys.argv[1:]:
        os.environ["PYTHONPATH"] = sys.argv[1]
    print(HEADER)
    for _, lines in rows():
        print(*lines(), sep="\n", flush=True)
