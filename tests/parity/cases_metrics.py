"""Golden metrics of short answers: made-up predictions, and what the repository's evaluators make of them.

Every key of a row is ours to compute, or the program's that it is named after (`OF_LMMS_EVAL`), which is a
library to us; a key that is neither is told as not yet ours, so that none is passed over in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from record import Case, Record, TableCheck
from stepwell.evaluate.boxes import ENOUGH, box_iou, read_box
from stepwell.evaluate.choices import choice, choice_letter
from stepwell.evaluate.metrics import anls, gqa_submission, relaxed
from stepwell.evaluate.vqa import vqa_accuracy, vqa_normalised, vqa_words
from stepwell.evaluate.yes_no import MEASURES, pope_counts, yes_or_no

__all__ = ["CASES"]

Row = Mapping[str, Any]

GIVEN = frozenset(
    {"text", "prediction", "answers", "answer", "target", "label", "choices", "gold", "gt_xyxy"}
)
OF_LMMS_EVAL = ("lmms_", "mmbench_", "mmmu_", "hrbench_", "center", "note")
"""Beginnings of keys."""


def _anls(row: Row) -> float | str:
    try:
        return anls(row["prediction"], row["answers"], official=True)
    except ZeroDivisionError as error:
        return type(error).__name__


def _st_vqa(row: Row) -> float:
    """ST-VQA's accuracy: an answer's text, normalised."""
    answers = [vqa_normalised(answer, official=True) for answer in row["answers"]]
    return float(vqa_normalised(row["prediction"], official=True) in answers)


def _letter(row: Row) -> str | None:
    return choice_letter(row["prediction"], official="scienceqa")


def _iou(row: Row) -> float:
    left, top, right, bottom = row["gt_xyxy"]
    return box_iou(read_box(row["prediction"]) or (0.0,) * 4, (left, top, right, bottom))


OURS: Mapping[str, Mapping[str, Callable[[Row], Any]]] = {
    "vqa_normalise": {
        "m4c_normalised": lambda row: vqa_normalised(row["text"], official=True),
        "punct_then_digits": lambda row: vqa_words(row["text"], official=True),
    },
    "vqa_accuracy": {
        "m4c_textvqa": lambda row: vqa_accuracy(row["prediction"], row["answers"], official=True),
        "stvqa_exact": _st_vqa,
    },
    "anls": {"m4c_anls": _anls},
    "relaxed_accuracy": {"lmms_relaxed": lambda row: relaxed(row["prediction"], [row["target"]])},
    "pope": {"official_parsed": lambda row: yes_or_no(row["prediction"], official=True)},
    "option_letter": {
        "scienceqa_official_letter": lambda row: _letter(row) or "FAILED",
        "scienceqa_official_index": lambda row: "ABCDE"[: len(row["choices"])].find(_letter(row) or "-"),
        "seed_official_correct": lambda row: choice(
            row["prediction"], row["gold"], [*row["choices"].values()], official="seed"
        ),
    },
    "gqa": {
        "official_submitted": lambda row: gqa_submission(row["prediction"]),
        "official_equal": lambda row: gqa_submission(row["prediction"]) == row["answer"],
    },
    "refcoco": {
        "parsed": lambda row: list(read_box(row["prediction"]) or (0.0,) * 4),
        "iou": _iou,
        "acc_at_0_5": lambda row: _iou(row) >= ENOUGH,
    },
}
"""Part -> key -> ours, of a row."""


def _metrics(record: Record) -> TableCheck:
    differences: list[str] = []
    left_out: list[str] = []
    by_lmms_eval: dict[str, None] = {}
    for part in record.settings["parts"]:
        if part not in OURS:
            by_lmms_eval[part] = None
            continue
        table = record.table[part]
        rows = table["cases"] if isinstance(table, dict) else table
        keys = dict.fromkeys(key for row in rows for key in row if key not in GIVEN)
        for key in [*keys, *(key for key in table if key != "cases")] if isinstance(table, dict) else keys:
            if key in OURS[part]:
                differences += _differences(part, key, rows)
            elif key == "official_aggregate":
                differences += _pope(rows, table[key])
            elif key.startswith(OF_LMMS_EVAL):
                by_lmms_eval[f"{part}.{key}"] = None
            else:
                left_out.append(f"{part}.{key}")
        differences += [f"{part}: no {key} recorded" for key in OURS[part].keys() - keys.keys()]
    return TableCheck(
        tuple(part for part in record.settings["parts"] if part in OURS),
        tuple(left_out),
        tuple(differences),
        {"lmms-eval": tuple(by_lmms_eval)},
    )


def _differences(part: str, key: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    for i, row in enumerate(rows):
        ours = OURS[part][key](row)
        if key in row and not _equal(ours, row[key]):
            yield f"{part}/{i}: {key} {ours!r}, recorded {row[key]!r}"


def _equal(ours: Any, recorded: Any) -> bool:
    if isinstance(recorded, float) and isinstance(ours, float):
        return math.isclose(ours, recorded, rel_tol=1e-12, abs_tol=1e-12)
    return bool(ours == recorded)


def _pope(rows: list[dict[str, Any]], recorded: Mapping[str, float]) -> Iterator[str]:
    counts = [pope_counts(row["prediction"], row["label"], official=True) for row in rows]
    ours = {name: float(measure(np.sum(counts, 0))) for name, measure in MEASURES.items()}
    if ours.keys() != recorded.keys() or not all(_equal(ours[name], recorded[name]) for name in ours):
        yield f"pope: official_aggregate {ours}, recorded {dict(recorded)}"


CASES: dict[str, Case] = {"inf.metrics": _metrics}
