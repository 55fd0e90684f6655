"""Facts about ConvNeXt as a flat list of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.encoder import Encoder
from stepwell.structures import TokenMap


def convnext(**arguments: Any) -> ConvNeXt:
    torch.manual_seed(0)
    model = ConvNeXt(**{"dims": (8, 12, 16, 24), "depths": (2, 1, 3, 1), **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def test_downsampling_layers_are_entries_of_their_own() -> None:
    spec = convnext().spec
    assert spec.strides == (4, 4, 8, 8, 16, 16, 16, 16, 32, 32)
    assert spec.dims == (8, 8, 12, 12, 16, 16, 16, 16, 24, 24)


@pytest.mark.parametrize(("depths", "count"), [((3, 3, 9, 3), 21), ((3, 3, 27, 3), 39)])
def test_the_published_sizes_have_as_many_entries_as_piip_counts(depths: tuple[int, ...], count: int) -> None:
    with torch.device("meta"):
        assert ConvNeXt(depths=depths).spec.depth == count


def test_every_state_has_the_width_and_grid_that_the_spec_says() -> None:
    model, state = convnext(), None
    state = model.stem(torch.randn(2, 3, 99, 71))
    assert state.size == (24, 17)
    for i, (dim, stride) in enumerate(zip(model.spec.dims, model.spec.strides, strict=True)):
        state = model.run(state, i, i)
        assert state.size == (99 // stride, 71 // stride)
        assert state.tokens.shape == (2, state.size[0] * state.size[1], dim)
        assert model.to_map(state).is_contiguous(memory_format=torch.channels_last)


def test_layers_run_in_any_grouping_and_an_empty_range_is_nothing() -> None:
    model = convnext()
    state = model.stem(torch.randn(1, 3, 64, 96))
    assert model.run(state, 3, 2) is state
    split = model.run(model.run(model.run(state, 0, 3), 4, 4), 5, 9)
    torch.testing.assert_close(split.tokens, model.run(state, 0, 9).tokens)


def test_a_batch_equals_its_images_one_by_one() -> None:
    model, image = convnext(), torch.randn(3, 3, 64, 50)
    torch.testing.assert_close(model(image[1:2]).tokens[0], model(image).tokens[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", [32, 33, 34, 35])
def test_an_overlapping_stem_keeps_the_grid_of_its_stride(side: int) -> None:
    model = convnext(stem_kernel=7)
    assert model.stem(torch.randn(1, 3, side, 64)).size == (8, 16)


def test_a_stage_of_stride_one_keeps_the_grid() -> None:
    model = convnext(strides=(4, 2, 2, 1))
    assert model.spec.stride == 16
    assert model(torch.randn(1, 3, 64, 96)).size == (4, 6)


def test_drop_path_grows_linearly_over_the_residual_blocks() -> None:
    model = convnext(drop_path=0.6)
    rates = [layer.drop_path.rate for layer in model.layers if hasattr(layer, "drop_path")]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_checkpointing_changes_no_gradient() -> None:
    image, gradients = torch.randn(1, 3, 32, 64), []
    for checkpointing in (False, True):
        model = convnext(checkpointing=checkpointing).train()
        model(image).tokens.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_compiles_into_one_graph() -> None:
    model, image = convnext(dims=(8, 12), depths=(1, 1), strides=(4, 2)), torch.randn(1, 3, 33, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
        torch.testing.assert_close(compiled.tokens, model(image).tokens, atol=1e-5, rtol=1e-4)


def test_half_precision_and_autocast_stay_near_single() -> None:
    model, image = convnext(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image).tokens
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(image).tokens
        half = model.bfloat16()(image.bfloat16()).tokens
    assert half.dtype == torch.bfloat16
    for out in (cast, half):
        assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_is_an_encoder_without_a_class_token() -> None:
    model = convnext()
    assert isinstance(model, Encoder)
    with pytest.raises(AssertionError):
        model.run(TokenMap(torch.randn(1, 4, 8), (2, 2), torch.randn(1, 1, 8)), 0, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dims": (8, 12)}, r"width, depth and stride, got \[8, 12\]"),
        ({"stem_kernel": 3}, "kernel 3 and stride 4 would skip pixels"),
        ({"kernel_size": 6}, "must be odd, got 6"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        convnext(**arguments)


def test_an_image_too_small_for_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="1x6 is smaller than one cell of stride 2"):
        convnext()(torch.randn(1, 3, 31, 96))
    with pytest.raises(ValueError, match="3x40 is smaller than one cell of stride 4"):
        convnext()(torch.randn(1, 3, 3, 40))


def test_layers_that_do_not_exist_are_refused() -> None:
    model = convnext()
    with pytest.raises(ValueError, match=r"0\.\.10 asked of a network with layers 0\.\.9"):
        model.run(model.stem(torch.randn(1, 3, 32, 32)), 0, 10)
