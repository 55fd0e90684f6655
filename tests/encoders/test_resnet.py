"""ResNet, held against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ResNetConfig, ResNetForImageClassification

from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.pretrained import load_encoder_weights
from stepwell.encoders.resnet import _Convolution

SIZES = {"dims": (8, 16, 32), "depths": (1, 2, 1), "stem_dim": 8}


def varied(module):
    """Norms that do not pass on what they get."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "normalization" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=generator)
    return module


@pytest.fixture(params=["basic", "bottleneck"])
def pair(request, tmp_path):
    """transformers' network in evaluation, ours with the weights of its folder, loaded."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 2, 1], layer_type=request.param, num_labels=3
    )
    theirs = varied(ResNetForImageClassification(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = build_encoder("resnet_nano", layer=request.param, **SIZES).eval()
    report = load_encoder_weights(ours, tmp_path)
    assert set(report.dropped) == {"classifier.1.weight", "classifier.1.bias"}
    return theirs.resnet, ours


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (80, 48)])
def test_maps_are_those_of_transformers(pair, size):
    theirs, ours = pair
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        wanted, found = theirs(image).last_hidden_state, ours(image)
    assert found.size == (size[0] // 16, size[1] // 16)
    torch.testing.assert_close(ours.to_map(found), wanted, rtol=1e-4, atol=1e-5)


def test_layers_run_apart_give_what_they_give_together(pair):
    _, ours = pair
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        state = ours.stem(image)
        for i in range(ours.spec.depth):
            state = ours.run(state, i, i)
            assert state.tokens.shape[2] == ours.spec.dims[i]
            assert state.size == (48 // ours.spec.strides[i], 64 // ours.spec.strides[i])
        assert torch.equal(state.tokens, ours(image).tokens)


def test_the_rest_of_a_stride_is_dropped_at_each_stage(pair):
    _, ours = pair
    image = torch.randn(1, 3, 63, 47)
    with torch.no_grad():
        assert ours(image).size == (3, 2)
        assert torch.equal(ours(image).tokens, ours(image[:, :, :60, :44]).tokens)  # to the stem's stride


def test_images_smaller_than_a_cell_are_refused():
    encoder = build_encoder("resnet_nano", **SIZES)
    with pytest.raises(ValueError, match="3x64 is smaller than one cell of stride 4"):
        encoder(torch.randn(1, 3, 3, 64))
    with pytest.raises(ValueError, match="1x16 is smaller than one cell of stride 2"):
        encoder(torch.randn(1, 3, 4, 64))


def test_the_spec_is_known_without_weights():
    assert encoder_spec("resnet_nano", SIZES) == build_encoder("resnet_nano", **SIZES).spec
    assert encoder_spec("resnet_50").dims[-1] == 2048
    assert encoder_spec("resnet_50").strides[-1] == 32
    with pytest.raises(ValueError, match="a stage needs width and depth"):
        encoder_spec("resnet_nano", {"dims": (8, 16), "depths": (1,)})
    with pytest.raises(ValueError, match="unknown layer 'other'; choose from basic, bottleneck"):
        build_encoder("resnet_nano", layer="other")


def statistics(encoder):
    return {name: value.clone() for name, value in encoder.named_buffers()}


def test_statistics_follow_the_batches_where_norms_learn():
    encoder = build_encoder("resnet_nano", **SIZES)
    before = statistics(encoder)
    encoder.embedder.requires_grad_(False)
    encoder.train()
    encoder(torch.randn(2, 3, 64, 64))
    moved = {name for name, value in statistics(encoder).items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(name.startswith("embedder") for name in moved)


def keep_statistics(encoder):
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def test_recomputing_gives_the_same_gradients_where_statistics_are_kept():
    encoder = build_encoder("resnet_nano", checkpointing=True, **SIZES).train()
    image = torch.randn(2, 3, 64, 64)
    assert not encoder.checkpointing  # statistics would be counted twice
    keep_statistics(encoder)
    assert encoder.checkpointing
    encoder(image).tokens.square().sum().backward()
    found = [parameter.grad for parameter in encoder.parameters()]
    encoder.zero_grad()
    encoder.gradient_checkpointing = False
    encoder(image).tokens.square().sum().backward()
    for gradient, wanted in zip(found, (p.grad for p in encoder.parameters()), strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_starting_values_are_hes_by_what_leaves_a_convolution():
    encoder = build_encoder("resnet_18")
    kernel = encoder.get_parameter("encoder.stages.1.layers.1.layer.0.convolution.weight")  # 128 -> 128
    assert abs(kernel.std().item() / (2 / (128 * 9)) ** 0.5 - 1) < 0.02


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"dims": (8, 16), "depths": (1, 0)}, "a stage needs width and depth"),
        ({"dims": (8, 16), "depths": (1, -1)}, "a stage needs width and depth"),
        ({"dims": (8, 18), "depths": (1, 1), "layer": "bottleneck"}, "a quarter as wide as its stage"),
    ],
)
def test_networks_that_there_are_not_are_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        build_encoder("resnet_nano", **arguments)


class Strides(TorchDispatchMode):
    """Keeps (channels, kernel, stride) of every convolution."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.convolution.default:
            weight, stride = arguments[1], arguments[3]
            self.seen.add((weight.shape[1], weight.shape[2], stride[0]))
        return function(*arguments, **(keywords or {}))


def test_narrow_maps_meet_no_strided_convolution_of_one_pixel():
    """oneDNN's gradient of it writes past its memory on AVX-512."""
    sizes = {"dims": (8, 15, 16, 32), "depths": (1, 1, 1, 1), "stem_dim": 8}
    with Strides() as found:
        build_encoder("resnet_nano", **sizes)(torch.randn(1, 3, 64, 64))
    assert {(8, 1, 1), (15, 1, 1), (16, 1, 2)} <= found.seen
    assert not {(8, 1, 2), (15, 1, 2)} & found.seen


def test_gradients_of_narrow_maps_are_those_of_strided_convolutions():
    convolution = _Convolution(8, 16, kernel=1, stride=2, relu=False).double().eval()
    map = torch.randn(2, 8, 96, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    plain = torch.nn.functional.conv2d(map, convolution.convolution.weight, stride=2)
    weight = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * weight).sum(), convolution.convolution.weight)[0]
    for _ in range(20):  # where memory was written past, some free in the end aborts
        single = copy.deepcopy(convolution).float()
        single.normalization = torch.nn.Identity()
        seen = single(map.float().requires_grad_())
        (seen * weight.float()).sum().backward()
        torch.testing.assert_close(seen.double(), plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(single.convolution.weight.grad.double(), wanted, rtol=1e-4, atol=1e-3)
