"""Defects of circuit boards by the shipped detector; `make demo` runs it.

    python examples/boards.py [FOLDER]

Prints what it finds in two scans beside what is there, and draws both into the folder.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from transformers.utils import logging

import stepwell

HERE = Path(__file__).parent
BOARDS = {  # validation images of DeepPCB; see README.md
    "board_1.jpg": "1 copper, 1 mousebite, 1 open, 2 pin-hole, 1 short, 2 spur",
    "board_2.jpg": "2 copper, 2 mousebite, 2 open, 1 pin-hole, 1 short, 1 spur",
}


def main(folder: Path) -> None:
    logging.disable_progress_bar()
    detector = stepwell.load("boards_tiny")
    for name, there in BOARDS.items():
        started = time.perf_counter()
        found = detector.predict(HERE / name)
        seconds = time.perf_counter() - started
        counts = Counter(found.class_names[label] for label in found.labels.tolist())
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        drawn = folder / f"{Path(name).stem}_found.png"
        found.draw(HERE / name).save(drawn)
        print(f"\n{name}: {told} (there are: {there}), {seconds:.2f} s; {drawn}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
