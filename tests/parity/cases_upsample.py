"""Golden files of LLaVA-UHD v2: how a guided stage and an inverse pyramid of them are built and run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from record import Case, Record, Required, Unsupported, check_required
from stepwell.fuse.upsample import GuidedStage, InversePyramid, KernelConfig, Level
from stepwell.keys.uhd import STAGE, pyramid_rules

__all__ = ["CASES", "STACK_REQUIRED"]

KERNEL: Required = {
    "temperature_clamp": ([1e-4, 1e4],),
    "kernel_sum_clamp": (1e-7,),
    "kernel_fixup_weight": (0.1,),
    "spatial_coordinates": ("minus1_to_1",),
    "source_upsample": ("bicubic",),
    "border": ("reflect",),
    "activation": ("gelu",),
}
STAGE_REQUIRED: Required = {**KERNEL, "guidance_at_output_size": (True,)}
STACK_REQUIRED: Required = {
    **KERNEL,
    "stage_scale": (2,),
    "shared_stages": (False,),
    "guidance_pool": ("adaptive_average",),
    "fixup_weight": (0.1,),
    "final_fixup": ("fixup_proj",),
}


def _stage(record: Record) -> dict[str, Tensor]:
    check_required(record.settings, STAGE_REQUIRED)
    stage = record.load_into(_build_stage(record.settings), STAGE)
    source, guidance = record.inputs["source"], record.inputs["guidance"]
    return {
        "output": stage(source, guidance),
        "range_kernel": stage.similarities(guidance),
        "spatial_kernel": stage.distances()[None, :, None, None],
    }


def _stack(record: Record) -> dict[str, Tensor]:
    s = record.settings
    count = s["num_stages"]
    check_required(
        s, {**STACK_REQUIRED, "scale": (2**count,), "internal_feeds_next_stage": (count == 3,)}
    )  # ours chains corrected maps where the official 8x stack does
    corrections = "each" if s["internal_feeds_next_stage"] else "last"
    pyramid = InversePyramid([_build_stage(s) for _ in range(count)], s["feat_dim"], corrections=corrections)
    record.load_into(pyramid, pyramid_rules(count))
    source, image = record.inputs["source"], record.inputs["image"]
    outputs = {"final": pyramid(source, image)}
    for key, stop_gradient in (("internal", False), ("stage_outputs", True)):
        if s[key]:
            levels = pyramid.levels(source, image, stop_gradient=stop_gradient)
            outputs |= {entry["output"]: _map_of(entry, levels, key) for entry in s[key]}
    return outputs


def _build_stage(s: dict[str, Any]) -> GuidedStage:
    config = KernelConfig(radius=s["radius"], key_dim=s["key_dim"])
    return GuidedStage(config, guidance_dim=s["guidance_dim"])


def _map_of(entry: dict[str, Any], levels: list[Level], where: str) -> Tensor:
    """The map of a level, corrected where the record says so, by the correction of ours that is named so."""
    level = levels[entry["stage"] - 1]
    if entry["fixup"] is None:
        return level.map
    own = f"fixup_proj_{2 ** entry['stage']}x" if len(levels) == 3 else "fixup_proj"
    if level.correction is None or entry["fixup"] != own:
        raise Unsupported(f"{where}: stage {entry['stage']} of {len(levels)} corrected by {entry['fixup']}")
    return level.corrected()


CASES: dict[str, Case] = {"uhd.jbu_stage": _stage, "uhd.jbu_stack": _stack}
