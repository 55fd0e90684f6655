"""Schedules of learning rates, at chosen steps, against numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from timm.scheduler import CosineLRScheduler

from stepwell.train.arguments import training_arguments
from stepwell.train.recipe import load_recipe
from stepwell.train.schedules import Run, Steps, build_schedule, checked_arguments

FULL = 2e-4


def optimiser_of(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates])


def rates(name, run, *, rates=(FULL,), **arguments):
    """Of every group, at every step of a stage."""
    optimiser = optimiser_of(*rates)
    schedule = build_schedule(optimiser, checked_arguments(name, arguments), run)
    told = []
    for _ in range(run.steps):
        told.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    return torch.tensor(told, dtype=torch.float64)


def run_of(steps, *, epoch_steps=100.0, warmup=0, in_epochs=True):
    return Run(steps=steps, epoch_steps=epoch_steps, warmup=warmup, in_epochs=in_epochs)


def test_steps_of_a_detector():
    """12 epochs of 100 steps, milestones at 8 and 11, 500 steps of warm-up from a thousandth."""
    told = rates("step", run_of(1200, warmup=500), milestones=(8, 11))[:, 0]
    for step, share in [
        (0, 0.001),
        (1, 0.001 + 0.999 / 500),
        (250, 0.5005),
        (499, 1 - 0.999 / 500),
        (500, 1),
        (799, 1),
        (800, 0.1),
        (1099, 0.1),
        (1100, 0.01),
        (1199, 0.01),
    ]:
        assert told[step] == pytest.approx(FULL * share, rel=1e-9), step


def test_steps_of_a_stage_that_counts_steps():
    run = run_of(30, in_epochs=False)
    told = rates("step", run, milestones=(10, 20), gamma=0.5, warmup_ratio=0.3)[:, 0] / FULL
    assert told[[0, 9, 10, 19, 20, 29]].tolist() == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


def test_milestones_may_come_in_any_order():
    run = Run(steps=10, epoch_steps=1, warmup=0, in_epochs=False)
    rates = [
        [Steps(milestones=order).rate(step, 1.0, run) for step in range(10)] for order in ((3, 8), (8, 3))
    ]
    assert rates[0] == rates[1]


def test_a_milestone_within_a_step_comes_behind_it():
    told = rates("step", run_of(30, epoch_steps=7.5), milestones=(1, 2.2))[:, 0] / FULL  # steps 7.5, 16.5
    assert told[[7, 8, 16, 17]].tolist() == pytest.approx([1, 0.1, 0.1, 0.01])


def test_a_warm_up_starts_from_its_ratio():
    told = rates("step", run_of(10, warmup=4), milestones=(1,), warmup_ratio=0.2)[:, 0] / FULL
    assert told[:5].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_line_of_a_segmenter():
    """80000 iterations, 1500 of warm-up from a millionth: in a line to nothing, of which a part is had."""
    optimiser = optimiser_of(4e-5)
    line, run = checked_arguments("line", {}), run_of(80000, warmup=1500, in_epochs=False)
    schedule = build_schedule(optimiser, line, run)
    (factor,) = schedule.lr_lambdas
    for step, share in [
        (0, 1e-6),
        (750, (1 - 750 / 80000) * (0.5 + 0.5e-6)),
        (1499, (1 - 1499 / 80000) * (1 - (1 - 1e-6) / 1500)),
        (1500, 1 - 1500 / 80000),
        (40000, 0.5),
        (79999, 1 / 80000),
        (80000, 0),
    ]:
        assert factor(step) == pytest.approx(share, rel=1e-9, abs=1e-15), step
    assert optimiser.param_groups[0]["lr"] == pytest.approx(4e-11)
    (raised,) = build_schedule(
        optimiser_of(1.0), checked_arguments("line", {"warmup_ratio": 0.5}), run
    ).lr_lambdas
    assert raised(0) == 0.5


def deit(lr, epochs=20):
    """What DeiT's training loop sets, epoch by epoch, through timm."""
    optimiser = optimiser_of(lr)
    schedule = CosineLRScheduler(
        optimiser, t_initial=epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, warmup_prefix=False
    )
    told = []
    for epoch in range(epochs):
        told.append(optimiser.param_groups[0]["lr"])
        schedule.step(epoch)
    return told


def test_the_cosine_of_a_classifier_lags_an_epoch():
    """Two groups with the same floor: the branches at 3e-5, the rest at 3e-4."""
    told = rates("epoch_cosine", run_of(80, epoch_steps=4), rates=(3e-5, 3e-4))
    assert all(torch.equal(told[4 * i], told[4 * i + j]) for i in range(20) for j in range(4))
    epochs = told[::4]
    for group, lr in enumerate((3e-5, 3e-4)):
        assert epochs[:, group].tolist() == pytest.approx(deit(lr), rel=1e-9)
        assert epochs[[0, 1], group].tolist() == pytest.approx([1e-6, 1e-6])
        assert epochs[2, group] == pytest.approx(1e-6 + (lr - 1e-6) / 5)
        assert epochs[6, group] == pytest.approx(1e-5 + (lr - 1e-5) * (1 + math.cos(math.pi / 4)) / 2)
        last = (1 + math.cos(math.pi * 18 / 20)) / 2
        assert epochs[19, group] == pytest.approx(1e-5 + (lr - 1e-5) * last)


def test_the_cosine_without_a_lag():
    arguments = {"start": 1e-4, "floor": 0.0, "warmup_epochs": 2, "lag": False}
    told = rates("epoch_cosine", run_of(20, epoch_steps=2), **arguments)[::2, 0]
    expected = [1e-4, 1.5e-4] + [FULL * (1 + math.cos(math.pi * e / 10)) / 2 for e in range(2, 10)]
    assert told.tolist() == pytest.approx(expected)
    plain = rates("epoch_cosine", run_of(2, epoch_steps=1), warmup_epochs=0, lag=False)[:, 0]
    assert plain[0] == pytest.approx(FULL)


def test_epochs_of_uneven_steps():
    told = rates("epoch_cosine", run_of(10, epoch_steps=2.5), lag=False, warmup_epochs=4, start=0.0)[:, 0]
    expected = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    assert (told / FULL * 4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "arguments"), [("step", {"milestones": [1, 2]}), ("line", {}), ("epoch_cosine", {})]
)
def test_a_schedule_goes_on_where_it_was(name, arguments):
    run = run_of(40, epoch_steps=5, warmup=12)
    whole = rates(name, run, rates=(1e-3, 1e-2), **arguments)

    def built(lrs):
        optimiser = optimiser_of(*lrs)
        return optimiser, build_schedule(optimiser, checked_arguments(name, arguments), run)

    optimiser, schedule = built((1e-3, 1e-2))
    for _ in range(17):
        optimiser.step()
        schedule.step()
    saved = optimiser.state_dict(), schedule.state_dict()
    again, behind = built((1e-3, 1e-2))
    again.load_state_dict(saved[0])
    behind.load_state_dict(saved[1])
    for step in range(17, 40):
        assert [group["lr"] for group in again.param_groups] == whole[step].tolist()
        again.step()
        behind.step()


def test_a_schedule_built_over_a_loaded_optimiser_starts_from_the_full_rate():
    optimiser = optimiser_of(1e-7)
    optimiser.param_groups[0]["initial_lr"] = FULL
    build_schedule(optimiser, checked_arguments("line", {}), run_of(10, in_epochs=False))
    assert optimiser.param_groups[0]["lr"] == FULL


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("step", {}, "milestones"),
        ("step", {"milestones": [-1]}, "milestones"),
        ("step", {"milestones": [1], "factor": 0.1}, "factor"),
        ("line", {"power": 2}, "power"),
        ("line", {"warmup_ratio": "little"}, "warmup_ratio"),
        ("epoch_cosine", {"warmup_epochs": -1}, "warmup_epochs"),
    ],
)
def test_wrong_arguments_are_named_in_a_line(tmp_path, name, arguments, field):
    with pytest.raises(ValidationError, match=field):
        checked_arguments(name, arguments)
    recipe = load_recipe(
        "piip_det_tsb_1568_1120_672", [f"stages.coco.schedule.{k}={v}" for k, v in _set(name, arguments)]
    )
    with pytest.raises(ValueError, match=rf"^stages\.coco\.schedule\.arguments: .*{field}") as told:
        training_arguments(recipe, recipe.stages[0], tmp_path, steps=1, seed=0)
    assert "\n" not in str(told.value)


def _set(name, arguments):
    yield "name", name
    yield "arguments", str(arguments).replace("'", '"')
