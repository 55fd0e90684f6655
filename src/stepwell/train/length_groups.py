"""An order of samples in which those of a step are alike: all with images or all without, and about as long.

LLaVA-1.5 (arXiv 2310.03744), whose code draws them so: less of a batch is padding, and processes wait less
for one another. A sample's length is negative where it has no image. A megabatch is what all processes take
in one step of the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from stepwell.data.mixture import Mixture
from stepwell.data.sample import BadSample, Sample, read

__all__ = ["even_chunks", "length_groups", "modality_groups", "word_length", "word_lengths"]


def word_length(sample: Sample) -> int:
    """Words of all its turns, negative for a sample without an image. Images stay closed."""
    contents = [message["content"] for message in sample.messages]
    texts = [[text] if isinstance(text, str) else [part["text"] for part in text] for text in contents]
    words = max(sum(len(text.split()) for parts in texts for text in parts), 1)
    return words if sample.images else -words


def word_lengths(samples: Mixture) -> list[int]:
    """Of all samples of a mixture; 1 for one that cannot be read, which another will replace."""

    @cache
    def length(number: int, place: int) -> int:
        words = read(samples.sources, number, place, word_length)
        return 1 if isinstance(words, BadSample) else int(words)

    return [length(number, place) for number, place in samples.places()]


def modality_groups(
    lengths: Sequence[int], batch: int, chunks: int, generator: torch.Generator, *, official: bool = False
) -> list[int]:
    """The indices of all samples, megabatches of either kind in a random order. Their last ones come last, as
    one, in the order of the file.

    chunks: batches of a megabatch, over all processes. official: samples that are all of texts are dealt by
    their negative lengths, as the code does that is imitated here. Raises ValueError for a length of 0.
    """
    if not all(lengths):
        raise ValueError(f"sample {list(lengths).index(0)} has no length")
    with_image = [i for i, length in enumerate(lengths) if length > 0]
    without = [i for i, length in enumerate(lengths) if length < 0]
    if not with_image or not without:
        sizes = lengths if official else [abs(length) for length in lengths]
        return length_groups(sizes, batch, chunks, generator)
    megabatches: list[list[int]] = []
    last: list[int] = []
    for kind in (with_image, without):
        sizes = [abs(lengths[i]) for i in kind]
        order = [kind[i] for i in length_groups(sizes, batch, chunks, generator)]
        *whole, rest = [order[i : i + batch * chunks] for i in range(0, len(order), batch * chunks)]
        megabatches += whole
        last += rest
    shuffled = torch.randperm(len(megabatches), generator=generator).tolist()
    return [i for place in shuffled for i in megabatches[place]] + sorted(last)


def length_groups(lengths: Sequence[int], batch: int, chunks: int, generator: torch.Generator) -> list[int]:
    """The indices of all samples in random megabatches, each dealt into `chunks` that are about as long."""
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    order: list[int] = []
    for start in range(0, len(shuffled), batch * chunks):
        megabatch = sorted(shuffled[start : start + batch * chunks], key=lambda i: -lengths[i])
        for chunk in even_chunks(megabatch, lengths, chunks):
            order += chunk
    return order


def even_chunks(indices: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deals indices, each to the chunk that is shortest in sum and not full; by turns where the chunks cannot
    have equally many.
    """
    if len(indices) % chunks:
        return [list(indices[i::chunks]) for i in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    sums: list[float] = [0.0] * chunks
    for index in indices:
        shortest = sums.index(min(sums))
        dealt[shortest].append(index)
        is_full = len(dealt[shortest]) == len(indices) // chunks
        sums[shortest] = float("inf") if is_full else sums[shortest] + lengths[index]
    return dealt
