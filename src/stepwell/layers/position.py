"""Position embeddings and position biases, and what happens to them on another grid.

PIIP, arXiv 2501.07783, resizes everything bicubically without antialiasing and without rescaling magnitudes,
also patch kernels; antialiasing is for families that were trained with it. Letters: C width, (H, W) a grid in
cells, h heads.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepwell.ops.precision import at_least_single
from stepwell.ops.resize import cell_centres
from stepwell.structures import Size

__all__ = [
    "SHORTEST",
    "RelativeBias",
    "antialiased_weights",
    "cubic_spline_weights",
    "fraction_embedding",
    "fraction_position_embedding",
    "index_position_embedding",
    "relative_position_bias",
    "resize_patch_kernel",
    "resize_position_embedding",
    "resize_relative_table",
    "resize_weights",
    "sincos_position_embedding",
]

MOST_BYTES = (
    2**26
)  # of a bias that is kept: 16 heads in windows of 28; a global layer of 64x64 needs a gigabyte


def resize_position_embedding(
    table: Tensor, source: Size, target: Size, *, class_slot: bool = False, antialias: bool = False
) -> Tensor:
    """([1 +] h*w, C) on grid source = (h, w) -> ([1 +] H*W, C) on grid target = (H, W).

    Bicubic by target size, corners not aligned, in fp32 at least. A class slot in row 0 is left as it is.
    antialias: a smaller grid averages over the cells it covers (DINOv2 with registers).
    """
    num_rows = source[0] * source[1] + class_slot
    if table.shape[0] != num_rows:
        raise ValueError(
            f"a position embedding for grid {source} has {num_rows} rows, this one {table.shape[0]}"
        )
    if source == target:
        return table
    slot, cells = table[:class_slot], table[class_slot:]
    map = cells.unflatten(0, source).permute(2, 0, 1)[None]
    map = map.to(at_least_single(table.dtype))  # bicubic weights need fp32
    if antialias and torch.compiler.is_exporting():  # OpenVINO would resize with another filter
        down, across = (
            torch.tensor(antialiased_weights(*sides), dtype=map.dtype, device=map.device)
            for sides in zip(source, target, strict=True)
        )
        map = down @ map @ across.t()
    else:
        map = F.interpolate(map, target, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([slot, map[0].flatten(1).t().to(table.dtype)])


def resize_weights(source: int, target: int) -> Tensor:
    """(target, source) in fp64, on the CPU: times one axis of a table, what the above makes of it."""
    line = torch.eye(source, dtype=torch.float64, device="cpu")[None, :, :, None]
    resized = F.interpolate(line, (target, 1), mode="bicubic", align_corners=False)
    return resized[0, :, :, 0].t()


def antialiased_weights(source: int, target: int) -> list[list[float]]:
    """(target, source): times one axis, torch's antialiased bicubic resize, which is Pillow's: a cubic of
    a = -0.5, as wide as the cells that it averages. In numbers, as an export would put torch's own resize
    into its graph.
    """
    width = max(1.0, source / target)
    lines = []
    for cell in range(target):
        centre = (cell + 0.5) * source / target
        first, last = max(0, int(centre - 2 * width + 0.5)), min(source, int(centre + 2 * width + 0.5))
        line = [
            _cubic((place + 0.5 - centre) / width) if first <= place < last else 0.0
            for place in range(source)
        ]
        total = sum(line)
        lines.append([weight / total for weight in line])
    return lines


def _cubic(distance: float) -> float:
    x = abs(distance)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_patch_kernel(kernel: Tensor, patch: int) -> Tensor:
    """(C, 3, p, p) -> (C, 3, patch, patch), bicubic as above; the magnitude of the sum is not kept."""
    if kernel.shape[-2:] == (patch, patch):
        return kernel
    exact = kernel.to(at_least_single(kernel.dtype))
    resized = F.interpolate(exact, (patch, patch), mode="bicubic", align_corners=False)
    return resized.to(kernel.dtype)


def sincos_position_embedding(dim: int, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """Sines and cosines of cell centres, (H*W, dim) in fp32, size = (H, W).

    Coordinates are divided by the longer side, so that a point of the image has one embedding at any
    resolution. A quarter of the channels each for sin and cos of the row and of the column, at frequencies
    that grow geometrically from half a turn across the longer side to one turn in four cells of a 128-cell
    side.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sine-cosine embedding needs a width divisible by 4, got {dim}")
    frequencies = math.pi * torch.logspace(0, math.log10(64), dim // 4, device=device)
    rows, cols = (
        (torch.arange(side, device=device)[:, None] + 0.5) / max(size) * frequencies for side in size
    )
    rows, cols = (torch.cat([angles.sin(), angles.cos()], dim=1) for angles in (rows, cols))
    return torch.cat([rows[:, None].expand(*size, -1), cols.expand(*size, -1)], dim=2).flatten(0, 1)


SHORTEST = 0.07
"""The shortest wavelength of a fraction embedding, where none is told."""


def fraction_embedding(
    fractions: Tensor, dim: int, *, longest: float = 2.0, shortest: float = SHORTEST
) -> Tensor:
    """(N,) fractions of an image's side -> (N, dim): sines, then cosines, of dim // 2 wavelengths.

    As in "Attention is all you need" (arXiv 1706.03762, section 3.5), with wavelengths that fall
    geometrically from `longest` to `shortest`.
    """
    steps = torch.linspace(0, 1, dim // 2, device=fractions.device)
    angles = fractions[:, None] * (2 * math.pi / (longest * (shortest / longest) ** steps))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def fraction_position_embedding(
    dim: int,
    size: Size,
    boxes: Tensor | None = None,
    *,
    shortest: float = SHORTEST,
    device: torch.device | str | None = None,
) -> Tensor:
    """(H*W, dim) in fp32: fraction embeddings of a cell's column and of its row, half of the channels each,
    down to the wavelength `shortest`.

    Unlike `sincos_position_embedding` it divides each side by itself, as boxes written as fractions do.
    boxes (B, 4): the cells lie there in the image, in fractions of it; then (B, H*W, dim).
    """
    if dim % 4:
        raise ValueError(f"an embedding of columns and rows needs a width divisible by 4, got {dim}")
    code = partial(fraction_embedding, dim=dim // 2, shortest=shortest)
    if boxes is not None:
        left, top, right, bottom = boxes.float().unbind(1)
        cols, rows = cell_centres(size[1], left, right), cell_centres(size[0], top, bottom)
        cols, rows = (code(x.flatten()).unflatten(0, x.shape) for x in (cols, rows))
        shape = (-1, *size, -1)
        return torch.cat([cols[:, None].expand(shape), rows[:, :, None].expand(shape)], -1).flatten(1, 2)
    rows, cols = (code((torch.arange(n, device=device) + 0.5) / n) for n in size)
    return torch.cat([cols.expand(*size, -1), rows[:, None].expand(*size, -1)], dim=2).flatten(0, 1)


def index_position_embedding(dim: int, size: Size, *, device: torch.device | str | None = None) -> Tensor:
    """(H*W, dim) in fp32: a cell's column, counted from 0, in the first half of the channels, its row in the
    second; in each, sines and then cosines of dim // 4 wavelengths, from 2 pi to 10000 times that.

    As in MAE (arXiv 2111.06377), and LLaVA-UHD's queries (arXiv 2403.11703).
    """
    if dim % 4:
        raise ValueError(f"an embedding of columns and rows needs a width divisible by 4, got {dim}")
    # In fp64, which some devices do not have.
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    rows, cols = (torch.arange(n, dtype=torch.float64, device="cpu")[:, None] * frequencies for n in size)
    rows, cols = (torch.cat([angles.sin(), angles.cos()], dim=1).float() for angles in (rows, cols))
    table = torch.cat([cols.expand(*size, -1), rows[:, None].expand(*size, -1)], dim=2).flatten(0, 1)
    return table.to(device or torch.get_default_device())


def relative_position_bias(table: Tensor, grid: Size) -> Tensor:
    """((2H-1)*(2W-1), h) per offset -> (h, H*W, H*W) per query and key, grid = (H, W).

    Row (dr + H-1) * (2W-1) + (dc + W-1) is for a query dr rows below and dc columns right of its key (BEiT).
    """
    H, W = grid
    offsets = table.T.unflatten(1, (2 * H - 1, 2 * W - 1)).flip(1, 2)  # (h, H-1-dr, W-1-dc)
    lines = offsets.unfold(2, W, 1).flip(2)  # (h, H-1-dr, query's column, key's column)
    lines = lines.transpose(1, 2).flatten(2)  # (h, query's column, rows of keys one behind the other)
    rows = [lines[..., (H - 1 - r) * W :][..., : H * W] for r in range(H)]  # what a query in row r reads
    return torch.stack(rows, 1).flatten(1, 2)


class RelativeBias:
    """`relative_position_bias` of one layer's table, which between two trainings is always the same.

    Where no gradient is recorded, on a CPU, the last bias is kept beside a copy of its table and handed out
    again as long as the table holds the same numbers, whichever way they may be written. On other devices it
    is cheap to build and dear to ask. Copies and pickles of a network leave it behind.
    """

    def __init__(self, grid: Size) -> None:
        self.grid = grid
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, table: Tensor) -> Tensor:
        """((2H-1)*(2W-1), h) -> (h, H*W, H*W)."""
        size = table.shape[1] * math.prod(self.grid) ** 2 * table.element_size()
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or size > MOST_BYTES:
            self._kept = None
        elif type(table) is nn.Parameter and table.device.type == "cpu":  # and no stand-in without numbers
            kept = self._kept
            if kept is None or kept[0].dtype != table.dtype or not torch.equal(kept[0], table):
                kept = self._kept = (
                    table.detach().clone(),
                    relative_position_bias(table.detach(), self.grid),
                )
            return kept[1]
        return relative_position_bias(table, self.grid)

    def __reduce__(self) -> tuple[type[RelativeBias], tuple[Size]]:
        return RelativeBias, (self.grid,)


def resize_relative_table(table: Tensor, source: Size, target: Size) -> Tensor:
    """((2h-1)*(2w-1), heads) for windows of source = (h, w) -> ((2H-1)*(2W-1), heads) for target = (H, W).

    BEiT's way: known offsets are placed at 0, 1, 1 + q, 1 + q + q^2, ... with q such that the outermost falls
    on the target's, and a cubic spline surface through them is read at whole offsets: near offsets keep their
    values, far ones are stretched. A side that does not change is left as it is.
    """
    if source == target:
        return table
    rows, cols = (_offset_weights(a, b) for a, b in zip(source, target, strict=True))
    exact = (table if table.is_meta else table.cpu()).double()  # as the splines; some devices have no fp64
    offsets = exact.unflatten(0, (2 * source[0] - 1, 2 * source[1] - 1))
    resized = torch.einsum("ar,rch,bc->abh", rows.to(exact.device), offsets, cols.to(exact.device))
    return resized.flatten(0, 1).to(table.dtype).to(table.device)


def _offset_weights(source: int, target: int) -> Tensor:
    """(2 * target - 1, 2 * source - 1): offsets of the target window from those of the source window."""
    if source == target:
        return torch.eye(2 * source - 1, dtype=torch.float64)
    growth, low, high = 1.0, 1.01, 1.5
    while high - low > 1e-6:
        growth = (low + high) / 2
        outermost = (1 - growth ** (source - 1)) / (1 - growth)
        low, high = (low, growth) if outermost > target - 1 else (growth, high)
    distances = torch.cumsum(growth ** torch.arange(source - 1, dtype=torch.float64), 0)
    known = torch.cat([-distances.flip(0), distances.new_zeros(1), distances])
    return cubic_spline_weights(known, torch.arange(1 - target, target, dtype=torch.float64))


def cubic_spline_weights(x: Tensor, at: Tensor) -> Tensor:
    """x (n,) increasing, at (m,) -> (m, n): times values at x, it reads the not-a-knot cubic spline at `at`.

    Outside [x_0, x_n-1] the border value is taken. n is at least 4.
    """
    scale = x.abs().max()  # cubes of large numbers would cost precision

    def basis(t: Tensor) -> Tensor:
        """A cubic, and from every knot on another one; the outer two points at either end are no knots."""
        t = t[:, None] / scale
        return torch.cat([t ** torch.arange(4), (t - x[2:-2] / scale).clamp(min=0) ** 3], dim=1)

    weights: Tensor = torch.linalg.solve(basis(x), basis(at.clamp(x[0], x[-1])), left=False)
    return weights
