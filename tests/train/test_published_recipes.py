"""The recipes of PIIP-LLaVA, LLaVA-UHD and INF-LLaVA against what papers and launch scripts print: numbers,
parts, data, prompts.

Written on 8 GPUs: PIIP-LLaVA, arXiv 2501.07783, section IV-E and Table XII; LLaVA-UHD v2, arXiv 2412.13871,
section 4.1 and the appendix on data; v1, arXiv 2403.11703; INF-LLaVA, arXiv 2407.16198, section 5.2 and Table
2.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from stepwell.models.published.papers import PUBLISHED
from stepwell.train.recipe import load_recipe

GPUS = 8
V2 = ("uhd_v2", "uhd_v2_825k", "uhd_v2_paper")
SAMPLES = {  # of the first stage and of the second
    "uhd_v1": (558_128, 665_298),
    "uhd_v2": (558_128, 858_000),
    "uhd_v2_825k": (558_128, 825_000),
    "uhd_v2_paper": (558_128, 858_000),
}
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer directly with the option's letter from the given choices."
CAPTION = "Provide a one-sentence caption for the provided image."

# Thousands of samples, and the prompt where the file has none.
MIX = {
    "llava_instruct": (158, None),
    "sharegpt": (40, None),
    "vqav2": (83, SHORT),
    "gqa": (72, SHORT),
    "okvqa": (9, SHORT),
    "ocrvqa": (80, SHORT),
    "docvqa": (15, SHORT),
    "chartqa": (20, SHORT),
    "aokvqa": (66, LETTER),
    "dvqa": (20, None),
    "textcaps": (22, CAPTION),
    "sharegpt4v": (55, None),
    "ai2d": (3, None),
    "laion_gpt4v": (11, None),
    "synthdog_en": (40, None),
    "lrv_instruct": (30, None),
    "refcoco": (48, None),
    "vg": (86, None),
}


INF = {
    "inf_llava": (558_128, 665_298),
    "inf_star_llava": (1_266_000, 1_382_000),
    "inf_paper": (558_128, 665_298),
}


PLUS = "piip_llava_plus_convnext_l_clip_l_1024_336_7b"
PIIP = {
    **{
        f"piip_llava_{release}": (558_128, 665_298)
        for release in (
            *("clip_bl_512_256_7b", "clip_bl_512_448_7b", "clip_bl_512_448_13b"),
            *("convnext_b_clip_l_640_224_7b", "convnext_b_clip_l_1024_336_7b"),
            *("convnext_b_clip_l_1024_336_13b", "convnext_l_clip_l_1024_336_7b"),
            "convnext_l_clip_l_1024_336_13b",
        )
    },
    PLUS: (558_128, 665_298 + 1_600_000),
}
CLIP = "OpenGVLab/clip-vit-large-patch14to16"
BRANCHES = {
    "clip_l": f"{CLIP}-224",
    "clip_l_336": f"{CLIP}-336",
    "clip_b": "openai/clip-vit-base-patch16",
    "convnext_b_clip": "timm/convnext_base.clip_laiona_augreg_320",
    "convnext_l_clip": "timm/convnext_large_mlp.clip_laion2b_ft_320",
}


@pytest.fixture(params=SAMPLES)
def recipe(request):
    return load_recipe(request.param)


@pytest.mark.parametrize("name", [*SAMPLES, *INF, *PIIP])
def test_batches_rates_and_schedules(name):
    recipe = load_recipe(name)
    assert [stage.name for stage in recipe.stages] == ["align", "tune"]
    assert [stage.sampling for stage in recipe.stages] == ["random", "grouped"]
    facts = zip(recipe.stages, (SAMPLES | INF | PIIP)[name], (256, 128), (1e-3, 2e-5), strict=True)
    for stage, samples, batch, rate in facts:
        assert stage.batch * stage.accumulate * GPUS == batch
        assert (stage.epochs, stage.steps) == (1, None)
        optimiser = stage.optimiser
        assert (optimiser.name, optimiser.lr, optimiser.part_lrs) == ("adamw_torch", rate, {})
        assert (optimiser.betas, optimiser.weight_decay, optimiser.max_grad_norm) == ((0.9, 0.999), 0, 1)
        assert optimiser.clip_steps is None
        assert (stage.schedule.name, stage.schedule.arguments) == ("cosine", {})
        assert stage.schedule.warmup_steps == math.ceil(0.03 * math.ceil(samples / batch))
        assert stage.trainer == {"gradient_checkpointing": True, "tf32": True}
        assert dict(stage.losses) == {"language": 1.0}
    assert recipe.bf16


def test_every_release_of_piip_llava_has_its_recipe():
    releases = {name for name, model in PUBLISHED.items() if name.startswith("piip") and model.task == "chat"}
    assert releases == set(PIIP)


@pytest.mark.parametrize("name", PIIP)
def test_stages_and_parts_of_piip_llava(name):
    recipe, published = load_recipe(name), PUBLISHED[name]
    assert recipe.model.vision == published.settings
    branches = {
        f"vision.branches.{i}": BRANCHES[branch.encoder]
        for i, branch in enumerate(published.settings.branches)
    }
    size = "13b" if name.endswith("13b") else "7b"
    assert recipe.model.parts == {**branches, "language": f"lmsys/vicuna-{size}-v1.5"}
    assert recipe.model.template == "vicuna_v1"
    align, tune = recipe.stages
    assert (set(align.train), set(tune.train)) == ({"projector"}, {"vision", "projector", "language"})
    assert (align.vision, tune.vision) == ({"framing": "crop"}, {})  # and then padded
    assert (align.template, tune.template) == ("plain", None)
    assert (align.max_length, tune.max_length) == (2048, 2048)
    assert [data.path.name for data in align.data] == ["blip_laion_cc_sbu_558k.json"]
    assert tune.data[0].path.name == "llava_v1_5_mix665k.json"
    assert len(tune.data) == (1 + 17 if name == PLUS else 1)
    assert {data.weight for data in tune.data} == {None}  # all samples of all sets


@pytest.mark.parametrize("name", INF)
def test_stages_and_data_of_inf_llava(name):
    recipe = load_recipe(name)
    align, tune = recipe.stages
    assert set(align.train) == {"vision.enhancement", "projector"}
    assert set(tune.train) == {"vision.enhancement", "projector", "language"}
    assert (align.vision, tune.vision) == ({"framing": "crop"}, {})  # and then padded
    assert (align.template, tune.template) == ("plain", None)
    assert (align.max_length, tune.max_length) == (2048, 2048)
    assert recipe.model.template == ("llama3" if name == "inf_paper" else "llama3_inf")
    assert recipe.model.parts == {
        "vision.branches.0": "openai/clip-vit-large-patch14-336",
        "language": "meta-llama/Meta-Llama-3-8B-Instruct",
    }
    weights = [[data.weight for data in stage.data] for stage in recipe.stages]
    assert weights == ([[558, 708], [665, 692, 25]] if name == "inf_star_llava" else [[None], [None]])


def test_what_the_first_stage_learns_and_sees(recipe):
    stage = recipe.stages[0]
    assert set(stage.train) == {"projector"}
    assert stage.vision == {"never_split": True}
    assert (stage.template, stage.max_length) == ("plain", 2048 if recipe.name == "uhd_v1" else 3072)
    (data,) = stage.data
    assert data.path.name == "blip_laion_cc_sbu_558k.json"
    assert (data.prompt, data.long_side, data.sliced) == (None, None, 0)


def test_what_the_second_stage_learns_and_sees(recipe):
    stage = recipe.stages[1]
    projector = {"projector", "language"}
    learning = {
        "uhd_v1": projector,  # a frozen encoder
        "uhd_v2_paper": projector | {"vision.branches"},  # a frozen up-sampler
    }
    corrected = projector | {"vision.branches", "vision.upsampler.corrections"}
    assert set(stage.train) == learning.get(recipe.name, corrected)
    assert stage.vision == {}  # slices, as the model has them
    assert (stage.template, stage.max_length) == (None, 2048 if recipe.name == "uhd_v1" else 4096)


def test_the_models(recipe):
    vision, parts = recipe.model.vision, recipe.model.parts
    assert (vision.kind, vision.encoder, vision.size) == (recipe.name[:6], "clip_l_14_336", 336)
    assert vision.select_layer == -2
    assert vision.max_slices == (6 if recipe.name == "uhd_v2_paper" else 7)
    assert parts["vision.branches.0"] == "openai/clip-vit-large-patch14-336"
    size = "13b" if recipe.name == "uhd_v1" else "7b"
    assert parts["language"] == f"lmsys/vicuna-{size}-v1.5"
    assert recipe.model.template == "vicuna_v1"
    if recipe.name in V2:
        of_paper = "_paper" * recipe.name.endswith("paper")
        assert parts["vision.upsampler"] == f"runs/uhd_v2_upsampler{of_paper}/model"
        assert (vision.levels, vision.windows.grid) == ((0, 1, 2), (12, 12))


@pytest.mark.parametrize("name", ["uhd_v2", "uhd_v2_paper"])
def test_the_mix_of_858k(name):
    data = load_recipe(name).stages[1].data
    assert {each.path.stem: (each.weight, each.prompt) for each in data} == MIX
    assert len(data) == len(MIX)
    assert sum(each.weight for each in data) == 858
    for each in data:
        # Images of TextVQA have a long side of 1024, a tenth of all others the area of six slices.
        treated = {"sharegpt": (None, 0), "textcaps": (1024, 0)}.get(each.path.stem, (None, 0.1))
        assert (each.long_side, each.sliced, each.slices) == (*treated, 6)


def test_the_mix_of_825k():
    data = load_recipe("uhd_v2_825k").stages[1].data
    assert {each.path.stem: each.weight for each in data} == {"llava_v1_5_mix665k": 665, "ureader_160k": 160}
    assert all(each.long_side == {"textvqa": 1024} and each.sliced == 0.1 for each in data)
    assert [each.prompt for each in data] == [None, None]


def test_the_data_of_the_first_version():
    (data,) = load_recipe("uhd_v1").stages[1].data
    assert data.path == Path("data/llava_v1_5_mix665k.json")
    assert data.prompt is None
