"""Window attention: what its switches mean, and the fast path equal to what is written."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import roi_align

from stepwell.flops.outlines import outlines
from stepwell.fuse import window_matrices
from stepwell.fuse.upsample import Correction, Level
from stepwell.fuse.windows import BINS, PAPER_BINS, WindowAttention, WindowConfig, nearest_bins
from stepwell.ops.choose import prefer

GRID, SIZE, DIM, OUT_DIM = (3, 4), (5, 4), 6, 16


def build(levels=(0, 1, 2), dims=None, dtype=torch.float64, **settings):
    """Every parameter is noise, so that none is without influence."""
    torch.manual_seed(0)
    settings = {"grid": GRID, "num_heads": 2} | settings
    dims = dims or [DIM + i for i in range(len(levels))]
    module = WindowAttention(dims, OUT_DIM, WindowConfig(**settings), levels=levels)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    return module.to(dtype).eval()


def build_correction(dim, dropout=0.0):
    torch.manual_seed(1)
    correction = Correction(dim, dropout).double()
    nn.init.normal_(correction.linear.weight, std=3)
    return correction


def draw_maps(module, views=2, size=SIZE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    dims = [p.in_features if isinstance(p, nn.Linear) else OUT_DIM for p in module.projections]
    return [
        torch.randn(views, dim, size[0] << level, size[1] << level, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for dim, level in zip(dims, module.levels, strict=True)
    ]


def run(module, maps, path="auto", correction=None):
    corrections = [None] * (len(maps) - 1) + [correction]
    with prefer(path):
        return module([[Level(*level) for level in zip(maps, corrections, strict=True)]])


SWITCHES = {
    "as released": {},
    "one set": {"query_sets": 1},
    "two sets": {"query_sets": 2},
    "the paper's bins": {"bins": "paper"},
    "fixed bins": {"bins": (3, 3)},
    "a pyramid of bins": {"bins": (2, 3), "pyramid": True},
    "level codes behind": {"level_code": "behind"},
    "no level codes": {"level_code": "none"},
    "window codes": {"window_code": True},
    "window codes in a pyramid": {"window_code": True, "pyramid": True},
    "no biases": {"bias": False},
    "no projections": {"bias": False, "dims": [OUT_DIM] * 3},
    "the finest alone": {"levels": (2,)},
    "the coarsest alone": {"levels": (0,)},
    "two levels": {"levels": (0, 2)},
    "four levels": {"levels": (0, 1, 2, 3)},
    "windows of less than a cell": {"grid": (12, 9)},
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", SWITCHES)
def test_fast_and_reference_are_equal_and_so_are_all_gradients(name, corrected):
    module = build(**SWITCHES[name])
    maps = draw_maps(module)
    correction = build_correction(maps[-1].shape[1]) if corrected else None
    leaves = [*maps, *module.parameters(), *(correction.parameters() if correction else ())]
    outputs = [run(module, maps, path, correction) for path in ("reference", "fast")]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-10)
    grad = torch.randn_like(outputs[0])
    reference, fast = (torch.autograd.grad(out, leaves, grad) for out in outputs)
    for a, b in zip(fast, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        kept = [run(module, maps, "fast", correction) for _ in range(2)]
    torch.testing.assert_close(kept[0], outputs[0].detach(), rtol=0, atol=1e-10)
    assert torch.equal(kept[0], kept[1])


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_one_level_and_one_set_are_torchvision_and_torchs_multihead_attention(path):
    module = build(levels=(0,), query_sets=1, level_code="none", grid=(2, 2))
    (x,) = maps = draw_maps(module, size=(6, 6))
    cells = module.norm(module.projections[0](x.movedim(1, -1))).movedim(-1, 1)
    place = module.position.t().unflatten(1, (2, 2))[None]
    place = F.interpolate(place, (6, 6), mode="bicubic", align_corners=False)
    boxes = torch.tensor([[3.0 * j, 3.0 * i, 3.0 * j + 3, 3.0 * i + 3] for i in range(2) for j in range(2)])
    key, value = (
        roi_align(y, [boxes.double()] * 2, (3, 3), aligned=False).flatten(2).transpose(1, 2)
        for y in (cells + place, cells)
    )
    attention = nn.MultiheadAttention(OUT_DIM, 2, batch_first=True, dtype=torch.float64)
    attention.in_proj_weight, attention.in_proj_bias = module.qkv.weight, module.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = module.mix.weight, module.mix.bias
    query = (module.query_norm(module.queries[0]) + module.position).repeat(2, 1)[:, None]
    read = attention(query, key, value, need_weights=False)[0].unflatten(0, (2, 4)).squeeze(2)
    wanted = F.linear(module.out_norm(read), module.out.weight)
    torch.testing.assert_close(run(module, maps, path), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"query_sets": 1}, {"query_sets": 2}),
        ({"bins": "code"}, {"bins": "paper"}),
        ({"bins": (2, 3)}, {"bins": (3, 2)}),
        ({"pyramid": False}, {"pyramid": True}),
        ({"level_code": "before"}, {"level_code": "none"}),
        ({"window_code": False}, {"window_code": True}),
    ],
)
def test_every_switch_is_heard(a, b):
    """The view is one where the paper's bins are others than the code's."""
    size = (6, 8)
    assert nearest_bins(size) != nearest_bins(size, PAPER_BINS)
    outputs = []
    for settings in (a, b):
        torch.manual_seed(0)
        module = build(**settings)
        if settings.get("query_sets", 4) == 4:
            module.load_state_dict({**module.state_dict(), **_common(build())}, strict=False)
        outputs.append(run(module, draw_maps(module, size=size)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def _common(module):
    """Parameters that every setting has, so that two modules differ by their setting alone."""
    return {name: x for name, x in module.state_dict().items() if not name.startswith("level_codes")}


def test_level_codes_before_and_behind_differ_only_beyond_the_map():
    """A pooled constant is the constant, where all of a window lies on the map."""
    before, behind = (build(level_code=place, grid=(12, 9)) for place in ("before", "behind"))
    behind.load_state_dict(before.state_dict())
    for size, alike in (((24, 18), True), ((5, 4), False)):
        a, b = (run(module, draw_maps(before, views=1, size=size), "fast") for module in (before, behind))
        assert torch.allclose(a, b, rtol=0, atol=1e-9) == alike


def test_bins_are_those_whose_aspect_is_nearest():
    assert nearest_bins((24, 24)) == (3, 3)
    assert nearest_bins((14, 41)) == (2, 4)
    assert nearest_bins((24, 32)) == (3, 4)
    assert nearest_bins((24, 32), PAPER_BINS) == (2, 3)  # 1.33 is nearer to 1.5 than to 1
    assert set(PAPER_BINS) < set(BINS)
    module = build(bins=(2, 3), pyramid=True)
    assert [module.bins((9, 9), level) for level in range(3)] == [(2, 3), (4, 6), (8, 12)]
    assert build(pyramid=True).bins((24, 24), 1) == (6, 6)


@pytest.mark.parametrize("path", ["reference", "fast"])
@pytest.mark.parametrize("grad", [False, True])
def test_views_do_not_mix(path, grad):
    """All at once, one by one, and in batches of a generator."""
    module = build()
    maps = draw_maps(module, views=5)
    with torch.set_grad_enabled(grad), prefer(path):
        whole = module([[Level(x) for x in maps]])
        batches = module([Level(x[part]) for x in maps] for part in (slice(0, 2), slice(2, 5)))
        single = module([[Level(x[3:4]) for x in maps]])
    torch.testing.assert_close(batches, whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(single, whole[3:4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("most", [1, 2**10])
@pytest.mark.parametrize("grad", [False, True])
def test_some_windows_at_a_time_are_all(most, grad, monkeypatch):
    module = build()
    maps = draw_maps(module)
    wanted = run(module, maps, "reference")
    monkeypatch.setattr(window_matrices, "MOST", most)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(run(module, maps, "fast"), wanted, rtol=0, atol=1e-10)


def test_a_part_has_as_many_windows_whatever_the_number_of_views(monkeypatch):
    """They share the queries, in the width of a cell, which are the larger half of the work."""
    module, counts = build(), []
    read = window_matrices.one_query_fast
    monkeypatch.setattr(window_matrices, "MOST", 2**8)
    monkeypatch.setattr(window_matrices, "one_query_fast", lambda *a: counts.append(len(a[0])) or read(*a))
    with torch.no_grad():
        for views in (1, 4):
            run(module, draw_maps(module, views=views), "fast")
    assert len(counts) > 2
    assert counts[: len(counts) // 2] == counts[len(counts) // 2 :]


def test_parts_are_computed_again_in_the_backward_pass(monkeypatch):
    """What lies between is larger than all that a step keeps."""
    module, counts = build(), []
    read = window_matrices.one_query_fast
    monkeypatch.setattr(window_matrices, "MOST", 1)
    monkeypatch.setattr(window_matrices, "one_query_fast", lambda *a: counts.append(len(a[0])) or read(*a))
    out = run(module, draw_maps(module), "fast")
    forward = len(counts)
    assert forward > 1
    out.sum().backward()
    assert len(counts) == 2 * forward


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_gradients_are_those_of_differences(path):
    module = build(levels=(0, 1), query_sets=1, grid=(2, 2))
    maps = draw_maps(module, views=1, size=(3, 2))
    correction = build_correction(maps[-1].shape[1])
    assert torch.autograd.gradcheck(lambda *maps: run(module, maps, path, correction), maps)


def test_second_derivatives_are_the_references():
    module = build(levels=(0,), query_sets=1, grid=(2, 2))
    maps = draw_maps(module, views=1, size=(3, 2))
    seconds = []
    for path in ("reference", "fast"):
        out = run(module, maps, path).square().sum()
        (first,) = torch.autograd.grad(out, maps, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [*maps, module.qkv.weight]))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


# ---- what is kept ---------------------------------------------------------------------------------------


def _by_an_optimiser(module, correction):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), lr=0.1).step()


def _by_a_state_dict(module, correction):
    module.load_state_dict({name: x + 0.5 * torch.randn_like(x) for name, x in module.state_dict().items()})


CHANGES = {
    "optimiser": _by_an_optimiser,
    "state dict": _by_a_state_dict,
    "position": lambda module, _: module.position.mul_(2),
    "a query": lambda module, _: module.queries.mul_(2),
    "a level code": lambda module, _: module.level_codes.mul_(2),
    "a projection's bias": lambda module, _: module.projections[1].bias.mul_(2),
    "gain": lambda module, _: module.norm.weight.mul_(2),
    "query norm": lambda module, _: module.query_norm.bias.add_(1),
    "keys": lambda module, _: module.qkv.weight.data[OUT_DIM].add_(1),
    "correction": lambda _, correction: correction.linear.weight.mul_(2),
    "correction, through .data": lambda _, correction: correction.linear.bias.data.add_(1),
    "another dtype": lambda module, correction: (module.float().double(), correction.float().double()),
    "behind what is kept": lambda module, _: module.join.weight.mul_(2),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_dies_with_its_parameters(name, mode):
    module = build()
    maps = [x.detach() for x in draw_maps(module)]
    correction = build_correction(maps[-1].shape[1])
    with mode():
        before = run(module, maps, "fast", correction)
    with torch.no_grad():
        CHANGES[name](module, correction)
    with mode():
        after = run(module, maps, "fast", correction)
        torch.testing.assert_close(after, run(module, maps, "reference", correction), rtol=0, atol=1e-9)
    if name != "another dtype":
        assert (after - before).abs().max() > 1e-6


def test_a_level_with_and_one_without_a_correction_are_two_things():
    module = build(levels=(0, 1), dims=[DIM, DIM])
    correction = build_correction(DIM)
    maps = [x.detach() for x in draw_maps(module)]
    with torch.no_grad():
        for levels in (
            [Level(maps[0], correction), Level(maps[1])],
            [Level(maps[0]), Level(maps[1], correction)],
        ):
            fast = module([levels])
            with prefer("reference"):
                torch.testing.assert_close(fast, module([levels]), rtol=0, atol=1e-10)


def test_training_keeps_nothing_and_neither_do_files_and_copies():
    module = build()
    maps = draw_maps(module)
    names = set(module.state_dict())
    with torch.no_grad():
        wanted = run(module, maps)
    assert module._kept._kept is not None
    assert set(module.state_dict()) == names
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin._kept._kept is None
        with torch.no_grad():
            assert torch.equal(run(twin, maps), wanted)
    run(module, maps)
    assert module._kept._kept is None


def test_what_is_kept_has_the_bytes_that_are_stated():
    module = build(dtype=torch.float32)
    with torch.no_grad():
        run(module, draw_maps(module, dtype=torch.float32))
    _, _, kept = module._kept._kept
    tensors = [kept.queries, kept.codes, *kept.keys, kept.value, *kept.projections]
    tensors += [tensor for deviation in kept.deviations for tensor in deviation[:3]]
    n, s, h, D, widths = 12, 4, 2, OUT_DIM, (6, 7, 8)
    stated = 2 * D * sum(C + 2 for C in widths) + n * s * D
    stated += sum(C**2 + C + 1 for C in widths) + n * s * h * (n + len(widths))
    assert sum(tensor.nbytes for tensor in tensors) == 4 * stated
    assert all(tensor.untyped_storage().nbytes() <= 4 * stated for tensor in tensors)


# ---- precision, other devices, other layers -------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_half_precision_is_as_near_as_the_direct_form_on_ordinary_weights(how, grad):
    torch.manual_seed(0)
    module = WindowAttention([32] * 3, 64, WindowConfig(grid=GRID, num_heads=4), levels=(0, 1, 2)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    module = module.bfloat16()
    maps = [x.detach() for x in draw_maps(module, views=8, size=(24, 24), dtype=torch.bfloat16)]
    exact = run(copy.deepcopy(module).double(), [x.double() for x in maps], "reference").detach()
    if how == "autocast":
        module, maps = module.float(), [x.float() for x in maps]
    errors = {}
    for path in ("reference", "fast"):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            out = run(module, maps, path)
        assert out.dtype == torch.bfloat16
        errors[path] = float((out.detach().double() - exact).square().mean().sqrt())
    assert errors["fast"] <= errors["reference"]
    assert errors["fast"] < 0.05 * float(exact.square().mean().sqrt())


def test_what_is_kept_for_one_precision_does_not_serve_another():
    module = build(dtype=torch.float32)
    maps = [x.detach() for x in draw_maps(module, dtype=torch.float32)]
    with torch.no_grad():
        plain = run(module, maps, "fast")
        with torch.autocast("cpu", torch.bfloat16):
            assert run(module, maps, "fast").dtype == torch.bfloat16
            assert module._kept._kept[2].queries.dtype == torch.bfloat16
        assert torch.equal(run(module, maps, "fast"), plain)


def test_autocast_rounds_nothing_before_the_products():
    """Pooled cells and what divides them are the same under it."""
    module = build(dtype=torch.float32)
    levels = [Level(x.detach()) for x in draw_maps(module, dtype=torch.float32)]
    with torch.no_grad():
        matrices = module._matrices(levels)
        plain = module._pool(levels, matrices)
        with torch.autocast("cpu", torch.bfloat16):
            inside = module._pool(levels, matrices)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))


def test_views_are_made_under_the_callers_autocast():
    """A generator runs while the module does; what that does in fp32 must not reach it."""
    module = build(dtype=torch.float32)
    maps = draw_maps(module, dtype=torch.float32)
    enabled = []

    def views():
        for i in range(2):
            enabled.append(torch.is_autocast_enabled("cpu"))
            yield [Level(x[i : i + 1]) for x in maps]

    with torch.autocast("cpu", torch.bfloat16), prefer("fast"):
        module(views())
    assert enabled == [True, True]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("path", ["reference", "fast"])
def test_shapes_alone_are_enough(path, grad):
    with outlines():
        module = WindowAttention([8] * 2, 16, WindowConfig(num_heads=2, window_code=True), levels=(0, 1))
        maps = [torch.empty(2, 8, 7 << i, 9 << i) for i in range(2)]
        with torch.set_grad_enabled(grad):
            assert run(module, maps, path).shape == (2, 144, 16)


def test_the_fast_path_has_the_smaller_count():
    """At the released size, which the meta device counts in no time; what depends on no image included."""
    counts = {}
    with torch.device("meta"):
        module = WindowAttention([1024] * 3, 4096, WindowConfig(), levels=(0, 1, 2))
        maps = [torch.empty(7, 1024, 24 << i, 24 << i) for i in range(3)]
    for path in ("reference", "fast"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(module, maps, path)
        counts[path] = counter.get_total_flops() / 2e9
    assert 3 * counts["fast"] < counts["reference"]


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_it_compiles_without_a_break(grad):
    module = build(dtype=torch.float32, window_code=True)
    maps = draw_maps(module, dtype=torch.float32)
    compiled = torch.compile(
        lambda *maps: module([[Level(x) for x in maps]]), fullgraph=True, backend="aot_eager"
    )
    with torch.set_grad_enabled(grad):
        got, wanted = compiled(*maps), run(module, maps, "reference")
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    if grad:
        grads = [
            torch.autograd.grad(out.square().sum(), [*maps, *module.parameters()]) for out in (got, wanted)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_an_adapted_projection_is_heard():
    """Another layer in place of a linear one has more than a weight and a bias: it is called."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x) + 1

    module = build(levels=(0,))
    adapted = Doubled(DIM, OUT_DIM).double()
    adapted.load_state_dict(module.projections[0].state_dict())
    module.projections[0] = adapted
    maps = draw_maps(module)
    torch.testing.assert_close(run(module, maps), run(module, maps, "reference"), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="a layer is adapted, heard, quantised or elsewhere"):
        run(module, maps, "fast")


def test_adapted_queries_keys_and_values_are_heard():
    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + x.mean()

    module = build(levels=(0,))
    maps, before = draw_maps(module), module.qkv
    plain = run(module, maps)
    module.qkv = Adapted(OUT_DIM, 3 * OUT_DIM).double()
    module.qkv.load_state_dict(before.state_dict())
    adapted = run(module, maps)
    torch.testing.assert_close(adapted, run(module, maps, "reference"), rtol=0, atol=1e-12)
    assert (adapted - plain).abs().max() > 1e-6


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"width 16 is not a multiple of 3 heads; change windows\.num_heads"):
        WindowAttention([4], 16, WindowConfig(num_heads=3), levels=[0])
    with pytest.raises(ValueError, match="a multiple of 4, got 30"):
        WindowAttention([4], 30, WindowConfig(), levels=[0])


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (512, 4), (3584, 28), (960, 6), (1028, 4), (896, 7)])
def test_heads_are_128_wide_or_the_next_wider_that_divide_the_width(width, heads):
    assert WindowAttention([4], width, WindowConfig(grid=(1, 1)), levels=[0]).num_heads == heads


@pytest.mark.parametrize("name", ["qkv", "projections.0", "norm", "query_norm"])
def test_whoever_hears_a_layer_hears_it_and_may_change_what_comes_out(name):
    module = build(levels=(0, 1))
    maps, plain = draw_maps(module), run(module, draw_maps(module))
    module.get_submodule(name).register_forward_hook(lambda layer, inputs, output: output * 0.5)
    changed = run(module, maps)
    torch.testing.assert_close(changed, run(module, maps, "reference"), rtol=0, atol=1e-12)
    assert (changed - plain).abs().max() > 1e-6
    with pytest.raises(RuntimeError, match="a layer is adapted, heard, quantised or elsewhere"):
        run(module, maps, "fast")


def test_another_eps_of_a_norm_is_another_value():
    module = build(levels=(0,))
    maps = [x.detach() for x in draw_maps(module)]
    with torch.no_grad():
        for norm in (module.norm, module.query_norm):
            run(module, maps, "fast")
            norm.eps = 0.5
            torch.testing.assert_close(
                run(module, maps, "fast"), run(module, maps, "reference"), rtol=0, atol=1e-9
            )


@pytest.mark.parametrize(
    "settings", [{"grid": (0, 3)}, {"grid": (3, -1)}, {"bins": (0, 3)}, {"bins": (3, -2)}]
)
def test_windows_without_a_row_or_a_column_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValidationError, match=f"{name} has a row and a column at least"):
        WindowConfig(**settings)


class _SingleOnDevice(TorchDispatchMode):
    """Refuses fp64 anywhere but on the CPU: Apple's GPUs have none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype != torch.float64 or tensor.device.type == "cpu", func
        return out


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_devices_without_fp64_do(path):
    with torch.device("meta"), _SingleOnDevice():
        module = WindowAttention([8] * 2, 16, WindowConfig(num_heads=2, window_code=True), levels=(0, 1))
        run(module, [torch.empty(2, 8, 7 << i, 9 << i) for i in range(2)], path)
