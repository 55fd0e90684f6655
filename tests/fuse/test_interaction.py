"""What branches tell each other, in which order, and how an interaction starts out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from stepwell.fuse.interaction import (
    DIRECTIONS,
    ConvFfn,
    DeformableCrossAttention,
    Injector,
    Interaction,
    InteractionConfig,
    InteractionUnit,
    Message,
    RegularCrossAttention,
    reference_points,
)
from stepwell.ops.choose import prefer
from stepwell.ops.parts import MOST
from stepwell.structures import TokenMap

DIMS, SIZES = (24, 16, 8), ((2, 3), (4, 6), (5, 7))
SMALL = InteractionConfig(num_heads=2, num_points=2, drop_path=0.0)


def make_states(dims=DIMS, sizes=SIZES, batch=2):
    return [
        TokenMap(torch.randn(batch, h * w, d), (h, w), torch.randn(batch, 1, d))
        for d, (h, w) in zip(dims, sizes, strict=True)
    ]


def open_gates(module):
    for name, parameter in module.named_parameters():
        if "gate" in name:
            nn.init.normal_(parameter)
    return module.eval()


@pytest.mark.parametrize("attention", ["deformable", "regular"])
@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
def test_a_new_interaction_changes_nothing(attention, directions):
    states = make_states()
    interaction = Interaction(DIMS, replace(SMALL, attention=attention, directions=directions))
    for before, after in zip(states, interaction(states), strict=True):
        assert torch.equal(before.tokens, after.tokens)


@pytest.mark.parametrize("num_branches", [1, 2, 3, 4, 5])
def test_any_number_of_branches_keeps_grids_and_class_tokens(num_branches):
    dims, sizes = (
        [8 * (num_branches - i) for i in range(num_branches)],
        [(i + 1, i + 2) for i in range(num_branches)],
    )
    states = make_states(dims, sizes)
    updated = open_gates(Interaction(dims, SMALL))(states)
    for before, after in zip(states, updated, strict=True):
        assert (after.tokens.shape, after.size) == (before.tokens.shape, before.size)
        assert after.class_token is before.class_token
        assert num_branches == 1 or not torch.allclose(after.tokens, before.tokens)


def test_messages_of_a_unit_read_the_states_before_it():
    states = make_states()
    unit = open_gates(InteractionUnit(DIMS, [(1, 0), (0, 1)], SMALL))
    first, second = unit.messages
    updated = unit(states)
    assert torch.equal(updated[0].tokens, first(states).tokens)
    assert torch.equal(updated[1].tokens, second(states).tokens)


def test_units_read_what_the_unit_before_has_written_finest_pair_first():
    states = make_states()
    interaction = open_gates(Interaction(DIMS, SMALL))
    fine, coarse = interaction.units
    between = fine(states)
    assert torch.equal(between[0].tokens, states[0].tokens)
    for ours, expected in zip(interaction(states), coarse(between), strict=True):
        assert torch.equal(ours.tokens, expected.tokens)


def test_largest_network_hears_of_the_smallest_within_one_interaction():
    interaction = open_gates(Interaction(DIMS, SMALL))
    for message in interaction.modules():
        if isinstance(message, DeformableCrossAttention):
            nn.init.normal_(message.out.weight)
    states = make_states()
    changed = [*states[:2], states[2]._replace(tokens=states[2].tokens + torch.randn_like(states[2].tokens))]
    assert not torch.allclose(interaction(states)[0].tokens, interaction(changed)[0].tokens)


def test_the_five_types_of_table_xvii():
    directed = {
        name: [[list(unit) for unit in schedule(3, i)] for i in (0, 1)]
        for name, schedule in DIRECTIONS.items()
    }
    both = [[(2, 1), (1, 2)], [(1, 0), (0, 1)]]
    assert directed["adjacent"] == [both, both]
    assert directed["alternating"] == [[[(0, 1)], [(1, 2)]], [[(2, 1)], [(1, 0)]]]
    assert directed["cycle_down"][0] == [[(0, 1)], [(1, 2)], [(2, 0)]]
    assert directed["cycle_up"][0] == [[(2, 1)], [(1, 0)], [(0, 2)]]
    assert {direction for unit in directed["all_pairs"][0] for direction in unit} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }


@pytest.mark.parametrize("directions", sorted(DIRECTIONS))
@pytest.mark.parametrize("num_branches", [1, 2, 3, 5])
def test_a_unit_reaches_every_branch_at_most_once_and_none_hears_itself(directions, num_branches):
    for unit in DIRECTIONS[directions](num_branches, 1):
        assert len({target for _, target in unit}) == len(unit)
        for source, target in unit:
            assert source != target
            assert {source, target} <= set(range(num_branches))


def test_branches_without_interactions_stay_apart_and_have_no_weights_for_it():
    states = make_states()
    apart = Interaction(DIMS, replace(SMALL, directions="none"))
    assert not list(apart.parameters())
    assert all(a is b for a, b in zip(apart(states), states, strict=True))


def test_alternating_interactions_go_down_and_up_by_turns():
    config = replace(SMALL, directions="alternating")
    for index, first in ((0, (0, 1)), (1, (2, 1)), (2, (0, 1))):
        message = Interaction(DIMS, config, index=index).units[0].messages[0]
        assert (message.source, message.target) == first


def test_a_message_reads_normed_projections_and_equations_1_and_2_follow():
    states, message = make_states(), open_gates(Message((1, 0), DIMS, SMALL))
    source, target, injector = states[1], states[0], message.injector
    features = nn.functional.layer_norm(message.project(source.tokens), (24,), eps=1e-6)
    query = nn.functional.layer_norm(target.tokens, (24,), eps=1e-6)
    x = target.tokens + injector.gate * injector.attn(
        query, target.size, injector.attn.values_of(features), source.size
    )
    ffn = injector.ffn(nn.functional.layer_norm(x, (24,), eps=1e-6), target.size)
    torch.testing.assert_close(message(states).tokens, x + injector.ffn_gate * ffn)


def test_points_start_on_rays_around_the_query():
    attention = DeformableCrossAttention(8, 8, num_heads=4, num_points=3)
    offsets = attention.offsets.bias.view(4, 3, 2)
    right, down, left, up = [[x * k, y * k] for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1)) for k in (1.0,)]
    for head, ray in enumerate((right, down, left, up)):
        for k in range(3):
            assert offsets[head, k].tolist() == pytest.approx([(k + 1) * c for c in ray], abs=1e-6)
    diagonal = DeformableCrossAttention(8, 8, num_heads=8).offsets.bias.view(8, 4, 2)[1, 0]
    assert diagonal.tolist() == pytest.approx([1, 1])  # the longer axis is one cell, not the length


def test_official_initial_weights_of_an_interaction():
    torch.manual_seed(0)
    interaction = Interaction((256, 128), InteractionConfig(num_heads=4))
    linear, conv = (
        interaction.units[0].messages[0].project,
        interaction.units[0].messages[0].injector.ffn.conv,
    )
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.1)
    for bias in (linear.bias, conv.bias):
        assert bias.abs().max() == 0
    attention = interaction.units[0].messages[0].injector.attn
    limit = math.sqrt(6 / sum(attention.value.weight.shape))
    assert attention.value.weight.abs().max().item() == pytest.approx(limit, rel=0.01)
    assert attention.offsets.weight.abs().max() == attention.weights.weight.abs().max() == 0


def test_offsets_are_counted_in_cells_of_the_map_that_is_read():
    attention = DeformableCrossAttention(4, 4, num_heads=1, num_points=1)
    with torch.no_grad():
        for linear in (attention.value, attention.out):
            linear.weight.copy_(torch.eye(4))
        attention.offsets.bias.copy_(torch.tensor([1.0, 0.0]))  # one cell to the right
    features = torch.randn(1, 3 * 5, 4)
    read = attention(torch.randn(1, 3 * 5, 4), (3, 5), attention.values_of(features), (3, 5)).view(3, 5, 4)
    torch.testing.assert_close(read[:, :-1], features.view(3, 5, 4)[:, 1:])
    assert read[:, -1].abs().max() < 1e-5  # outside the map


@pytest.mark.parametrize("attention", ["deformable", "regular"])
def test_a_branch_too_large_to_be_read_at_once_says_the_same(attention):
    """More source tokens than a part holds: they become values part by part."""
    message = Message((1, 0), (8, 4), replace(SMALL, attention=attention))
    for parameter in message.parameters():
        nn.init.normal_(parameter, std=0.3)
    states = make_states(dims=(8, 4), sizes=((3, 4), (70, 67)))
    whole = message(states).tokens
    assert MOST < 2 * 70 * 67
    sizes = []
    message.injector.attn.value.register_forward_hook(lambda _, inputs, output: sizes.append(output.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(message(states).tokens, whole, rtol=1e-4, atol=1e-5)
        assert max(sizes) < sum(sizes) == 70 * 67
        with prefer("reference"):
            torch.testing.assert_close(message(states).tokens, whole, rtol=1e-4, atol=1e-5)
    assert sizes[-1] == 70 * 67


def test_reference_points_are_columns_and_rows_of_the_other_grid():
    x, y = reference_points((2, 4), (6, 2), device=torch.device("cpu"))
    assert x.tolist() == [-0.25, 0.25, 0.75, 1.25] * 2
    assert y.tolist() == [1.0] * 4 + [4.0] * 4


CUTS = torch.tensor([[0.25, 0.1, 0.5, 0.9], [-0.2, 0.0, 1.1, 0.3]], dtype=torch.float64)


def test_reference_points_in_a_box_of_the_other_grid():
    size, other = (3, 4), (6, 8)
    x, y = reference_points(size, other, CUTS, device=torch.device("cpu"), dtype=torch.float64)
    assert x.shape == y.shape == (2, 12)
    assert x[0, :4].tolist() == pytest.approx([8 * (0.25 + 0.25 * (i + 0.5) / 4) - 0.5 for i in range(4)])
    assert y[1, ::4].tolist() == pytest.approx([6 * 0.3 * (i + 0.5) / 3 - 0.5 for i in range(3)])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    same = reference_points(size, other, whole, device=torch.device("cpu"))
    for found, expected in zip(same, reference_points(size, other, device=torch.device("cpu")), strict=True):
        torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("target", [0, 1, 2])
def test_branches_meet_at_the_same_place_of_the_image(monkeypatch, target):
    """All branches but the last see the whole, the last one the cut: where a query looks is where it lies."""
    seen = {}
    sizes = [(4, 6), (6, 9), (5, 7)]

    def read(self, query, values, sizes, centre, unit=None):
        seen["centre"] = [axis.flatten(1) if axis.shape[0] == 2 else axis.flatten()[None] for axis in centre]
        return torch.zeros_like(query)

    monkeypatch.setattr("stepwell.layers.deformable.DeformableAttention.read", read)
    interaction = Interaction(DIMS, SMALL).double()
    states = [
        TokenMap(torch.randn(2, h * w, dim).double(), (h, w)) for (h, w), dim in zip(sizes, DIMS, strict=True)
    ]
    boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2).double()] * 2 + [CUTS]

    def place(axis, cells, box, first, last):
        """Cells of a grid that fills a box -> fractions of the whole."""
        return box[:, first, None] + (axis + 0.5) / cells * (box[:, last] - box[:, first])[:, None]

    messages = [m for unit in interaction.units for m in unit.messages if m.target == target]
    assert messages
    for message in messages:
        message(states, CUTS)
        x, y = seen["centre"]
        (height, width), box = sizes[message.source], boxes[message.source]
        own = torch.meshgrid(
            torch.arange(sizes[target][0]).double(), torch.arange(sizes[target][1]).double(), indexing="ij"
        )
        for axis, cells, index, first, last, side in ((x, width, 1, 0, 2, 1), (y, height, 0, 1, 3, 0)):
            expected = place(own[index].flatten()[None], sizes[target][side], boxes[target], first, last)
            torch.testing.assert_close(place(axis, cells, box, first, last), expected.expand(2, -1))


@pytest.mark.parametrize("attention", ["deformable", "regular"])
def test_a_cut_that_is_all_changes_nothing(attention):
    interaction = open_gates(Interaction(DIMS, replace(SMALL, attention=attention))).eval()
    states = make_states()
    whole = interaction(states, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2))
    for found, expected in zip(whole, interaction(states), strict=True):
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_cuts_of_a_batch_are_looked_at_each_by_itself(implementation):
    interaction = open_gates(Interaction(DIMS, SMALL)).double().eval()
    states = [state._replace(tokens=state.tokens.double()) for state in make_states()]
    with prefer(implementation), torch.no_grad():
        together = interaction(states, CUTS)
        for i in range(2):
            alone = interaction(
                [
                    state._replace(
                        tokens=state.tokens[i : i + 1],
                        class_token=None if state.class_token is None else state.class_token[i : i + 1],
                    )
                    for state in states
                ],
                CUTS[i : i + 1],
            )
            for found, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(found.tokens[i], expected.tokens[0])


def test_regular_attention_is_torchs_multi_head_attention():
    ours = RegularCrossAttention(12, 8, num_heads=3)
    theirs = nn.MultiheadAttention(12, 3, kdim=8, vdim=8, batch_first=True)
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key.weight)
        theirs.v_proj_weight.copy_(ours.value.weight)
        theirs.out_proj.load_state_dict(ours.out.state_dict())
        theirs.in_proj_bias.zero_()
    query, features = torch.randn(2, 6, 12), torch.randn(2, 20, 8)
    expected = theirs(query, features, features, need_weights=False)[0]
    torch.testing.assert_close(ours(query, (2, 3), ours.values_of(features), (4, 5)), expected)


def test_ffn_mixes_neighbours_on_the_querys_own_grid():
    ffn = ConvFfn(8, hidden_dim=4)
    tokens = torch.randn(1, 12, 8, requires_grad=True)
    ffn(tokens, (3, 4))[0, 5].sum().backward()  # the cell at row 1, column 1
    touched = tokens.grad.abs().sum(-1).view(3, 4) > 0
    assert touched.tolist() == [[True] * 3 + [False]] * 3


def test_drop_path_acts_on_the_ffn_and_not_on_attention():
    injector = open_gates(Injector(8, 8, replace(SMALL, ffn_ratio=0.5, drop_path=0.999)))
    query, values = torch.randn(3, 6, 8), injector.values_of(torch.randn(3, 6, 8))
    attended = query + injector.gate * injector.attn(injector.query_norm(query), (2, 3), values, (2, 3))
    torch.manual_seed(0)
    torch.testing.assert_close(injector.train()(query, (2, 3), values, (2, 3)), attended)


def test_without_projections_and_norms_there_are_no_such_parameters():
    interaction = Interaction(DIMS, replace(SMALL, project=False, norm=False, ffn_ratio=None))
    names = [name for name, _ in interaction.named_parameters()]
    assert not [name for name in names if "norm" in name or "project" in name or "ffn" in name]


def test_gradients_reach_every_parameter():
    interaction = open_gates(Interaction(DIMS, SMALL))
    for module in interaction.modules():
        if isinstance(module, DeformableCrossAttention):
            nn.init.normal_(module.weights.weight)
            nn.init.normal_(module.offsets.weight, std=0.1)
    sum(state.tokens.square().sum() for state in interaction(make_states())).backward()
    for name, parameter in interaction.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name  # noqa: PT018


def test_autocast_stays_close_to_full_precision():
    interaction, states = open_gates(Interaction(DIMS, SMALL)), make_states()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = interaction(states)
    for ours, exact in zip(half, interaction(states), strict=True):
        torch.testing.assert_close(ours.tokens.float(), exact.tokens, rtol=0.05, atol=0.05)


def test_points_and_weights_are_not_rounded_to_half_precision(monkeypatch):
    """The places of a large map are whole cells apart in bf16, and sums of rounded weights are not one."""
    attention, seen = DeformableCrossAttention(8, 8, num_heads=2, num_points=3).bfloat16(), {}
    nn.init.normal_(attention.weights.weight)
    nn.init.zeros_(attention.offsets.bias)

    def sample(value, sizes, x, y, weights):
        seen.update(x=x, y=y, weights=weights)
        return value.new_zeros(*x.shape[:2], 8)[..., : attention.value.out_features]

    monkeypatch.setattr("stepwell.layers.deformable.deform_attn", sample)
    attention(torch.randn(1, 300, 8).bfloat16(), (2, 150), torch.zeros(1, 600, 8).bfloat16(), (2, 300))
    assert (seen["x"][0, :150, 1, 2] - torch.arange(150) * 2 - 0.5).abs().max() < 1e-4
    assert (seen["y"][0, :, 1, 2] - torch.tensor([0.0, 1.0]).repeat_interleave(150)).abs().max() < 1e-4
    assert (seen["weights"].sum(-1) - 1).abs().max() < 1e-6


def test_what_cannot_be_built_is_refused_with_numbers():
    with pytest.raises(ValueError, match=r"24 with ratio 0\.5 has 12 channels"):
        DeformableCrossAttention(24, 24, num_heads=16, ratio=0.5)
    with pytest.raises(ValueError, match="24 does not divide into 16 heads"):
        RegularCrossAttention(24, 24, num_heads=16)
    with pytest.raises(ValueError, match="'deformable' or 'regular'"):
        InteractionConfig(attention="normal")
    with pytest.raises(ValueError, match="'adjacent', 'alternating'"):
        InteractionConfig(directions="up")
