"""Networks of timm as encoders: layer by layer they compute what timm computes in one go."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stepwell.encoders.catalogue import build_encoder, encoder_spec
from stepwell.encoders.encoder import Encoder
from stepwell.encoders.pretrained import load_encoder_state
from stepwell.fuse.interaction import InteractionConfig
from stepwell.fuse.merge import ProjectorConfig
from stepwell.keys.report import FitError
from stepwell.models.dense import DenseSettings
from stepwell.models.perception import PyramidBackbone, PyramidBackboneConfig
from stepwell.models.piip import PiipConfig
from stepwell.models.plain import PlainConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.systems import vision_settings
from stepwell.models.vision import settings_json

SMALL: dict[str, Any] = {"depth": 4, "embed_dim": 64, "num_heads": 2}
NETWORKS: list[tuple[str, dict[str, Any], tuple[int, int], int]] = [
    ("vit_tiny_patch16_224", SMALL, (64, 96), 4),
    ("deit_tiny_distilled_patch16_224", SMALL, (64, 96), 4),
    ("vit_small_patch14_reg4_dinov2", SMALL, (70, 98), 4),
    ("vit_small_patch16_dinov3", SMALL, (64, 96), 4),
    ("vit_small_patch16_rope_mixed_224", SMALL, (64, 96), 4),
    ("vit_base_patch16_siglip_224", SMALL, (64, 96), 4),
    ("vit_base_patch16_radio_v3", SMALL, (64, 96), 4),
    ("convnext_atto", {}, (64, 96), 4),
    ("resnet10t", {}, (64, 96), 5),
    ("regnetx_002", {}, (64, 96), 4),
    (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
        (224, 224),
        4,
    ),
    ("tf_efficientnet_lite0", {}, (64, 96), 1),
    ("beit_base_patch16_224", SMALL, (224, 224), 1),
]
"""timm's name, arguments, an image size, the number of layers."""


def drawn(model: nn.Module) -> nn.Module:
    """No weight left at a zero or a one that would hide a mistake."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.05, std=0.2)
    return model.eval()


def whole(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's network itself, at any image size where it can."""
    try:
        return drawn(timm.create_model(name, **arguments, dynamic_img_size=True))
    except TypeError:
        return drawn(timm.create_model(name, **arguments))


@pytest.mark.parametrize(("name", "arguments", "size", "depth"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_layer_by_layer_it_is_timms_network(
    name: str, arguments: dict[str, Any], size: tuple[int, int], depth: int
) -> None:
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    theirs = whole(name, arguments)
    ours = build_encoder(f"timm:{name}", **arguments).eval()
    assert isinstance(ours, Encoder)
    report = load_encoder_state(ours, theirs.state_dict())
    assert set(report.dropped.values()) <= {"behind the last layer, not taken over"}
    assert ours.spec == encoder_spec(f"timm:{name}", arguments)
    assert ours.spec.depth == depth
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs.forward_intermediates(
            image, intermediates_only=True, norm=False, output_fmt="NCHW"
        )[-1]
        state = ours.stem(image)
        for layer in range(depth):
            state = ours.run(state, layer, layer)
            assert state.tokens.shape[2] == ours.spec.dims[layer]
            assert state.size == (size[0] // ours.spec.strides[layer], size[1] // ours.spec.strides[layer])
        torch.testing.assert_close(ours.to_map(state), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(image).tokens, state.tokens)


def test_arguments_may_be_lists_as_json_has_them() -> None:
    name, arguments, _, _ = next(network for network in NETWORKS if network[0].startswith("swin"))
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
    assert encoder_spec(f"timm:{name}", lists) == encoder_spec(f"timm:{name}", arguments)
    settings = PlainConfig(encoder=f"timm:{name}", size=224, arguments=lists, select_layer=-1)
    again = vision_settings(json.loads(json.dumps(settings_json(settings))))
    assert again.build(8).encoders[0].spec.dims == (24, 48, 96, 192)


def test_statistics_are_those_of_the_pretraining() -> None:
    assert encoder_spec("timm:tf_efficientnet_lite0").mean == (0.5, 0.5, 0.5)
    assert encoder_spec("timm:convnext_atto").std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "in_front"), [("vit_tiny_patch16_224", (1, 0)), ("vit_small_patch14_reg4_dinov2", (1, 4))]
)
def test_class_token_and_registers_travel_beside_the_grid(name: str, in_front: tuple[int, int]) -> None:
    encoder = build_encoder(f"timm:{name}", **SMALL)
    state = encoder(torch.randn(1, 3, 56, 84))
    lengths = tuple(0 if token is None else token.shape[1] for token in (state.class_token, state.registers))
    assert lengths == in_front


def test_a_remainder_smaller_than_a_patch_is_dropped() -> None:
    encoder = build_encoder("timm:vit_tiny_patch16_224", **SMALL).eval()
    image = torch.randn(1, 3, 47, 70)
    with torch.no_grad():
        assert torch.equal(encoder(image).tokens, encoder(image[:, :, :32, :64]).tokens)
    with pytest.raises(ValueError, match="smaller than one patch of 16"):
        encoder(torch.randn(1, 3, 8, 64))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "convnext_atto"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    arguments = SMALL if name.startswith("vit") else {}
    encoder = drawn(build_encoder(f"timm:{name}", **arguments)).train()
    image = torch.randn(1, 3, 64, 64)
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        encoder.gradient_checkpointing = checkpointing
        encoder.zero_grad()
        encoder(image).tokens.square().mean().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "tf_efficientnet_lite0"])
def test_batch_statistics_that_do_not_learn_stay_and_are_not_counted_twice(name: str) -> None:
    encoder = build_encoder(f"timm:{name}", checkpointing=True)
    image = torch.randn(2, 3, 64, 64)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    encoder.requires_grad_(False).train()
    encoder(image)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())
    encoder.requires_grad_(True).train()
    encoder(image).tokens.sum().backward()
    counts = {int(t) for key, t in encoder.state_dict().items() if key.endswith("num_batches_tracked")}
    assert counts == {1}


def test_a_layer_leaves_what_goes_into_it_as_it_was() -> None:
    encoder = build_encoder("timm:resnet10t").eval()
    state = encoder.stem(torch.randn(1, 3, 64, 64))
    before = state.tokens.clone()
    encoder.run(state, 0, 1)
    assert torch.equal(state.tokens, before)


def test_old_files_do_not_count_batches() -> None:
    theirs = drawn(timm.create_model("resnet10t"))
    state = {k: t for k, t in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = load_encoder_state(build_encoder("timm:resnet10t"), state)
    assert set(report.absent.values()) == {"counts from 0"}


def test_a_stem_of_convolutions_counts_to_the_stride() -> None:
    encoder = build_encoder("timm:vit_tiny_r_s16_p8_224", depth=2).eval()
    assert encoder.spec.stride == 32
    assert encoder(torch.randn(1, 3, 70, 96)).size == (2, 3)
    with pytest.raises(ValueError, match=r"patches of 16x8, which are no squares"):
        build_encoder("timm:vit_tiny_patch16_224", patch_size=(16, 8), **SMALL)


def test_a_network_of_fixed_size_says_so() -> None:
    name, arguments, _, _ = next(network for network in NETWORKS if network[0].startswith("swin"))
    with pytest.raises(ValueError, match=r"swin_tiny.* cannot take an image of 96x96: .*224"):
        build_encoder(f"timm:{name}", **arguments)(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("name", ["swin", "vit_small_patch16_dinov3", "tf_efficientnet"])
def test_saved_in_a_backbone_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    """Whatever starting values a module of timm would give itself."""
    name, arguments, size, _ = next(network for network in NETWORKS if network[0].startswith(name))
    branch = BranchConfig(encoder=f"timm:{name}", size=size[0], arguments=arguments)
    config = PyramidBackboneConfig(pyramid=DenseSettings(branches=(branch,), merge="none", operations=()))
    model = drawn(PyramidBackbone(config))
    model.save_pretrained(tmp_path)
    again = PyramidBackbone.from_pretrained(tmp_path)
    for (key, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("hf-hub:owner/name", {}, "is no network's name"),
        ("resnet10t", {"checkpoint_path": "/somewhere.pth"}, "'checkpoint_path' is not taken"),
        ("resnet10t", {"pretrained": True}, "'pretrained' is not taken"),
        ("vit_tiny_patch16_224", {"patch_size": 0}, "timm cannot build"),
        ("convnext_atto", {"act_layer": "rubbish"}, "timm cannot build"),
    ],
)
def test_what_would_fetch_or_cannot_be_built_is_refused(
    name: str, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        encoder_spec(f"timm:{name}", arguments)


def test_weights_of_another_network_are_refused() -> None:
    encoder = build_encoder("timm:convnext_atto")
    with pytest.raises(FitError, match="does not fit"):
        load_encoder_state(encoder, timm.create_model("convnext_femto").state_dict())
    state = timm.create_model("convnext_atto").state_dict() | {"strange": torch.zeros(1)}
    with pytest.raises(FitError, match=r"1 unknown \(strange\)"):
        load_encoder_state(encoder, state)


def test_names_and_arguments_that_timm_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timm cannot build 'resnet_999': Unknown model"):
        build_encoder("timm:resnet_999")
    with pytest.raises(ValueError, match=r"timm cannot build 'convnext_atto': .*nonsense"):
        encoder_spec("timm:convnext_atto", {"nonsense": 3})


def test_without_timm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[timm\]'"):
        build_encoder("timm:convnext_atto")


def test_a_pyramid_of_timms_networks(tmp_path) -> None:
    """A transformer and a convolutional network in conversation; weights from a file under timm's names."""
    branches = [
        BranchConfig(
            encoder="timm:vit_tiny_patch16_224", size=64, interactions=((0, 1), (2, 3)), arguments=SMALL
        ),
        BranchConfig(encoder="timm:convnext_atto", size=128, interactions=((0, 1), (2, 3))),
    ]
    interaction = InteractionConfig(num_heads=4)
    projector = ProjectorConfig(num_groups=8)
    vision = PiipConfig(branches=branches, interaction=interaction, projector=projector).build(24).eval()
    theirs = drawn(timm.create_model("convnext_atto"))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    loaded = build_encoder("timm:convnext_atto", weights=tmp_path)
    vision.encoders[1].load_state_dict(loaded.state_dict())
    layouts = [vision.geometry.layout((100, 60))]
    with torch.no_grad():
        (tokens,) = vision([torch.randn(3, *size) for size in layouts[0].inputs], layouts)
    assert tokens.shape == (layouts[0].num_visual, 24)
