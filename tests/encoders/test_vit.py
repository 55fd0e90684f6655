"""Facts about the plain vision transformer: sizes, tokens, layer ranges, dtypes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepwell.encoders.encoder import Encoder
from stepwell.encoders.vit import VisionTransformer
from stepwell.ops.choose import prefer

FAMILIES: dict[str, dict[str, Any]] = {
    "deit": {"layer_scale": 1.0, "windows": [3, 0, 2]},
    "internvit": {"norm": "rmsnorm", "qk_norm": True, "qkv_bias": False, "layer_scale": 0.1},
    "beit": {"position": "relative", "windows": 3},
    "uniperceiver": {"temporal_rows": 8, "embed_norm": True, "windows": 2, "window_padding": "qkv"},
    "clip": {"patch_bias": False, "class_token": True, "class_slot": True, "embed_norm": True},
    "sincos": {"position": "sincos", "class_token": True, "final_norm": True},
}


def vit(**arguments: Any) -> VisionTransformer:
    """A small one with all weights drawn, so that nothing hides behind a zero."""
    torch.manual_seed(0)
    defaults = {"dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "patch": 8, "position_grid": (3, 4)}
    model = VisionTransformer(**{**defaults, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_its_images_one_by_one_on_both_paths(family: str) -> None:
    model, image = vit(**FAMILIES[family]), torch.randn(3, 3, 40, 61)
    batch = model(image)
    assert batch.size == (5, 7)
    for i, path in ((0, "reference"), (2, "fast")):
        with prefer(path):
            single = model(image[i : i + 1])
        torch.testing.assert_close(single.tokens[0], batch.tokens[i], atol=1e-5, rtol=1e-4)


def test_pixels_beyond_the_last_whole_patch_are_dropped() -> None:
    model, image = vit(), torch.randn(1, 3, 23, 33)
    assert torch.equal(model(image).tokens, model(image[..., :16, :32]).tokens)


def test_an_image_smaller_than_a_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="7x40 is smaller than one patch of 8"):
        vit()(torch.randn(1, 3, 7, 40))


@pytest.mark.parametrize("family", ["deit", "clip"])
def test_layers_run_in_any_grouping_and_an_empty_range_is_nothing(family: str) -> None:
    model, image = vit(**FAMILIES[family]), torch.randn(1, 3, 40, 48)
    state = model.stem(image)
    assert model.run(state, 0, -1) is state
    split = model.run(model.run(state, 0, 0), 1, 2)
    whole = model.run(state, 0, 2)
    torch.testing.assert_close(split.tokens, whole.tokens)
    if whole.class_token is not None:
        torch.testing.assert_close(split.class_token, whole.class_token)


def test_layers_that_do_not_exist_are_refused() -> None:
    model = vit()
    with pytest.raises(ValueError, match=r"2\.\.3 asked of a network with layers 0\.\.2"):
        model.run(model.stem(torch.randn(1, 3, 16, 16)), 2, 3)


def test_the_table_is_resized_to_the_grid_of_the_image() -> None:
    model, image = vit(), torch.randn(1, 3, 40, 56)
    bare = model.patch_embed(image)[0]
    table = model.position.table.view(1, 3, 4, 16).permute(0, 3, 1, 2)
    resized = F.interpolate(table, (5, 7), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(model.stem(image).tokens, bare + resized)


def test_the_class_token_has_the_first_row_of_the_table_only_with_a_slot() -> None:
    image = torch.randn(2, 3, 24, 32)
    with_slot, without = vit(class_token=True, class_slot=True), vit(class_token=True)
    expected = with_slot.class_token + with_slot.position.table[0]
    torch.testing.assert_close(with_slot.stem(image).class_token, expected.expand(2, 1, 16))
    torch.testing.assert_close(without.stem(image).class_token, without.class_token.expand(2, 1, 16))


def test_only_the_first_row_of_the_temporal_table_counts() -> None:
    model, image = vit(temporal_rows=8), torch.randn(1, 3, 24, 32)
    before = model.stem(image).tokens
    model.position.temporal.data[1:] += 9
    assert torch.equal(model.stem(image).tokens, before)
    model.position.temporal.data[0] += 1
    torch.testing.assert_close(model.stem(image).tokens, before + 1)


def test_the_final_norm_is_forwards_affair() -> None:
    model, image = vit(final_norm=True, class_token=True), torch.randn(1, 3, 24, 32)
    raw, out = model.run(model.stem(image), 0, 2), model(image)
    torch.testing.assert_close(out.tokens, model.norm(raw.tokens))
    torch.testing.assert_close(out.class_token, model.norm(raw.class_token))


def test_to_map_is_a_channels_last_view_of_the_patches() -> None:
    model = vit(class_token=True)
    state = model(torch.randn(2, 3, 40, 24))
    map = model.to_map(state)
    assert map.shape == (2, 16, 5, 3)
    assert torch.equal(map[1, :, 4, 2], state.tokens[1, 4 * 3 + 2])
    assert map.untyped_storage().data_ptr() == state.tokens.untyped_storage().data_ptr()


def test_checkpointing_recomputes_and_changes_no_gradient() -> None:
    image, gradients, runs = torch.randn(2, 3, 24, 32), [], []
    for checkpointing in (False, True):
        model = vit(checkpointing=checkpointing, class_token=True).train()
        model.blocks[1].register_forward_pre_hook(lambda *_, last=checkpointing: runs.append(last))
        model(image).tokens.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert runs == [False, True, True]  # the backward pass runs a block once more
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


def test_drop_path_rates_reach_the_blocks() -> None:
    blocks = vit(drop_path=0.4, drop_path_schedule="linear").blocks
    assert [block.drop_path.rate for block in blocks] == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize("family", ["beit", "clip", "uniperceiver"])
def test_compiles_into_one_graph(family: str) -> None:
    model, image = vit(**FAMILIES[family], depth=1), torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(image)
        torch.testing.assert_close(compiled.tokens, model(image).tokens, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_autocast_stay_near_single(family: str) -> None:
    model, image = vit(**FAMILIES[family]), torch.randn(1, 3, 40, 48)
    with torch.no_grad():
        expected = model(image).tokens
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(image).tokens
        half = model.bfloat16()(image.bfloat16()).tokens
    assert half.dtype == torch.bfloat16
    for out in (cast, half):
        assert (out.float() - expected).norm() < 0.03 * expected.norm()


def test_is_an_encoder_and_lives_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = VisionTransformer(dim=3200, depth=2, num_heads=25)
        state = model(torch.empty(1, 3, 448, 224))
    assert isinstance(model, Encoder)
    assert state.tokens.shape == (1, 28 * 14, 3200)
    assert (model.spec.depth, model.spec.dim, model.spec.stride) == (2, 3200, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"windows": [7, 7]}, "3 blocks need one window each, got 2"),
        ({"windows": 7, "class_token": True}, "no place for a class token"),
        ({"class_slot": True, "position": "sincos"}, "position='sincos' has none"),
        ({"windows": 7, "registers": 2}, "no place for a class token and registers"),
        ({"position": "rotary"}, "'rotary'"),
        ({"position": "relative", "class_token": True}, "between patches only"),
        ({"position": "relative", "registers": 1}, "between patches only"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        vit(**arguments)


def test_layers_are_repeated_in_the_backward_pass_on_the_path_they_took() -> None:
    """Also where it runs in another thread, as it does on a GPU: other layers would keep other tensors."""
    model, image = vit(checkpointing=True).train(), torch.randn(1, 3, 16, 24)
    with prefer("reference"):
        loss = model(image).tokens.square().sum()
    with ThreadPoolExecutor(max_workers=1) as other:
        other.submit(loss.backward).result()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())
