"""How a configuration of PIIP (arXiv 2501.07783) is written: names of networks and sizes -> settings.

Branch 1 (the largest network, the smallest view) comes first in every list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from stepwell.encoders.catalogue import ENCODERS, encoder_spec
from stepwell.encoders.convnext import ConvNeXt
from stepwell.fuse.interaction import InteractionConfig
from stepwell.heads.neck import SIMPLE
from stepwell.models.dense import DenseSettings
from stepwell.models.pyramid import BranchConfig, Branches
from stepwell.models.runs import STAGE_MERGES, layer_runs
from stepwell.structures import HALF_MEAN, HALF_STD

__all__ = ["dense_branches", "dense_settings", "plain_branches"]

DROP_PATH = {"t": 0.05, "s": 0.05, "b": 0.15, "l": 0.4, "h": 0.4, "6b": 0.4}  # detection, by size of a ViT
CONVNEXT_DROP_PATH = {"t": 0.3, "s": 0.3, "b": 0.4}
LINEAR = ("augreg", "mae", "dinov2", "beitv2", "uniperceiver", "internvit")  # drop path grows with the layer


def dense_settings(
    branches: Branches,
    *,
    interaction: InteractionConfig | None = None,
    merge: Literal["dense", "stages", "none"] = "dense",
    dino: bool = False,
    halves: bool = True,
    image_branch: int | None = None,
) -> DenseSettings:
    """Of a detector or segmenter. dino: the finest map is not returned. halves: the statistics of images, in
    place of those of branch 1. image_branch: as of DenseSettings.
    """
    has_strides = ENCODERS[branches[-1].encoder].build is ConvNeXt
    return DenseSettings(
        branches=branches,
        interaction=interaction or InteractionConfig(),
        merge=merge,
        merge_after=STAGE_MERGES if has_strides or merge == "stages" else (),
        operations=() if has_strides else SIMPLE[dino:],
        neck_norm="layernorm" if merge == "none" else "groupnorm",
        mean=HALF_MEAN if halves else None,
        std=HALF_STD if halves else None,
        image_branch=image_branch,
    )


def plain_branches(encoders: str, sizes: Sequence[int], interactions: int = 12, **arguments: Any) -> Branches:
    """encoders: names of the catalogue, branch 1 first; a list among `arguments` has a value per branch."""
    return tuple(
        _branch(encoder, size, interactions, own) for encoder, size, own in _each(encoders, sizes, arguments)
    )


def dense_branches(encoders: str, sizes: Sequence[int], interactions: int = 12, **arguments: Any) -> Branches:
    """The same for a detector or segmenter, whose networks drop paths by their family and size.

    windows: one for all layers, or a tuple that is repeated over them. ConvNeXt takes no argument.
    """
    branches = []
    for encoder, size, own in _each(encoders, sizes, arguments):
        family, network_size = ENCODERS[encoder].family, encoder.removesuffix("_384").rpartition("_")[2]
        if family == "convnext":
            own = {"drop_path": CONVNEXT_DROP_PATH[network_size]}
        else:
            own.setdefault("drop_path", DROP_PATH[network_size])
            if family in LINEAR:
                own["drop_path_schedule"] = "linear"
            if isinstance(windows := own.get("windows"), tuple):
                own["windows"] = [*windows] * (encoder_spec(encoder).depth // len(windows))
        branches.append(_branch(encoder, size, interactions, own))
    return tuple(branches)


def _each(
    encoders: str, sizes: Sequence[int], arguments: dict[str, Any]
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    for k, (encoder, size) in enumerate(zip(encoders.split(), sizes, strict=True)):
        own = {key: value[k] if isinstance(value, list) else value for key, value in arguments.items()}
        yield encoder, size, own


def _branch(encoder: str, size: int, interactions: int, arguments: dict[str, Any]) -> BranchConfig:
    runs = layer_runs(encoder_spec(encoder).depth, interactions)
    return BranchConfig(encoder=encoder, size=size, interactions=runs, arguments=arguments)
