"""A tokenizer for small readers: answers are spelled character by character, questions take few tokens.

Vocabulary: special tokens, bytes (so that any text survives a round trip), printable characters, pieces of
the lower-case words of the known questions, the fixed sentences of those questions, and the 1001 coordinates
"0.000" to "1.000", each one token wherever it stands alone. Capitals and digits are never merged.
"""

from __future__ import annotations

import json
from itertools import chain

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stepwell.reader.questions import ANSWER_SHORTLY, BOX_FORMAT, FIELD_QUESTIONS, READ_QUESTIONS

__all__ = ["build_reader_tokenizer", "coordinate_tokens"]

PAD, UNKNOWN, START, END, IMAGE = "<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>"
_CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"] + list("£€¥§°×é–—‘’“”•…")  # noqa: RUF001
_ROLES = "system user assistant answer questions question picture text line word phrase number single"
_OTHER_WORDS = """Which What Where When Who How Why Is Are Read Tell Give List Find Describe this that these
page paper document image picture photo letter says say see written printed shown there here price cost paid
change cash tax amount sum invoice bill shop seller buyer customer phone telephone number time title heading
first last line top bottom left right please me and or for from with to it"""


def build_reader_tokenizer(*, max_length: int = 8192) -> PreTrainedTokenizerFast:
    """The tokenizer, complete; the same at every call. Its `<image>` stands for one visual token."""
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Z]?[a-z]+|[\s\S]"), behavior="isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pieces
    wordings = [*READ_QUESTIONS, *(wording for field in FIELD_QUESTIONS.values() for wording in field)]
    words = [*_ROLES.split(), *(f" {word}" for word in _OTHER_WORDS.split()), *_OTHER_WORDS.split()]
    learner.train_from_iterator(
        sorted(wordings + words), trainers.BpeTrainer(vocab_size=900, show_progress=False, min_frequency=1)
    )
    merges = _merges(learner)
    special = [PAD, UNKNOWN, START, END, IMAGE]
    entries = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *_CHARACTERS,
        *("".join(merge) for merge in merges),
        *chain(*coordinate_tokens().values()),
        BOX_FORMAT,
        ANSWER_SHORTLY,
    ]
    vocabulary = {entry: place for place, entry in enumerate(dict.fromkeys(entries))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.add_tokens(
        [
            AddedToken(text, single_word=True, normalized=False)
            for text in chain(*coordinate_tokens().values())
        ]
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (BOX_FORMAT, ANSWER_SHORTLY)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def coordinate_tokens() -> dict[str, list[str]]:
    """Thousandths from 0 to 1 in the three forms that a box is made of.

    "left" as in "[0.037", "bottom" as in "0.405]", and "plain" for what stands in between.
    """
    plain = [f"{thousandth / 1000:.3f}" for thousandth in range(1001)]
    return {"plain": plain, "left": [f"[{text}" for text in plain], "bottom": [f"{text}]" for text in plain]}


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
