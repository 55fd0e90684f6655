"""`stepwell ask` as a person runs it: processor time beside that of importing torch; seconds and memory
of the whole process, for a middling and a large image."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

from measure import STEADY, Row, peak_gib

from stepwell.reader.drawn import draw_page

SIDES = (1000, 4000)
ENTRY = "import sys; from stepwell.cli import run; sys.argv[0] = 'stepwell'; sys.exit(run())"
RECEIPT = Path(__file__).parents[1] / "examples" / "receipt.jpg"
QUESTION = "How much is the total?"


def user_rows() -> list[Row]:
    return [("stepwell ask, the README's receipt, user time", _user_time)]


def rows() -> list[Row]:
    return [(f"stepwell ask, {side * 3 // 4}x{side} px", partial(_whole, side)) for side in SIDES]


def _user_time(rounds: int = 5) -> Iterator[str]:
    """In turn, one warm-up of each; repeats that vary are made once more."""
    commands = [["-c", ENTRY, "ask", str(RECEIPT), QUESTION], ["-c", "import torch"]]
    for _ in range(2):
        asking, importing = zip(
            *[[_user_seconds(command) for command in commands] for _ in range(rounds + 1)][1:], strict=True
        )
        spread = max(max(side) / min(side) for side in (asking, importing))
        if spread <= STEADY:
            break
    ours, torch = median(asking), median(importing)
    most = 1.6 * torch + 1
    met = "met" if ours <= most else "missed"
    note = f"varies {spread:.1f}x" if spread > STEADY else ""
    yield f"| stepwell ask | {ours:.2f} | {torch:.2f} | at most {most:.2f}, {met} | {note} |"


def _user_seconds(arguments: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before


def _whole(side: int, rounds: int = 3) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{side}.png"
        page = draw_page(0, 0, size=(1000, 750), text=(16, 20), kind="receipt")
        page.image.resize((side * 3 // 4, side)).save(path)
        command = ["-c", ENTRY, "ask", str(path), QUESTION]
        seconds = median(_seconds([sys.executable, *command]) for _ in range(rounds))
        memory = peak_gib(*command)
    yield f"| stepwell ask, {side * 3 // 4}x{side} px | {seconds:.1f} s | {memory:.2f} GiB |"


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
