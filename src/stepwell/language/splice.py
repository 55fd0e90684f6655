"""Visual tokens where the placeholders are.

LLaVA (arXiv 2304.08485), section 4.1: visual tokens are words to the language model. A prompt carries one
placeholder token for every visual token, so that labels, masks and positions need no change. Letters: B
batch, L text length, D the language model's width, N visual tokens of the whole batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["place_visual_tokens"]


def place_visual_tokens(
    input_ids: Tensor, inputs_embeds: Tensor, visual_tokens: Tensor | None, image_token_id: int
) -> Tensor:
    """Embeddings (B, L, D) with visual_tokens (N, D) in place of the embedded placeholders, in reading
    order.

    input_ids (B, L) says where `image_token_id` stands. `visual_tokens` is None where there is no image.
    Raises ValueError naming both counts where placeholders and visual tokens differ in number; a compiled
    graph, which cannot read counts, leaves that to its caller.
    """
    placeholders = input_ids == image_token_id
    if not torch.compiler.is_compiling():
        expected, actual = int(placeholders.sum()), 0 if visual_tokens is None else len(visual_tokens)
        if expected != actual:
            raise ValueError(
                f"the text has {expected} image placeholder tokens, the images give {actual} visual tokens; "
                "make both with the same processor"
            )
    if visual_tokens is None:
        return inputs_embeds
    visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(placeholders[..., None], visual_tokens)
