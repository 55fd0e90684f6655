"""What a user would pick instead of a reader on questions that tell a box: rapidocr's recogniser, on the box
cut out of the image.

python benchmarks/ocr.py QUESTIONS IMAGES [--limit N]    wants `pip install rapidocr onnxruntime`

PP-OCRv6 small, Apache 2.0, on the processor; its detector is not asked. Scored as `stepwell evaluate
--metric reading` scores.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from rapidocr import RapidOCR

from stepwell.evaluate.metrics import characters, spelled_alike
from stepwell.flops.text import aligned
from stepwell.images.open import open_image
from stepwell.views.region import region_in_words

MARGIN = 0.1  # cut out beside a box, by its height


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("images", type=Path, help="the folder that image paths start from")
    parser.add_argument("--limit", type=int, help="questions with a box, from the first")
    arguments = parser.parse_args()
    engine = RapidOCR(params={"Global.log_level": "error"})
    rows = [json.loads(line) for line in arguments.questions.read_text("utf-8").splitlines()]
    rows = [row for row in rows if region_in_words(row["question"])][: arguments.limit]
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    seconds = []
    for row in rows:
        began = time.perf_counter()
        said = read(engine, arguments.images / row["image"], row["question"])
        seconds.append(time.perf_counter() - began)
        found = float(spelled_alike(said, row["answers"])), characters(said, row["answers"])
        for kind in ("all", row["type"]):
            scores[kind].append(found)
    means = {kind: map(statistics.fmean, zip(*found, strict=True)) for kind, found in scores.items()}
    table = [
        [kind, str(len(scores[kind])), *(f"{x:.4f}" for x in of_kind)] for kind, of_kind in means.items()
    ]
    print(aligned(["questions of type", "number", "exact", "characters"], table))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{statistics.fmean(seconds):.3f} seconds a question, image opened in them; {peak:.2f} GiB")


def read(engine: RapidOCR, file: Path, question: str) -> str:
    """What stands in the box that a question tells."""
    image, box = open_image(file), region_in_words(question)
    assert box is not None
    left, top, right, bottom = (
        edge * side for edge, side in zip(box, (*image.size, *image.size), strict=True)
    )
    room = MARGIN * (bottom - top)
    line = image.crop((round(left - room), round(top - room), round(right + room), round(bottom + room)))
    found = engine(np.asarray(line.convert("RGB"))[:, :, ::-1], use_det=False, use_cls=False, use_rec=True)
    return " ".join(found.txts or ())


if __name__ == "__main__":
    main()
