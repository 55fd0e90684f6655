"""Metrics of short answers equal the recorded official ones, and every key of their table is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

from record import read_record
from verify import verify

GOLDEN = Path(__file__).parent / "inf" / "metrics.json"


def test_official_scores_come_back_and_what_is_by_lmms_eval_is_named():
    verdict = verify(read_record(GOLDEN), ["reference"])
    assert verdict.status == "ok"
    checked, others = verdict.reason.split("; ")
    parts = "vqa_normalise, vqa_accuracy, anls, relaxed_accuracy, pope, option_letter, gqa, refcoco"
    assert checked == f"checked {parts}"
    assert others.startswith("by lmms-eval ")
    whole = "mme ocrbench mmmu_open realworldqa llm_judged pope.lmms_aggregate refcoco.center".split()
    assert {*whole} <= {*others.removeprefix("by lmms-eval ").split(", ")}
    assert "m4c" not in others
    assert "official" not in others


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("vqa_normalise", 5, "m4c_normalised"), "apple  please"),
        (("vqa_normalise", 5, "punct_then_digits"), "apple"),
        (("vqa_accuracy", 9, "m4c_textvqa"), 0.3001),
        (("vqa_accuracy", 9, "stvqa_exact"), 0.0),
        (("anls", 60, "m4c_anls"), 1.0),
        (("anls", 1, "m4c_anls"), 0.91),
        (("relaxed_accuracy", 0, "lmms_relaxed"), False),
        (("pope", "cases", 0, "official_parsed"), "no"),
        (("pope", "official_aggregate", "recall"), 0.6251),
        (("option_letter", 0, "scienceqa_official_letter"), "B"),
        (("option_letter", 0, "scienceqa_official_index"), 1),
        (("option_letter", 0, "seed_official_correct"), False),
        (("gqa", 0, "official_submitted"), "Yes"),
        (("gqa", 0, "official_equal"), False),
        (("refcoco", 0, "parsed"), [0.1, 0.2, 0.5, 0.7]),
        (("refcoco", 1, "iou"), 0.99),
        (("refcoco", 1, "acc_at_0_5"), False),
    ],
)
def test_every_official_key_is_compared(place, value):
    record = read_record(GOLDEN)
    *parents, key = place
    part = record.table
    for parent in parents:
        part = part[parent]
    assert part[key] != value
    part[key] = value
    verdict = verify(record, ["reference"])
    assert verdict.status == "FAILED"
    assert place[0] in verdict.reason
    assert "more" not in verdict.reason


def test_a_key_that_nobody_makes_is_not_yet_ours():
    record = read_record(GOLDEN)
    record.table["anls"][3]["infovqa_anls"] = 1.0
    verdict = verify(record, ["reference"])
    assert verdict.status == "ok"
    assert "; not yet anls.infovqa_anls; by lmms-eval " in verdict.reason


def test_a_key_that_is_gone_is_told():
    record = read_record(GOLDEN)
    for row in record.table["gqa"]:
        del row["official_equal"]
    assert verify(record, ["reference"]).reason == "reference path: gqa: no official_equal recorded"
