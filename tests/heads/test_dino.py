"""DINO as a whole: losses of any batch, detections in any company, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.heads.dino import Dino, DinoConfig, best_boxes
from stepwell.heads.dino_denoising import draw
from stepwell.ops.choose import prefer
from stepwell.structures import Extent, Objects

SMALL = {
    "dim": 16,
    "num_levels": 3,
    "norm_groups": 4,
    "num_queries": 9,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_dim": 12,
    "num_heads": 4,
    "num_points": 2,
    "self_attention_heads": 2,
    "denoising": {"num_queries": 6},
    "max_detections": 7,
}
EXTENTS = [Extent((64, 60), (64, 64)), Extent((37, 64), (64, 64)), Extent((64, 64), (64, 64))]
OBJECTS = [
    Objects(torch.tensor([[3.0, 4, 30, 40], [10, 10, 50, 60]]), torch.tensor([1, 3])),
    Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    Objects(torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([0])),
]


def make(dtype=torch.float64, seed=0, **changes) -> Dino:
    """Boxes that differ, as they do not at the start."""
    torch.manual_seed(seed)
    dino = DinoConfig(**{**SMALL, **changes}).build([5, 6], [8, 16], num_classes=4)
    for parameter in dino.parameters():
        nn.init.normal_(parameter, std=0.4 if parameter.ndim > 1 else 0.2)
    return dino.to(dtype)


def make_maps(dtype=torch.float64, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 5, 8, 8), (batch, 6, 4, 4)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def pick(maps, *images):
    return [x[list(images)] for x in maps]


def test_an_image_among_others_of_its_padded_size_gives_what_it_gives_alone():
    dino, maps = make(), make_maps()
    together = dino.detect(maps, EXTENTS)
    for image, found in enumerate(together):
        (alone,) = dino.detect(pick(maps, image), [EXTENTS[image]])
        assert torch.equal(found.labels, alone.labels)
        torch.testing.assert_close(found.boxes, alone.boxes)
        torch.testing.assert_close(found.scores, alone.scores)


def test_what_stands_in_padding_is_not_looked_at_behind_the_neck():
    """The neck's norms are over a whole map, as in the official code; here they are left out."""
    dino, maps = make(num_levels=2), make_maps()
    for level in dino.neck.projections:
        level[1] = nn.Identity()
    changed = [x.clone() for x in maps]
    changed[0][1, :, 5:], changed[1][1, :, 3:] = 7.0, 7.0  # 37 of 64 pixels are 4.6 and 2.3 cells
    for a, b in zip(dino.detect(maps, EXTENTS), dino.detect(changed, EXTENTS), strict=True):
        torch.testing.assert_close(a.boxes, b.boxes)
        torch.testing.assert_close(a.scores, b.scores)


def test_detections_are_the_best_pairs_best_first_inside_the_image():
    logits = torch.tensor([[[-1.0, 2], [3, -2], [0, 1]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.4, 0.4], [0.2, 0.2, 0.2, 0.2]]])
    (found,) = best_boxes(logits, boxes, [Extent((40, 100), (64, 128))], 3)
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2, 1]).sigmoid())
    assert found.labels.tolist() == [0, 1, 1]
    torch.testing.assert_close(
        found.boxes, torch.tensor([[70.0, 0, 100, 12], [25, 10, 75, 30], [10, 4, 30, 12]])
    )
    (all_of_them,) = best_boxes(logits, boxes, [Extent((40, 100), (64, 128))], 300)
    assert len(all_of_them.scores) == 6


@pytest.mark.parametrize("images", [[0], [1], [1, 1], [0, 1, 2]])
def test_losses_of_any_objects_reach_every_parameter(images):
    dino, maps = make(), pick(make_maps(), *images)
    losses = dino.losses(maps, [EXTENTS[i] for i in images], [OBJECTS[i] for i in images])
    names = ["encoder", "layer1", "layer2", "denoising1", "denoising2"]
    assert sorted(losses) == sorted(f"{name}_{term}" for name in names for term in ("class", "box", "giou"))
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    without = {name for name, p in dino.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert without == set()
    if not any(len(OBJECTS[i].labels) for i in images):
        assert all(v.detach() == 0 for name, v in losses.items() if "box" in name or "denoising" in name)


def test_objects_of_a_batch_share_what_losses_are_divided_by():
    """Three objects, each found once: of one layer, the mean over the images by their objects."""
    dino, maps = make(), make_maps()
    together = dino.losses(maps, EXTENTS, OBJECTS)
    alone = [dino.losses(pick(maps, i), [EXTENTS[i]], [OBJECTS[i]]) for i in (0, 2)]
    for name in ("encoder_box", "layer1_giou", "layer2_box"):
        torch.testing.assert_close(together[name], (2 * alone[0][name] + alone[1][name]) / 3)


def test_denoising_is_drawn_from_torch_or_given():
    dino, maps = make(), make_maps()
    torch.manual_seed(5)
    first = dino.losses(maps, EXTENTS, OBJECTS)
    torch.manual_seed(5)
    draws = draw(2 * 3 * 3, 4)  # three groups of six queries over two objects, twice the three objects each
    given = dino.losses(maps, EXTENTS, OBJECTS, draws=draws)
    other = dino.losses(maps, EXTENTS, OBJECTS)
    for name, loss in first.items():
        torch.testing.assert_close(given[name], loss)
        assert ("denoising" not in name) == torch.allclose(other[name], loss), name


def test_queries_do_not_see_what_denoises():
    """Predictions of the others are those without."""
    dino, maps = make(), make_maps()
    with torch.no_grad():
        memory = dino.encode(maps, EXTENTS)
        expected = dino.predict(dino.decode(memory, dino.select(memory)))
        matched = dino.match(maps, EXTENTS, OBJECTS)
    torch.testing.assert_close(matched.found.logits[1:], expected.logits)
    torch.testing.assert_close(matched.found.boxes[1:], expected.boxes)


def test_a_layer_learns_through_the_boxes_of_the_next_but_not_through_where_it_looked():
    """Look forward twice: the first box head hears of the second layer's boxes; the encoder's boxes are told
    by their own loss alone."""
    dino = make()
    matched = dino.match(make_maps(), EXTENTS, OBJECTS)
    first, selecting = dino.box_heads[0][0].weight, dino.box_heads[-1][0].weight
    of_second = torch.autograd.grad(matched.found.boxes[2].sum(), [first, selecting], allow_unused=True)
    assert of_second[0].abs().sum() > 0
    assert not of_second[1].any()


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_single_precision_gives_what_double_gives_on_both_paths(path):
    maps = make_maps()
    expected = make().losses(maps, EXTENTS, OBJECTS, draws=draw(18, 4, generator=torch.Generator()))
    with prefer(path):
        single = make(torch.float32).losses(
            [x.float() for x in maps], EXTENTS, OBJECTS, draws=draw(18, 4, generator=torch.Generator())
        )
    for name, loss in single.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), expected[name], rtol=1e-3, atol=1e-4)


def test_half_precision_parameters_give_boxes_scores_and_losses_in_single():
    dino, maps = make(torch.bfloat16), make_maps(torch.float32)
    assert all(x.dtype == torch.float32 for found in dino.detect(maps, EXTENTS) for x in found[:2])
    losses = dino.losses(maps, EXTENTS, OBJECTS)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert dino.queries.grad.isfinite().all()


def test_detecting_asks_the_last_layer_alone_for_classes():
    dino, asked = make(), []
    for i, head in enumerate(dino.class_heads):
        head.register_forward_hook(lambda *_, i=i: asked.append(i))
    dino.detect(make_maps(), EXTENTS)
    assert asked == [2, 1]  # of the encoder, and of the last layer


def test_many_cells_are_encoded_in_parts_to_the_same_result(monkeypatch):
    dino, maps = make(), make_maps()
    with torch.no_grad():
        whole = dino.encode(maps, EXTENTS).cells
        calls = []

        def in_parts(function, *tokens):
            parts = list(zip(*(x.split(7, 1) for x in tokens), strict=True))
            calls.extend(parts)
            return torch.cat([function(*part) for part in parts], 1)

        monkeypatch.setattr("stepwell.heads.dino_transformer.in_parts", in_parts)
        torch.testing.assert_close(dino.encode(maps, EXTENTS).cells, whole)
    assert len(calls) == 12  # of 64 + 16 + 4 cells


def test_it_is_built_and_run_without_numbers():
    with torch.device("meta"):
        dino = DinoConfig(**SMALL).build([5, 6], [8, 16], num_classes=4)
        maps = [x.to("meta") for x in make_maps(torch.float32)]
        found = dino.detect(maps, EXTENTS)
    assert [x.boxes.shape for x in found] == [(7, 4)] * 3


def test_starting_values_are_the_official_ones():
    torch.manual_seed(0)
    dino = DinoConfig(**{**SMALL, "dim": 64, "num_queries": 500}).build([5], [16], num_classes=200)
    for head in dino.class_heads:
        torch.testing.assert_close(head.bias, torch.full((200,), -4.59512))
    for head in dino.box_heads:
        assert not head[-1].weight.any()
        assert not head[-1].bias.any()
        assert head[0].weight.any()
    for table in (dino.queries, dino.label_embedding.weight):
        assert 0.9 < table.std() < 1.1
    attn = dino.decoder.layers[0].self_attn
    for weight, fans in (
        (attn.qkv.weight, 4 * 64),
        (attn.proj.weight, 128),
        (dino.memory_proj.weight, 128),
    ):
        bound = (6 / fans) ** 0.5
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not attn.qkv.bias.any()
    assert not attn.proj.bias.any()
    offsets = dino.encoder.layers[0].attn.offsets
    assert not offsets.weight.any()
    assert (
        offsets.bias.view(4, 3, 2, 2)[0, :, 1].tolist() == [[2, 0]] * 3
    )  # head 0 looks right, on each level


def test_the_defaults_are_the_published_ones():
    config = DinoConfig()
    assert (config.dim, config.num_queries, config.encoder_layers, config.decoder_layers) == (256, 900, 6, 6)
    assert (config.num_levels, config.num_heads, config.num_points, config.ffn_dim) == (4, 8, 4, 2048)
    assert (config.cell_temperature, config.box_temperature, config.max_detections) == (20, 10000, 300)
    denoising, cost, loss = config.denoising, config.cost, config.loss
    assert (denoising.num_queries, denoising.label_noise, denoising.box_noise) == (100, 0.5, 1)
    assert (cost.label, cost.box, cost.giou, cost.alpha, cost.gamma) == (2, 5, 2, 0.25, 2)
    assert (loss.label, loss.box, loss.giou, loss.alpha, loss.gamma) == (1, 5, 2, 0.25, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 18}, "multiple of 4"),
        ({"num_heads": 3}, "dim 16 does not divide into num_heads 3"),
        ({"self_attention_heads": 5}, "self_attention_heads 5"),
        ({"norm_groups": 7}, "norm_groups 7"),
        ({"num_queries": 0}, "greater than 0"),
        ({"num_query": 3}, "num_query"),
        ({"num_levels": 1}, "2 maps do not make 1 levels"),
    ],
)
def test_settings_that_make_no_head_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        DinoConfig(**{**SMALL, **changes}).build([5, 6], [8, 16], num_classes=4)


def test_widths_and_strides_must_tell_the_same_maps():
    with pytest.raises(ValueError, match="2 widths and 1 strides"):
        DinoConfig().build([5, 6], [8], num_classes=4)


def test_inputs_that_do_not_fit_are_refused():
    dino, maps = make(), make_maps()
    with pytest.raises(ValueError, match="2 maps and got 1"):
        dino.detect(maps[:1], EXTENTS)
    with pytest.raises(ValueError, match=r"\[3, 3\] images came with 2 extents"):
        dino.detect(maps, EXTENTS[:2])
    with pytest.raises(ValueError, match="objects of 2 images came with 3 extents"):
        dino.losses(maps, EXTENTS, OBJECTS[:2])
    wrong = [OBJECTS[0]._replace(labels=torch.tensor([1, 4])), *OBJECTS[1:]]
    with pytest.raises(ValueError, match=r"4 classes are 0 to 3, got \[4\]"):
        dino.losses(maps, EXTENTS, wrong)


def test_an_image_of_few_cells_has_as_many_queries_as_cells():
    dino = make(num_queries=85)
    memory = dino.encode(make_maps(), EXTENTS)
    assert dino.select(memory).boxes.shape == (3, 84, 4)
    assert all(len(found.scores) == 7 for found in dino.detect(make_maps(), EXTENTS))
    losses = dino.losses(make_maps(), EXTENTS, OBJECTS)
    assert all(loss.isfinite() for loss in losses.values())
