"""Pyramids for dense tasks and for classification as models of transformers: built, saved, reloaded.

PIIP, arXiv 2501.07783, section IV. `PyramidBackbone` is a transformers backbone: UperNet, Mask2Former and the
DETR family take it as they take their own. Letters: B batch, (H, W) the largest view, C widths, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BitImageProcessorPil, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.generic import can_return_tuple

from stepwell.language.labels import IGNORE
from stepwell.layers.linear import is_plain
from stepwell.models.config import checked_format, refuse_unknown
from stepwell.models.dense import ClassifierSettings, DenseSettings, PyramidFeatures
from stepwell.models.predicting import Choice, Predicts, best_first
from stepwell.models.predictions import TOP, Classification
from stepwell.models.saving import SharedWeights
from stepwell.models.starting_values import keep_built, reset, start_missing
from stepwell.models.vision import NEVER_CUT, fitted, settings_json, validated
from stepwell.structures import Size
from stepwell.views.tiling import Tiles

__all__ = [
    "PyramidBackbone",
    "PyramidBackboneConfig",
    "PyramidClassifierConfig",
    "PyramidForImageClassification",
    "PyramidPreTrainedModel",
    "has_another_processor",
    "image_processor",
]


class PyramidBackboneConfig(BackboneConfigMixin, PreTrainedConfig):
    """`pyramid`: DenseSettings or their JSON; out_features and out_indices as for every backbone.

    Stages are named stage1, stage2, ..., finest first. Raises ValueError naming the wrong field.
    """

    model_type = "stepwell_pyramid"

    def __init__(
        self,
        pyramid: dict[str, Any] | DenseSettings | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.stepwell_format = checked_format(kwargs)
        settings: DenseSettings = validated(DenseSettings, pyramid or {}, "pyramid")
        self.pyramid = settings_json(settings)
        count = len(settings.operations) or len(settings.merge_after) + 1
        self.stage_names = [f"stage{i + 1}" for i in range(count)]
        if out_features is None and out_indices is None:
            out_features = list(self.stage_names)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        refuse_unknown(kwargs.keys() - {"stage_names"}, type(self).__name__)
        super().__init__(**kwargs)

    @property
    def settings(self) -> DenseSettings:
        settings: DenseSettings = validated(DenseSettings, self.pyramid, "pyramid")
        return settings


class PyramidClassifierConfig(PreTrainedConfig):
    """`pyramid`: ClassifierSettings or their JSON. Raises ValueError naming the wrong field."""

    model_type = "stepwell_classifier"

    def __init__(self, pyramid: dict[str, Any] | ClassifierSettings | None = None, **kwargs: Any) -> None:
        self.stepwell_format = checked_format(kwargs)
        refuse_unknown(kwargs, type(self).__name__)
        self.pyramid = settings_json(validated(ClassifierSettings, pyramid or {}, "pyramid"))
        super().__init__(**kwargs)

    @property
    def settings(self) -> ClassifierSettings:
        settings: ClassifierSettings = validated(ClassifierSettings, self.pyramid, "pyramid")
        return settings


def image_processor(settings: DenseSettings | ClassifierSettings) -> BitImageProcessorPil:
    """Of a classifier as the official evaluation: short side to the image's, centre crop, bicubic. Of
    a dense network, whose images have any size, it normalises only.
    """
    side, (mean, std) = settings.image_side, settings.statistics
    resizes = isinstance(settings, ClassifierSettings)
    return BitImageProcessorPil(
        do_resize=resizes,
        do_center_crop=resizes,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(mean),
        image_std=list(std),
    )


class PyramidPreTrainedModel(SharedWeights, PreTrainedModel):
    """Inputs are taken in any precision. `output_attentions`, which heads and users of transformers hand
    over, changes nothing: none are kept. `return_dict=False` gives a tuple.
    """

    base_model_prefix = "pyramid"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    parts: ClassVar[dict[str, str]] = {
        "vision": "pyramid",
        "vision.branches": "pyramid.encoder.branches",
        "vision.interactions": "pyramid.encoder.interactions",
        "vision.merges": "pyramid.merges",
        "vision.neck": "pyramid.neck",
        "head": "pyramid.head",
    }
    """Names of parts, as for an assistant -> prefixes of parameters."""
    _no_split_modules = NEVER_CUT

    def initialize_weights(self) -> None:
        start_missing(self.pyramid)
        super().initialize_weights()

    def _init_weights(self, module: Any) -> None:
        reset(module)

    def image_processor(self) -> BitImageProcessorPil:
        """Of the images that this model takes: resized and cut for a classifier, and normalised."""
        return image_processor(self.config.settings)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As transformers', with the image processor beside the weights, so that pipelines take the folder.

        One of another origin that lies there already stays.
        """
        folder = Path(save_directory)
        stays = has_another_processor(
            folder, lambda: image_processor(self.config_class.from_pretrained(folder).settings)
        )
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process and not stays:
            self.image_processor().save_pretrained(folder)


class PyramidBackbone(BackboneMixin, PyramidPreTrainedModel):
    config_class = PyramidBackboneConfig
    has_attentions = False

    def __init__(self, config: PyramidBackboneConfig) -> None:
        super().__init__(config)
        self.pyramid = config.settings.build()
        self.num_features = list(self.pyramid.dims)
        keep_built(self.pyramid)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,  # heads hand on what their losses are given
        *,
        finish: bool = True,
    ) -> BackboneOutput:
        """(B, 3, H, W), normalised -> `feature_maps`: one (B, C, H / stride, W / stride) per out_feature; as
        hidden_states those of all stages. finish=False: for heads of ours, which may do without a map that is
        doubled last (`Doubled`).
        """
        image = fitted(pixel_values, self.pyramid)
        if not finish and is_plain(self.pyramid, PyramidFeatures):
            places = [self.stage_names.index(name) for name in self.out_features]
            return BackboneOutput(feature_maps=self.pyramid.unfinished(image, places))
        maps = dict(zip(self.stage_names, self.pyramid(image), strict=True))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BackboneOutput(
            feature_maps=tuple(maps[name] for name in self.out_features),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
        )


class PyramidForImageClassification(Predicts[Classification], PyramidPreTrainedModel):
    """`output_hidden_states` changes nothing: branches end at different sizes and none are kept."""

    config_class = PyramidClassifierConfig

    def __init__(self, config: PyramidClassifierConfig) -> None:
        super().__init__(config)
        self.pyramid = config.settings.build(config.num_labels)
        keep_built(self.pyramid)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> ImageClassifierOutput:
        """(B, 3, H, W), normalised -> `logits` (B, K) and, given labels, the loss of `config.problem_type`.

        Labels are (B,) classes, of which -100 is ignored; with "multi_label_classification" (B, K) in 0 to 1;
        with "regression" (B, K), or (B,) where K is 1. Without a problem_type transformers tells from K and
        the labels. num_items_in_batch: what losses of classes are summed and divided by, if not their number.
        Raises ValueError for labels of another shape, and for classes that there are not.
        """
        size = (pixel_values.shape[-2], pixel_values.shape[-1])
        (logits,) = self.scored(pixel_values, [size] * len(pixel_values))
        loss = None
        if labels is not None:
            labels = self._checked(labels, logits)
            loss = self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def score(self, pixels: Tensor, sizes: Sequence[Size]) -> tuple[Tensor]:
        """Logits (B, K)."""
        return (self.pyramid(fitted(pixels, self.pyramid)),)

    def image_processor(self) -> BitImageProcessorPil:
        """The one that the model was loaded with, or that of its configuration."""
        return self.kept_processor or super().image_processor()

    def _check_choice(self, choice: Choice, tiles: Tiles | None) -> None:
        if tiles is not None:
            raise ValueError("a classifier looks at a whole picture: it takes no tiles")
        if self.config.problem_type == "regression":
            raise ValueError("a model of regression gives numbers and no classes: call it, not predict")

    def _predict_batch(self, images: Sequence[Image], choice: Choice) -> list[Classification]:
        logits = self._run(self.image_processor()(list(images), return_tensors="pt")).logits.float()
        are_alone = self.config.problem_type == "multi_label_classification" or logits.shape[1] == 1
        of_images = logits.sigmoid() if are_alone else logits.softmax(1)
        found = []
        for values, scores, image in zip(logits, of_images, images, strict=True):
            labels = best_first(values, choice.most or TOP)  # scores are alike where they round to 0 or 1
            if choice.threshold is not None:
                labels = labels[scores[labels] > choice.threshold]
            found.append(
                Classification(
                    labels=labels.cpu(),
                    scores=scores[labels].cpu(),
                    class_names=self.class_names,
                    image_size=(image.height, image.width),
                )
            )
        return found

    def _checked(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As the loss takes them. The kind of problem is told as transformers tells it."""
        batch, count = logits.shape
        problem = self.config.problem_type
        if problem is None and count > 1 and labels.dtype in (torch.long, torch.int):
            problem = "single_label_classification"
        if problem == "single_label_classification":
            if labels.numel() != batch or labels.is_floating_point():
                raise ValueError(
                    f"labels of classes are ({batch},) whole numbers, got {tuple(labels.shape)} of "
                    f"{labels.dtype}; for others set config.problem_type"
                )
            if not torch.compiler.is_compiling():
                is_class = (labels >= 0) & (labels < count) | (labels == IGNORE)
                if not bool(is_class.all()):
                    raise ValueError(f"labels are classes 0 to {count - 1}, got {labels[~is_class][0]}")
            return labels.long()
        if tuple(labels.shape) != (batch, count) and (count > 1 or labels.numel() != batch):
            raise ValueError(f"labels are ({batch}, {count}), one an output, got {tuple(labels.shape)}")
        return labels.to(logits.dtype)


def has_another_processor(folder: Path, of_model: Callable[[], BaseImageProcessor]) -> bool:
    """Whether an image processor lies in a folder that is not the one of the model there."""
    file = folder / IMAGE_PROCESSOR_NAME
    if not file.is_file():
        return False
    try:
        ours = of_model()
    except (OSError, ValueError):
        return True
    return bool(json.loads(file.read_text("utf-8")) != json.loads(ours.to_json_string()))
