"""Golden files of INF-LLaVA and of what the LLaVA family shares: how each kind is built and run."""

from __future__ import annotations

from torch import Tensor

from stepwell.keys.inf import PROJECTOR
from stepwell.language.projector import build_projector
from stepwell.weights.record import Case, Record

__all__ = ["CASES"]


def _projector(record: Record) -> dict[str, Tensor]:
    s = record.settings
    module = build_projector(s["projector_type"], s["mm_hidden_size"], s["hidden_size"])
    return {"y": record.load_into(module, PROJECTOR)(record.inputs["x"])}


CASES: dict[str, Case] = {"inf.projector": _projector}
