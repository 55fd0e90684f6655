"""Pyramids for dense tasks and for classification as models of transformers: built, saved, reloaded.

PIIP, arXiv 2501.07783, section IV. `PyramidBackbone` is a transformers backbone: UperNet, Mask2Former and the
DETR family take it as they take their own. Letters: B batch, (H, W) the largest view, C widths, K classes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from stepwell.models.config import refuse_unknown
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.saving import SharedWeights
from stepwell.models.starting_values import keep_built, reset, start_missing
from stepwell.models.vision import NEVER_CUT, settings_json, validated

__all__ = [
    "PyramidBackbone",
    "PyramidBackboneConfig",
    "PyramidClassifierConfig",
    "PyramidForImageClassification",
    "PyramidPreTrainedModel",
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
        refuse_unknown(kwargs, type(self).__name__)
        self.pyramid = settings_json(validated(ClassifierSettings, pyramid or {}, "pyramid"))
        super().__init__(**kwargs)

    @property
    def settings(self) -> ClassifierSettings:
        settings: ClassifierSettings = validated(ClassifierSettings, self.pyramid, "pyramid")
        return settings


class PyramidPreTrainedModel(SharedWeights, PreTrainedModel):
    """`output_hidden_states` and `output_attentions`, which heads and users of transformers hand over, change
    nothing: neither is kept. `return_dict=False` gives a tuple.
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
    ) -> BackboneOutput:
        """(B, 3, H, W), normalised -> `feature_maps`: one (B, C, H / stride, W / stride) per out_feature."""
        maps = dict(zip(self.stage_names, self.pyramid(pixel_values), strict=True))
        return BackboneOutput(feature_maps=tuple(maps[name] for name in self.out_features))


class PyramidForImageClassification(PyramidPreTrainedModel):
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
    ) -> ImageClassifierOutput:
        """(B, 3, H, W), normalised -> `logits` (B, K) and, given labels (B,), the mean cross-entropy."""
        logits = self.pyramid(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
