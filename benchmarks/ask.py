"""`stepwell ask` as a person runs it: whole-process seconds and memory, a middling and a large image."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measure import peak_gib

from stepwell.reader.drawn import draw_page

SIDES = (1000, 4000)
ASK = "import sys; from stepwell.cli import run; sys.argv[0] = 'stepwell'; sys.exit(run())"


def run(rounds: int = 3) -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            path = Path(folder) / f"{side}.png"
            page = draw_page(0, 0, size=(1000, 750), text=(16, 20), kind="receipt")
            page.image.resize((side * 3 // 4, side)).save(path)
            command = ["-c", ASK, "ask", str(path), "How much is the total?"]
            seconds = median(_seconds([sys.executable, *command]) for _ in range(rounds))
            memory = peak_gib(*command)
            rows.append(f"| stepwell ask, {side * 3 // 4}x{side} px | {seconds:.1f} s | {memory:.2f} GiB |")
    return rows


def _seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
