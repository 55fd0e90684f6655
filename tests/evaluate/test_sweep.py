"""A sweep: a pyramid keeps its proportions, each size is a run of its own, and costs are those of flops/."""

from __future__ import annotations

import json
import sys
from functools import partial

import pytest
from PIL import Image

from stepwell import cli
from stepwell.evaluate.sweep import sweep
from stepwell.flops.report import report as count_costs
from stepwell.fuse.dual import EnhancementConfig
from stepwell.models.inf import InfConfig
from stepwell.models.plain import PlainConfig
from stepwell.weights.load import load

ROWS = [{"image": f"{i}.png", "question": "What?", "answers": ["x"]} for i in (0, 1, 2)]


def test_sizes_keep_the_proportions_of_a_pyramid(assistant):
    vision = assistant.model.config.vision
    assert vision.sizes_for(128) == [64, 128]
    assert vision.sizes_for(64) == [32, 64]
    assert vision.sizes_for(88) == [48, 88]  # 44, to whole cells of 16
    assert vision.sizes_for(16) == [16, 16]
    assert PlainConfig(encoder="vit_nano").sizes_for(96) == [96]


def test_each_size_is_evaluated_and_costed(model_folder, write, folder):
    open_model = partial(load, model_folder, device="cpu")
    points = sweep(
        open_model, write(*ROWS), [128, 64], metric="anls", output=folder / "out", max_new_tokens=2
    )
    assert [(point.size, point.sizes) for point in points] == [(64, [32, 64]), (128, [64, 128])]
    for point in points:
        at_size = open_model(vision={"sizes": point.sizes})
        answers = [json.loads(line) for line in (folder / "out" / str(point.size) / "answers.jsonl").open()]
        assert [answer["prediction"] for answer in answers] == [
            at_size.ask(folder / row["image"], "What?", max_new_tokens=2) for row in ROWS
        ]
        tokens = [at_size.layout(folder / row["image"]).num_visual for row in ROWS]
        assert point.report.visual_tokens.mean == pytest.approx(sum(tokens) / 3)
        costs = [
            count_costs(at_size.model.config.vision, size=(40, width), out_dim=32) for width in (60, 70, 80)
        ]
        assert point.paper_gflops == pytest.approx(sum(cost.gmacs for cost in costs) / 3)
        assert point.true_gflops == pytest.approx(sum(cost.gflops for cost in costs) / 3)
    told = json.loads((folder / "out" / "sweep.json").read_text())
    assert [entry["size"] for entry in told] == [64, 128]
    assert told[0]["score"] == points[0].report.scores.score
    assert (
        f"| 128 | 64, 128 | 3 | {points[1].report.scores.score:.4f} |"
        in (folder / "out" / "sweep.md").read_text()
    )


def test_images_of_one_input_may_cost_unequally(save, write, folder):
    """How many crops are encoded is in none of their inputs' sizes."""
    vision = InfConfig(
        encoder="vit_nano",
        size=32,
        resolutions=(32,),
        max_crops=4,
        small_input=True,
        enhancement=EnhancementConfig(perspectives="global", enhance="none", reduce="average"),
    )
    sizes = [(40, 40), (40, 120)]
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height)).save(folder / f"{i}.png")
    open_model = partial(load, save(vision, folder / "model"), device="cpu")
    (point,) = sweep(
        open_model, write(*ROWS[:2]), [32], metric="anls", output=folder / "out", max_new_tokens=1
    )
    costs = [count_costs(vision, size=size, out_dim=32).gflops for size in sizes]
    assert costs[0] != costs[1]
    assert point.true_gflops == pytest.approx(sum(costs) / 2)


def test_a_size_that_the_geometry_refuses_is_told_before_anything_is_asked(model_folder, write, folder):
    with pytest.raises(ValueError, match=r"^size 100 cannot be evaluated: .*a side of 100") as caught:
        sweep(
            partial(load, model_folder, device="cpu"),
            write(*ROWS),
            [64, 100],
            metric="anls",
            output=folder / "out",
        )
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_the_command_draws_the_sweep_or_says_what_that_needs(
    model_folder, write, folder, capsys, monkeypatch
):
    command = ["evaluate", str(model_folder), str(write(*ROWS)), "--metric", "anls", "--sizes", "64,128"]
    command += ["--output", str(folder / "out"), "--max-new-tokens", "2", "--device", "cpu"]
    assert cli.main(command) == 0
    with Image.open(folder / "out" / "sweep.png") as picture:
        assert min(picture.size) > 300
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["64", "128"]
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert err == "stepwell: drawing a sweep needs matplotlib: pip install 'stepwell[eval]'\n"
    assert not out  # nothing is evaluated that cannot be drawn
