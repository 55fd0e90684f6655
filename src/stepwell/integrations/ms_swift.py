"""Assistants in ms-swift: `register()` makes it know a folder of ours by its class, and train it.

What ms-swift writes as text with `<image>` becomes messages, rendered by the model's own chat template and
tokenised as for `ask` and `stepwell train`. Needs no ms-swift until it is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepwell.language.labels import IGNORE
from stepwell.language.messages import IMAGE

__all__ = ["NAME", "as_messages", "register"]

NAME = "stepwell"
"""Of the model, its template and its parts, for `--model_type` and `--template`."""


def as_messages(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any], system: str | None = None
) -> list[dict[str, Any]]:
    """ms-swift's messages, of texts in which `<image>` stands for the next of `images`, as
    language/messages.py has them. A text in the place of an image names a file: it is the user's own data.

    Raises ValueError for tools and their calls, and where images and placeholders differ in number.
    """
    waiting = [Path(image) if isinstance(image, str) and image[:5] != "data:" else image for image in images]
    count = sum(message["content"].count(IMAGE) for message in messages if message["role"] == "user")
    if count != len(waiting):
        raise ValueError(f"{count} {IMAGE} placeholders for {len(waiting)} images")
    out = [{"role": "system", "content": [_text(system)]}] if system else []
    for message in messages:
        role, content = message["role"], message["content"]
        if role not in ("user", "assistant"):
            raise ValueError(f"chat templates here know users and assistants, got a message of {role!r}")
        if role == "assistant":
            out.append({"role": role, "content": [_text(content)]})
            continue
        first, *others = content.split(IMAGE)
        parts = [_text(first)]
        for text in others:
            parts += [{"type": "image", "image": waiting.pop(0)}, _text(text)]
        out.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
    return out


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text.strip()}


def register() -> None:
    """Makes ms-swift know our assistants; again, it does nothing. Raises ImportError without ms-swift."""
    try:
        from swift.model import ModelMeta, MultiModelKeys, register_model, register_model_arch
        from swift.model.register import ModelLoader
        from swift.template import Template, TemplateMeta, register_template
    except ImportError as error:
        raise ImportError("this plug-in needs ms-swift: pip install 'stepwell[ms-swift]'") from error

    from stepwell.models.assistant import StepwellForConditionalGeneration

    class Loader(ModelLoader):
        """Code beside weights is not run."""

        default_trust_remote_code = False

        def _postprocess_config(self, config: Any) -> Any:
            """ms-swift writes a width to where ours has none; DeepSpeed looks at the language model's too."""
            config = super()._postprocess_config(config)
            del config.hidden_size
            return config

        def get_model(self, *args: Any, **kwargs: Any) -> Any:
            self.auto_model_cls = StepwellForConditionalGeneration
            return super().get_model(*args, **kwargs)

    class Conversations(Template):
        """Token ids, labels and pixels of a conversation as our processor makes them.

        Image files are opened by us, upright and within limits.
        """

        load_images = False

        def _encode(self, inputs: Any) -> dict[str, Any]:
            """Raises ValueError for tools, videos, sounds, boxes, and for weights of the loss."""
            others = ("tools", "videos", "audios", "objects")
            if given := [name for name in others if getattr(inputs, name)]:
                raise ValueError(f"assistants of stepwell take texts and images; got {', '.join(given)}")
            if self._loss_scale != "default":
                raise ValueError(f"all answers count alike here; got loss_scale {self._loss_scale!r}")
            spoken = [message for message in inputs.messages if message["content"] is not None]
            messages = as_messages(spoken, inputs.images, inputs.system)
            found = self.processor.apply_chat_template(
                messages,
                tokenize=True,
                return_dict=True,
                add_generation_prompt=messages[-1]["role"] == "user",
                return_assistant_tokens_mask=self.is_training,
                return_tensors="pt",
            )
            encoded = {name: found[name] for name in (*_PIXELS, _REGIONS) if name in found}
            encoded["input_ids"] = ids = found["input_ids"][0].tolist()
            encoded["labels"] = encoded["loss_scale"] = None
            if self.is_training:
                is_answer = found["assistant_masks"][0].tolist()
                encoded["labels"] = [
                    token if one else IGNORE for token, one in zip(ids, is_answer, strict=True)
                ]
            return encoded

        def _data_collator_mm_data(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
            """Of a batch's conversations, of which some may have no image and some no region."""
            import torch

            present = [one for one in batch if _PIXELS[0] in one]
            joined = {name: torch.cat([one[name] for one in present]) for name in _PIXELS if present}
            if any(_REGIONS in one for one in present):
                none = [torch.zeros(len(one["image_sizes"]), 4, dtype=torch.long) for one in present]
                pairs = zip(present, none, strict=True)
                joined[_REGIONS] = torch.cat([one.get(_REGIONS, zeros) for one, zeros in pairs])
            return joined

    register_model_arch(
        MultiModelKeys(
            NAME,
            language_model=["model.language_model", "lm_head"],
            vision_tower="model.vision",
            aligner="model.vision.projector",
        ),
        exist_ok=True,
    )
    # The words are the chat template's, in the processor; here ms-swift learns what ends an answer.
    register_template(
        TemplateMeta(NAME, [], ["{{QUERY}}"], [], system_prefix=["{{SYSTEM}}"], template_cls=Conversations),
        exist_ok=True,
    )
    register_model(
        ModelMeta(
            NAME,
            [],
            Loader,
            template=NAME,
            model_arch=NAME,
            architectures=[StepwellForConditionalGeneration.__name__],
            is_multimodal=True,
            tags=["vision"],
        ),
        exist_ok=True,
    )


_PIXELS, _REGIONS = ("pixel_values", "image_sizes"), "image_regions"
