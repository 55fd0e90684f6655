"""Official PIIP names and where they end up."""

from __future__ import annotations

import pytest
import torch

from stepwell.fuse.interaction import Interaction, InteractionConfig
from stepwell.fuse.merge import BranchMerge, ProjectorConfig, TokenMerge, dense_stacks, linear_stacks
from stepwell.heads.neck import SimplePyramid
from stepwell.keys.engine import Rename, convert, plan
from stepwell.keys.piip import (
    classifier_rules,
    encoder_rules,
    features_rules,
    interaction_rules,
    linear_merge_rules,
    merge_rules,
    pyramid_rules,
    token_merge_rules,
    vision_rules,
)

INJECTOR = [
    *(f"{norm}.{kind}" for norm in ("query_norm", "feat_norm", "ffn_norm") for kind in ("weight", "bias")),
    *(
        f"attn.{part}.{kind}"
        for part in ("sampling_offsets", "attention_weights")
        for kind in ("weight", "bias")
    ),
    *(f"attn.{part}.{kind}" for part in ("value_proj", "output_proj") for kind in ("weight", "bias")),
    *(f"ffn.{part}.{kind}" for part in ("fc1", "fc2", "dwconv.dwconv") for kind in ("weight", "bias")),
]
ANY_BRANCH = [Rename(r"layer\.(weight|bias)", r"\g<0>")]


def official_interaction(num_branches, gate):
    return [
        f"interaction_units_{a}{a + 1}.{name}"
        for a in range(1, num_branches)
        for direction in ("branch1to2", "branch2to1")
        for name in (
            f"{direction}_proj.weight",
            f"{direction}_proj.bias",
            *(f"{direction}_injector.{name}" for name in (*INJECTOR, f"ca_{gate}", f"cffn_{gate}")),
        )
    ]


@pytest.mark.parametrize("gate", ["gamma", "weight"])
@pytest.mark.parametrize("num_branches", [2, 3, 4, 6])
def test_every_name_of_an_interaction_fills_every_tensor_of_ours(num_branches, gate):
    result = plan(official_interaction(num_branches, gate), interaction_rules(num_branches))
    ours = Interaction([16 * k for k in range(num_branches, 0, -1)], InteractionConfig(num_heads=2))
    assert result.unknown == []
    assert result.targets.keys() == ours.state_dict().keys()


def test_finest_pair_is_our_first_unit_and_its_first_message_goes_to_the_larger_network():
    names = [
        "interaction_units_34.branch2to1_proj.weight",
        "interaction_units_12.branch1to2_injector.ca_gamma",
    ]
    result = plan(names, interaction_rules(4))
    assert result.targets["units.0.messages.0.project.weight"].sources == (names[0],)
    assert result.targets["units.2.messages.1.injector.gate"].sources == (names[1],)


def test_branches_count_from_one_there_and_from_zero_here():
    names = ["branch2.layer.weight", "interactions.1.interaction_units_12.branch1to2_proj.bias"]
    result = plan(names, encoder_rules([ANY_BRANCH] * 2, 2))
    assert list(result.targets) == [
        "encoder.branches.1.layer.weight",
        "encoder.interactions.1.units.0.messages.1.project.bias",
    ]
    assert plan(["branch3.layer.weight"], encoder_rules([ANY_BRANCH] * 2, 2)).unknown


def test_scalars_of_a_merge_become_one_vector_in_branch_order():
    names = {f"w{k}": torch.tensor(float(k)) for k in (3, 1, 2)}
    assert convert(names, merge_rules(3, "merge."))["merge.weights"].tolist() == [1, 2, 3]
    assert plan(["w1", "w2"], merge_rules(3, "merge.")).unknown == ["w1", "w2"]


def test_merges_after_interactions_come_before_the_last_one():
    names = [
        f"{prefix}{k}.{part}"
        for prefix in ("intermediate_merging_0_branch", "intermediate_merging_10_branch", "merge_branch")
        for k in (1, 2)
        for part in ("0.weight", "1.weight", "1.bias")
    ]
    names += [
        f"{prefix}{k}"
        for prefix in ("intermediate_merging_0_w", "intermediate_merging_10_w", "w")
        for k in (1, 2)
    ]
    result = plan(names, features_rules([ANY_BRANCH] * 2, 0, merge_after=[0, 10]))
    assert result.unknown == []
    assert result.targets["merges.1.stacks.1.0.weight"].sources == (
        "intermediate_merging_10_branch2.0.weight",
    )
    assert result.targets["merges.2.weights"].sources == ("w1", "w2")


def test_merges_and_pyramid_of_a_detector_fill_ours():
    merge = BranchMerge(dense_stacks((64, 32)))
    official = [f"merge_branch{k}.{i}.weight" for k in (1, 2) for i in (0, 1, 3, 4)]
    official += [f"merge_branch{k}.{i}.bias" for k in (1, 2) for i in (1, 4)] + ["w1", "w2"]
    assert plan(official, merge_rules(2, "")).targets.keys() == merge.state_dict().keys()
    official = [
        f"{name}.{kind}" for name in ("fpn1.0", "fpn1.1", "fpn1.3", "fpn2.0") for kind in ("weight", "bias")
    ]
    neck = SimplePyramid([64] * 4)
    result = plan(official, pyramid_rules(neck.operations, target=""))
    assert result.targets.keys() == neck.state_dict().keys()


def test_a_pyramid_without_its_finest_map_drops_that_stage_with_a_reason():
    result = plan(["fpn1.0.weight", "up2.0.weight"], pyramid_rules(["up2", "same", "maxpool2"]))
    assert list(result.targets) == ["neck.stages.0.0.weight"]
    assert "not returned" in result.dropped["fpn1.0.weight"]


def test_merge_of_a_classifier_fills_ours():
    official = ["merge_branch1.weight", "merge_branch1.bias", "w1", "w2"]
    official += [f"merge_branch2.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    merge = BranchMerge(linear_stacks((64, 32)))
    assert plan(official, linear_merge_rules(2, "")).targets.keys() == merge.state_dict().keys()


def test_heads_come_before_encoders_that_know_no_final_norm():
    result = plan(
        ["branch2.norm.weight", "branch2.head.bias"], classifier_rules([ANY_BRANCH] * 2, 0, merged=False)
    )
    assert list(result.targets) == ["head.norms.1.weight", "head.classifiers.1.bias"]
    result = plan(["cls_norm.bias", "cls_head.weight"], classifier_rules([ANY_BRANCH] * 2, 0, merged=True))
    assert list(result.targets) == ["head.norm.bias", "head.classifier.weight"]


@pytest.mark.parametrize(("norm", "layers"), [("groupnorm", (1, 3, 6)), ("layernorm", (1, 5))])
def test_projector_fills_ours(norm, layers):
    official = [
        f"mm_projector.branch{k}.{i}.{kind}" for k in (1, 2, 3) for i in layers for kind in ("weight", "bias")
    ]
    result = plan(official, vision_rules([ANY_BRANCH] * 3, 0, norm=norm))
    ours = TokenMerge((8, 8, 8), 32, ProjectorConfig(norm=norm)).state_dict()
    assert result.targets.keys() == {f"projector.{name}" for name in ours}
    assert plan(["branch1.2.weight"], token_merge_rules(norm)).unknown
