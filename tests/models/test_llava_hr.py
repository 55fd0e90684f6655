"""LLaVA-HR against a model put together from transformers' CLIP, timm's ConvNeXt and plain layers."""

from __future__ import annotations

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from stepwell.keys.checkpoint import Tensors
from stepwell.keys.engine import plan
from stepwell.keys.fill import fill
from stepwell.models.assistant import StepwellForConditionalGeneration
from stepwell.models.config import StepwellConfig
from stepwell.models.llava_hr import LlavaHrConfig
from stepwell.models.published.papers import find_published
from stepwell.structures import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD
from stepwell.train.groups import freeze_all_but

DIM, OUT = 32, 24
DIMS, DEPTHS = (8, 12, 16, 20), (1, 1, 2, 1)
SMALL = LlavaHrConfig(
    size=160,
    fast_least=140,
    fast_arguments={"dim": DIM, "depth": 8, "num_heads": 4, "mlp_ratio": 2, "position_grid": [8, 8]},
    slow_arguments={"dims": DIMS, "depths": DEPTHS, "layer_scale": 0.1},
)
NANO = {"fast": "vit_nano", "slow": "convnext_nano", "fast_least": 32}
NANO |= {"slow_arguments": {"strides": (4, 2, 2, 2)}}


class Official(nn.Module):
    """The names and the order of LLaVA-HR's code, as far as a forward pass needs them."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": DIM, "intermediate_size": 2 * DIM, "num_hidden_layers": 8}
        clip = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=112, patch_size=14)
        slow = TimmConvNeXt(dims=DIMS, depths=DEPTHS, num_classes=3)
        self.fast_vision_tower = nn.ModuleDict({"vision_tower": CLIPVisionModel(clip)})
        self.slow_vision_tower = nn.ModuleDict({"vision_tower": slow})
        self.align_stages_latent = nn.ModuleList(
            nn.ModuleDict(
                {
                    "slow_conv": nn.Conv2d(DIMS[-1], DIMS[-1], 1),
                    "slow_proj": nn.Conv2d(DIMS[-1], DIM, 1),
                    "fast_conv": nn.Conv2d(DIM, DIM, 7, padding=3, groups=DIM),
                    "fast_proj": nn.Conv2d(DIM, DIM, 1),
                    "gate": nn.Sequential(nn.Linear(2 * DIM, DIM // 2), nn.GELU(), nn.Linear(DIM // 2, 1)),
                }
            )
            for _ in range(3)
        )
        ends = {"fast_proj": nn.Linear(DIM, DIM), "slow_proj": nn.Linear(DIMS[-1], DIM)}
        self.align_stages = nn.ModuleList([nn.ModuleDict(ends)])

    def forward(self, image, side):
        clip = self.fast_vision_tower["vision_tower"]
        clip = getattr(clip, "vision_model", clip)
        slow = self.slow_vision_tower["vision_tower"]
        slow = slow.stages(slow.stem(image))
        small = F.interpolate(image, (side, side), mode="bilinear", align_corners=True)
        f = clip.embeddings.patch_embedding(small)
        cells = f.shape[-1]
        table = clip.embeddings.position_embedding.weight[1:].T.reshape(1, DIM, 8, 8)
        f = f + F.interpolate(table, (cells, cells), mode="bicubic", antialias=True)
        f = clip.pre_layrnorm(f.flatten(2).transpose(1, 2))

        def seen(x):
            x = F.interpolate(x, (cells, cells), mode="bilinear", align_corners=True)
            return x.flatten(2).transpose(1, 2)

        for i, layer in enumerate(clip.encoder.layers):
            f = layer(f, None)
            f = f[0] if isinstance(f, tuple) else f
            if i % 2 == 0 or i == 7:
                continue
            part = self.align_stages_latent[i // 2]
            s = seen(part["slow_proj"](F.gelu(part["slow_conv"](slow))))
            grid = f.transpose(1, 2).reshape(-1, DIM, cells, cells)
            f = (grid + part["fast_proj"](F.gelu(part["fast_conv"](grid)))).flatten(2).transpose(1, 2)
            f = f + torch.tanh(part["gate"](torch.cat([f, s], 2).mean(1)))[:, None] * s
        end = self.align_stages[0]
        return end["fast_proj"](f) + end["slow_proj"](seen(slow))


@pytest.fixture(scope="module")
def official():
    torch.manual_seed(0)
    tower = Official().eval()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 0.15)
    return tower, nn.Sequential(nn.Linear(DIM, OUT), nn.GELU(), nn.Linear(OUT, OUT))


@pytest.fixture(scope="module")
def converted(official):
    """Our model with the official one's weights, by the rules of the release."""
    tower, projector = official
    text = LlamaConfig(
        hidden_size=OUT, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    model = StepwellForConditionalGeneration(StepwellConfig(SMALL, text, image_token_id=20))
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    state = {k.replace("gamma", "weight") if "blocks" in k else k: v for k, v in state.items()}
    state = {  # transformers has left "vision_model." out of its names since the release
        k.replace(
            ".fast_vision_tower.vision_tower.vision_model.", ".fast_vision_tower.vision_tower."
        ).replace(".fast_vision_tower.vision_tower.", ".fast_vision_tower.vision_tower.vision_model."): v
        for k, v in state.items()
    }
    state |= {f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.startswith("model.language_model."):
            state[name.replace("model.language_model.", "model.")] = tensor
    state["lm_head.weight"] = model.lm_head.weight.detach()
    rules = find_published("favor123/llava-hr-7b-sft-1024").rules(SMALL)
    report = fill(
        model, plan({k: tuple(v.shape) for k, v in state.items()}, rules), Tensors(state), name="it"
    )
    assert report.ok, report.text()
    reasons = {"final norm", "class token", "head"}
    assert {word for why in report.dropped.values() for word in reasons if word in why} == reasons
    return model.model.vision.eval()


@pytest.mark.parametrize(("size", "side"), [(160, 140), (320, 140), (352, 154)])
def test_tokens_are_those_of_the_official_layout(official, converted, size, side):
    """A slow grid that grows, one that fits, and positions that are resized in all of them."""
    vision = SMALL.resized([size]).build(OUT)
    vision.load_state_dict(converted.state_dict())
    layout = vision.geometry.layout((50, 70))
    assert [view.size for view in layout.views] == [(side, side), (size, size)]
    torch.manual_seed(1)
    image = torch.randn(3, size, size)
    tower, projector = official
    expected = projector(tower(image[None], side))
    (tokens,) = vision.eval()([image], [layout])
    torch.testing.assert_close(tokens, expected[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "side", "tokens"),
    [
        (1024, 448, 1024),
        (768, 336, 576),
        (384, 336, 576),
        (1536, 672, 2304),
        (1008, 434, 961),
        (64, 336, 576),
    ],
)
def test_the_fast_view_has_a_cell_for_every_one_of_the_slow_encoder(size, side, tokens):
    config = LlavaHrConfig(size=size)
    layout = config.geometry().layout((300, 400))
    assert [view.size for view in layout.views] == [(side, side), (size, size)]
    assert layout.inputs == ((size, size),)
    assert layout.num_visual == tokens
    assert config.largest == size


def test_statistics_are_the_fast_encoders_unless_told():
    geometry = LlavaHrConfig(fast="augreg_l", slow="convnext_t").geometry()
    assert (geometry.mean, geometry.std) == (HALF_MEAN, HALF_STD)
    geometry = LlavaHrConfig(mean=IMAGENET_MEAN, std=IMAGENET_STD).geometry()
    assert (geometry.mean, geometry.std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("settings", "cells"), [({}, 1), ({"fast_arguments": {"windows": 3}}, 3), ({"min_cells": 2}, 2)]
)
def test_a_long_image_has_room_for_a_window(settings, cells):
    layout = LlavaHrConfig(**NANO, size=128, framing="aspect", **settings).geometry().layout((3, 900))
    assert [view.grid for view in layout.views] == [(cells, 4)] * 2


def vision_of(**settings):
    torch.manual_seed(0)
    vision = LlavaHrConfig(**{**NANO, "size": 128, "framing": "aspect", **settings}).build(OUT).eval()
    for name, parameter in vision.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.2)
    return vision


def inputs_of(*layouts):
    torch.manual_seed(1)
    return [torch.randn(3, *size) for layout in layouts for size in layout.inputs]


@pytest.mark.parametrize("framing", ["aspect", "pad"])
def test_images_of_any_shape_give_in_a_batch_what_they_give_alone(framing):
    vision = vision_of(framing=framing)
    layouts = [vision.geometry.layout(size) for size in ((300, 410), (20, 90), (31, 30), (3, 900))]
    inputs = inputs_of(*layouts)
    for image, layout, features in zip(inputs, layouts, vision.encode(inputs, layouts), strict=True):
        assert features.tokens.shape == (layout.num_visual, OUT)
        (alone,) = vision.encode([image], [layout])
        torch.testing.assert_close(features.tokens, alone.tokens, rtol=1e-4, atol=1e-5)
        assert [(m.map.shape[1:], m.stride) for m in features.maps] == [
            (layout.views[0].grid, 32),
            (layout.views[1].grid, 32),
        ]


@pytest.mark.parametrize("fast_least", [32, 96, 160])
def test_the_geometry_draws_what_the_encoders_are_given(fast_least):
    """A view that is smaller than the input, and one that is larger; corners lie on corners."""
    vision = vision_of(fast_least=fast_least)
    layout = vision.geometry.layout((300, 400))
    (image,) = inputs_of(layout)
    seen = []
    for encoder, stem in zip(vision.encoders, ("patch_embed", "embed"), strict=True):
        getattr(encoder, stem).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    vision.encode([image], [layout])
    drawn = vision.geometry.views([image], layout)
    for view, given, told in zip(drawn, reversed(seen), layout.views, strict=True):
        assert torch.equal(view, given)
        assert tuple(view.shape[1:]) == told.size
    height, width = layout.views[0].size
    assert max(height, width) == max(64, fast_least)
    expected = F.interpolate(image[None], (height, width), mode="bilinear", align_corners=True)[0]
    torch.testing.assert_close(drawn[0], expected)


def test_a_view_that_floats_would_round_down_keeps_its_last_pixel():
    """352 * (196 / 352) is a little less than 196."""
    config = LlavaHrConfig(size=352, fast_least=196)
    assert config.geometry().layout((9, 9)).views[0].size == (196, 196)


def test_new_adapters_leave_the_dual_encoder_as_it_is():
    """Which is stage 1 of the training, and INF-LLaVA's figure 1(b)."""
    torch.manual_seed(0)
    new = LlavaHrConfig(**NANO, size=128).build(OUT).eval()
    dual = LlavaHrConfig(**NANO, size=128, adapters=0).build(OUT).eval()
    missing, unexpected = dual.load_state_dict(new.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in unexpected} == {"adapters"}
    layout = new.geometry.layout((64, 64))
    inputs = inputs_of(layout)
    (a,), (b,) = new(inputs, [layout]), dual(inputs, [layout])
    assert torch.equal(a, b)
    opened = vision_of(framing="pad")
    opened.load_state_dict(new.state_dict() | {k: v for k, v in opened.state_dict().items() if "adapt" in k})
    assert not torch.allclose(opened(inputs, [layout])[0], a, atol=1e-3)


def test_no_class_token_goes_through_the_fast_encoder():
    small = {"fast": "clip_b", "slow": "convnext_nano", "fast_arguments": {"dim": 16, "num_heads": 2}}
    names = {name for name, _ in LlavaHrConfig(**small).build(OUT).named_parameters()}
    assert "branches.0.class_token" not in names
    assert "branches.0.position.table" in names


def test_a_transformer_of_timm_can_be_the_fast_encoder():
    vision = LlavaHrConfig(**{**NANO, "fast": "timm:test_vit", "adapters": 2}, size=128).build(OUT).eval()
    layout = vision.geometry.layout((90, 60))
    (tokens,) = vision(inputs_of(layout), [layout])
    assert tokens.shape == (layout.num_visual, OUT)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapters": 4}, "24 layers of clip_l_14_336 do not fall into 5 equal stages; adapters may be 0, 1"),
        ({"size": 31}, "a view of 31 is smaller than a cell of convnext_l_clip, which is 32"),
        ({"fast": "vit_xxl"}, "unknown encoder 'vit_xxl'"),
        ({"slow_arguments": {"class_token": True}}, "no argument 'class_token'"),
        ({"projector": "mlp"}, "projector"),
    ],
)
def test_what_cannot_be_built_is_refused_in_the_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        LlavaHrConfig(**settings)


def test_one_size_tells_both_views():
    with pytest.raises(ValueError, match=r"the slow encoder's view tells both, got \[448, 1024\]"):
        LlavaHrConfig().adjusted({"sizes": [448, 1024]})
    assert LlavaHrConfig().adjusted({"sizes": [384], "framing": "crop"}).size == 384


def gradients(vision, layout, inputs):
    vision.zero_grad()
    vision(inputs, [layout])[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in vision.named_parameters() if p.grad is not None}


def test_gradients_reach_everything_and_are_the_same_with_checkpoints():
    vision = vision_of().train()
    layout = vision.geometry.layout((60, 90))
    inputs = inputs_of(layout)
    plain = gradients(vision, layout, inputs)
    assert plain.keys() == dict(vision.named_parameters()).keys()
    assert all(g.abs().sum() > 0 for g in plain.values())
    calls = []
    vision.adapters[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for module in (vision, *vision.branches):
        module.gradient_checkpointing = True
    for name, gradient in gradients(vision, layout, inputs).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert len(calls) == 2  # once more on the way back


def test_a_stage_freezes_adapters_by_their_name():
    vision = vision_of()
    parts = LlavaHrConfig.parts
    freeze_all_but(vision, ["vision.merge", "projector"], parts)
    learning = {name.split(".")[0] for name, p in vision.named_parameters() if p.requires_grad}
    assert learning == {"merge", "projector"}
    freeze_all_but(vision, ["vision.adapters", "vision.branches.1"], parts)
    learning = {".".join(name.split(".")[:2]) for name, p in vision.named_parameters() if p.requires_grad}
    assert learning == {"adapters.0", "adapters.1", "adapters.2", "branches.1"}


def test_half_precision_gives_the_same_tokens_but_for_rounding():
    vision = vision_of()
    layout = vision.geometry.layout((60, 90))
    inputs = inputs_of(layout)
    expected = vision(inputs, [layout])[0]
    half = vision.bfloat16()([x.bfloat16() for x in inputs], [layout])[0]
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().mean() < 0.05 * expected.abs().mean()
