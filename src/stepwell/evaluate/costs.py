"""What the vision system of an assistant costs on the images that it was asked about."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from stepwell.flops.report import report
from stepwell.models.ask import Assistant
from stepwell.models.vision import VisionConfig
from stepwell.structures import Region, Size

__all__ = ["VisionCosts", "vision_costs", "vision_of"]


class VisionCosts(NamedTuple):
    """Of one image in the mean. paper_gflops: multiply-accumulates in 1e9, as the papers count; true_gflops:
    all operations of the vision system. None where there was no image; the former too for a kind that no
    paper counts.
    """

    paper_gflops: float | None
    true_gflops: float | None


def vision_of(assistant: Assistant) -> VisionConfig:
    vision: VisionConfig = assistant.model.config.vision
    return vision


def vision_costs(assistant: Assistant, seen: Sequence[tuple[Size, Region | None]]) -> VisionCosts:
    """seen: (height, width) of each image, and the region of it that was looked at closely."""
    settings = vision_of(assistant)
    width = assistant.model.model.get_input_embeddings().weight.shape[1]
    known: dict[Any, tuple[float, float]] = {}  # what is alike in layout costs the same
    costs = []
    for size, region in seen:
        layout = assistant.engine.geometry.layout_of(size, region)
        key = layout.inputs, tuple(view.grid for view in layout.views), layout.runs
        if key not in known:
            counted = report(settings, size=size, region=region, out_dim=width)
            known[key] = counted.gmacs, counted.gflops
        costs.append(known[key])
    if not costs:
        return VisionCosts(None, None)
    return VisionCosts(fmean(paper for paper, _ in costs) or None, fmean(true for _, true in costs))
