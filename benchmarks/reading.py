"""The drawn pages that readers are measured on: draws them, and tells whether they are the recorded ones.

python benchmarks/reading.py FOLDER

benchmarks/reading holds the questions and the digests of the images, as they were before any reader was
trained that is measured on them. Another Pillow or NumPy may draw other pixels, and the first that differ are
named. reader.yaml there is a draft of the next reader's recipe, with what its stages were seen to do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from stepwell.evaluate.answers import digest_of_file
from stepwell.reader.drawn import DrawnPages
from stepwell.reader.drawn_set import write_drawn

RECORDED = Path(__file__).parent / "reading"
LONG_SIDES = (800, 1280)


def main(folder: Path) -> int:
    pages = DrawnPages(
        count=500, seed=7, sides=LONG_SIDES, aspect=(0.8, 2.4), text=(8, 40), reads=8, held_out=True
    )
    write_drawn(pages, folder, view=LONG_SIDES[1])
    recorded = (line.split() for line in (RECORDED / "drawn_images.sha256").read_text().splitlines())
    differing = [name for digest, name in recorded if digest_of_file(folder / name) != digest]
    questions = (folder / "questions.jsonl").read_bytes()
    if questions != (RECORDED / "drawn_questions.jsonl").read_bytes():
        differing.append("questions.jsonl")
    print(f"{len(pages)} pages in {folder}; {len(differing)} files differ {' '.join(differing[:5])}")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
