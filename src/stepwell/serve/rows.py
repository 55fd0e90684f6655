"""One answer of a batch as it grows: which token comes next, what of the text may be shown, when it is done.

Every row has its own temperature, seed and end, so that an answer does not depend on which others are made
beside it. Letters: V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Ended", "Finish", "Row"]

Finish = Literal["stop", "length"]


class Ended(NamedTuple):
    """What a row tells at its end."""

    finish: Finish
    new_tokens: int


_COLDEST = 1e-4  # below, nothing but the best token has a chance
_HALF = "\ufffd"  # of a character whose last bytes are still to come


class Row:
    """end: ids that end an answer. temperature: 0 takes the best token; otherwise tokens are drawn among the
    most likely ones whose shares reach `top_p`. stop: texts that end an answer, and are not in it. tell: is
    called with every piece of text once it is certain, and with what ended. seed: of what is drawn.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        end: Collection[int],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        tell: Callable[[str | Ended], object] = lambda told: None,
    ) -> None:
        self.tokenizer, self.end, self.stop, self.tell = tokenizer, frozenset(end), tuple(stop), tell
        self.max_new_tokens, self.top_p = max_new_tokens, top_p
        self.temperature = temperature if temperature >= _COLDEST else 0.0
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self._shown = ""
        if self.temperature > 0:
            self._chance = torch.Generator().manual_seed(seed % 2**63)

    def next(self, scores: Tensor) -> int:
        """Scores (V,) -> the token that is drawn."""
        chances = (scores.float().cpu() / self.temperature).softmax(0)
        if self.top_p < 1:
            ordered, places = chances.sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            is_kept = before < self.top_p
            is_kept[0] = True
            chances = torch.zeros_like(chances).scatter(0, places, ordered.where(is_kept, 0))
        return int(chances.multinomial(1, generator=self._chance))

    def add(self, token: int) -> None:
        """The next token of an answer that is not done."""
        if token in self.end:
            self._end("stop")
            return
        self.ids.append(token)
        text = self._text()
        stops = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if stops:
            self._end("stop", text[: min(stops)])
        elif len(self.ids) >= self.max_new_tokens:
            self._end("length")
        else:
            self._show(self._certain(text))

    def _end(self, finish: Finish, text: str | None = None) -> None:
        self._show((self._text() if text is None else text).rstrip())
        self.finish = finish
        self.tell(Ended(finish, len(self.ids)))

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True)).lstrip()

    def _certain(self, text: str) -> str:
        """Without the end that may still change, or go with a stop or with the answer's end."""
        text = text.rstrip(_HALF)
        begun = [
            length for stop in self.stop for length in range(1, len(stop)) if text.endswith(stop[:length])
        ]
        return text[: len(text) - max(begun, default=0)].rstrip()

    def _show(self, text: str) -> None:
        if len(text) > len(self._shown) and text.startswith(self._shown):
            self.tell(text[len(self._shown) :])
            self._shown = text
