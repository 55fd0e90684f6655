"""Recipes: bases, overrides, and one-line refusals."""

from __future__ import annotations

import pytest
import yaml

from stepwell.models.published.papers import find_published
from stepwell.train.recipe import load_recipe
from stepwell.train.shipped import recipe_names


def write(path, **fields):
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_how_to_run_it(name):
    assert load_recipe(name).name == name


def test_shipped_recipes_start_with_their_command():
    from importlib import resources

    for name in recipe_names():
        first = (resources.files("stepwell") / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
        assert first.startswith(f"# stepwell train {name} ")


def test_a_variant_changes_only_the_fields_it_names(tmp_path):
    path = write(tmp_path / "mine.yaml", base="reader_smoke", name="mine", model={"start_looking": False})
    base, mine = load_recipe("reader_smoke"), load_recipe(path)
    assert base.model.start_looking
    assert not mine.model.start_looking
    assert mine.model.text == base.model.text
    assert mine.stages == base.stages


def test_a_variant_changes_entries_of_lists_by_their_names(tmp_path):
    changes = {"answer": {"steps": 9, "optimiser": {"lr": 0.5}}, 0: {"data": {"drawn": {"weight": 2.0}}}}
    base, mine = (
        load_recipe(recipe)
        for recipe in ("reader_smoke", write(tmp_path / "mine.yaml", base="reader_smoke", stages=changes))
    )
    look, answer = mine.stages
    assert (answer.steps, answer.optimiser.lr) == (9, 0.5)
    assert answer.model_copy(update={"steps": 2, "optimiser": base.stages[1].optimiser}) == base.stages[1]
    assert answer.optimiser.part_lrs == base.stages[1].optimiser.part_lrs
    assert look.data[0] == base.stages[0].data[0].model_copy(update={"weight": 2.0})
    assert load_recipe("reader_smoke") == base
    with pytest.raises(ValueError, match=r"^recipe .*mine\.yaml: no entry 'later' in a list of 2$"):
        load_recipe(write(tmp_path / "mine.yaml", base="reader_smoke", stages={"later": {"steps": 3}}))


def test_bases_are_found_beside_the_file(tmp_path):
    write(tmp_path / "first.yaml", base="reader_smoke", seed=7)
    assert load_recipe(write(tmp_path / "second.yaml", base="first.yaml", workers=3)).seed == 7


def test_a_circle_of_bases_is_refused(tmp_path):
    write(tmp_path / "a.yaml", base="b.yaml")
    with pytest.raises(ValueError, match="its own base"):
        load_recipe(write(tmp_path / "b.yaml", base="a.yaml"))


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("seed=5", lambda r: r.seed, 5),
        ("stages.0.steps=9", lambda r: r.stages[0].steps, 9),
        ("stages.look.optimiser.lr=1e-4", lambda r: r.stages[0].optimiser.lr, 1e-4),  # which says none
        ("stages.answer.optimiser.lr=1e-4", lambda r: r.stages[1].optimiser.lr, 1e-4),
        ("stages.look.data.drawn.text=[9, 11]", lambda r: r.stages[0].data[0].text, (9, 11)),
        ("model.text.hidden_size=64", lambda r: r.model.text["hidden_size"], 64),
        ("stages.look.trainer={adam_epsilon: 1e-6}", lambda r: r.stages[0].trainer, {"adam_epsilon": 1e-6}),
        (
            "stages.look.trainer={a: .5e-6, b: -2E+3}",
            lambda r: r.stages[0].trainer,
            {"a": 5e-7, "b": -2000.0},
        ),
        (
            "stages.look.trainer={a: 1e, b: e-6, c: 1e-6x}",
            lambda r: [*r.stages[0].trainer.values()],
            ["1e", "e-6", "1e-6x"],
        ),
    ],
)
def test_overrides_reach_any_field(override, read, value):
    assert read(load_recipe("reader_smoke", [override])) == value


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("sead=5", "sead: Extra inputs"),
        ("stages.0.stepps=5", r"stages\.0\.stepps: Extra inputs"),
        ("stages.answer.steps=none", r"stages\.1\.steps"),
        ("stages.later.steps=1", "no entry 'later' in a list of 2"),
        ("stages.look.steps.deep=1", "stages.look.steps.deep: there is no 'deep' in the value 2"),
        ("seed", "a.b=c"),
        ("seed={", "--set seed: '{' is not YAML"),
        ("name=../elsewhere", "name: String should match"),
        ("name=..", "name: String should match"),
        ("stages.look.name=a/b", r"stages\.0\.name: String should match"),
        ("stages.look.epochs=1.5", "stages.0: give either steps or epochs"),
        ("stages.look.steps=null", "stages.0: give either steps or epochs"),
        ("stages.look.keep=best", "stages.0: keep: best needs validation data"),
        ("stages.look.even=true", "stages.0: even is of batches of weighed data: give a batch above 1"),
        ("stages.look.packed=true", "stages.0: packed is of the loss language or pointer, which the stage"),
        ("stages.look.losses={}", r"stages\.0\.losses"),
        ("stages.look.losses={words: 1.0}", r"stages\.0\.losses\.words"),
        ("model.start=somewhere", "start is a whole model; boxes_are_regions beside it would be ignored"),
        ("model.vision.kind=pip", "model.vision: vision_config: kind 'pip' is none of 'plain', 'piip'"),
        ("stages.look.optimiser.betas=[-0.1, 0.9]", r"stages\.0\.optimiser\.betas\.0: .*or equal to 0"),
        ("stages.look.optimiser.betas=[0.9, 1.1]", r"stages\.0\.optimiser\.betas\.1: .*or equal to 1"),
        ("stages.look.optimiser.lr=0", r"stages\.0\.optimiser\.lr: .*greater than 0"),
        ("stages.look.optimiser.weight_decay=-1", r"stages\.0\.optimiser\.weight_decay: .*or equal to 0"),
        ("stages.look.schedule.warmup_steps=-1", r"stages\.0\.schedule\.warmup_steps: .*or equal to 0"),
        ("stages.look.batch=0", r"stages\.0\.batch: .*greater than 0"),
        ("workers=-1", "workers: .*or equal to 0"),
        ("task=read", "unknown task 'read'; choose from chat, classify, detect, reader, segment, upsampler"),
        ("task=chat", "model.start_looking: Extra inputs"),  # a field that the task ignores
    ],
)
def test_wrong_overrides_are_refused_in_one_line_with_the_field(override, complaint):
    with pytest.raises(ValueError, match=complaint) as found:
        load_recipe("reader_smoke", [override])
    assert "\n" not in str(found.value)


def test_unknown_recipes_are_refused_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match="reader_smoke, reader_tiny"):
        load_recipe("reader_huge")


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_recipe(path)
    path.write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(path)


def test_a_field_of_a_loss_that_the_stage_does_not_name_is_refused():
    losses = "stages.answer.losses={language: 1.0}"
    for field in ("frame_step=2.0", "pointer_layers=[1]", "pointer_head=0"):
        assert load_recipe("reader_smoke", [f"stages.answer.{field}"])
        with pytest.raises(
            ValueError, match=rf"stages\.1: {field.split('=')[0]} is of the loss \w+( or \w+)*, which"
        ):
            load_recipe("reader_smoke", [losses, f"stages.answer.{field}"])


def test_a_vision_system_by_the_name_of_a_published_model():
    name = "piip_llava_clip_bl_512_448_7b"
    recipe = load_recipe(name)
    assert recipe.model.vision == find_published(name).settings
    for wrong in ("nothing", "piip_det_tsb_1120_896_448"):
        with pytest.raises(ValueError, match=f"model.vision: vision '{wrong}' is no published assistant"):
            load_recipe(name, [f"model.vision={wrong}"])
