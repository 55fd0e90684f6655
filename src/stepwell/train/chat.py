"""The task `chat`: any vision system and any causal language model learn to answer questions about images.

LLaVA, arXiv 2304.08485, section 4.2: stages differ in what learns and on which data; the loss is that of the
answers.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer

from stepwell.data.conversations import Conversations
from stepwell.data.mixture import Mixture
from stepwell.data.resized import Resized
from stepwell.data.sample import Source
from stepwell.folders import ModelError, check_hub_name, commit_of, download, find_folder, model_type
from stepwell.language.labels import IGNORE
from stepwell.language.messages import IMAGE
from stepwell.layers.zero import zero_through
from stepwell.models.adapters import adapted_layers, add_adapters, lora_config, merge_adapters, save_adapters
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.parts import load_parts
from stepwell.models.processor import StepwellProcessor
from stepwell.models.quantised import quantise
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json
from stepwell.train.chat_recipe import ChatRecipe
from stepwell.train.collate import Collator, turn_mask
from stepwell.train.length_groups import modality_groups, word_lengths
from stepwell.train.processes import is_first, tell
from stepwell.train.recipe import Recipe
from stepwell.train.tasks import JudgedByLosses
from stepwell.train.turn_attention import TURNS_APART, check_decoder
from stepwell.views.slices import SliceGeometry, long_side_size

__all__ = [
    "ChatTask",
    "ChatTraining",
    "language_loss",
    "longest_sample",
    "token_accuracy",
    "wanted_adapters",
]


ORIGIN = "origin.json"  # of a trained folder: what it started from
ADAPTER = "adapter"  # in a trained folder: what peft loads on what it started from


class ChatTraining(StepwellForConditionalGeneration):
    """The model, whose forward gives the loss of its answers."""

    def forward(self, labels: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """A batch of `Collator` -> the loss `language`; in evaluation the score `accuracy` too."""
        loss, outputs = language_loss(super().forward, labels, **inputs)
        if inputs.get("image_sizes") is None:
            loss = loss + zero_through(self.model.vision)
        return {"language": loss} | ({} if self.training else {"accuracy": token_accuracy(outputs, labels)})


class ChatTask(JudgedByLosses):
    """A stage that trains a whole StepwellForConditionalGeneration."""

    recipe: ClassVar[type[Recipe]] = ChatRecipe

    def __init__(self, recipe: Any, stage: Any) -> None:
        self.settings, self.stage = recipe, stage
        self.losses: Mapping[str, float] = stage.losses
        self.learning: tuple[str, ...] = stage.train
        self.lora: Any = None  # peft's configuration, once there is a model
        self.scores: tuple[str, ...] = ("accuracy",) if "language" in stage.losses else ()
        if recipe.model.start is None:
            tokenizer = self.build_tokenizer(recipe.model)
            self.config = _config(recipe.model, tokenizer)
            image_processor = StepwellImageProcessor(recipe.model.vision)
            self.processor = StepwellProcessor(
                image_processor,
                tokenizer,
                template=recipe.model.template,
                boxes_are_regions=recipe.model.boxes_are_regions,
            )
        else:
            self.origin = _folder(recipe.model.start, recipe.model.revision)
            self.config = StepwellConfig.from_pretrained(self.origin)
            self.processor = StepwellProcessor.from_pretrained(self.origin, trust_remote_code=False)
        vision = self.config.vision.adjusted(stage.vision)
        self.stage_config = copy.deepcopy(self.config)
        self.stage_config.vision_config = settings_json(vision)
        length = longest_sample(stage, self.config.text_config)
        self.has_groups = stage.turns == "apart" or stage.packed
        if self.has_groups:
            check_decoder(self.config.text_config, length)
        stage_processor = StepwellProcessor(
            StepwellImageProcessor(vision),
            self.processor.tokenizer,
            template=stage.template or self.processor.template,
        )
        self.collator = Collator(
            stage_processor,
            max_length=length,
            turns=stage.turns,
            packed=stage.packed,
            averaging=stage.averaging,
            pad_to_multiple_of=stage.pad_to_multiple_of,
            limits=recipe.image_limits.build(),
        )

    @classmethod
    def configuration(cls, recipe: Any) -> StepwellConfig:
        if recipe.model.start is None:
            return _config(recipe.model, cls.build_tokenizer(recipe.model))
        config: StepwellConfig = StepwellConfig.from_pretrained(
            _folder(recipe.model.start, recipe.model.revision)
        )
        return config

    @classmethod
    def build_tokenizer(cls, model: Any) -> Any:
        """The tokenizer of the recipe's model, with a token for an image."""
        revision = None if model.tokenizer else model.revisions.get("language")
        name = model.tokenizer or model.parts.get("language")
        if name is None:
            raise ValueError(
                "model.tokenizer: name a folder with a tokenizer, or start the part `language` from one"
            )
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if IMAGE not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        return tokenizer

    def build(self) -> nn.Module:
        module: nn.Module = self.start(ChatTraining, self.stage_config)
        return module

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            module: nn.Module = self.with_adapters(ChatTraining(self.stage_config))
        return module

    def with_adapters(self, model: Any) -> Any:
        """The model, with those that the recipe wants; a finished one has all its weights in full."""
        if (wanted := self.settings.model.lora) is None:
            return model
        self.lora = wanted_adapters(model, self.settings)
        is_outline = any(parameter.is_meta for parameter in model.parameters())
        if wanted.bits is not None and type(model) is not StepwellForConditionalGeneration and not is_outline:
            dtype = torch.bfloat16 if self.settings.bf16 else torch.float32
            quantise(model, self.lora.target_modules, bits=wanted.bits, dtype=dtype)
        add_adapters(model, self.lora)
        return model

    def start(self, kind: type[Any], config: StepwellConfig, **arguments: Any) -> Any:
        """A model of the class `kind` with the starting weights of the recipe; in later stages, which go on
        with those of the one before, without the parts'.
        """
        settings = self.settings.model
        if settings.start is not None:
            model = kind.from_pretrained(
                self.origin, config=config, dtype=torch.float32, trust_remote_code=False, **arguments
            )
            return self.with_adapters(self._attending(model))
        model = kind(config, **arguments)
        model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        model.generation_config.eos_token_id = self.processor.tokenizer.eos_token_id
        if self.stage == self.settings.stages[0] and kind is not StepwellForConditionalGeneration:
            reports = load_parts(model, settings.parts, parts=self.parts(model), revisions=settings.revisions)
            if reports and is_first():
                for part, report in reports.items():
                    tell(f"{part} from {report.text()}")
                commits = {part: report.commit for part, report in reports.items()}
                self._write_origin(self.settings.output / self.settings.name, settings.parts, commits)
        return self.with_adapters(self._attending(model))

    def _attending(self, model: Any) -> Any:
        """The model, whose attention knows of turns apart and packed rows where the stage has them."""
        decoder = model.model.language_model
        if self.has_groups and decoder.config._attn_implementation == "sdpa":
            decoder.set_attn_implementation(TURNS_APART)
        return model

    def parts(self, module: Any) -> Mapping[str, str]:
        parts: Mapping[str, str] = module.parts
        return parts

    def source(self, data: Any) -> Source:
        source: Source = Conversations(data.path, images=data.images, prompt=data.prompt)
        sides = {"": data.long_side} if isinstance(data.long_side, int) else data.long_side or {}
        for within, side in sides.items():
            source = Resized(source, partial(long_side_size, side=side), within=within)
        if data.sliced:
            geometry = vision_settings(self.stage_config.vision_config).geometry()
            if not isinstance(geometry, SliceGeometry):
                raise ValueError(f"data.sliced: a {self.config.vision.kind!r} system has no slices")
            resize = partial(geometry.resized, slices=data.slices)
            number = [*self.stage.data, *self.stage.validation].index(data)
            source = Resized(source, resize, share=data.sliced, seed=(self.settings.seed, number))
        return source

    def order(self, samples: Mixture, *, batches: int, seed: int) -> list[int] | None:
        if self.stage.sampling == "random":
            return None
        official = self.stage.sampling == "grouped_official"
        generator = torch.Generator().manual_seed(seed)
        lengths, batch = word_lengths(samples), self.stage.batch
        of_a_step = batch * batches
        stretch = max(samples.epoch, of_a_step)  # of which no sample comes again, but in tiny data
        order: list[int] = []
        for start in range(0, len(lengths), stretch):
            of_stretch = lengths[start : start + stretch]
            grouped = modality_groups(of_stretch, batch, batches, generator, official=official)
            order += [start + i for i in grouped]
        return order

    def prepare(self, sample: Any) -> Any:
        return self.collator.prepare(sample)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        return self.collator(samples)

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        learned = batch["labels"][:, 1:] != IGNORE
        weights = batch["weights"][:, 1:].float() if "weights" in batch else 1  # DeepSpeed rounds inputs
        return {"language": (weights * learned).sum(), "accuracy": learned.sum()}

    def save(self, weights: Path, folder: Path) -> None:
        model = self.start(StepwellForConditionalGeneration, self.config)
        missing, _ = load_model(model, weights, strict=False)  # heads that only training needs are left out
        missing = [name for name in missing if not (self._is_quantised and ".base_layer." in name)]
        assert not missing, f"{weights} lacks {missing[0]}"
        if self.lora is not None:
            if (start := self.settings.model.start) is not None:
                save_adapters(model, self.lora, folder / ADAPTER, base=start)
            merge_adapters(model)
        model.to(getattr(torch, self.settings.save_dtype)).save_pretrained(folder)
        # Stored small, computed in full: in half precision the answers of a batch may differ from single
        # ones.
        model.config.dtype = torch.float32
        model.config.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        start, trained = self.settings.model.start, self.settings.output / self.settings.name / ORIGIN
        if start is not None:
            self._write_origin(folder, {"start": start}, {"start": commit_of(self.origin)})
        elif trained.is_file():
            shutil.copyfile(trained, folder / ORIGIN)

    @property
    def _is_quantised(self) -> bool:
        """Whether layers beside adapters are in no state dict."""
        lora = self.settings.model.lora
        return lora is not None and lora.bits is not None

    def _write_origin(
        self, folder: Path, sources: Mapping[str, str], commits: Mapping[str, str | None]
    ) -> None:
        """What the training started from; commits of what came from the hub."""
        origin = {what: {"from": source, "commit": commits[what]} for what, source in sources.items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ORIGIN).write_text(json.dumps(origin, indent=2), "utf-8")


def _folder(start: str, revision: str | None = None) -> Path:
    """Of a whole model of ours, fetched if it must be. Raises ModelError and HubError."""
    folder = find_folder(start)
    if folder is None:
        check_hub_name(start)
        folder = download(start, revision=revision)
    elif revision is not None:
        raise ModelError(f"model.revision {revision}: {start} is on this machine, as one version")
    if (kind := model_type(folder)) != StepwellConfig.model_type:
        raise ModelError(f"model.start: {folder} holds a {kind!r} model, which answers no questions")
    return folder


def _config(model: Any, tokenizer: Any) -> StepwellConfig:
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    if model.text is None:
        text = AutoConfig.from_pretrained(
            model.parts["language"], revision=model.revisions.get("language"), trust_remote_code=False
        )
        text = text.text_config if isinstance(text, StepwellConfig) else text
    else:
        text = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **ids, **model.text})
    largest = max(number for token, number in tokenizer.get_vocab().items() if token != IMAGE)
    if largest >= text.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {largest}, the language model an embedding of {text.vocab_size}; "
            "name the tokenizer that belongs to it"
        )
    return StepwellConfig(
        vision_config=model.vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        template=model.template,
    )


def longest_sample(stage: Any, text: Any) -> int:
    """In tokens: what a stage allows, and the language model has positions for. Turns apart share theirs."""
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or stage.turns == "apart":
        return int(stage.max_length)
    return min(int(stage.max_length), int(positions))


def wanted_adapters(model: Any, settings: Any) -> Any:
    """peft's configuration of the adapters that a recipe wants; what learns beside them, in any stage, is
    whole.
    """
    lora = settings.model.lora
    learning = {part for stage in settings.stages for part in stage.train} & set(model.parts)
    layers = adapted_layers(model, lora.parts)
    whole = [
        part for part in learning if not any(name.startswith(f"{model.parts[part]}.") for name in layers)
    ]
    return lora_config(
        model,
        lora.parts,
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        whole=sorted(whole),
    )


def language_loss(
    forward: Callable[..., Any],
    labels: Tensor,
    groups: Tensor | None = None,
    weights: Tensor | None = None,
    **inputs: Any,
) -> tuple[Tensor, Any]:
    """Mean cross-entropy of the supervised tokens, fp32, 0 without any; and the outputs. Logits of other
    positions are never made. groups of turns apart or packed samples and weights of tokens: (B, L), as
    `Collator` gives them.
    """
    if groups is not None:
        inputs["attention_mask"] = turn_mask(groups)
    supervised, wanted = _supervised(labels)
    outputs = forward(**inputs, logits_to_keep=supervised, use_cache=False)
    logits = outputs.logits.float().flatten(0, 1)
    shares = (wanted != IGNORE).float()
    if weights is not None:
        shares = shares * weights[:, 1:][:, supervised].flatten().float()
    losses = F.cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="none")
    return (losses * shares).sum() / shares.sum().clamp(min=1), outputs


def token_accuracy(outputs: Any, labels: Tensor) -> Tensor:
    """The share of supervised tokens that the outputs of `language_loss` get right, each behind the right
    ones before it; 0 without any.
    """
    _, wanted = _supervised(labels)
    right: Tensor = (outputs.logits.argmax(-1).flatten() == wanted)[wanted != IGNORE]
    return right.float().sum() / max(1, len(right))


def _supervised(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (B, L) -> the S positions whose following token any row learns, and those tokens, (B * S,)."""
    following = labels[:, 1:]
    positions = (following != IGNORE).any(0).nonzero()[:, 0]
    return positions, following[:, positions].flatten()
