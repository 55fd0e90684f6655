"""A trained up-sampler of an encoder's maps as a model of transformers: saved, reloaded, taken as a part.

LLaVA-UHD v2, arXiv 2412.13871, section 3.1. The folder holds the up-sampler's tensors alone, under the names
of `InversePyramid`, and the settings of the encoder whose maps it was trained on.
Letters: B batch, C channels, (h, w) the encoder's grid, n the number of levels, p pixels a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from stepwell.fuse.upsample import GuidedStage, InversePyramid, Level, UpsamplerConfig, build_upsampler
from stepwell.models.config import checked_format, refuse_unknown
from stepwell.models.saving import SharedWeights
from stepwell.models.starting_values import keep_built, reset, start_missing
from stepwell.models.vision import settings_json, validated
from stepwell.structures import IMAGENET_MEAN, IMAGENET_STD, Statistics

__all__ = ["StepwellUpsampler", "StepwellUpsamplerConfig", "refuse_other_upsampler"]


class StepwellUpsamplerConfig(PreTrainedConfig):
    """`dim`: C. `levels`: n. `upsampler`: UpsamplerConfig or its JSON. The others say what it was trained on:
    the hidden state `select_layer` of an encoder of the catalogue, images of this `mean` and `std`.

    Raises ValueError naming the wrong field.
    """

    model_type = "stepwell_upsampler"

    def __init__(
        self,
        encoder: str = "clip_l_14_336",
        arguments: Mapping[str, Any] | None = None,
        select_layer: int = -2,
        dim: int = 1024,
        levels: int = 2,
        upsampler: dict[str, Any] | UpsamplerConfig | None = None,
        mean: Statistics = IMAGENET_MEAN,
        std: Statistics = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        self.stepwell_format = checked_format(kwargs)
        refuse_unknown(kwargs, type(self).__name__)
        for name, value in (("dim", dim), ("levels", levels)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
        self.encoder, self.arguments, self.select_layer = encoder, dict(arguments or {}), select_layer
        self.dim, self.levels = dim, levels
        self.upsampler = settings_json(validated(UpsamplerConfig, upsampler or {}, "upsampler"))
        self.mean, self.std = list(mean), list(std)
        super().__init__(**kwargs)

    @property
    def settings(self) -> UpsamplerConfig:
        settings: UpsamplerConfig = validated(UpsamplerConfig, self.upsampler, "upsampler")
        return settings


class StepwellUpsampler(SharedWeights, PreTrainedModel):
    """An `InversePyramid`, whose tensors a folder holds under its own names."""

    config_class = StepwellUpsamplerConfig
    base_model_prefix = "pyramid"  # of the names here, where a folder has none in front of them
    main_input_name = "map"
    input_modalities = ("image",)

    def __init__(self, config: StepwellUpsamplerConfig) -> None:
        super().__init__(config)
        self.pyramid = build_upsampler(config.settings, config.dim, config.levels)
        keep_built(self)
        self.post_init()

    def initialize_weights(self) -> None:
        start_missing(self)
        super().initialize_weights()

    def _init_weights(self, module: Any) -> None:
        reset(module)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("state_dict", self.pyramid.state_dict())
        super().save_pretrained(save_directory, *args, **kwargs)

    def forward(self, map: Tensor, image: Tensor) -> Tensor:
        """map (B, C, h, w), image (B, 3, p*h, p*w), normalised -> the largest map (B, C, 2^n h, 2^n w).

        As of `InversePyramid`: where each level has a correction, which is so in the official stack of three,
        this map has one more, of its own, which a training of levels leaves as it is. Raises ValueError for a
        map of another width.
        """
        self._refuse_other_width(map)
        largest: Tensor = self.pyramid(map, image)
        return largest

    def levels(self, map: Tensor, image: Tensor) -> list[Level]:
        """The same -> the map of every level, the smallest first, as a model reads them."""
        self._refuse_other_width(map)
        return self.pyramid.levels(map, image)

    def _refuse_other_width(self, map: Tensor) -> None:
        if map.shape[1] != self.config.dim:
            raise ValueError(f"this up-sampler takes maps of {self.config.dim} channels, got {map.shape[1]}")


def refuse_other_upsampler(pyramid: InversePyramid, config: StepwellUpsamplerConfig) -> None:
    """Raises ValueError where a pyramid is not the one that `config` describes: in its levels, in its width,
    or in how its stages weigh pixels, which no tensor shows. Dropout may differ.
    """
    ours: dict[str, Any] = {"levels": len(pyramid.stages)}
    theirs: dict[str, Any] = {"levels": config.levels}
    if len(pyramid.corrections):
        ours["dim"], theirs["dim"] = cast(Any, pyramid.corrections[0]).linear.in_features, config.dim
    for stage in pyramid.stages:
        if isinstance(stage, GuidedStage):
            ours |= {f"kernel.{name}": value for name, value in asdict(stage.config).items()}
            theirs |= {f"kernel.{name}": value for name, value in asdict(config.settings.kernel).items()}
    for name, value in theirs.items():
        if name != "kernel.dropout" and value != ours[name]:
            raise ValueError(f"an up-sampler of {name} {value!r} does not fit the model's of {ours[name]!r}")
