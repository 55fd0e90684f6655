"""A fixed set of drawn pages as files, with their answers: for tests, and for whoever trains something else.

The files are those of the receipts' data set: questions a line, conversations, COCO boxes of all lines with
their text, and key fields. Image names are relative to the folder.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepwell.reader.drawn import DrawnPages, Page
from stepwell.reader.questions import asked_about

__all__ = ["write_drawn"]

SIZES = ((10, "up to 10 px"), (13, "11-13 px"), (18, "14-18 px"))
"""Largest em, in pixels of the largest view -> how questions that read so large a text are called."""
LARGER = "19 px and more"


def write_drawn(
    pages: DrawnPages,
    folder: Path,
    *,
    reads: int = 8,
    view: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> None:
    """images/000000.png, ..., questions.jsonl (question_id, image, question, answers, type, and box in
    fractions where one is read), conversations.json, lines.json (COCO) and fields.jsonl.

    reads: questions of a page that read a line. view: long side of the largest view of the models that will
    be asked; types of these questions say how large the text is there. The folder is there whole or not at
    all. Raises FileExistsError where it is already.
    """
    if folder.resolve() == Path.cwd():
        raise ValueError(f"name a new folder: {folder} is the one you are in")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(17, "is there already, and is not written over", str(folder))
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    try:
        _write(pages, part, reads, view, progress)
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(
    pages: DrawnPages, folder: Path, reads: int, view: int, progress: Callable[[int], None] | None
) -> None:
    questions: list[Any] = []
    conversations: list[Any] = []
    fields: list[Any] = []
    images: list[Any] = []
    annotations: list[Any] = []
    for index in range(len(pages)):
        page, name = pages.drawn(index), f"images/{index:06}.png"
        page.image.convert("L").save(folder / name)
        images.append(
            {"id": index + 1, "file_name": name, "width": page.image.width, "height": page.image.height}
        )
        for line in page.lines:
            left, top, right, bottom = (round(value, 2) for value in line.box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1,
                    "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
                    "area": round((right - left) * (bottom - top), 2),
                    "iscrowd": 0,
                    "text": line.text,
                }
            )
        asked = _questions(page, index, name, reads, view, seed=pages.seed)
        questions += asked
        turns = [
            {"from": speaker, "value": value}
            for number, each in enumerate(asked)
            for speaker, value in (
                ("human", ("" if number else "<image>\n") + each["question"]),
                ("gpt", each["answers"][0]),
            )
        ]
        if turns:
            conversations.append({"id": f"{index:06}", "image": name, "conversations": turns})
        fields.append({"image": name, "fields": page.fields})
        if progress is not None:
            progress(index + 1)
    coco = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "line"}],
    }
    (folder / "lines.json").write_text(json.dumps(coco), "utf-8")
    (folder / "conversations.json").write_text(json.dumps(conversations, indent=1), "utf-8")
    for file, entries in (("questions.jsonl", questions), ("fields.jsonl", fields)):
        (folder / file).write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")


def _questions(
    page: Page, index: int, name: str, reads: int, view: int, *, seed: int
) -> list[dict[str, Any]]:
    size = (page.image.height, page.image.width)
    chance = random.Random(f"{seed}/{index}/set")
    ems = {id(line): em for line, em in zip(page.lines, page.ems, strict=True)}
    shrunk = min(1.0, view / max(size))
    questions = []
    for number, asked in enumerate(asked_about(page.lines, page.fields, size, reads=reads, chance=chance)):
        entry: dict[str, Any] = {
            "question_id": f"{index:06}-{number}",
            "image": name,
            "question": asked.question,
            "answers": [asked.answer],
            "type": asked.kind,
        }
        if asked.box is not None:
            entry["type"] = f"read {_size(ems[id(asked.line)] * shrunk)}"
            entry["box"] = [round(edge, 4) for edge in asked.box]
        questions.append(entry)
    return questions


def _size(em: float) -> str:
    return next((name for largest, name in SIZES if round(em) <= largest), LARGER)
