"""LLaVA-HR's vision: a slow encoder at high resolution speaks into the stages of a fast one.

LLaVA-HR, arXiv 2403.03003. Without adapters it is the dual encoder of INF-LLaVA (arXiv 2407.16198), figure
1(b): two networks whose features are added at the end. Letters: B batch, N tokens, D the language model's
width, (H, W) the input, C the width of an encoder, (h, w) its grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from stepwell.encoders.catalogue import ENCODERS, build_encoder, encoder_spec
from stepwell.encoders.encoder import Encoder, run_layers
from stepwell.encoders.vit import VisionTransformer
from stepwell.fuse.mixture import MixtureAdapter, MixtureMerge
from stepwell.language.projector import build_projector
from stepwell.models.vision import STRICT, VisionConfig, VisionSystem
from stepwell.ops.ragged import by_shapes
from stepwell.structures import EncoderSpec, Statistics, TokenLayout, VisionFeatures
from stepwell.views.pyramid import Framing, PyramidGeometry
from stepwell.views.region import RegionConfig

__all__ = ["LlavaHrConfig", "LlavaHrVision"]

NO_CLASS_TOKEN = {"class_token": False, "antialias": True}
"""Of a plain transformer of the catalogue: patches alone go through it, their positions resized as in the
released code.
"""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LlavaHrConfig(VisionConfig):
    """Branch 0 is the fast encoder, whose grid the tokens have, branch 1 the slow one.

    size: of the slow encoder's view. fast_least: the fast one's is as many of its patches as the slow one has
    cells, and at least so large. adapters: they stand behind as many of the fast encoder's equal stages, all
    but the last; 0 leaves two encoders that meet at the end. projector: behind the sum of both. mean, std:
    None is the fast encoder's own.
    """

    adjustable: ClassVar = frozenset({"fast_least", "framing", "min_cells", "mean", "std", "region"})
    parts: ClassVar = {
        "vision.branches": "branches",
        "vision.adapters": "adapters",
        "vision.merge": "merge",
        "projector": "projector",
    }

    kind: Literal["llava_hr"] = "llava_hr"
    fast: str = "clip_l_14_336"
    slow: str = "convnext_l_clip"
    size: Annotated[int, Field(gt=0)] = 1024
    fast_least: Annotated[int, Field(gt=0)] = 336
    adapters: Annotated[int, Field(ge=0)] = 3
    projector: Annotated[str, Field(pattern=r"^(linear|mlp[1-9]\d*x_gelu|identity)$")] = "mlp2x_gelu"
    framing: Framing = "pad"
    min_cells: Annotated[int, Field(gt=0)] = 1  # framing "aspect": cells of the short side in both views
    mean: Statistics | None = None
    std: Statistics | None = None
    region: RegionConfig = field(default_factory=RegionConfig)
    fast_arguments: dict[str, Any] = field(default_factory=dict)  # of the encoders, where the catalogue's
    slow_arguments: dict[str, Any] = field(default_factory=dict)  # differ

    def __post_init__(self) -> None:
        (fast, slow), stages = self._specs, self.adapters + 1
        if fast.depth % stages:
            counts = [str(n - 1) for n in range(1, fast.depth + 1) if fast.depth % n == 0]
            raise ValueError(
                f"the {fast.depth} layers of {self.fast} do not fall into {stages} equal stages; "
                f"adapters may be {', '.join(counts)}"
            )
        if self.size < slow.stride:
            raise ValueError(
                f"a view of {self.size} is smaller than a cell of {self.slow}, which is {slow.stride}"
            )

    @property
    def _networks(self) -> tuple[tuple[str, dict[str, Any]], ...]:
        """Name and arguments of the fast encoder and of the slow one."""
        entry = ENCODERS.get(self.fast)
        own = NO_CLASS_TOKEN if entry is not None and entry.build is VisionTransformer else {}
        return (self.fast, {**own, **self.fast_arguments}), (self.slow, self.slow_arguments)

    @property
    def _specs(self) -> tuple[EncoderSpec, ...]:
        return tuple(encoder_spec(name, arguments) for name, arguments in self._networks)

    @property
    def largest(self) -> int:
        return self.size

    def geometry(self) -> PyramidGeometry:
        fast, slow = self._specs
        return PyramidGeometry(
            names=(self.fast, self.slow),
            sides=(max(self.size // slow.stride * fast.stride, self.fast_least), self.size),
            strides=(fast.stride, slow.stride),
            framing=self.framing,
            mean=self.mean or fast.mean,
            std=self.std or fast.std,
            min_cells=max(self.min_cells, fast.window, slow.window),
            grid_view=0,
            align_corners=True,
            region=self.region,
        )

    def build(self, out_dim: int) -> LlavaHrVision:
        fast, slow = (build_encoder(name, **arguments) for name, arguments in self._networks)
        dim, slow_dim = fast.spec.dim, slow.spec.dim
        return LlavaHrVision(
            fast,
            slow,
            [MixtureAdapter(dim, slow_dim) for _ in range(self.adapters)],
            MixtureMerge(dim, slow_dim),
            build_projector(self.projector, dim, out_dim),
            self.geometry(),
        )

    def resized(self, sizes: Sequence[int]) -> LlavaHrConfig:
        if len(sizes) != 1:
            raise ValueError(f"sizes: the slow encoder's view tells both, got {list(sizes)}")
        return dataclasses.replace(self, size=sizes[0])


class LlavaHrVision(VisionSystem):
    """adapters: behind the fast encoder's equal stages, of which there is one more; projector: (B, N, C) ->
    (B, N, D); geometry: of the fast view and the slow one, which is the input.
    """

    def __init__(
        self,
        fast: Encoder,
        slow: Encoder,
        adapters: Sequence[MixtureAdapter],
        merge: MixtureMerge,
        projector: nn.Module,
        geometry: PyramidGeometry,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([cast(nn.Module, fast), cast(nn.Module, slow)])
        self.adapters = nn.ModuleList(adapters)
        self.merge = merge
        self.projector = projector
        self.geometry: PyramidGeometry = geometry
        self.gradient_checkpointing = False  # of adapters; transformers looks for it here and in encoders

    @property
    def encoders(self) -> list[Encoder]:
        return cast("list[Encoder]", list(self.branches))

    def encode(self, inputs: Sequence[Tensor], layouts: Sequence[TokenLayout]) -> list[VisionFeatures]:
        given = self.geometry.by_image(inputs, layouts)
        return [
            VisionFeatures(tokens, self.geometry.feature_maps(maps, layout), layout)
            for (tokens, *maps), layout in zip(by_shapes(self._encode, given), layouts, strict=True)
        ]

    def _encode(self, image: Tensor, fine: Tensor | None = None, cut: Tensor | None = None) -> list[Tensor]:
        """(B, 3, H, W) -> tokens (B, N, D), the maps (B, C, h, w) of the fast encoder and of the slow one. Of
        a close-up also the view of the cut, and where that lies (B, 4).
        """
        fast, slow = self.encoders
        small, large = self.geometry.pyramid(image, fine)
        seen = slow.to_map(slow.run(slow.stem(large), 0, slow.spec.depth - 1))
        state, step = fast.stem(small), fast.spec.depth // (len(self.adapters) + 1)
        checkpointing = self.gradient_checkpointing and self.training
        for i in range(len(self.adapters) + 1):
            state = fast.run(state, i * step, (i + 1) * step - 1)
            if i < len(self.adapters):
                tokens = run_layers(
                    self.adapters, state.tokens, i, i, state.size, seen, cut, checkpointing=checkpointing
                )
                state = state._replace(tokens=tokens)
        tokens = self.projector(self.merge(state.tokens, state.size, seen, cut))
        return [tokens, fast.to_map(state), seen]
