"""Dual enhancement: what the paper's equations say, what its switches mean, and that less work is enough."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from stepwell.fuse.dual import MOST_WINDOWS, PAPER_ENHANCEMENT, DualEnhancement, EnhancementConfig
from stepwell.ops.choose import prefer
from stepwell.ops.crops import merge_blocks, merge_strides, middle

CODE = EnhancementConfig(num_heads=2)
DIM = 16
GRIDS = [((3, 3), (6, 6)), ((2, 2), (4, 4)), ((4, 2), (4, 4)), ((1, 3), (3, 3)), ((3, 2), (4, 5))]
"""(grid of crops, cells of a crop); the last leaves phases unequal in blocks."""


def build(config, seed=0):
    """Every parameter is noise, so that none is without influence."""
    torch.manual_seed(seed)
    module = DualEnhancement(DIM, config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return module


def draw(grid, crop, batch=2):
    generator = torch.Generator().manual_seed(1)
    shape = (batch, grid[0] * grid[1], *crop, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def few(strided, grid):
    """The global crops in the middle."""
    rows, cols = map(list, map(middle, grid))
    return strided.unflatten(1, grid)[:, rows][:, :, cols].flatten(1, 2)


def plainly(module, local, strided, grid):
    """The equations window by window on the whole fine grid: (map of global queries, map of local ones)."""
    config, (rows, cols), (height, width) = module.config, grid, local.shape[2:4]
    whole = {"local": merge_blocks(local, grid), "global": merge_strides(strided, grid)}
    maps = []
    for name, attend in zip(("global", "local"), (module.attentions[0], module.attentions[-1]), strict=True):
        other = "local" if name == "global" else "global"
        in_strides = (name == "global") == (config.windows == "own")
        out = torch.empty_like(whole[name])
        for i in range(rows):
            for j in range(cols):
                place = (slice(None), slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                if in_strides:
                    place = (slice(None), slice(i, None, rows), slice(j, None, cols))
                asking, cells = whole[name][place], whole[other][place]
                out[place] = one_window(attend, asking.flatten(1, 2), cells.flatten(1, 2)).view_as(asking)
        maps.append(out)
    return maps


def one_window(attend, asking, cells):
    heads = []
    q, k, v = attend.query(asking), attend.key(cells), attend.value(cells)
    for part in range(attend.num_heads):
        d = DIM // attend.num_heads
        of_head = slice(part * d, (part + 1) * d)
        scores = torch.einsum("bnd,bmd->bnm", q[..., of_head], k[..., of_head]) / d**0.5
        heads.append(torch.einsum("bnm,bmd->bnd", scores.softmax(-1), v[..., of_head]))
    out = attend.out(torch.cat(heads, -1))
    return attend.norm(out + asking) if attend.residual else attend.norm(out)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize(("grid", "crop"), GRIDS)
def test_the_codes_form_is_fusion_and_a_bilinear_resize_of_two_passes(grid, crop, path):
    module = build(CODE)
    local, strided = draw(grid, crop)
    of_global, of_local = plainly(module, local, strided, grid)
    halves = [module.fusion.of_local(of_local), module.fusion.of_global(of_global)]
    fused = module.fusion.norm(torch.cat(halves, -1) + of_global + of_local).movedim(-1, 1)
    expected = F.interpolate(fused, crop, mode="bilinear", align_corners=False).movedim(1, -1)
    with prefer(path):
        assert torch.allclose(module(local, strided, grid), expected, atol=1e-9)
        assert torch.allclose(module(local, few(strided, grid), grid), expected, atol=1e-9)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize(("grid", "crop"), GRIDS)
def test_the_papers_form_is_linear_concatenation_and_average_pooling(grid, crop, path):
    module = build(PAPER_ENHANCEMENT)
    local, strided = draw(grid, crop)
    of_global, of_local = plainly(module, local, strided, grid)
    halves = [of_global @ module.fusion.of_global.weight.T, of_local @ module.fusion.of_local.weight.T]
    fused = torch.cat(halves, -1).movedim(-1, 1)
    expected = F.avg_pool2d(fused, grid).movedim(1, -1)
    with prefer(path):
        assert torch.allclose(module(local, strided, grid), expected, atol=1e-9)
    names = {name for name, _ in module.named_parameters()}
    assert not any("bias" in name or "norm" in name or ".out." in name for name in names)
    assert {name.split(".")[1] for name in names if name.startswith("attentions")} == {"0", "1"}


def test_the_papers_windows_are_not_the_codes():
    grid, crop = (2, 2), (4, 4)
    local, strided = draw(grid, crop)
    code, paper = build(CODE), build(replace(CODE, windows="own"))
    assert not torch.allclose(code(local, strided, grid), paper(local, strided, grid), atol=1e-3)


@pytest.mark.parametrize("config", [CODE, PAPER_ENHANCEMENT, replace(CODE, windows="own")])
def test_both_paths_have_the_same_gradients(config):
    grid, crop = (3, 3), (3, 3)
    gradients = []
    for path in ("reference", "fast"):
        module = build(config)
        inputs = draw(grid, crop)
        with prefer(path):
            module(*inputs, grid).pow(2).sum().backward()
        parameters = [p.grad for p in module.parameters()]
        assert all(grad is not None and grad.abs().max() > 0 for grad in parameters)
        gradients.append([x.grad for x in inputs] + parameters)
    assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(*gradients, strict=True))


def test_gradients_of_global_crops_outside_the_middle_are_exactly_zero():
    module, grid = build(CODE), (3, 3)
    local, strided = draw(grid, (3, 3))
    with prefer("reference"):
        module(local, strided, grid).pow(2).sum().backward()
    touched = strided.grad.abs().amax((0, 2, 3, 4)) > 0
    assert touched.nonzero().flatten().tolist() == [4]
    assert (local.grad.abs().amax((0, 2, 3, 4)) > 0).all()


NEEDED = {
    "the code": (CODE, "middle"),
    "the paper": (PAPER_ENHANCEMENT, "all"),
    "the paper's windows": (replace(CODE, windows="own"), "all"),
    "global queries in strides": (replace(CODE, windows="own", enhance="global"), "middle"),
    "a convolution": (replace(CODE, fusion="conv3x3"), "all"),
    "local crops": (EnhancementConfig(perspectives="local", enhance="none"), "none"),
    "global crops": (EnhancementConfig(perspectives="global", enhance="none"), "middle"),
    "global crops, averaged": (
        EnhancementConfig(perspectives="global", enhance="none", reduce="average"),
        "all",
    ),
}


@pytest.mark.parametrize("grid", [(3, 3), (4, 2)])
@pytest.mark.parametrize("name", NEEDED)
def test_the_crops_that_are_said_to_be_needed_are_those_with_an_influence(name, grid):
    config, expected = NEEDED[name]
    assert config.global_crops == expected
    module = build(config)
    local, strided = draw(grid, (4, 4))
    with prefer("reference"):
        module(local, strided, grid).pow(2).sum().backward()
    touched = [] if strided.grad is None else (strided.grad.abs().amax((0, 2, 3, 4)) > 0).nonzero().flatten()
    rows, cols = map(middle, grid)
    needed = {
        "all": list(range(grid[0] * grid[1])),
        "middle": [row * grid[1] + col for row in rows for col in cols],
        "none": [],
    }
    assert list(map(int, touched)) == needed[expected]


def test_one_perspective_is_put_together_and_reduced_without_attention():
    grid = (3, 3)
    local, strided = draw(grid, (3, 3))
    for name, whole in (("local", merge_blocks(local, grid)), ("global", merge_strides(strided, grid))):
        config = EnhancementConfig(perspectives=name, enhance="none", reduce="average")
        module = build(config)
        assert not list(module.parameters())
        given = (local, None) if name == "local" else (None, strided)
        expected = F.avg_pool2d(whole.movedim(-1, 1), 3).movedim(1, -1)
        assert torch.allclose(module(*given, grid), expected)


def test_without_enhancement_the_maps_are_fused_as_they_are():
    grid = (2, 2)
    local, strided = draw(grid, (4, 4))
    module = build(EnhancementConfig(enhance="none", fusion="addition", reduce="none"))
    expected = merge_blocks(local, grid) + merge_strides(strided, grid)
    assert torch.allclose(module(local, strided, grid), expected)


@pytest.mark.parametrize("enhance", ["global", "local"])
def test_one_enhancement_alone_is_its_map(enhance):
    grid = (2, 2)
    local, strided = draw(grid, (4, 4))
    module = build(replace(CODE, enhance=enhance, reduce="none"))
    of_global, of_local = plainly(module, local, strided, grid)
    expected = of_global if enhance == "global" else of_local
    assert module.fusion is None
    assert torch.allclose(module(local, strided, grid), expected, atol=1e-9)


def test_every_fusion_is_what_its_name_says():
    grid = (2, 2)
    local, strided = draw(grid, (4, 4))
    whole = {}
    for fusion in ("multiplication", "weighted_addition", "max", "addition", "conv3x3", "linear_concat"):
        module = build(replace(CODE, enhance="none", fusion=fusion, reduce="none"))
        whole[fusion] = (module, module(local, strided, grid))
    of_local, of_global = merge_blocks(local, grid), merge_strides(strided, grid)
    share = whole["weighted_addition"][0].fusion.share
    conv, linear = (whole[name][0].fusion for name in ("conv3x3", "linear_concat"))
    both = torch.cat([of_global, of_local], -1).movedim(-1, 1)
    expected = {
        "multiplication": of_global * of_local,
        "weighted_addition": share * of_global + (1 - share) * of_local,
        "max": torch.where(of_global > of_local, of_global, of_local),
        "addition": of_global + of_local,
        "conv3x3": F.conv2d(both, conv.conv.weight, conv.conv.bias, padding=1).movedim(1, -1),
        "linear_concat": torch.cat(
            [of_global @ linear.of_global.weight.T, of_local @ linear.of_local.weight.T], -1
        ),
    }
    for fusion, (_, out) in whole.items():
        assert torch.allclose(out, expected[fusion]), fusion
    fresh = DualEnhancement(DIM, replace(CODE, fusion="weighted_addition")).fusion
    assert fresh.share.item() == 0.5


@pytest.mark.parametrize(("reduce", "pool"), [("average", F.avg_pool2d), ("max", F.max_pool2d)])
def test_pooling_takes_the_cells_of_a_place(reduce, pool):
    grid = (3, 2)
    local, strided = draw(grid, (4, 4))
    config = EnhancementConfig(enhance="none", fusion="addition", reduce=reduce)
    whole = (merge_blocks(local, grid) + merge_strides(strided, grid)).movedim(-1, 1)
    expected = pool(whole, grid).movedim(1, -1)
    assert torch.allclose(build(config)(local, strided, grid), expected)


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_a_convolution_in_front_of_a_bilinear_resize_sees_all_phases(path):
    grid, crop = (3, 3), (3, 3)
    local, strided = draw(grid, crop)
    module = build(replace(CODE, enhance="none", fusion="conv3x3"))
    both = torch.cat([merge_strides(strided, grid), merge_blocks(local, grid)], -1).movedim(-1, 1)
    fused = module.fusion.conv(both)
    expected = F.interpolate(fused, crop, mode="bilinear", align_corners=False).movedim(1, -1)
    with prefer(path):
        assert torch.allclose(module(local, strided, grid), expected)


def test_the_fast_path_asks_no_cell_that_is_not_read():
    grid, crop = (3, 3), (6, 6)
    flops = {}
    for path in ("reference", "fast"):
        module = build(CODE).float()
        local, strided = (x.detach().float() for x in draw(grid, crop))
        with prefer(path), FlopCounterMode(display=False) as counter:
            module(local, strided, grid)
        flops[path] = counter.get_total_flops()
    assert flops["fast"] < flops["reference"] / 2.5


def test_without_a_gradient_few_windows_are_asked_at_once(monkeypatch):
    """Else keys and values of all crops would be held together."""
    module, grid = build(CODE), (3, 3)
    inputs = [x.detach() for x in draw(grid, (3, 3))]
    asked = []
    attend = module.attentions[0].forward
    monkeypatch.setattr(module.attentions[0], "forward", lambda *x: asked.append(len(x[0])) or attend(*x))
    whole = module(*inputs, grid)
    assert max(asked) == 2 * 9
    asked.clear()
    with torch.no_grad():
        assert torch.allclose(module(*inputs, grid), whole)
    assert max(asked) == MOST_WINDOWS
    assert sum(asked) == 2 * (9 + 1)


def test_half_precision_reduces_in_single():
    grid, crop = (2, 2), (4, 4)
    module = build(replace(CODE, enhance="none", fusion="addition", reduce="average")).bfloat16()
    local, strided = (x.detach().bfloat16() for x in draw(grid, crop))
    whole = (merge_blocks(local, grid) + merge_strides(strided, grid)).float()
    expected = F.avg_pool2d(whole.movedim(-1, 1), 2).movedim(1, -1).bfloat16()
    assert torch.equal(module(local, strided, grid), expected)


def test_what_cannot_be_is_refused():
    grid = (3, 3)
    local, strided = draw(grid, (3, 3))
    with pytest.raises(ValueError, match="4 global crops are not those of a grid of 3x3"):
        build(CODE)(local, strided[:, :4], grid)
    with pytest.raises(ValueError, match="1 global crops are not those"):
        build(PAPER_ENHANCEMENT)(local, few(strided, grid), grid)
    with pytest.raises(ValueError, match="set enhance 'none'"):
        EnhancementConfig(perspectives="local")
    with pytest.raises(ValueError, match="width 16 is not a multiple of 3 heads"):
        build(replace(CODE, num_heads=3))
