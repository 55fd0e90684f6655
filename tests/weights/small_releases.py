"""Small stand-ins for released checkpoints: the official names, an eighth of the widths, two layers each."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepwell.fuse.interaction import InteractionConfig
from stepwell.heads.box_head import BoxHeadConfig
from stepwell.heads.mask_head import MaskHeadConfig
from stepwell.heads.rcnn import RcnnConfig
from stepwell.heads.rpn import RpnConfig
from stepwell.models.published.papers import PUBLISHED
from stepwell.models.pyramid import BranchConfig

MANIFESTS = Path(__file__).parent / "manifests"
LAYOUTS = Path(__file__).parents[1] / "keys" / "layouts"
KEPT = {196, 197, 37, 101, 401, 1000, 80, 81, 320}  # rows of position tables, classes and their boxes
SMALL_RCNN = RcnnConfig(
    dim=32, rpn=RpnConfig(dim=32), box=BoxHeadConfig(dim=128), mask=MaskHeadConfig(dim=32)
)
LLAMA = {"hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8}
HEADS = {128: 32, 64: 16}  # of the interactions, 16 -> 4: offsets and weights

State = dict[str, Tensor]


def shapes(name: str) -> dict[str, list[int]]:
    folder = MANIFESTS if (MANIFESTS / f"{name}.json").is_file() else LAYOUTS
    return json.loads((folder / f"{name}.json").read_text())["keys"]


def small(side: int) -> int:
    return side if side < 48 or side in KEPT else HEADS.get(side) or side // 8


def is_early(name: str) -> bool:
    """Of the first two layers and interactions."""
    return all(int(i) < 2 for i in re.findall(r"(?:blocks|encoder\.layers|interactions)\.(\d+)\.", name))


def small_state(*names: str) -> State:
    """The names of manifests with small random tensors."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: torch.randn([small(side) for side in shape], generator=generator) * 0.1
        for name in names
        for key, shape in shapes(name).items()
        if is_early(key)
    }


def small_branch(branch: BranchConfig) -> BranchConfig:
    dims = {"l": 128, "b": 96, "s": 48, "t": 24}
    dim = dims[branch.encoder.removesuffix("_384").rpartition("_")[2]]
    arguments = {**branch.arguments, "dim": dim, "depth": 2}
    return BranchConfig(
        encoder=branch.encoder, size=branch.size, interactions=((0, 0), (1, 1)), arguments=arguments
    )


def shrink(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the published configuration of this name at the size of `small_state` while a test runs."""
    full = PUBLISHED[name]
    settings = replace(
        full.settings,
        branches=tuple(small_branch(branch) for branch in full.settings.branches),
        interaction=InteractionConfig(num_heads=4),
    )
    text_config = None if full.text_config is None else full.text_config | LLAMA
    head = SMALL_RCNN if full.task == "detection" else full.head
    small_one = replace(full, settings=settings, text_config=text_config, head=head)
    monkeypatch.setitem(PUBLISHED, name, small_one)
