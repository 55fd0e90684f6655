"""What a published checkpoint becomes: the key table, our names and shapes, and the files beside the weights.

The model is built on the meta device, so that even 13 billion parameters cost no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, BitImageProcessor, PreTrainedConfig
from transformers.image_utils import PILImageResampling

from stepwell.encoders.catalogue import ENCODERS
from stepwell.encoders.convnext import ConvNeXt
from stepwell.keys.backbones import Layout as Names
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import Rule, with_prefix
from stepwell.keys.piip import classifier_rules, features_rules
from stepwell.keys.released import assistant_rules, detector_rules, is_language_model
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.dense import ClassifierSettings
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.processor import StepwellProcessor
from stepwell.models.published import Published
from stepwell.weights.text_config import llama_config

__all__ = ["Layout", "build_layout"]

Shape = tuple[int, ...]

NAMES: dict[str, Names] = {
    "deit": "deit",
    "deit3": "deit",
    "augreg": "internvit",
    "mae": "internvit",
    "dinov2": "internvit",
    "internvit": "internvit",
    "beitv2": "beit",
    "uniperceiver": "uniperceiver",
    "clip": "clip",
    "convnext": "convnext_hf",
    "convnext_clip": "convnext_timm",
}
"""The released code's block class, hence names, of a family of the catalogue."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published configuration, ready to take tensors.

    `ours` has every name and shape of our model; `absent` those that the source legitimately lacks, and why.
    """

    rules: list[Rule]
    config: PreTrainedConfig
    ours: Mapping[str, Shape]
    absent: Mapping[str, str] = field(default_factory=dict)

    def write_processor(self, folder: Path, tokenizer: Path) -> list[str]:
        """What `from_pretrained` wants beside the weights but config.json. Returns notes for the report.

        Raises ValueError where the tokenizer in the folder `tokenizer` cannot be read.
        """
        if isinstance(self.config, StepwellConfig):
            return _write_processor(folder, self.config, tokenizer)
        if isinstance(self.config, PyramidClassifierConfig):
            _classification_processor(self.config.settings).save_pretrained(folder)
        return []


def build_layout(published: Published, shapes: Mapping[str, Shape], settings: Mapping[str, Any]) -> Layout:
    """shapes: names and shapes of the source; settings: the config.json beside it, or nothing."""
    if published.task == "chat":
        return _chat(published, shapes, settings)
    return _classifier(published) if published.task == "classification" else _dense(published)


def _dense(published: Published) -> Layout:
    settings = published.dense_settings()
    config = PyramidBackboneConfig(pyramid=settings, architectures=[PyramidBackbone.__name__])
    with torch.device("meta"):
        ours = _shapes(PyramidBackbone(config))
    features = features_rules(
        _tables(published),
        len(published.branches[0].interactions),
        merge_after=settings.merge_after,
        operations=settings.operations,
    )
    return Layout(rules=detector_rules(features, "pyramid."), config=config, ours=ours)


def _classifier(published: Published) -> Layout:
    config = PyramidClassifierConfig(
        pyramid=published.classifier_settings(),
        num_labels=published.num_classes,
        architectures=[PyramidForImageClassification.__name__],
    )
    with torch.device("meta"):
        ours = _shapes(PyramidForImageClassification(config))
    merged = published.head == "merge"
    rules = classifier_rules(_tables(published), len(published.branches[0].interactions), merged=merged)
    return Layout(rules=with_prefix(rules, "", "pyramid."), config=config, ours=ours)


def _chat(published: Published, shapes: Mapping[str, Shape], settings: Mapping[str, Any]) -> Layout:
    assert published.text_dim is not None
    text_config = llama_config(shapes, settings, dim=published.text_dim)
    config = StepwellConfig(
        vision_config=published.vision_config(),
        text_config=text_config,
        image_token_id=text_config.vocab_size,  # the first that is no word
        template="vicuna_v1",
        architectures=[StepwellForConditionalGeneration.__name__],
    )
    with torch.device("meta"):
        ours = _shapes(StepwellForConditionalGeneration(config))
    absent = {}
    if not any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in shapes):
        why = "no language model in this source"
        absent = {name: why for name in ours if is_language_model(name)}
    rules = assistant_rules(_tables(published), len(published.branches[0].interactions))
    return Layout(rules=rules, config=config, ours=ours, absent=absent)


def _tables(published: Published) -> list[list[Rule]]:
    """The key table of every branch."""
    tables: list[list[Rule]] = []
    for branch in published.branches:
        entry = ENCODERS[branch.encoder]
        arguments = {**entry.arguments, **branch.arguments}
        if entry.build is ConvNeXt:
            tables.append(backbone_rules(NAMES[entry.family], depths=arguments["depths"]))
        else:
            tables.append(
                backbone_rules(
                    NAMES[entry.family],
                    class_token=arguments.get("class_token", False),
                    class_slot=arguments.get("class_slot", False),
                )
            )
    return tables


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _write_processor(folder: Path, config: StepwellConfig, source: Path) -> list[str]:
    """The tokenizer of the source, with a token for a picture's place; without one, the image side alone."""
    image_processor = StepwellImageProcessor(vision_config=config.vision_config)
    if not any(source.glob("tokenizer*")):
        image_processor.save_pretrained(folder)
        return ["no tokenizer beside the source: the model can be loaded, but asked nothing until it has one"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (ImportError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        if (source / "tokenizer.model").is_file():
            reason = "a tokenizer.model needs two packages: pip install sentencepiece protobuf"
        raise ValueError(f"the tokenizer in {source} cannot be read: {reason}") from None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    StepwellProcessor(image_processor, tokenizer, template=config.template).save_pretrained(folder)
    return []


def _classification_processor(settings: ClassifierSettings) -> BitImageProcessor:
    """As the official evaluation: short side to the largest view's, centre crop, bicubic."""
    side = settings.branches[-1].size
    return BitImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
    )
