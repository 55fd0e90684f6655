"""Parts of a model, frozen or learning, and their groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepwell.train.groups import freeze_all_but, frozen_norms, parameter_groups, part_of
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task


@pytest.fixture(scope="module")
def task():
    recipe = load_recipe("reader_smoke")
    return find_task(recipe.task)(recipe, recipe.stages[1])


@pytest.fixture(scope="module")
def model(task) -> nn.Module:
    return task.build()


@pytest.fixture(scope="module")
def parts(task, model):
    return task.parts(model)


def learning(model: nn.Module, parts) -> set[str]:
    return {part_of(name, parts) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_parameter_belongs_to_a_part(model, parts):
    roots = {part_of(name, parts).split(".")[0] for name, _ in model.named_parameters()}
    assert roots == {"vision", "projector", "language", "line_head"}


def test_parts_are_told_apart_by_whole_names(model, parts):
    freeze_all_but(model, ["vision.branches.1", "projector"], parts)
    assert {
        ".".join(name.split(".")[:3]) for name in learning(model, parts) if name.startswith("vision")
    } == {"vision.branches.1"}
    assert not any(name.startswith("language") for name in learning(model, parts))
    freeze_all_but(model, ["vision"], parts)
    assert {name.split(".")[0] for name in learning(model, parts)} == {"vision"}
    assert any(name.startswith("vision.interactions.0.") for name in learning(model, parts))


def test_unknown_parts_are_refused(model, parts):
    with pytest.raises(ValueError, match=r"'vision.branch'.*language, line_head, projector, vision"):
        freeze_all_but(model, ["vision.branch"], parts)


@pytest.mark.parametrize("part", ["visoin", "language", "vision.branches.7"])
def test_a_rate_of_what_does_not_learn_is_refused(model, parts, part):
    freeze_all_but(model, ["vision", "projector"], parts)
    with pytest.raises(ValueError, match=rf"that learns is called '{part}'; its parts are projector, vision"):
        parameter_groups(model, parts, lr=1.0, part_lrs={"vision": 0.5, part: 0.5}, weight_decay=0.1)


def test_every_learning_parameter_is_in_exactly_one_group(model, parts):
    freeze_all_but(model, ["vision", "projector"], parts)
    groups = parameter_groups(model, parts, lr=1.0, part_lrs={"vision": 0.5}, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_the_longest_part_name_gives_the_rate(model, parts):
    freeze_all_but(model, ["vision", "projector", "language"], parts)
    rates = {"vision": 0.5, "vision.branches.0": 0.25, "language": 0.125}
    groups = parameter_groups(model, parts, lr=1.0, part_lrs=rates, weight_decay=0.1)
    rate = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    expected = {"vision.branches.0": 0.25, "vision": 0.5, "language": 0.125, "projector": 1.0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = next(part for part in expected if part_of(name, parts).startswith(part + "."))
        assert rate[id(parameter)] == expected[part], name


def test_only_matrices_and_kernels_decay(model, parts):
    freeze_all_but(model, ["vision", "projector", "language"], parts)
    groups = parameter_groups(model, parts, lr=1.0, part_lrs={}, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_norm = isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__
            if is_norm or name == "bias" or "gamma" in name:
                assert id(parameter) not in decayed
            elif isinstance(module, nn.Linear | nn.Conv2d) and parameter.requires_grad:
                assert id(parameter) in decayed


def test_batch_norms_are_frozen_with_their_weights():
    module = nn.ModuleDict(
        {"body": nn.BatchNorm2d(2), "head": nn.BatchNorm2d(2), "bare": nn.BatchNorm2d(2, affine=False)}
    )
    freeze_all_but(module, ["body", "head"], {}, ["body"])
    assert frozen_norms(module) == [module["body"]]
    assert frozen_norms(module, all_norms=True) == [module["body"], module["head"]]
    with pytest.raises(ValueError, match="nothing learns: body, head of head are frozen"):
        freeze_all_but(module, ["head"], {}, ["body", "head"])


def test_frozen_parameters_stay_as_they_are(model, parts):
    freeze_all_but(model, ["projector"], parts)
    optimiser = torch.optim.SGD(parameter_groups(model, parts, lr=1.0, part_lrs={}, weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    changed = {
        part_of(n, parts).split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])
    }
    assert changed == {"projector"}
