"""What a recipe would train, told without training it."""

from __future__ import annotations

import pytest
import yaml
from shapes import write_coco
from tiny import recipe_of

from stepwell import cli
from stepwell.train.dry_run import _loss, dry_run
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task

KINDS = (
    *("piip_llava_plus_convnext_l_clip_l_1024_336_7b", "llava_next", "llava_hr", "uhd_v2", "inf_llava"),
    *("piip_det_tsb_1568_1120_672", "piip_det_dino_sbl_1792_1120_672", "piip_seg_h6b_512_512"),
    *("piip_cls_tsb_368_192_128", "piip_cls_b_512_256_128", "uhd_v2_upsampler", "reader_tiny"),
)


def cells(text, part):
    """Of the rows of a part, in the tables of the model and of the stages."""
    return [line.split() for line in text.splitlines() if line.split()[:1] == [part]]


def test_parts_rates_and_counts_are_those_of_the_training():
    text = dry_run("reader_smoke", ["stages.answer.optimiser.part_lrs={vision.branches.1: 5.0e-5}"])
    recipe = load_recipe("reader_smoke")
    module = find_task("reader")(recipe, recipe.stages[0]).build()
    count = sum(parameter.numel() for parameter in module.model.language_model.parameters()) / 1e6
    model, look, answer = cells(text, "language")
    assert model[1:] == [f"{count:.2f}", "random", "weights"]
    assert look[1:] == ["0.00", "of", f"{count:.2f}", "frozen"]
    assert answer[1:] == [f"{count:.2f}", "of", f"{count:.2f}", "0.001", "0", "to", "0.01"]
    assert [row[4] for row in cells(text, "vision.branches.1")[1:]] == ["0.002", "5e-05"]
    total = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    assert cells(text, "all") == [["all", f"{total:.2f}"]]
    assert "stage look: 2 steps of 2 samples (2 x 1 x 1 processes)" in text


def test_the_first_sample_is_rendered_with_its_answers_marked():
    text = dry_run("reader_smoke")
    recipe = load_recipe("reader_smoke")
    task = find_task("reader")(recipe, recipe.stages[0])
    messages = task.source(recipe.stages[0].data[0])[0].messages
    for message in messages[1::2]:
        assert f">>>{message['content']}<|im_end|><<<" in text
    row = task.prepare(task.source(recipe.stages[0].data[0])[0]).example.row
    placeholders = int((row.ids == task.processor.image_token_id).sum())
    assert f"<image: {placeholders} tokens>" in text
    assert f"the first sample has {len(row.ids)} tokens" in text


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_that_of_one_row_where_samples_are_packed(packed):
    recipe = load_recipe("reader_smoke")
    module = find_task("reader")(recipe, recipe.stages[1]).outline()
    layout = module.model.vision.geometry.layout((64, 64))
    length = layout.num_visual + 20
    shapes = []
    module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    loss = _loss(module, layout, 3, length, packed=packed)
    assert shapes == [(1, 3 * length) if packed else (3, length)]
    assert loss.shape == ()


def test_nothing_is_written(tmp_path, capsys):
    recipe = load_recipe("reader_smoke").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**recipe, "output": str(tmp_path / "runs")}))
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "nothing is trained now" in out
    assert err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run", "--set", "stages.look.steps=0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_training_would_refuse_or_leave_out_is_told(tmp_path):
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "odd.json").write_text('[{"image": 5, "conversations": []}]')
    data = "stages.look.data=[{kind: conversations, path: %s/%s.json}]"
    for name, complaint in (("none", "there is none"), ("odd", "it has no turns")):
        text = dry_run("reader_smoke", [data % (tmp_path, name)])
        assert f"the first sample cannot be used: {complaint}" in text
    validation = "stages.look.validation=[{kind: conversations, path: nowhere.json}]"
    text = dry_run("reader_smoke", [validation])
    assert "validation: nowhere.json: nowhere.json: no such file or directory" in text
    two = "stages.look.data=[{kind: drawn, weight: 2}, {kind: drawn, seed: 2}]"
    with pytest.raises(ValueError, match="give a weight to every entry, or to none"):
        dry_run("reader_smoke", [two])


def test_a_detector_with_its_data(tmp_path):
    annotations = write_coco(tmp_path / "data", images=3)
    data = {"kind": "coco", "annotations": str(annotations)}
    text = dry_run(recipe_of("detect", tmp_path, data))
    assert "stage shapes: 4 steps of 2 samples" in text
    assert cells(text, "head")[0][2:] == ["random", "weights"]
    assert any(line.startswith("data: kind=coco") and line.endswith(" samples") for line in text.splitlines())


def test_what_is_not_here_is_named_and_the_rest_is_told():
    text = dry_run("llava_1_5")
    assert "lmsys/vicuna-7b-v1.5 is not on this machine: sizes are the published" in text
    assert cells(text, "language")[0][1:] == ["6738.42", "lmsys/vicuna-7b-v1.5"]
    assert cells(text, "vision.branches.0")[0][2] == "openai/clip-vit-large-patch14-336"
    assert "an image of 336 x 336 gives 576 visual tokens" in text
    assert "images=data/llava_pretrain" in text
    assert "not on this machine" in text
    with pytest.raises(OSError, match="connect"):
        dry_run("llava_1_5", ["model.parts.language=nobody/nothing"])


def test_adapters_on_what_is_not_here_learn_in_its_place():
    text = dry_run("llava_1_5", ["model.lora={parts: [language], rank: 8}"])
    linear = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # rows and columns of the layers
    (model, *stages) = cells(text, "language")
    added = 8 * linear / 1e6
    assert float(model[1]) == pytest.approx(6738.42 + added, abs=0.02)
    assert stages[-1][1:4] == [f"{added:.2f}", "of", model[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_shipped_recipes_of_every_kind_can_be_looked_at(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = dry_run(name)
    for stage in load_recipe(name).stages:
        assert f"stage {stage.name}: " in text
    assert cells(text, "all")
