"""Which layers a network runs before each interaction.

PIIP, arXiv 2501.07783, section III-B, and the configuration files of the official repository. Layers are
those of an encoder's list, so ConvNeXt's downsampling layers count: depths 3, 3, 27, 3 are 39 layers.
"""

from __future__ import annotations

__all__ = ["STAGE_MERGES", "layer_runs"]

STAGE_MERGES = (0, 1, 10)
"""Of 12 interactions, those that end a stage of ConvNeXt, beside the last."""

# Last layer of each run where a network was published with other than equal runs, by (layers, interactions).
RUN_ENDS = {
    (21, 12): (2, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20),
    (32, 4): (7, 15, 23, 31),
    (32, 12): (1, 3, 5, 7, 10, 13, 16, 19, 22, 25, 28, 31),
    (39, 12): (2, 6, 10, 13, 16, 19, 22, 25, 28, 31, 34, 38),
    (39, 24): (
        *(1, 2, 4, 6, 9, 10, 12, 13, 15, 16, 18, 19),
        *(21, 22, 24, 25, 27, 28, 30, 31, 33, 34, 36, 38),
    ),
}


def layer_runs(depth: int, count: int) -> tuple[tuple[int, int], ...]:
    """Layers (first, last) before each of `count` interactions of a network of `depth` layers.

    As published; where only twelve unequal runs were, several of them in a row make one, as they do in the
    published pair of runs; else equal runs. Raises ValueError where nothing of this fits.
    """
    if count == 0:
        return ()
    ends, twelve = RUN_ENDS.get((depth, count)), RUN_ENDS.get((depth, 12))
    if ends is None and twelve is not None and 12 % count == 0:
        ends = twelve[12 // count - 1 :: 12 // count]
    if ends is None:
        if depth % count:
            raise ValueError(f"{depth} layers do not fall into {count} equal runs; give the runs themselves")
        ends = tuple(range(depth // count - 1, depth, depth // count))
    return tuple(zip((0, *(end + 1 for end in ends[:-1])), ends, strict=True))
