"""Images and text -> what a model takes, with as many placeholder tokens as the images have visual tokens.

The processor holds the geometry of the vision system, the same that the model holds, so both count alike.
Letters: B conversations or texts, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from PIL.Image import Image
from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils.chat_template_utils import _get_template_variables

from stepwell.images.limits import ImageLimits
from stepwell.language.labels import LabelledTokens, label_tokens, tokens_of_image
from stepwell.language.messages import IMAGE, Message, images_of, regions_of, text_of
from stepwell.language.prompt import Prompt, plain_prompt, render
from stepwell.language.template import TEMPLATES, find_template, template_of
from stepwell.models.batch import TextOptions, token_batch
from stepwell.models.config import LOADING, refuse_other_settings
from stepwell.models.image_opening import flat
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.structures import Geometry, TokenLayout
from stepwell.views.region import region_in_words, region_of_fractions

__all__ = ["StepwellProcessor"]


class StepwellProcessor(ProcessorMixin):
    """An image processor and a tokenizer that agree on what an image costs.

    template: the name of one of our chat templates; chat_template: another's, in Jinja, by default the
    tokenizer's own. boxes_are_regions: the one box of fractions that the last question of messages about one
    image tells is looked at closely (views/region.py), where no region is given. In text, each `<image>`
    stands for one image and becomes its layout's runs. Raises ValueError, with both counts, where
    placeholders and images do not match.
    """

    def __init__(
        self,
        image_processor: StepwellImageProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        template: str | None = None,
        boxes_are_regions: bool = False,
    ) -> None:
        if image_processor is None or tokenizer is None:
            raise ValueError("a processor is made of an image_processor and a tokenizer; give both")
        self.boxes_are_regions = boxes_are_regions
        self.image_token = IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        if self.image_token_id is None or self.image_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {IMAGE!r}; add it as a special token first")
        if chat_template is not None and template is not None:
            raise ValueError("a processor has a template, one of ours, or a chat_template; give one of them")
        tokenizer.padding_side = "left"  # where `generate` wants it
        if template is not None:
            chat_template = find_template(template).jinja
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    @classmethod
    def from_pretrained(
        cls,
        source: Any,
        *,
        vision: Mapping[str, Any] | None = None,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers'; keywords may be the tokenizer's too. vision: changes to the geometry. limits: of
        image files.

        Raises ValueError naming the first setting that the model beside it has otherwise, and for keywords
        that nobody knows (those of a pipeline are the model's too).
        """
        processor = super().from_pretrained(source, **kwargs)
        others = kwargs.keys() - LOADING - {"template", "chat_template", *cls.get_attributes()}
        unknown = sorted(name for name in others if not hasattr(processor.tokenizer, name))
        if unknown and "_from_pipeline" not in kwargs:
            raise ValueError(f"StepwellProcessor knows no {', '.join(map(repr, unknown))}")
        settings = {"image_token_id": processor.image_token_id}
        if not kwargs.keys() & {"template", "chat_template"}:
            settings["template"] = processor.template
        refuse_other_settings(source, kwargs, **settings)
        processor.image_processor.limits = limits or processor.image_processor.limits
        if vision:
            processor.image_processor = processor.image_processor.adjusted(vision)
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, source: Any, *_: Any, **kwargs: Any) -> list[Any]:
        """The image processor, which refuses what it does not know, is handed nothing of the tokenizer's."""
        loading = {name: value for name, value in kwargs.items() if name in LOADING}
        return [
            AutoImageProcessor.from_pretrained(source, **loading),
            AutoTokenizer.from_pretrained(source, **kwargs),
        ]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Ours by its name, whatever file of an older release lies beside it."""
        fields = dict(processor_dict)
        if fields.pop("separators", None):  # folders of 0.1 say that they have none
            raise ValueError(
                "processor_config.json has separators; the vision system's layout tells them now"
            )
        if kwargs.get("chat_template"):
            fields.pop("template", None)
        elif kwargs.get("template") or fields.get("template"):
            fields.pop("chat_template", None)
        return super().from_args_and_dict(args, fields, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "template": self.template}

    @property
    def template(self) -> str | None:
        """The name of the chat template, where it is one of ours."""
        template = template_of(self.chat_template)
        return None if template is None else template.name

    @property
    def geometry(self) -> Geometry:
        return self.image_processor.geometry  # type: ignore[no-any-return]

    def image_tokens(self, layout: TokenLayout) -> list[int]:
        """The token ids that stand for an image."""
        return tokens_of_image(layout, self.tokenizer, self.image_token_id)

    def num_tokens(self, layout: TokenLayout) -> int:
        """All that the language model reads of an image, separators counted."""
        return len(self.image_tokens(layout))

    def label(
        self,
        messages: Sequence[Message],
        images: Sequence[Image] = (),
        *,
        add_generation_prompt: bool = False,
        image_tokens: Sequence[Sequence[int]] | None = None,
    ) -> LabelledTokens:
        """One conversation and its opened images, in order -> token ids with labels.

        image_tokens: ids that stand for each image, in place of the images. Raises ValueError as `render` and
        `label_tokens` do.
        """
        prompt = render(
            messages,
            self.jinja(),
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
        )
        if image_tokens is None:
            image_tokens = [self.image_tokens(layout) for layout in self.image_processor.layouts(images)]
        return label_tokens(prompt, self.tokenizer, image_tokens)

    def prompt(self, conversations: Sequence[Sequence[Message]]) -> BatchFeature:
        """Conversations that end with a user message -> one left-padded batch for `generate`."""
        return self.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One conversation, or a list of them -> prompts, or tokens with the images of the messages.

        As transformers', with the tokens of `label`: what people wrote stays text, even where it spells a
        special token. The images of messages, which others may have written, are never opened by a name that
        is text. chat_template: Jinja, or the name of one of ours. kwargs are the template's variables, and
        options of the call, as are processor_kwargs (return_tensors, padding, limits, ...); others are
        refused. return_assistant_tokens_mask marks what is supervised.
        """
        jinja = self.jinja(chat_template)
        known = _get_template_variables(jinja)
        variables = {name: value for name, value in kwargs.items() if name in known}
        options = {name: value for name, value in kwargs.items() if name not in known}
        options |= processor_kwargs or {}
        is_batch = len(conversation) > 0 and isinstance(conversation[0], (list, tuple))
        conversations = conversation if is_batch else [conversation]
        prompts = [
            render(
                messages,
                jinja,
                self.tokenizer,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **variables,
            )
            for messages in conversations
        ]
        images = [images_of(messages) for messages in conversations]
        shown = [self.regions(messages) for messages in conversations]
        given = sorted(name for name, value in options.items() if value is not None)
        if (beside := options.pop("images", None)) and any(images):
            raise ValueError("images stand in the messages and beside them; give them once")
        if not tokenize:
            if beside or options.pop("limits", None) or TextOptions.read(options) != TextOptions():
                raise ValueError(f"tokenize=False gives text alone; leave out {', '.join(given)}")
            return prompts if is_batch else prompts[0]
        if any(region is not None for regions in shown for region in regions):
            if options.get("regions") is not None:
                raise ValueError("regions stand in the messages and beside them; give them once")
            images = self.image_processor.fetch_images(images, limits=options.pop("limits", None))
            options["regions"] = [
                None if region is None else region_of_fractions(region, (image.height, image.width))
                for image, region in zip(flat(images), chain(*shown), strict=True)
            ]
        batch = self(text=prompts, images=beside or images, **options)
        return batch if return_dict else batch["input_ids"]

    def regions(self, messages: Sequence[Any]) -> list[Any]:
        """Of each image of a conversation, in fractions, or None: what stands beside it, or, where this
        processor takes boxes for regions, what the last question about a single image tells in words.
        """
        regions = regions_of(messages)
        if self.boxes_are_regions and regions == [None]:
            asked = [text_of(message) for message in messages if message["role"] == "user"]
            return [region_in_words(asked[-1]) if asked else None]
        return regions

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        regions: Sequence[Sequence[float] | None] | None = None,
        limits: ImageLimits | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """text: one string or several; images: all their images in order, flat or nested by string; regions:
        what is looked at closely, one an image or None, (left, top, right, bottom) in pixels of the upright
        image; limits: of image files, by default the image processor's.

        Prompts of `apply_chat_template` keep what people wrote as text; in other strings special tokens are
        meant. Returns input_ids and attention_mask (B, L), padded where `padding` says so, and the image
        processor's tensors. Raises ValueError for an option that is not known, and where truncation would cut
        an image.
        """
        options = TextOptions.read(kwargs)
        opened = (
            [] if images is None else list(flat(self.image_processor.fetch_images(images, limits=limits)))
        )
        layouts = self.image_processor.layouts(opened, regions)
        prompts = [
            text
            if isinstance(text, Prompt)
            else plain_prompt(text, self.tokenizer, add_special_tokens=options.add_special_tokens)
            for text in ([text] if isinstance(text, str) else text or [])
        ]
        data: dict[str, Any] = {}
        if text is not None:
            _check_counts(prompts, images, len(opened))
            tokens = iter([self.image_tokens(layout) for layout in layouts])
            rows = [
                label_tokens(prompt, self.tokenizer, [next(tokens) for _ in range(prompt.num_images)])
                for prompt in prompts
            ]
            data |= token_batch(rows, self.tokenizer, self.image_token_id, options)
        if opened:
            data |= self.image_processor(opened, layouts=layouts)
        return BatchFeature(data, tensor_type=options.return_tensors)

    def jinja(self, chat_template: str | None = None) -> str:
        """The Jinja of a chat template that a call names or gives; None: this processor's."""
        own = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        jinja = own.get("default" if chat_template is None else chat_template, chat_template)
        if not jinja:
            raise ValueError(f"there is no chat template; choose one of ours: {', '.join(sorted(TEMPLATES))}")
        return jinja if "{" in jinja else find_template(jinja).jinja

    def _get_num_multimodal_tokens(self, image_sizes: Iterable[Sequence[int]] | None = None, **_: Any) -> Any:
        """Placeholders and rows of pixels of images of the given (H, W) sizes, asked for by inference
        servers.
        """
        if image_sizes is None:
            return MultiModalData()
        layouts = [self.geometry.layout((int(height), int(width))) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_visual for layout in layouts],
            num_image_patches=[layout.num_pixels for layout in layouts],
        )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


def _check_counts(prompts: Sequence[Prompt], images: Any, total: int) -> None:
    """Each text needs as many images as it has placeholders: those nested by text, or all together."""
    placeholders = [prompt.num_images for prompt in prompts]
    if isinstance(images, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in images):
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} lists of images were given for {len(prompts)} texts")
        for i, (count, row) in enumerate(zip(placeholders, images, strict=True)):
            if count != len(list(flat(row))):
                raise ValueError(
                    f"text {i} has {count} {IMAGE} placeholders but {len(list(flat(row)))} images"
                )
    if sum(placeholders) != total:
        raise ValueError(
            f"the text has {sum(placeholders)} {IMAGE} placeholders but {total} images were given"
        )
