"""The baseline reads the hidden state it is told to, in that state's width and at its stride."""

from __future__ import annotations

import pytest
import torch

from stepwell.models.plain import PlainConfig

SHAPES = {-1: (24, 32), -2: (24, 32), -3: (16, 16), 5: (16, 16), 3: (12, 8), 1: (8, 4), 0: (8, 4), -9: (8, 4)}
"""select_layer -> width and stride in a ConvNeXt of 8 layers, 3 of which sample down."""


def convnext(select_layer):
    arguments = {"dims": (8, 12, 16, 24), "depths": (1, 2, 1, 1)}
    return PlainConfig(
        encoder="convnext_t", size=64, arguments=arguments, select_layer=select_layer, projector="identity"
    )


@pytest.mark.parametrize(("select_layer", "width", "stride"), [(k, *v) for k, v in SHAPES.items()])
def test_every_stage_of_a_convnext_can_be_read(select_layer, width, stride):
    config = convnext(select_layer)
    vision = config.build(out_dim=width).eval()
    layout = vision.geometry.layout((64, 64))
    assert layout.num_visual == (64 // stride) ** 2
    image = torch.randn(3, 64, 64)
    (features,) = vision.encode([image], [layout])
    (encoder,) = vision.encoders
    state = encoder.run(encoder.stem(image[None]), 0, select_layer % 9 - 1)
    assert torch.equal(features.tokens, state.tokens[0])
    (feature_map,) = features.maps
    assert (feature_map.map.shape[0], feature_map.stride) == (width, stride)
    assert feature_map.map.shape[1:] == feature_map.view.grid


@pytest.mark.parametrize("select_layer", [-10, 9])
def test_a_layer_that_there_is_not_is_refused_in_the_settings(select_layer):
    with pytest.raises(ValueError, match=f"select_layer {select_layer} is not one of the 9 hidden states"):
        convnext(select_layer)


@pytest.mark.parametrize("projector", ["mlp", "mlp0x_gelu", "mlp2x_gelu_norm", "a linear", "linear\n"])
def test_an_unknown_projector_is_refused_in_the_settings(projector):
    with pytest.raises(ValueError, match="projector"):
        PlainConfig(projector=projector)


@pytest.mark.parametrize("projector", ["linear", "identity", "mlp1x_gelu", "mlp12x_gelu"])
def test_every_projector_that_can_be_built_is_a_setting(projector):
    settings = PlainConfig(encoder="vit_nano", size=32, projector=projector)
    assert settings.build(out_dim=64).projector(torch.randn(1, 4, 64)).shape == (1, 4, 64)
