"""Denoising queries: truths that were spoilt on purpose, for a decoder that learns to put them right.

DINO, arXiv 2203.03605, section 3.3 (contrastive denoising); DN-DETR, arXiv 2203.01305. A *group* holds every
object of an image twice: a little off, to be found again, and further off, to be told as background. The
groups stand in front of the decoder's own queries, each group positive objects first.
Letters: B batch, T objects of all images, R repetitions (two a group), S queries that denoise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.heads.dino_boxes import inverse_sigmoid, to_centres

__all__ = ["Denoising", "Draws", "contents", "denoising", "draw", "num_groups", "unseen_queries"]


class Draws(NamedTuple):
    """Everything random: a row for every repetition of every object, even repetitions positive."""

    label_chance: Tensor  # (R*T,) in [0, 1): below half the label noise the label is replaced
    new_label: Tensor  # (R*T,)
    sign: Tensor  # (R*T, 4), -1 or 1: where a corner's coordinate goes
    part: Tensor  # (R*T, 4) in [0, 1): how far, in halves of the box's side; negatives go one further


class Denoising(NamedTuple):
    """Queries that denoise, and what is to be made of them."""

    labels: Tensor  # (B, S), -1 where an image has fewer objects than another
    box_logits: Tensor  # (B, S, 4) of centre, width, height in fractions; 0 there
    assigned: Tensor  # (B, S): the object, counted over all images, of a positive query, else -1
    groups: int

    @property
    def num_queries(self) -> int:
        return self.labels.shape[1]


def num_groups(counts: Sequence[int], num_queries: int) -> int:
    """As many groups as `num_queries` positives make in the image with most objects, and one at least."""
    return max(1, num_queries // max(1, *counts)) if any(counts) else 1


def draw(
    num_rows: int,
    num_classes: int,
    *,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Draws:
    """num_rows: repetitions of all objects together."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    new_label = torch.randint(num_classes, (num_rows,), device=device, generator=generator)
    sign = torch.randint(2, (num_rows, 4), device=device, generator=generator) * 2 - 1
    return Draws(uniform(num_rows), new_label, sign, uniform(num_rows, 4))


def denoising(
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    draws: Draws,
    groups: int,
    *,
    label_noise: float,
    box_noise: float,
) -> Denoising:
    """boxes (n, 4), left, top, right, bottom in fractions, and labels (n,) of every image."""
    counts = [len(b) for b in boxes]
    slots, total, repetitions = max(counts), sum(counts), 2 * groups
    all_boxes, all_labels = torch.cat(list(boxes)), torch.cat(list(labels))

    spoilt = draws.label_chance < label_noise / 2
    noisy_labels = torch.where(spoilt, draws.new_label, all_labels.repeat(repetitions))
    part = draws.part.view(groups, 2, total, 4) + torch.arange(2, device=all_boxes.device).view(2, 1, 1)
    moves = (part * draws.sign.view(part.shape)).view(-1, 4) * box_noise
    half = (all_boxes[:, 2:] - all_boxes[:, :2]).repeat(repetitions, 2) / 2
    corners = (all_boxes.repeat(repetitions, 1) + moves.to(half.dtype) * half).clamp(0, 1)
    noisy_logits = inverse_sigmoid(to_centres(corners))

    def in_slots(rows: Tensor, empty: int) -> Tensor:
        """(R*T, ...) -> (B, S, ...)."""
        images = rows.unflatten(0, (repetitions, total)).split(counts, dim=1)
        padded = [
            F.pad(image, (*(0, 0) * (rows.ndim - 1), 0, slots - image.shape[1]), value=empty)
            for image in images
        ]
        return torch.stack([image.flatten(0, 1) for image in padded])

    is_positive = torch.arange(repetitions, device=all_boxes.device) % 2 == 0
    objects = torch.arange(total, device=all_boxes.device)
    assigned = torch.where(is_positive[:, None], objects, -1).flatten()
    return Denoising(in_slots(noisy_labels, -1), in_slots(noisy_logits, 0), in_slots(assigned, -1), groups)


def contents(table: nn.Embedding, denoised: Denoising) -> Tensor:
    """What the queries start as, (B, S, C): the rows of their labels, zeros where there is none."""
    labels = denoised.labels
    rows: Tensor = table(labels.clamp(min=0))
    return rows.masked_fill(labels[..., None] < 0, 0)


def unseen_queries(denoised: Denoising, num_queries: int) -> Tensor:
    """(S + Q, S + Q): True where a query (row) may not see another: a group sees itself and the `num_queries`
    that look for objects, and these see no group."""
    count = denoised.num_queries
    per_group = max(1, count // denoised.groups)
    index = torch.arange(count + num_queries, device=denoised.labels.device)
    group = torch.where(index < count, index // per_group, -1)
    return (group[None] >= 0) & (group[None] != group[:, None])
