"""A plug-in of lmms-eval: `--model stepwell --model_args model=FOLDER_OR_NAME` answers its tasks.

lmms-eval finds it by the entry point `stepwell` of the group `lmms_eval.models`, and the class by its name
in this module, which is importable without lmms-eval. Its requests for chat models are (context,
doc_to_messages, generation arguments, document, task, split).
"""

from __future__ import annotations

import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stepwell.folders import SHIPPED
from stepwell.integrations.conversations import answers_to

__all__ = ["Options", "as_messages", "manifest", "model_class"]

_WINDOW = 8  # batches, whose images are in memory together, and among which those alike come together
_ADDED = "\n\n"  # what lmms-eval ends every task at that names no end; its own chat models do not cut there
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams")
_NEUTRAL = {
    "repetition_penalty": 1,
    "length_penalty": 1,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
}


@dataclass(frozen=True, slots=True)
class Options:
    """How a task's answers are made: greedily, and cut before the first of the texts `until`."""

    max_new_tokens: int = 128
    until: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any], warn: Callable[[str], object] = warnings.warn) -> Options:
        """Of a task's `generation_kwargs`. Warns of arguments that are not known. Raises ValueError for those
        that ask for other answers than greedy ones, and for a `max_new_tokens` that is no number.
        """
        said = {name: value for name, value in given.items() if value is not None}
        wants = said.get("temperature", said.get("do_sample", False))
        samples = bool(wants) and said.get("do_sample", True)
        if samples or said.get("num_beams", 1) != 1:
            raise ValueError(
                f"answers are greedy, and the task asks for {_told(said, _SAMPLING)}; override it with "
                "--gen_kwargs do_sample=False,temperature=0,num_beams=1"
            )
        if other := [name for name, value in _NEUTRAL.items() if said.get(name, value) != value]:
            raise ValueError(f"answers know no {_told(said, other)}; override it with --gen_kwargs")
        most = said.get("max_new_tokens", cls().max_new_tokens)
        if not isinstance(most, int) or most < 1:
            raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {most!r}")
        if strange := said.keys() - {*_SAMPLING, *_NEUTRAL, "max_new_tokens", "until"}:
            warn(f"stepwell leaves a task's {_told(said, strange)} aside")
        until = said.get("until", ())
        texts = [until] if isinstance(until, str) else until
        return cls(most, tuple(text for text in texts if text and text != _ADDED))

    def cut(self, answer: str) -> str:
        """An answer up to the first of the texts that end it."""
        places = [place for text in self.until if (place := answer.find(text)) >= 0]
        return answer[: min(places)].rstrip() if places else answer


def _told(given: Mapping[str, Any], names: Iterable[str]) -> str:
    return ", ".join(f"{name}={given[name]!r}" for name in sorted(names) if name in given)


def as_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages, which have images under `url`, as language/messages.py has them.

    A text in the place of an image names a file: tasks are written by those who run them. Raises ValueError
    for a video or a sound.
    """
    return [
        {"role": message["role"], "content": list(map(_part, _parts(message["content"])))}
        for message in messages
    ]


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise ValueError(f"stepwell looks at images; the task shows {part['type']!r}, which it cannot answer")
    image = part["url"]
    is_name = isinstance(image, str) and not image.startswith("data:")
    return {"type": "image", "image": Path(image) if is_name else image}


def manifest() -> Any:
    """What the entry point gives: the model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="stepwell", chat_class_path=f"{__name__}.StepwellModel")


def __getattr__(name: str) -> Any:
    if name == "StepwellModel":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def model_class() -> Any:
    """The class that lmms-eval makes models of, derived from its own. Raises ImportError without it."""
    from transformers.utils.logging import tqdm

    try:
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.api.model import lmms
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from lmms_eval.utils import eval_logger, simple_parse_args_string
    except ImportError as error:
        raise ImportError("this plug-in needs lmms-eval: pip install 'stepwell[lmms-eval]'") from error

    class StepwellModel(lmms):
        """model: a folder of ours, a name on the hub or a shipped model's; device, dtype and revision as of
        `stepwell.load`. In one process. Raises ValueError for anything else that is given.
        """

        is_simple = False

        def __init__(
            self,
            model: str = SHIPPED.name,
            *,
            batch_size: int | str = 1,
            device: str | None = None,
            dtype: Any = None,
            revision: str | None = None,
            **others: Any,
        ) -> None:
            if others:
                known = "model, batch_size, device, dtype and revision"
                raise ValueError(f"--model_args may be {known}; got {', '.join(sorted(others))}")
            if not str(batch_size).isdecimal() or int(batch_size) < 1:
                raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size}")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("stepwell answers in one process: start lmms-eval without a launcher")
            super().__init__()

            from stepwell.models.ask import as_assistant
            from stepwell.weights.load import load

            self.assistant = as_assistant(
                load(model, device=device, dtype=dtype, revision=revision), str(model)
            )
            self.batch_size = int(batch_size)

        @classmethod
        def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Any:
            """What --model_args says goes before options of the command, some of which have a default."""
            options = {name: value for name, value in (additional_config or {}).items() if value is not None}
            return cls(**{**options, **simple_parse_args_string(arg_string)})

        def generate_until(self, requests: Sequence[Any]) -> list[Any]:
            """Answers with their tokens, in the order of the requests; one that cannot be answered is empty,
            and told in a warning. Raises ValueError for a task that asks for what we cannot do.
            """
            alike: dict[Options, list[int]] = defaultdict(list)
            warn = cache(eval_logger.warning)  # once; Python's own warnings are silenced by lmms-eval
            for place, request in enumerate(requests):
                alike[Options.read(request.args[2], warn)].append(place)
            started = time.perf_counter()
            results: dict[int, Any] = {}
            told = 0
            with tqdm(total=len(requests), desc="Model Responding") as bar:

                def tell(count: int) -> None:
                    nonlocal told
                    told, before = len(results) + count, told
                    bar.update(told - before)

                for options, places in alike.items():
                    for start in range(0, len(places), _WINDOW * self.batch_size):
                        window = places[start : start + _WINDOW * self.batch_size]
                        answers = self._answers([requests[place] for place in window], options, tell)
                        results |= zip(window, answers, strict=True)
            seconds = time.perf_counter() - started
            made = sum(result.token_counts.output_tokens or 0 for result in results.values())
            log_metrics(total_elapsed_time=seconds, total_gen_tokens=made, avg_speed=made / seconds)
            return [results[place] for place in range(len(requests))]

        def _answers(
            self, requests: Sequence[Any], options: Options, progress: Callable[[int], None]
        ) -> list[Any]:
            conversations = []
            for _, to_messages, _, document, task, split in (request.args for request in requests):
                conversations.append(as_messages(to_messages(self.task_dict[task][split][document])))
            answers = answers_to(
                self.assistant,
                conversations,
                max_new_tokens=options.max_new_tokens,
                batch_size=self.batch_size,
                progress=progress,
            )
            results = []
            for request, answer in zip(requests, answers, strict=True):
                context, _, given, document, task, _ = request.args
                if answer.error is not None:
                    eval_logger.warning(f"{task}, {document}: no answer, {answer.error}")
                text = options.cut(answer.text)
                counts = TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.answer_tokens)
                results.append(GenerationResult(text, counts))
                self.cache_hook.add_partial("generate_until", (context, given), text)
            return results

        def loglikelihood(self, requests: Sequence[Any]) -> Any:
            """Raises ValueError: an assistant gives texts, not how likely others are."""
            raise ValueError("stepwell answers in words: take a task of the output type generate_until")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
            """Raises ValueError: rounds whose questions hang on answers are not served."""
            raise ValueError("stepwell answers in one round: take a task of the output type generate_until")

    return StepwellModel
