"""How an up-sampler learns without labels: its maps of an image have to agree with what the encoder sees of
shifted, zoomed and mirrored views of it.

FeatUp, arXiv 2403.10516, section 3; LLaVA-UHD v2, arXiv 2412.13871, section 3.1 and equations 10 and 11,
which supervises every level of the pyramid. Where its paper and its released code differ, both are here.
Letters: B batch, C channels of a map, V those that are compared, (H, W) the image, (h, w) the encoder's grid,
n sampled pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.encoders.encoder import Encoder
from stepwell.fuse.downsample import LOGIT_DROPOUT, Downsampler, KernelDownsampler
from stepwell.fuse.upsample import InversePyramid
from stepwell.ops.adaptive_conv import reflect
from stepwell.structures import Size

__all__ = [
    "Draws",
    "HiddenMap",
    "Jitter",
    "Loss",
    "MultiviewTraining",
    "UncertaintyHead",
    "draw_jitter",
    "entropy",
    "jitter",
    "project",
    "sampled_crf",
    "total_variation",
]

Loss = Literal["reconstruction", "crf", "total_variation", "entropy"]


class Jitter(NamedTuple):
    """A view of an image: padded by its mirror, zoomed, cut out at (row, column), mirrored."""

    pad: int
    zoom: float
    row: int
    column: int
    flip: bool


def draw_jitter(size: Size, *, max_pad: int, max_zoom: float) -> Jitter:
    """A view of images of `size`, by torch's generator: half of them zoomed, half of them mirrored."""
    zooms, share, row, column, flips = torch.rand(5, dtype=torch.float64).tolist()
    zoom = 1 + share * (max_zoom - 1) if zooms > 0.5 else 1.0
    room = [int((length + 2 * max_pad) * zoom) - length for length in size]
    return Jitter(max_pad, zoom, int(row * (room[0] + 1)), int(column * (room[1] + 1)), flips > 0.5)


def jitter(x: Tensor, view: Jitter) -> Tensor:
    """(B, C, H, W), an image or a map as large -> the same of the view."""
    height, width = x.shape[-2:]
    x = reflect(x, view.pad)
    if view.zoom > 1:
        x = F.interpolate(x, scale_factor=view.zoom, mode="bilinear")
    x = x[..., view.row : view.row + height, view.column : view.column + width]
    return x.flip(-1) if view.flip else x


def project(x: Tensor, projection: Tensor | None) -> Tensor:
    """x (B, C, H, W), projection (B, C, V), whose columns are taken at length 1 -> (B, V, H, W)."""
    if projection is None:
        return x
    return torch.einsum("bchw,bcv->bvhw", x, F.normalize(projection, dim=1))


def sampled_crf(
    image: Tensor,
    x: Tensor,
    positions: Tensor,
    *,
    place: float = 0.1,
    colour: float = 0.15,
    near: float = 0.005,
    weights: tuple[float, float] = (10.0, 3.0),
    shift: float = 0.0,
) -> Tensor:
    """Pixels near one another, and of one colour, should hold the same: a conditional random field's energy.

    image (B, 3, H, W), x (B, V, H, W), positions (2, n): rows and columns. The similarity of two pixels is
    weights[0] where both their place and their colour are the same, and weights[1] where their place is;
    place, colour, near: how fast it falls with their squared distance, places counted from 0 to 1.
    """
    rows, columns = positions
    lengths = torch.tensor(x.shape[-2:], device=x.device)
    apart = _squared_distances((positions / lengths[:, None])[None].to(x.dtype))
    unlike = _squared_distances(image[:, :, rows, columns])
    similarity = (
        weights[0] * (-apart / (2 * place) - unlike / (2 * colour)).exp()
        + weights[1] * (-apart / (2 * near)).exp()
        - shift
    )
    return (_squared_distances(x[:, :, rows, columns]) * similarity).mean()


def _squared_distances(x: Tensor) -> Tensor:
    """(B, V, n) -> (B, n, n)."""
    squares = x.square().sum(1)
    return squares[:, :, None] + squares[:, None] - 2 * x.transpose(1, 2) @ x


def total_variation(x: Tensor) -> Tensor:
    """(B, V, H, W) -> squared differences of neighbours, down and across, a pixel of x."""
    return (x.diff(dim=-2).square().sum() + x.diff(dim=-1).square().sum()) / x.numel()


def entropy(kernels: Tensor) -> Tensor:
    """(B, V, K, K), each of sum 1 -> in nats, the mean of all kernels."""
    return -(kernels * kernels.clamp(min=1e-7).log()).sum((-3, -2, -1)).mean()


class UncertaintyHead(nn.Module):
    """How far off a cell may be, told from what the encoder saw there."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, 1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.conv.reset_parameters()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 1, h, w), the scale of an error."""
        out: Tensor = (self.conv(x) + 0.1).exp().clamp(min=1e-4)
        return out


class HiddenMap(nn.Module):
    """The map of an encoder after so many of its layers."""

    def __init__(self, encoder: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.encoder, self.num_layers = encoder, num_layers

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        encoder = self.encoder
        assert isinstance(encoder, Encoder)
        return encoder.to_map(encoder.run(encoder.stem(image), 0, self.num_layers - 1))


class Draws(NamedTuple):
    """What is drawn for one view of a batch; the lists have an entry for each level that is supervised."""

    jitter: Jitter
    projection: Tensor | None  # (B, C, V), normal
    kept: Sequence[Tensor | None]  # (B, h, w), cells whose scores count in the down-sampler
    positions: Sequence[Tensor]  # (2, n), of the CRF; empty where the view has none


class MultiviewTraining(nn.Module):
    """A frozen encoder, an up-sampler, and what only its training needs: a down-sampler a level, and maybe a
    head of uncertainty.

    encoder: image -> map. downsamplers, uncertainty: of the last levels, as many as are supervised. losses:
    those that are computed. uncertainty_form: "code" is e^2 / 2u^2 + log u, the mean of which is summed over
    levels; "paper" halves the logarithm too (equation 11). stop_gradient: none goes from a level to those
    before it. max_pad: pixels. random_projection: V, None compares all channels. crf_samples: n.
    """

    def __init__(
        self,
        encoder: nn.Module,
        upsampler: InversePyramid,
        downsamplers: Sequence[Downsampler],
        uncertainty: Sequence[UncertaintyHead] = (),
        *,
        losses: Collection[Loss],
        views: int = 2,
        max_pad: int = 30,
        max_zoom: float = 2.0,
        random_projection: int | None = None,
        uncertainty_form: Literal["code", "paper"] = "code",
        stop_gradient: bool = True,
        crf_samples: int = 1000,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.upsampler = upsampler
        self.downsamplers = nn.ModuleList(downsamplers)
        self.uncertainty = nn.ModuleList(uncertainty)
        self.losses, self.views = tuple(losses), views
        self.max_pad, self.max_zoom = max_pad, max_zoom
        self.random_projection, self.crf_samples = random_projection, crf_samples
        self.log_weight = 1.0 if uncertainty_form == "code" else 0.5
        self.stop_gradient = stop_gradient
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiviewTraining:
        """The encoder stays as it is used."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, image: Tensor, draws: Sequence[Draws] | None = None) -> dict[str, Tensor]:
        """image (B, 3, H, W), normalised -> the losses; in evaluation the scores of `errors` too.

        draws: one a view, by default by torch's generator; in evaluation always the same. All views are of
        the same maps of the levels, drawn once. Every loss is a sum over levels; the reconstruction is a mean
        over views, the entropy a sum; the others are of the first view.
        """
        map = self._seen(image)
        levels = self.upsampler.levels(map, image, stop_gradient=self.stop_gradient)
        maps = [level.corrected() for level in levels]
        if draws is None:
            with torch.random.fork_rng(_devices(image), enabled=not self.training):
                if not self.training:
                    torch.manual_seed(0)
                draws = [self.draw(image, map, is_first=view == 0) for view in range(self.views)]
        totals: dict[str, Tensor] = {}
        for number, view in enumerate(draws):
            for terms in self.terms(image, maps, view, is_first=number == 0):
                for name, term in terms.items():
                    share = term / len(draws) if name == "reconstruction" else term
                    totals[name] = totals.get(name, 0.0) + share
        return totals if self.training else totals | self.errors(image, [map, *maps], draws[0])

    def draw(self, image: Tensor, map: Tensor, *, is_first: bool) -> Draws:
        """For images (B, 3, H, W) and their maps (B, C, h, w)."""
        size, (batch, dim, *grid) = (image.shape[-2], image.shape[-1]), map.shape
        projection = None
        if self.random_projection is not None:
            projection = torch.randn(batch, dim, self.random_projection, device=map.device, dtype=map.dtype)
        has_crf = is_first and "crf" in self.losses
        kept: list[Tensor | None] = [None] * len(self.downsamplers)
        if self.training:
            kept = [torch.rand(batch, *grid, device=map.device) > LOGIT_DROPOUT for _ in kept]
        return Draws(
            draw_jitter(size, max_pad=self.max_pad, max_zoom=self.max_zoom),
            projection,
            kept,
            [self._pixels(size, image.device) for _ in self.downsamplers] if has_crf else [],
        )

    def _pixels(self, size: Size, device: torch.device) -> Tensor:
        return torch.stack([torch.randint(length, (self.crf_samples,), device=device) for length in size])

    def terms(
        self, image: Tensor, maps: Sequence[Tensor], view: Draws, *, is_first: bool
    ) -> list[dict[str, Tensor]]:
        """maps: (B, C, 2h, 2w), (B, C, 4h, 4w), ... -> the losses of a view, a level each that is supervised,
        the smallest first.
        """
        seen = self._seen(jitter(image, view.jitter))
        count = len(self.downsamplers)
        return [
            self._level_terms(image, map, seen, view, level, is_first=is_first)
            for level, map in enumerate(maps[-count:])
        ]

    def _level_terms(
        self, image: Tensor, map: Tensor, seen: Tensor, view: Draws, level: int, *, is_first: bool
    ) -> dict[str, Tensor]:
        down: Any = self.downsamplers[level]
        values = project(map, view.projection)
        # Whatever is done to pixels is linear, so few channels go through it: those compared, and the scores.
        moved = self._moved(torch.cat([values, down.scores(map)], 1), image, view.jitter)
        values, scores = moved[:, : values.shape[1]], moved[:, values.shape[1] :]
        terms: dict[str, Tensor] = {}
        if "reconstruction" in self.losses:
            pooled = down.pool(values, scores, seen.shape[-2:], view.kept[level])
            error = (pooled - project(seen, view.projection)).square()
            if len(self.uncertainty):
                scale = self.uncertainty[level](seen)
                error = error / (2 * scale**2) + self.log_weight * scale.log()
            terms["reconstruction"] = error.mean()
        if view.positions:
            terms["crf"] = sampled_crf(image, values, view.positions[level])
        if is_first and "total_variation" in self.losses:
            terms["total_variation"] = total_variation(values.square().sum(1, keepdim=True))
        if "entropy" in self.losses:
            assert isinstance(down, KernelDownsampler)
            terms["entropy"] = -entropy(down.kernel()[None, None])  # a wide kernel is wanted
        return terms

    def errors(self, image: Tensor, maps: Sequence[Tensor], view: Draws) -> dict[str, Tensor]:
        """maps: the encoder's, and those of all levels -> `error_1x`, `error_2x`, ...: how far the mean of
        each cell, no down-sampler between, is from what the encoder sees of the view, in shares of the
        latter's square. The first is what enlarging without learning gives.
        """
        seen = project(self._seen(jitter(image, view.jitter)), view.projection)
        errors = {}
        for level, map in enumerate(maps):
            moved = self._moved(project(map, view.projection), image, view.jitter)
            off = F.adaptive_avg_pool2d(moved, (seen.shape[-2], seen.shape[-1])) - seen
            share = off.square().sum((1, 2, 3)) / seen.square().sum((1, 2, 3))
            errors[f"error_{2**level}x"] = share.mean()
        return errors

    def _moved(self, map: Tensor, image: Tensor, view: Jitter) -> Tensor:
        """A level's map in pixels, and of them the view."""
        return jitter(F.interpolate(map, image.shape[-2:], mode="bilinear"), view)

    @torch.no_grad()
    def _seen(self, image: Tensor) -> Tensor:
        map: Tensor = self.encoder(image)
        return map


def _devices(image: Tensor) -> list[torch.device]:
    return [image.device] if image.is_cuda else []
