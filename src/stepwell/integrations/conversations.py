"""Answers to conversations as other tools write them, many at a time, with what each of them took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepwell.folders import one_line
from stepwell.language.messages import images_of
from stepwell.ops.memory import is_about_memory
from stepwell.structures import Size

if TYPE_CHECKING:
    from stepwell.models.ask import Assistant

__all__ = ["Answer", "answers_to"]

Conversation = Sequence[Mapping[str, Any]]
"""Messages as of language/messages.py, contents as lists; the last is a user's."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and its tokens: of the prompt, images counted, and of the answer, its end left out. error:
    why there is none, in one line.
    """

    text: str
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None


def answers_to(
    assistant: Assistant,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Of each conversation as it would be alone: any number of turns and of images, also none. One that
    cannot be answered has its error, and the others their answers.

    assistant: of `stepwell.load`. Conversations whose images are alike in layout are answered together.
    `progress` is called with the number of answers there are.
    """
    found: dict[int, Answer] = {}

    def answer(places: Sequence[int]) -> None:
        """All at these places together, or one by one where one of them cannot be answered."""
        try:
            answers = _answer(assistant, [conversations[place] for place in places], max_new_tokens)
        except Exception as error:
            if not isinstance(error, ValueError | OSError | TypeError) and not is_about_memory(error):
                raise
            if len(places) > 1:
                for place in places:
                    answer([place])
                return
            answers = [Answer("", error=one_line(error))]
        found.update(zip(places, answers, strict=True))
        if progress is not None:
            progress(len(found))

    order = sorted(range(len(conversations)), key=lambda place: _inputs(assistant, conversations[place]))
    for start in range(0, len(order), batch_size):
        answer(order[start : start + batch_size])
    return [found[place] for place in range(len(conversations))]


def _inputs(assistant: Assistant, messages: Conversation) -> list[tuple[Size, ...]]:
    """Of each image, without decoding it; empty where that cannot be told, which answering then does."""
    try:
        return [assistant.layout(image).inputs for image in images_of(messages)]
    except (ValueError, OSError, TypeError):
        return []


def _answer(assistant: Assistant, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Answer]:
    """Of one batch, or one by one where together all would end where the longest has to."""
    import torch

    from stepwell.models.engine import Prompts, tokens_left

    engine: Any = assistant.engine
    inputs = assistant.processor.prompt(conversations).to(engine.model.device)
    left = tokens_left(engine, inputs["input_ids"].shape[1])
    if len(conversations) > 1 and max_new_tokens > left:
        alone = [_answer(assistant, [messages], max_new_tokens) for messages in conversations]
        return [answer for answers in alone for answer in answers]
    named = {
        name: inputs[name] for name in ("pixel_values", "image_sizes", "image_regions") if name in inputs
    }
    with torch.inference_mode():
        of_images = engine.model.get_image_features(**named) if named else []
        none = engine.model.get_input_embeddings().weight[:0]
        tokens = torch.cat(of_images) if of_images else none
        prompts = Prompts(inputs["input_ids"], inputs["attention_mask"].bool(), tokens)
        rows = engine.answer(prompts, max_new_tokens=int(min(max_new_tokens, left))).tolist()
    end = engine.model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else {*(end or ())}
    return [
        Answer(
            engine.tokenizer.decode(row, skip_special_tokens=True).strip(),
            prompt_tokens,
            next((place for place, token in enumerate(row) if token in ends), len(row)),
        )
        for row, prompt_tokens in zip(rows, inputs["attention_mask"].sum(1).tolist(), strict=True)
    ]
