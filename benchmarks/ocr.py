"""What a user would pick instead of a reader on questions that tell a box: an OCR engine's recogniser, on the
box cut out of the image.

python benchmarks/ocr.py QUESTIONS IMAGES [--limit N]    wants `pip install rapidocr onnxruntime`
python benchmarks/ocr.py QUESTIONS IMAGES --engine tesseract    wants `apt install tesseract-ocr`

PP-OCRv6 small (Apache 2.0) and tesseract's English model (Apache 2.0) for one line, both on the processor; no
detector is asked. Scored as `stepwell evaluate --metric reading` scores.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL.Image import Image, Resampling

from stepwell.evaluate.metrics import characters, spelled_alike
from stepwell.flops.text import aligned
from stepwell.images.open import open_image
from stepwell.views.region import region_in_words

MARGIN = 0.1  # cut out beside a box, by its height
HEIGHT = 48  # pixels that tesseract is shown of a line, with its margin

Recogniser = Callable[[Image], str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("images", type=Path, help="the folder that image paths start from")
    parser.add_argument("--limit", type=int, help="questions with a box, from the first")
    parser.add_argument("--engine", choices=("rapidocr", "tesseract"), default="rapidocr")
    arguments = parser.parse_args()
    recognise = rapidocr() if arguments.engine == "rapidocr" else tesseract
    rows = [json.loads(line) for line in arguments.questions.read_text("utf-8").splitlines()]
    rows = [row for row in rows if region_in_words(row["question"])][: arguments.limit]
    scores: dict[str, list[tuple[float, float]]] = defaultdict(list)
    seconds = []
    for row in rows:
        began = time.perf_counter()
        said = recognise(line_of(arguments.images / row["image"], row["question"]))
        seconds.append(time.perf_counter() - began)
        found = float(spelled_alike(said, row["answers"])), characters(said, row["answers"])
        for kind in ("all", row["type"]):
            scores[kind].append(found)
    means = {kind: map(statistics.fmean, zip(*found, strict=True)) for kind, found in scores.items()}
    table = [
        [kind, str(len(scores[kind])), *(f"{x:.4f}" for x in of_kind)] for kind, of_kind in means.items()
    ]
    print(aligned(["questions of type", "number", "exact", "characters"], table))
    ours, theirs = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    peak = max(resource.getrusage(who).ru_maxrss for who in (ours, theirs)) / 2**20
    print(f"{statistics.fmean(seconds):.3f} seconds a question, image opened in them; {peak:.2f} GiB")


def line_of(file: Path, question: str) -> Image:
    """The box that a question tells, cut out."""
    image, box = open_image(file), region_in_words(question)
    assert box is not None
    left, top, right, bottom = (
        edge * side for edge, side in zip(box, (*image.size, *image.size), strict=True)
    )
    room = MARGIN * (bottom - top)
    return image.crop((round(left - room), round(top - room), round(right + room), round(bottom + room)))


def rapidocr() -> Recogniser:
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error"})

    def recognise(line: Image) -> str:
        found = engine(np.asarray(line)[:, :, ::-1], use_det=False, use_cls=False, use_rec=True)
        return " ".join(found.txts or ())

    return recognise


def tesseract(line: Image) -> str:
    """A process for each line, as its command line has it."""
    file = io.BytesIO()
    line.resize((max(1, round(line.width * HEIGHT / line.height)), HEIGHT), Resampling.BICUBIC).save(
        file, "png"
    )
    command = ["tesseract", "stdin", "stdout", "--psm", "7", "--dpi", "150"]
    said = subprocess.run(command, input=file.getvalue(), capture_output=True, check=True).stdout
    return " ".join(said.decode().split())


if __name__ == "__main__":
    main()
