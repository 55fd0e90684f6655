"""The task `upsampler`: an inverse pyramid learns to enlarge the maps of a frozen encoder, from images alone.

LLaVA-UHD v2, arXiv 2412.13871, section 3.1: the pre-training of its up-sampler, before any language model is
there. The losses are those of train/multiview.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from PIL import Image
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from stepwell.data.image_folder import Images
from stepwell.data.mixture import Mixture
from stepwell.data.sample import Source
from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.fuse.downsample import DownsamplerConfig, build_downsampler
from stepwell.fuse.upsample import UpsamplerConfig, build_upsampler
from stepwell.images.open import open_image
from stepwell.models.upsampler import StepwellUpsampler, StepwellUpsamplerConfig
from stepwell.structures import EncoderSpec, Statistics
from stepwell.train.multiview import HiddenMap, Loss, MultiviewTraining, UncertaintyHead
from stepwell.train.processes import tell
from stepwell.train.recipe import Place, Positive, Rate, Recipe, Stage, Strict
from stepwell.train.tasks import JudgedByLosses
from stepwell.views.preprocess import resize_short_side_and_crop, to_tensor

__all__ = ["ImageData", "UpsamplerModel", "UpsamplerRecipe", "UpsamplerStage", "UpsamplerTask"]

UPSAMPLER = "upsampler"  # the part, and its prefix in the module


class UpsamplerModel(Strict):
    """An encoder, one of its hidden states, and the up-sampler of its map.

    arguments: of the encoder, where the catalogue's differ. parts: where the encoder starts, a folder, a file
    or a name on the hub, of which a commit, branch or tag is the `revision`. select_layer: index into the
    hidden states, the embedding being the first. size: side of the images, whose short side is resized to it
    and whose middle is cut out. mean, std: None is the encoder's own. levels: each twice as large as the one
    before.
    """

    encoder: str
    arguments: dict[str, Any] = {}
    parts: dict[Literal["encoder"], str] = {}
    revision: str | None = None
    select_layer: int = -2
    size: Positive = 336
    resize: Literal["bicubic", "nearest"] = "bicubic"
    mean: Statistics | None = None
    std: Statistics | None = None
    levels: Annotated[int, Field(ge=1, le=6)] = 2
    upsampler: UpsamplerConfig = UpsamplerConfig()
    downsampler: DownsamplerConfig = DownsamplerConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> UpsamplerModel:
        self.spec.layers_before(self.select_layer)
        if self.size < self.stride:
            raise ValueError(f"size {self.size} is smaller than one cell of {self.stride} pixels")
        if self.upsampler.kind == "bilinear":
            raise ValueError("upsampler.kind bilinear has nothing to learn")
        if self.revision is not None and not self.parts:
            raise ValueError("revision is of an encoder from the hub; name it in parts.encoder")
        return self

    @property
    def spec(self) -> EncoderSpec:
        return encoder_spec(self.encoder, self.arguments)

    @property
    def num_layers(self) -> int:
        """Layers that run: those before the hidden state that is read."""
        return self.spec.layers_before(self.select_layer)

    @property
    def dim(self) -> int:
        """Width of that hidden state; the embedding has that of the first layer."""
        return self.spec.dims[max(self.num_layers - 1, 0)]

    @property
    def stride(self) -> int:
        """Pixels of a cell of it."""
        return self.spec.strides[max(self.num_layers - 1, 0)]


class ImageData(Strict):
    """Images of any kind: all below a folder, or those that a text file lists, a path a line."""

    kind: Literal["images"] = "images"
    weight: Rate | None = None
    path: Place
    images: Place | None = None  # the folder that the paths of a list start from; None: the list's own


class UpsamplerStage(Stage):
    """losses: "reconstruction"; "crf" and "total_variation", of pixels near one another; "entropy", of the
    kernels of down-samplers that have one. views: of each image, padded by max_pad pixels and zoomed by up to
    max_zoom. random_projection: channels that maps are compared in, null is all of them. uncertainty: how the
    errors are weighed by what a head makes of them, "code", "paper" (equation 11) or "none". hierarchical:
    every level has its losses, not the last alone. stop_gradient: none goes from a level to those before it;
    by default where each has its losses, except in a stack of three, as the official code trains them.
    crf_samples: pixels that are compared with one another.
    """

    train: tuple[Literal["upsampler", "downsamplers", "uncertainty"], ...] = (
        "upsampler",
        "downsamplers",
        "uncertainty",
    )
    losses: Annotated[Mapping[Loss, Rate], Field(min_length=1)] = {"reconstruction": 1.0, "crf": 0.001}
    views: Positive = 2
    max_pad: Annotated[int, Field(ge=0)] = 30
    max_zoom: Annotated[float, Field(ge=1)] = 2.0
    random_projection: Positive | None = 30
    uncertainty: Literal["code", "paper", "none"] = "code"
    hierarchical: bool = True
    stop_gradient: bool | None = None
    crf_samples: Positive = 1000
    data: Annotated[tuple[ImageData, ...], Field(min_length=1)]
    validation: tuple[ImageData, ...] = ()

    @model_validator(mode="after")
    def _belongs_together(self) -> UpsamplerStage:
        if self.vision:
            raise ValueError("vision: the geometry of an up-sampler's training is the model's size")
        if self.stop_gradient and not self.hierarchical:
            raise ValueError("stop_gradient would leave levels without any; it needs hierarchical: true")
        return self


class UpsamplerRecipe(Recipe):
    """In fp32, as it was published, and small when it is done."""

    task: Literal["upsampler"] = "upsampler"
    model: UpsamplerModel
    stages: Annotated[tuple[UpsamplerStage, ...], Field(min_length=1)]
    bf16: bool = False
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class UpsamplerTask(JudgedByLosses):
    """A stage that trains an InversePyramid."""

    recipe: ClassVar[type[Recipe]] = UpsamplerRecipe

    def __init__(self, recipe: Any, stage: Any) -> None:
        self.settings, self.stage = recipe, stage
        self.limits = recipe.image_limits.build()
        self.losses: Mapping[str, float] = stage.losses
        model = recipe.model
        if "entropy" in stage.losses and model.downsampler.kind != "kernel":
            raise ValueError(
                f"stages.{stage.name}.losses.entropy is of a kernel; it needs model.downsampler.kind: kernel"
            )
        self.learning = [part for part in stage.train if part != "uncertainty" or stage.uncertainty != "none"]
        self.scores = tuple(f"error_{2**level}x" for level in range(model.levels + 1))
        self.mean, self.std = model.mean or model.spec.mean, model.std or model.spec.std
        self.resample = Image.Resampling[model.resize.upper()]

    @classmethod
    def configuration(cls, recipe: Any) -> Any:
        raise ValueError(
            f"recipe {recipe.name} trains an up-sampler, which costs what it costs in a model: name one"
        )

    def build(self) -> nn.Module:
        model = self.settings.model
        encoder = build_encoder(model.encoder, **model.arguments)
        if (source := model.parts.get("encoder")) is not None:
            report = load_encoder_weights(encoder, source, revision=model.revision)
            tell(f"encoder from {report.text()}")
        return self._module(encoder)

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return self._module(build_encoder(self.settings.model.encoder, **self.settings.model.arguments))

    def _module(self, encoder: Any) -> nn.Module:
        model, stage = self.settings.model, self.stage
        supervised = model.levels if stage.hierarchical else 1
        stop_gradient = stage.stop_gradient
        if stop_gradient is None:
            stop_gradient = stage.hierarchical and model.levels != 3
        return MultiviewTraining(
            HiddenMap(encoder, model.num_layers),
            build_upsampler(model.upsampler, model.dim, model.levels),
            [build_downsampler(model.downsampler, model.dim, model.stride) for _ in range(supervised)],
            [UncertaintyHead(model.dim) for _ in range(supervised) if stage.uncertainty != "none"],
            losses=tuple(stage.losses),
            views=stage.views,
            max_pad=stage.max_pad,
            max_zoom=stage.max_zoom,
            random_projection=stage.random_projection,
            uncertainty_form="paper" if stage.uncertainty == "paper" else "code",
            stop_gradient=stop_gradient,
            crf_samples=stage.crf_samples,
        )

    def parts(self, module: nn.Module) -> Mapping[str, str]:
        return {part: part for part in (UPSAMPLER, "downsamplers", "uncertainty")}

    def source(self, data: Any) -> Source:
        return Images(data.path, images=data.images)

    def order(self, samples: Mixture, *, batches: int, seed: int) -> None:
        """By chance."""

    def prepare(self, sample: Any) -> Tensor:
        """A file -> (3, size, size), normalised."""
        side = self.settings.model.size
        image = resize_short_side_and_crop(open_image(sample, limits=self.limits), side, self.resample)
        return to_tensor(image, (side, side), self.mean, self.std)

    def collate(self, samples: Sequence[Any]) -> dict[str, Any]:
        return {"image": torch.stack(list(samples))}

    def counts(self, batch: dict[str, Any]) -> dict[str, Tensor | int]:
        return dict.fromkeys((*self.stage.losses, *self.scores), len(batch["image"]))

    def save(self, weights: Path, folder: Path) -> None:
        settings = self.settings.model
        model = StepwellUpsampler(
            StepwellUpsamplerConfig(
                encoder=settings.encoder,
                arguments=settings.arguments,
                select_layer=settings.select_layer,
                dim=settings.dim,
                levels=settings.levels,
                upsampler=settings.upsampler,
                mean=self.mean,
                std=self.std,
            )
        )
        tensors, prefix = load_file(weights), f"{UPSAMPLER}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        model.pyramid.load_state_dict(own)
        model.to(getattr(torch, self.settings.save_dtype)).save_pretrained(folder)
