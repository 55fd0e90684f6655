"""A tokenizer.json without transformers: as much of its tokenizers as asking a question needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

__all__ = ["Encoded", "LightTokenizer"]

_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})  # those that take the file as it is
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KNOWN = frozenset(
    {
        *("added_tokens_decoder", "backend", "clean_up_tokenization_spaces", "extra_special_tokens"),
        *("image_token", "is_local", "local_files_only", "model_max_length", "model_specific_special_tokens"),
        *("padding_side", "processor_class", "tokenizer_class", *_SPECIAL),
    }
)


class Encoded(NamedTuple):
    """Of one text: ids, their first and last character, and 1 where a special token was added."""

    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]
    special_tokens_mask: list[int]


class LightTokenizer:
    """Methods and attributes of transformers' fast tokenizers, for one text at a time."""

    is_fast = True

    def __init__(self, tokenizer: Tokenizer, special: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self.special_tokens_map = special

    @classmethod
    def read(cls, folder: Path) -> LightTokenizer | None:
        """The tokenizer of a folder; None where transformers would make something else of its files."""
        config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        special = {name: config[name] for name in _SPECIAL if config.get(name) is not None}
        more = [*(config.get("model_specific_special_tokens") or {}).values(), config.get("image_token")]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        takes_file_as_it_is = (
            config.keys() <= _KNOWN
            and config.get("tokenizer_class") in _CLASSES
            and not config.get("clean_up_tokenization_spaces")
            and not config.get("extra_special_tokens")
            and {*special.values(), *filter(None, more)} <= known
        )
        others = ("added_tokens.json", "special_tokens_map.json")  # older transformers' changes to it
        if not takes_file_as_it_is or any((folder / name).exists() for name in others):
            return None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, special)

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> Encoded:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(encoding.ids, encoding.offsets, encoding.special_tokens_mask)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self.special_tokens_map.values())

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self._tokenizer.get_added_tokens_decoder())

    def get_added_vocab(self) -> dict[str, int]:
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def convert_tokens_to_ids(self, token: str) -> int | None:
        known = self._tokenizer.token_to_id(token)
        return self.unk_token_id if known is None else known

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str | None]:
        return [self._tokenizer.id_to_token(i) for i in ids]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens_map.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        return self._special_id("unk_token")
