"""Denoising: queries made of the objects themselves, spoilt, which the decoder learns to put right.

DINO, arXiv 2203.03605, section 3.3 (contrastive denoising): in every group each object stands twice, a little
spoilt as a positive and more spoilt as a negative, which is to be told apart as background.
Letters: B batch, n objects of the image that has most, g groups, S = 2 * n * g slots of an image, R = 2 * g *
(objects of all images) rows of draws, K classes, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from stepwell.heads.dino_positions import box_logits

__all__ = ["DenoisingConfig", "Draws", "NoisyObjects", "draw", "hidden_queries", "spoil"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DenoisingConfig:
    """num_queries: as many as fit are objects in groups, at least one group. label_noise: twice the part of
    labels that are exchanged. box_noise: corners move by up to this part of half a side.
    """

    num_queries: Annotated[int, Field(gt=0)] = 100
    label_noise: Annotated[float, Field(ge=0, le=2)] = 0.5
    box_noise: Annotated[float, Field(ge=0)] = 1.0

    def groups(self, most_objects: int) -> int:
        """For an image with so many objects."""
        return max(1, self.num_queries // max(1, most_objects))


class Draws(NamedTuple):
    """What chance decides: for 2g repetitions of the objects of all images, one after the other."""

    chance: Tensor  # (R,), 0..1
    label: Tensor  # (R,), in place of the object's where the chance is small
    sign: Tensor  # (R, 4), 0 or 1: minus or plus
    part: Tensor  # (R, 4), 0..1


class NoisyObjects(NamedTuple):
    """Spoilt objects in their slots; a slot without one is 0."""

    labels: Tensor  # (B, S)
    box_logits: Tensor  # (B, S, 4)
    is_used: Tensor  # (B, S)
    groups: int


def draw(rows: int, num_classes: int, device: torch.device) -> Draws:
    """By torch's generator of the device."""
    return Draws(
        torch.rand(rows, device=device),
        torch.randint(num_classes, (rows,), device=device),
        torch.randint(2, (rows, 4), device=device),
        torch.rand(rows, 4, device=device),
    )


def spoil(
    labels: Sequence[Tensor],
    boxes: Sequence[Tensor],
    draws: Draws,
    groups: int,
    config: DenoisingConfig,
    eps: float,
) -> NoisyObjects:
    """labels (n,) and boxes (n, 4), centre and size in parts of the image, of every image -> its slots.

    eps: of `box_logits`. Repetitions are positive and negative in turn.
    """
    counts = [len(each) for each in labels]
    most, repetitions = max(counts), 2 * groups
    every_label = torch.cat(list(labels)).repeat(repetitions)
    every_box = torch.cat(list(boxes)).repeat(repetitions, 1)
    is_negative = torch.arange(repetitions, device=every_box.device).repeat_interleave(sum(counts)) % 2 == 1
    every_label = torch.where(draws.chance < config.label_noise / 2, draws.label, every_label)
    half = every_box[:, 2:] / 2
    corners = torch.cat([every_box[:, :2] - half, every_box[:, :2] + half], 1)
    moved = (2 * draws.sign - 1) * (draws.part + is_negative[:, None])
    corners = (corners + moved * half.repeat(1, 2) * config.box_noise).clamp(0, 1)
    low, high = corners[:, :2], corners[:, 2:]
    logits = box_logits(torch.cat([(low + high) / 2, high - low], 1), eps=eps)

    image = torch.cat([torch.full((count,), i) for i, count in enumerate(counts)])
    place = torch.cat([torch.arange(count) for count in counts])
    image = image.to(logits.device).repeat(repetitions)
    place = place.to(logits.device).repeat(repetitions)
    place = place + most * torch.arange(repetitions, device=logits.device).repeat_interleave(sum(counts))
    slots = (len(counts), most * repetitions)
    noisy_labels, noisy_logits = every_label.new_zeros(slots), logits.new_zeros(*slots, 4)
    is_used = torch.zeros(slots, dtype=torch.bool, device=logits.device)
    noisy_labels[image, place] = every_label
    noisy_logits[image, place] = logits
    is_used[image, place] = True
    return NoisyObjects(noisy_labels, noisy_logits, is_used, groups)


def hidden_queries(slots: int, groups: int, num_queries: int, device: torch.device) -> Tensor:
    """(S + Nq, S + Nq), True where a row may not look: others see no slot, and groups not each other."""
    group = torch.arange(slots, device=device) // max(1, slots // groups)
    group = torch.cat([group, torch.full((num_queries,), -1, device=device)])
    is_slot = group >= 0
    return is_slot[None] & (group[:, None] != group[None])
