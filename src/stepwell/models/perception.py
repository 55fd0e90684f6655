"""Pyramids for dense tasks and for classification as models of transformers: built, saved, reloaded.

PIIP, arXiv 2501.07783, section IV. `PyramidBackbone` is a transformers backbone: UperNet, Mask2Former and the
DETR family take it as they take their own. Letters: B batch, (H, W) the largest picture, C widths, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, field
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from stepwell.encoders.catalogue import build_encoder
from stepwell.encoders.encoder import Statistics
from stepwell.fuse.merge import BranchMerge, LastMap, dense_stacks, linear_stacks, stage_stacks
from stepwell.heads.classify import BranchHeads, MergedHead
from stepwell.heads.neck import FACTORS, Resampling, SimplePyramid
from stepwell.models.config import (
    BranchConfig,
    InteractionConfig,
    first_complaint,
    refuse_unknown,
)
from stepwell.models.piip import (
    PyramidClassifier,
    PyramidEncoder,
    PyramidFeatures,
    build_interactions,
    check_rising,
)

__all__ = [
    "ClassifierSettings",
    "DenseSettings",
    "PyramidBackbone",
    "PyramidBackboneConfig",
    "PyramidClassifierConfig",
    "PyramidForImageClassification",
    "PyramidPreTrainedModel",
    "build_classifier",
    "build_features",
]

SIMPLE: tuple[Resampling, ...] = ("up4", "up2", "same", "maxpool2")
HALF: Statistics = (0.5, 0.5, 0.5)
_strict = ConfigDict(extra="forbid")
_TINY = (
    BranchConfig(encoder="vit_t", size=224),
)  # transformers makes a config of defaults when it saves one


@dataclass(frozen=True, kw_only=True, config=_strict)
class DenseSettings:
    """A pyramid whose maps leave at several strides; branch 1 is the largest network on the smallest view.

    merge: "dense" (two convolutions in every branch), "stages" (one, and none in branch 1), or "none" for a
    single branch. merge_branches: positions of those that are merged, None for all (Table IX). merge_after:
    the interactions with a merge of their own, beside the last. operations: of the neck, one per map that
    leaves; none where the merged maps leave as they are. neck_norm: "layernorm" in baselines of one branch.
    """

    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)] = _TINY
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    merge: Literal["dense", "stages", "none"] = "dense"
    merge_branches: tuple[int, ...] | None = None
    merge_after: tuple[int, ...] = ()
    operations: tuple[Resampling, ...] = SIMPLE
    neck_norm: Literal["groupnorm", "layernorm"] = "groupnorm"
    mean: Statistics = HALF
    std: Statistics = HALF

    def __post_init__(self) -> None:
        merges = len(self.merge_after) + 1
        if self.operations and merges not in (1, len(self.operations)):
            raise ValueError(f"{len(self.operations)} operations need 1 or as many merges, got {merges}")
        if self.merge == "none" and len(self.branches) > 1:
            raise ValueError(f"merge 'none' is for a single branch, not for {len(self.branches)} branches")
        check_rising(self.merge_after, len(self.branches[0].interactions))
        if self.merge_branches is not None:
            chosen = set(self.merge_branches)
            if not chosen or len(chosen) < len(self.merge_branches):
                raise ValueError(f"merge_branches {self.merge_branches} must name branches, each once")
            if not chosen <= set(range(len(self.branches))):
                raise ValueError(f"merge_branches {self.merge_branches} of {len(self.branches)} branches")


@dataclass(frozen=True, kw_only=True, config=_strict)
class ClassifierSettings:
    """A pyramid with class logits.

    head: "first_patch" or "cls", a head per branch that reads that token; "merge", one on the merged map.
    """

    branches: Annotated[tuple[BranchConfig, ...], Field(min_length=1)] = _TINY
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    head: Literal["first_patch", "cls", "merge"] = "first_patch"
    mean: Statistics = HALF
    std: Statistics = HALF


def build_features(settings: DenseSettings) -> PyramidFeatures:
    """A dense pyramid with random weights."""
    encoder = _build_encoder(settings)
    layers = _merge_layers(settings, encoder)
    dims = _dims(encoder, layers)
    strides = [encoder.encoders[-1].spec.strides[step[-1]] for step in layers]
    neck = None
    if settings.operations:
        if len(layers) == 1:
            strides, widths = strides * len(settings.operations), [dims[0][0]] * len(settings.operations)
        else:
            widths = [step[0] for step in dims]
        strides = [int(s / FACTORS[op]) for s, op in zip(strides, settings.operations, strict=True)]
        eps = 1e-5 if settings.neck_norm == "groupnorm" else 1e-6
        neck = SimplePyramid(widths, operations=settings.operations, norm=settings.neck_norm, norm_eps=eps)
    return PyramidFeatures(
        encoder,
        [_merge(settings, widths) for widths in dims],
        neck,
        ratios=_ratios(settings.branches),
        strides=strides,
        merge_after=settings.merge_after,
    )


def _merge(settings: DenseSettings, dims: list[int]) -> nn.Module:
    if settings.merge == "none":
        return LastMap()
    stacks = (dense_stacks if settings.merge == "dense" else stage_stacks)(dims)
    if settings.merge_branches is None:
        return BranchMerge(stacks)
    return BranchMerge([stacks[i] for i in settings.merge_branches], branches=settings.merge_branches)


def build_classifier(settings: ClassifierSettings, num_classes: int) -> PyramidClassifier:
    """A classifier with random weights."""
    encoder = _build_encoder(settings)
    dims = [branch.spec.dim for branch in encoder.encoders]
    if settings.head == "merge":
        head: Any = MergedHead(BranchMerge(linear_stacks(dims)), dims[0], num_classes)
    else:
        head = BranchHeads(dims, num_classes, read=settings.head)
    return PyramidClassifier(encoder, head, ratios=_ratios(settings.branches))


def _build_encoder(settings: DenseSettings | ClassifierSettings) -> PyramidEncoder:
    branches = [build_encoder(branch.encoder, **branch.arguments) for branch in settings.branches]
    ranges = [branch.interactions for branch in settings.branches]
    specs = [branch.spec for branch in branches]
    return PyramidEncoder(branches, build_interactions(specs, ranges, **asdict(settings.interaction)), ranges)


def _merge_layers(settings: DenseSettings, encoder: PyramidEncoder) -> list[list[int]]:
    """For each merge, the layer of every branch that it follows."""
    layers = [[found[i][1] for found in encoder.ranges] for i in settings.merge_after]
    return [*layers, [branch.spec.depth - 1 for branch in encoder.encoders]]


def _dims(encoder: PyramidEncoder, layers: list[list[int]]) -> list[list[int]]:
    """For each merge, the width of every branch; branch 1's is that of the merged map."""
    return [
        [branch.spec.dims[i] for branch, i in zip(encoder.encoders, step, strict=True)] for step in layers
    ]


def _ratios(branches: Sequence[BranchConfig]) -> list[float]:
    """The plain quotients, as in the official code: some lose a pixel when a side is rounded down."""
    return [branch.size / branches[-1].size for branch in branches]


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
        self.pyramid = _json(_DENSE, pyramid)
        settings = self.settings
        count = len(settings.operations) or len(settings.merge_after) + 1
        self.stage_names = [f"stage{i + 1}" for i in range(count)]
        if out_features is None and out_indices is None:
            out_features = list(self.stage_names)
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        refuse_unknown(kwargs.keys() - {"stage_names"}, type(self).__name__)
        super().__init__(**kwargs)

    @property
    def settings(self) -> DenseSettings:
        return _DENSE.validate_python(self.pyramid)


class PyramidClassifierConfig(PreTrainedConfig):
    """`pyramid`: ClassifierSettings or their JSON. Raises ValueError naming the wrong field."""

    model_type = "stepwell_classifier"

    def __init__(self, pyramid: dict[str, Any] | ClassifierSettings | None = None, **kwargs: Any) -> None:
        refuse_unknown(kwargs, type(self).__name__)
        self.pyramid = _json(_CLASSIFIER, pyramid)
        super().__init__(**kwargs)

    @property
    def settings(self) -> ClassifierSettings:
        return _CLASSIFIER.validate_python(self.pyramid)


class PyramidPreTrainedModel(PreTrainedModel):
    base_model_prefix = "pyramid"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True

    def _init_weights(self, module: Any) -> None:
        """Every part initialises itself when it is built."""


class PyramidBackbone(BackboneMixin, PyramidPreTrainedModel):
    config_class = PyramidBackboneConfig
    has_attentions = False

    def __init__(self, config: PyramidBackboneConfig) -> None:
        super().__init__(config)
        self.pyramid = build_features(config.settings)
        merged = _dims(self.pyramid.encoder, _merge_layers(config.settings, self.pyramid.encoder))
        self.num_features = [merged[source][0] for source in self.pyramid.sources]
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """(B, 3, H, W), normalised -> `feature_maps`: one (B, C, H / stride, W / stride) per out_feature."""
        maps = dict(zip(self.stage_names, self.pyramid(pixel_values).values(), strict=True))
        return BackboneOutput(feature_maps=tuple(maps[name] for name in self.out_features))


class PyramidForImageClassification(PyramidPreTrainedModel):
    config_class = PyramidClassifierConfig

    def __init__(self, config: PyramidClassifierConfig) -> None:
        super().__init__(config)
        self.pyramid = build_classifier(config.settings, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """(B, 3, H, W), normalised -> `logits` (B, K) and, given labels (B,), the cross-entropy."""
        logits = self.pyramid(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


_DENSE: TypeAdapter[DenseSettings] = TypeAdapter(DenseSettings)
_CLASSIFIER: TypeAdapter[ClassifierSettings] = TypeAdapter(ClassifierSettings)


def _json(adapter: TypeAdapter[Any], settings: Any) -> dict[str, Any]:
    """Settings or their JSON, None for the defaults -> JSON with every field written out."""
    try:
        made = adapter.validate_python({} if settings is None else settings)
    except ValidationError as error:
        raise ValueError(f"pyramid: {first_complaint(error)}") from None
    found: dict[str, Any] = adapter.dump_python(made, mode="json")
    return found
