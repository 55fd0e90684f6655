"""The baseline: one view, one encoder, one of its hidden states, a projector.

LLaVA-1.5, arXiv 2310.03744, section 3.2: CLIP ViT-L/14 at 336 pixels, the second to last hidden state
without its class token, a two-layer MLP. Shapes: B batch, (h, w) grid, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor, nn

from stepwell.encoders.encoder import Encoder
from stepwell.models.geometry import PyramidGeometry
from stepwell.structures import FeatureMaps, TokenLayout, TokenMap, VisualTokens

__all__ = ["PlainVision"]


class PlainVision(nn.Module):
    """A vision system with one branch.

    encoder: any Encoder; projector: (B, N, C) -> (B, N, D); select_layer: index into the hidden states, of
    which the embedding is the first, so -1 is the last layer and -2 the one before.
    """

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, geometry: PyramidGeometry, *, select_layer: int = -2
    ) -> None:
        super().__init__()
        assert isinstance(encoder, Encoder)
        depth = encoder.spec.depth
        if not -depth - 1 <= select_layer <= depth:
            raise ValueError(f"select_layer {select_layer} is not one of the {depth + 1} hidden states")
        self.branches = nn.ModuleList([encoder])
        self.projector = projector
        self.geometry = geometry
        self.num_layers = select_layer % (depth + 1)

    def layout(self, size: tuple[int, int]) -> TokenLayout:
        return self.geometry.layout(size)

    def views(self, image: Image, layout: TokenLayout) -> list[Tensor]:
        return self.geometry.views(image, layout)

    def encode(self, views: Sequence[Tensor]) -> TokenMap:
        """views: [(B, 3, H, W)] -> the selected hidden state."""
        (image,) = views
        encoder = self.branches[0]
        assert isinstance(encoder, Encoder)
        return encoder.run(encoder.stem(image), 0, self.num_layers - 1)

    def features(self, views: Sequence[Tensor]) -> FeatureMaps:
        encoder = self.branches[0]
        assert isinstance(encoder, Encoder)
        return {self.geometry.strides[-1]: encoder.to_map(self.encode(views))}

    def forward(self, views: Sequence[Tensor]) -> VisualTokens:
        state = self.encode(views)
        return VisualTokens(self.projector(state.tokens), state.size)
