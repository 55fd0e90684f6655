"""Whether what `ask --json` tells beside an answer can be believed: confidence against right answers, and
whether the box of `where` falls on the line that the answer stands in.

python benchmarks/reliability.py QUESTIONS [--model MODEL] [--limit 100] [--seed 0]
    [--lines LINES] [--out reliability.png]

QUESTIONS as for `stepwell evaluate`, of which so many are drawn by the seed; an answer is right where it is
spelled alike but for case and blanks. LINES is a COCO file of text lines with their `text`; of questions
about whole images whose answer stands in one of them, it is told how often the middle of the box lies on such
a line. Writes the figure, and the numbers of both as JSON beside it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from stepwell.commands.printing import show_progress
from stepwell.evaluate.metrics import spelled_alike
from stepwell.evaluate.rows import BadRow, Row, read_rows
from stepwell.folders import write_whole
from stepwell.look.read_from import ReadFrom, read_from
from stepwell.look.reliability import draw_reliability, reliability
from stepwell.look.trace import ask_and_trace
from stepwell.models.ask import as_assistant
from stepwell.weights.light import load_to_ask

BESIDE = 0.3
"""Of a line's height: so far beside it a box still falls on it."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", default="reader_tiny")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the questions that are taken")
    parser.add_argument("--bins", type=int, default=10)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--out", type=Path, default=Path("reliability.png"))
    arguments = parser.parse_args()
    rows = read_rows(arguments.questions)
    rows = random.Random(arguments.seed).sample(rows, min(arguments.limit, len(rows)))
    lines = {} if arguments.lines is None else lines_by_image(arguments.lines)
    assistant = as_assistant(load_to_ask(arguments.model), arguments.model)
    sure, right, on_line = [], [], defaultdict(list)
    for count, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            raise ValueError(f"{row.where}: {row.reason}")
        answer, traced = ask_and_trace(
            assistant, list(row.images), row.question, max_new_tokens=arguments.max_new_tokens
        )
        sure.append(traced.confidence)
        right.append(spelled_alike(answer, row.answers))
        place, source = truth(row, lines), read_from(traced)
        if place and source is not None and traced.layouts[0].region is None:
            on_line["right answers" if right[-1] else "wrong answers"].append(falls_on(source, place))
        show_progress(count, len(rows))
    found = reliability(sure, right, bins=arguments.bins)
    draw_reliability(arguments.out, found, title=f"{len(rows)} answers of {arguments.model}")
    told = {
        "model": arguments.model,
        "questions": arguments.questions.name,
        "right": round(sum(right) / len(right), 4),
        "confidence": round(sum(sure) / len(sure), 4),
        **found.as_json(),
        "where": {
            kind: {"answers": len(hits), "box_on_line": round(sum(hits) / len(hits), 4)}
            for kind, hits in sorted(on_line.items())
        },
    }
    text = json.dumps(told, indent=2)
    write_whole(arguments.out.with_suffix(".json"), text + "\n")
    print(text)


def lines_by_image(file: Path) -> dict[str, list[dict[str, Any]]]:
    coco = json.loads(file.read_text("utf-8"))
    names = {image["id"]: Path(image["file_name"]).name for image in coco["images"]}
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in coco["annotations"]:
        lines[names[line["image_id"]]].append(line)
    return lines


def truth(row: Row, lines: dict[str, list[dict[str, Any]]]) -> list[list[float]]:
    """Boxes (left, top, width, height) of the lines of the image in which an answer stands."""
    of_image = lines.get(Path(row.names[0]).name, [])
    return [
        line["bbox"] for line in of_image if any(letters(a) in letters(line["text"]) for a in row.answers)
    ]


def letters(text: str) -> str:
    return "".join(text.upper().split())


def falls_on(source: ReadFrom, lines: list[list[float]]) -> bool:
    left, top, right, bottom = source.box
    x, y = (left + right) / 2, (top + bottom) / 2
    return any(
        a - BESIDE * height <= x <= a + width + BESIDE * height
        and b - BESIDE * height <= y <= b + height + BESIDE * height
        for a, b, width, height in lines
    )


if __name__ == "__main__":
    main()
