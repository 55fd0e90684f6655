"""Where an answer was read from, and how sure its tokens were: one more pass over the prompt with its answer.

The same for any engine that answers (models/engine.py). Attention is that of the language model, from the
position that predicts a token to the visual tokens. Letters: h heads, n tokens of the answer, N visual tokens
of all its images, L tokens of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepwell.look.attention_rows import Attended, SeeAttention
from stepwell.look.choice import Heads
from stepwell.look.reading_head import Places, places_of, reading_scores
from stepwell.models.ask import Assistant
from stepwell.models.engine import Engine, padded
from stepwell.models.looks import Seen
from stepwell.structures import TokenLayout, VisionFeatures

__all__ = ["Traced", "ask_and_trace", "trace"]


class Traced(NamedTuple):
    """An answer, token by token."""

    ids: tuple[int, ...]  # of the tokens, that which ends the answer among them
    tokens: tuple[str, ...]  # what each adds to the text; "" for special ones
    probabilities: Tensor  # (n,) of each token, given those before it
    attention: Tensor | None  # (n, N); a row sums to what was taken of the images, 1 at most
    head: tuple[int, int] | None  # layer and head whose attention that is, None for a mean
    layouts: tuple[TokenLayout, ...]  # of the images, whose visual tokens follow each other

    @property
    def confidence(self) -> float:
        """Mean probability of the tokens. It is not calibrated: docs/look.md has its reliability."""
        return float(self.probabilities.mean())

    def of_image(self, rows: Tensor, number: int) -> Tensor:
        """rows (..., N) -> (..., N of one image)."""
        parts: tuple[Tensor, ...] = rows.split([layout.num_visual for layout in self.layouts], -1)
        return parts[number]


def ask_and_trace(
    assistant: Assistant,
    image: Seen | Sequence[Seen],
    question: str,
    *,
    region: Any = None,
    max_new_tokens: int = 128,
    heads: Heads = "reading",
    layer: int | None = None,
    head: int | None = None,
) -> tuple[str, Traced]:
    """The answer, as `Assistant.ask` gives it, and where it was read; images are encoded once."""
    seen = [image] if not isinstance(image, list | tuple) or isinstance(image, VisionFeatures) else image
    layouts = assistant.layouts((image, question, region))
    encoded = [
        one if isinstance(one, VisionFeatures) else assistant.encode(one, region=layout.region)
        for one, layout in zip(seen, layouts, strict=True)
    ]
    ids: list[int] = []
    answer: str = assistant.ask(encoded, question, max_new_tokens=max_new_tokens, each=ids.append)
    return answer, trace(assistant, encoded, question, ids, heads=heads, layer=layer, head=head)


@torch.inference_mode()
def trace(
    assistant: Assistant,
    images: Sequence[VisionFeatures],
    question: str,
    ids: Sequence[int],
    *,
    heads: Heads = "reading",
    layer: int | None = None,
    head: int | None = None,
) -> Traced:
    """images: what `encode` made of them. ids: of the tokens of an answer, as `Assistant.ask` tells them.

    layer, head: of the heads of all layers, those of one layer, or of one number. Of these the one that reads
    is taken, and their mean where none does, as in answers of one token. Attention is None where the language
    model computes it by other means than torch's. Raises ValueError for an answer without a token, and for a
    layer or head that there is not.
    """
    if not len(ids):
        raise ValueError("an answer has one token at least: give the ids that ask(..., each=...) tells")
    engine = assistant.engine
    layouts = tuple(features.layout for features in images)
    prompt = assistant.prompt(question, layouts)
    whole = padded(engine, [[*prompt, *ids]], torch.cat([features.tokens for features in images]))
    texts = _texts(engine, ids)
    rows = _Rows(
        [len(prompt) - 1 + i for i in range(len(ids))],
        (whole.input_ids[0] == engine.image_token_id).nonzero()[:, 0],
        length=whole.input_ids.shape[1],
        spoken=[i for i, text in enumerate(texts) if text],
        places=places_of(layouts) if heads == "reading" else None,
        chosen=(layer, head),
    )
    with SeeAttention(rows.see):
        logits = engine.logits(whole, last=len(ids) + 1)[0, :-1].float()
    if engine.image_token_id < logits.shape[-1]:
        logits[:, engine.image_token_id] = -torch.inf  # it is never chosen
    chosen = torch.tensor(list(ids), device=logits.device)
    probabilities = logits.softmax(-1).gather(1, chosen[:, None])[:, 0]
    attention, best = rows.result()
    return Traced(tuple(map(int, ids)), texts, probabilities.cpu(), attention, best, layouts)


class _Rows:
    """Takes in the attention of the layers of a language model, which call one after the other, and keeps the
    mean and the best head. spoken: tokens that are text. places: None where no head is to be chosen.
    """

    def __init__(
        self,
        positions: Sequence[int],
        visual: Tensor,
        *,
        length: int,
        spoken: Sequence[int],
        places: Places | None,
        chosen: tuple[int | None, int | None],
    ) -> None:
        self.positions, self.visual, self.length = torch.tensor(positions), visual, length
        self.spoken, self.places = list(spoken), places
        self.layer, self.head = chosen
        self.layers = self.count = 0  # of layers that were seen, and of those that were taken in
        self.sum: Tensor | None = None
        self.best: tuple[float, Tensor | None, tuple[int, int] | None] = (0.0, None, None)

    def see(self, attended: Attended) -> None:
        number, self.layers = self.layers, self.layers + 1
        if self.layer not in (None, number):
            return
        # Heads that share keys may stand in line like more tokens (language/decoder.py).
        groups = attended.query.shape[2] // self.length
        positions = torch.cat([self.positions + group * self.length for group in range(groups)])
        rows = attended.rows(positions)[0][:, :, self.visual.to(attended.query.device)]
        rows = rows.unflatten(1, (groups, -1)).flatten(0, 1)  # (h, n, N)
        first = 0
        if self.head is not None:
            if not 0 <= self.head < len(rows):
                raise ValueError(f"head {self.head} of the language model's {len(rows)}, counted from 0")
            first, rows = self.head, rows[self.head : self.head + 1]
        self.count += 1
        mean = rows.mean(0)
        self.sum = mean if self.sum is None else self.sum + mean
        if self.places is not None:
            score, best = reading_scores(rows[:, self.spoken], self.places).max(0)
            if float(score) > self.best[0]:
                self.best = float(score), rows[best], (number, first + int(best))

    def result(self) -> tuple[Tensor | None, tuple[int, int] | None]:
        """Attention (n, N), and whose it is."""
        if self.layer is not None and self.layers and not self.count:
            raise ValueError(f"layer {self.layer} of the language model's {self.layers}, counted from 0")
        _, rows, head = self.best
        if rows is not None:
            return rows.cpu(), head
        return None if self.sum is None else (self.sum / self.count).cpu(), None


def _texts(engine: Engine, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token adds: pieces of a word have their blanks only beside those in front of them. A piece of
    a character has its text with the last piece.
    """
    texts, told = [], ""
    for count in range(1, len(ids) + 1):
        text = str(engine.tokenizer.decode(list(ids[:count]), skip_special_tokens=True))
        is_whole = not text.endswith("\ufffd") or count == len(ids)
        texts.append(text[len(told) :] if is_whole else "")
        told = text if is_whole else told
    return tuple(texts)
