"""The task that trains an up-sampler: its recipes, its steps, and the folder that it leaves."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_run import equal_weights, killed_after, read_metrics
from torchvision.transforms import functional as TF
from two_processes import run_in_two

import stepwell
from stepwell.cli import main
from stepwell.encoders.catalogue import build_encoder
from stepwell.fuse.downsample import KernelDownsampler
from stepwell.train.groups import freeze_all_but
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture, train
from stepwell.train.stage_trainer import StageTrainer
from stepwell.train.tasks import find_task
from stepwell.train.upsampler import UpsamplerTask

ENCODER = {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8}
SMALL = {
    "encoder": "vit_nano",
    "arguments": ENCODER,
    "parts": {},
    "size": 48,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six images of several sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        coarse = torch.rand(3, 5, 6, generator=generator)
        TF.to_pil_image(TF.resize(coarse, [60 + 8 * i, 70])).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def settings(pictures, tmp_path):
    """Overrides that make a published recipe a small one."""
    model = [
        f"model.{name}={yaml.safe_dump(value, default_flow_style=True)}" for name, value in SMALL.items()
    ]
    stage = {"steps": 2, "batch": 2, "accumulate": 1, "max_pad": 4, "crf_samples": 50}
    return [
        *(override.removesuffix("...\n").strip() for override in model),
        *(f"stages.upsampler.{name}={value}" for name, value in stage.items()),
        f"stages.upsampler.data.0.path={pictures}",
        f"output={tmp_path}",
        "workers=0",
        "log_steps=1",
    ]


def trainer_of(settings, *overrides, folder=None, name="uhd_v2_upsampler"):
    recipe = load_recipe(name, [*settings, *overrides])
    task = UpsamplerTask(recipe, recipe.stages[0])
    torch.manual_seed(0)
    return StageTrainer(task.build(), task, recipe, mixture(task, seed=0), folder or recipe.output, seed=0)


RECIPES = ["uhd_v2_upsampler", "uhd_v2_upsampler_paper"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_trained_folder_gives_the_maps_of_the_training(settings, recipe):
    folder = train(recipe, settings)
    model = stepwell.load(folder)
    trainer = trainer_of(settings, name=recipe)
    module = trainer.model
    module.load_state_dict(load_file(folder.parent / "1_upsampler/finished/model.safetensors"))
    pyramid = module.eval().upsampler
    assert model.pyramid.state_dict().keys() == pyramid.state_dict().keys()
    assert load_file(folder / "model.safetensors").keys() == pyramid.state_dict().keys()
    map, image = torch.randn(2, 32, 5, 7), torch.randn(2, 3, 40, 56)
    levels = pyramid.levels(map, image)
    assert torch.equal(model(map, image), levels[-1].corrected())
    assert [level.map.shape[-2:] for level in model.levels(map, image)] == [(10, 14), (20, 28)]
    assert all(
        torch.equal(one.map, other.map) for one, other in zip(levels, model.levels(map, image), strict=True)
    )
    assert model.config.encoder == "vit_nano"
    assert model.config.arguments == ENCODER
    assert (model.config.select_layer, model.config.dim, model.config.levels) == (-2, 32, 2)
    assert model.config.settings == load_recipe(recipe).model.upsampler
    assert model.dtype == torch.float32


def test_the_recipes_are_the_published_settings():
    code, paper = (load_recipe(name) for name in RECIPES)
    stage = code.stages[0]
    assert (stage.steps, stage.batch * stage.accumulate, stage.views, stage.max_pad) == (2000, 16, 2, 30)
    assert (stage.max_zoom, stage.random_projection, stage.uncertainty) == (2.0, 30, "code")
    assert dict(stage.losses) == {"reconstruction": 1.0, "crf": 0.001}
    assert (stage.optimiser.name, stage.optimiser.lr, stage.optimiser.clip_steps) == ("nadam", 1e-3, 10)
    assert (stage.optimiser.max_grad_norm, stage.optimiser.weight_decay) == (1e-4, 0)
    assert stage.hierarchical
    assert not code.bf16
    assert code.model.resize == "nearest"
    other = paper.stages[0]
    assert paper.model.model_copy(update={"upsampler": code.model.upsampler}) == code.model
    kernel = paper.model.upsampler.kernel
    assert (kernel.distance, kernel.similarity, kernel.normalise) == ("pixels", "sigma", "count")
    assert not kernel.correction
    assert paper.model.upsampler.corrections == "none"
    assert (other.optimiser.name, other.random_projection, other.uncertainty) == ("adam", None, "paper")
    assert dict(other.losses) == {"reconstruction": 1.0}


def test_the_encoder_starts_where_the_recipe_says_and_does_not_learn(settings, tmp_path):
    torch.manual_seed(9)
    encoder = build_encoder("vit_nano", **ENCODER)
    save_file(encoder.state_dict(), tmp_path / "vit.safetensors")
    folder = train("uhd_v2_upsampler", [*settings, f"model.parts.encoder={tmp_path}/vit.safetensors"])
    finished = load_file(folder.parent / "1_upsampler/finished/model.safetensors")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(finished[f"encoder.encoder.{name}"], tensor)


@pytest.mark.parametrize(("layer", "layers"), [(-2, 2), (-1, 3), (1, 1), (0, 0)])
def test_the_hidden_state_is_that_of_the_layer(settings, layer, layers):
    module = trainer_of(settings, f"model.select_layer={layer}").model.encoder
    image = torch.randn(1, 3, 24, 32)
    encoder = module.encoder
    tokens = encoder.stem(image)
    for block in list(encoder.blocks)[:layers]:
        tokens = tokens._replace(tokens=block(tokens.tokens, tokens.size))
    torch.testing.assert_close(module(image), encoder.to_map(tokens))


def test_an_interrupted_run_ends_as_if_it_had_not_been(settings, pictures, tmp_path, monkeypatch):
    fields = ["steps=4", "optimiser.clip_steps=3", f"validation=[{{path: {pictures}}}]", "validate_steps=3"]
    settings = [*settings, "save_steps=1", *(f"stages.upsampler.{field}" for field in [*fields, "keep=last"])]
    through = train("uhd_v2_upsampler", [*settings, f"output={tmp_path}/through"])
    killed_after(2, monkeypatch, "uhd_v2_upsampler", [*settings, f"output={tmp_path}/killed"])
    resumed = train("uhd_v2_upsampler", [*settings, f"output={tmp_path}/killed"])
    assert equal_weights(through, resumed)
    finished = [folder.parent / "1_upsampler/finished" for folder in (through, resumed)]
    assert equal_weights(*finished)
    rows = read_metrics(finished[0].parent)
    assert {row["metric"] for row in rows} >= {"loss_crf", "eval_loss_reconstruction", "eval_error_4x"}


def changed(trainer):
    """How far the parameters of an up-sampler move in its training."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    return max(float((after[name].detach() - tensor).abs().max()) for name, tensor in before.items())


SGD = (
    "stages.upsampler.optimiser={name: sgd, lr: 1.0, weight_decay: 0, max_grad_norm: 1.0e-7, clip_steps: %s}"
)


def test_gradients_are_clipped_in_the_first_steps_alone(settings):
    assert changed(trainer_of(settings, SGD % 2)) < 1e-6
    assert changed(trainer_of(settings, SGD % 1)) > 1e-3
    assert changed(trainer_of(settings, SGD % "null")) < 1e-6
    never = SGD.replace("1.0e-7", "0") % "null"
    assert changed(trainer_of(settings, never)) > 1e-3


@pytest.mark.parametrize(("name", "kind"), [("nadam", torch.optim.NAdam), ("adam", torch.optim.Adam)])
def test_optimisers_of_torch_by_their_names(settings, name, kind):
    rates = "lr: 3.0e-4, part_lrs: {uncertainty: 1.0e-5}, betas: [0.8, 0.95], weight_decay: 0.1"
    optimiser = f"{{name: {name}, {rates}}}"
    trainer = trainer_of(settings, f"stages.upsampler.optimiser={optimiser}")
    made = trainer.create_optimizer()
    assert type(made) is kind
    assert {group["lr"] for group in made.param_groups} == {3e-4, 1e-5}
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 0.1}
    assert {group["betas"] for group in made.param_groups} == {(0.8, 0.95)}
    trainer.train()
    complaint = "stages.upsampler.trainer.optim is set by another field"
    with pytest.raises(ValueError, match=complaint):
        trainer_of(settings, "stages.upsampler.trainer={optim: sgd}")


def test_fields_of_a_stage_reach_the_training(settings):
    plain = trainer_of(settings).model
    assert (plain.views, plain.max_pad, plain.max_zoom, plain.random_projection) == (2, 4, 2.0, 30)
    assert plain.losses == ("reconstruction", "crf")
    assert (len(plain.downsamplers), len(plain.uncertainty), plain.stop_gradient) == (2, 2, True)
    assert [down.kernel_size for down in plain.downsamplers] == [8, 8]  # the encoder's patch
    fields = ["views=3", "max_zoom=1.0", "random_projection=null", "hierarchical=false", "uncertainty=none"]
    fields += ["losses={reconstruction: 1.0, entropy: 0.1}", "crf_samples=7"]
    other = trainer_of(
        settings,
        *(f"stages.upsampler.{field}" for field in fields),
        "model.downsampler={kind: kernel, kernel: 5}",
        "model.levels=3",
    ).model
    assert (other.views, other.max_zoom, other.random_projection, other.crf_samples) == (3, 1.0, None, 7)
    assert other.losses == ("reconstruction", "entropy")
    assert (len(other.downsamplers), len(other.uncertainty), other.stop_gradient) == (1, 0, False)
    assert isinstance(other.downsamplers[0], KernelDownsampler)
    assert other.downsamplers[0].kernel_size == 5
    assert len(other.upsampler.stages) == 3
    for levels, hierarchical in ((1, True), (2, True), (3, False), (4, True)):  # as the official stacks
        module = trainer_of(settings, f"model.levels={levels}").model
        assert (len(module.downsamplers), module.stop_gradient) == (levels, hierarchical)
    eight = trainer_of(settings, "model.levels=3", "stages.upsampler.stop_gradient=true").model
    assert eight.stop_gradient
    last = trainer_of(settings, "stages.upsampler.hierarchical=false").model
    assert len(last.downsamplers) == len(last.uncertainty) == 1
    assert not trainer_of(settings, "stages.upsampler.stop_gradient=false").model.stop_gradient
    assert trainer_of(settings, "stages.upsampler.uncertainty=paper").model.log_weight == 0.5


def test_parts_learn_that_the_stage_names(settings):
    trainer = trainer_of(settings, "stages.upsampler.train=[upsampler]")
    learning = {name.split(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert learning == {"upsampler"}
    with pytest.raises(ValueError, match="encoder"):
        freeze_all_but(trainer.model, ["encoders"], trainer.task.parts(trainer.model))


@pytest.mark.parametrize(("filter", "pillow"), [("nearest", 0), ("bicubic", 3)])
def test_images_are_resized_cut_and_normalised(settings, pictures, filter, pillow):
    task = trainer_of(settings, f"model.resize={filter}").task
    sample = task.prepare(pictures / "5.png")
    image = Image.open(pictures / "5.png")
    assert image.size == (70, 100)
    resized = image.resize((48, 68), pillow).crop((0, 10, 48, 58))
    expected = TF.normalize(TF.to_tensor(resized), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(sample, expected)
    own = trainer_of(settings, "model.mean=null", "model.std=null", "model.encoder=siglip_b").task
    assert (own.mean, own.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(("layer", "dim", "stride"), [(0, 8, 4), (1, 8, 4), (2, 16, 8), (-1, 16, 8)])
def test_any_encoder_of_the_catalogue_at_any_of_its_layers(settings, layer, dim, stride):
    arguments = "model.arguments={dims: [8, 16], depths: [1, 1], strides: [4, 2], layer_scale: null}"
    overrides = ["model.encoder=convnext_nano", arguments, f"model.select_layer={layer}"]
    model = stepwell.load(train("uhd_v2_upsampler", [*settings, *overrides, "stages.upsampler.steps=1"]))
    assert model.config.dim == dim
    down = trainer_of(settings, *overrides).model.downsamplers[0]
    assert down.kernel_size == stride


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("model.encoder=clip_xl", "unknown encoder 'clip_xl'"),
        ("model.arguments={width: 3}", "has no argument 'width'"),
        ("model.select_layer=-5", "select_layer -5 is not one of the 4 hidden states"),
        ("model.size=7", "size 7 is smaller than one cell of 8 pixels"),
        ("model.levels=0", "model.levels: Input should be greater than or equal to 1"),
        ("model.upsampler={kind: bilinear}", "upsampler.kind bilinear has nothing to learn"),
        ("model.upsampler={kind: jbu}", "model.upsampler.kind"),
        ("model.revision=main", "revision is of an encoder from the hub; name it in parts.encoder"),
        ("model.parts={language: x}", "model.parts.language"),
        ("model.downsampler={kernel: 0}", "model.downsampler.kernel"),
        ("stages.upsampler.train=[encoder]", "stages.0.train.0"),
        ("stages.upsampler.losses={language: 1.0}", "stages.0.losses"),
        ("stages.upsampler.vision={size: 32}", "vision: the geometry of an up-sampler's training"),
        ("stages.upsampler.max_zoom=0.5", "stages.0.max_zoom"),
        ("stages.upsampler={hierarchical: false, stop_gradient: true}", "stages.0"),
        ("stages.upsampler.losses={entropy: 1.0}", "losses.entropy is of a kernel; it needs"),
        ("model.downsampler={kernel: 49}", "windows of 49x49 pixels have no room in a map of 48x48"),
        ("stages.upsampler.data.0.path=nowhere", "nowhere"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, override, complaint):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train("uhd_v2_upsampler", [*settings, override])
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_stopping_gradients_needs_losses_at_all_levels(settings):
    overrides = ["stages.upsampler.hierarchical=false", "stages.upsampler.stop_gradient=true"]
    with pytest.raises(ValueError, match="it needs hierarchical: true"):
        load_recipe("uhd_v2_upsampler", [*settings, *overrides])


def test_images_are_opened_within_the_limits_of_the_recipe(settings, tmp_path):
    Image.new("RGB", (900, 4)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match="max_aspect=225"):
        trainer_of(settings).task.prepare(tmp_path / "long.png")
    trainer_of(settings, "image_limits.max_aspect=225").task.prepare(tmp_path / "long.png")


def test_an_image_that_cannot_be_read_is_left_out(settings, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(["broken.png", *(str(path) for path in sorted(pictures.iterdir()))]))
    train(
        "uhd_v2_upsampler", [*settings, f"stages.upsampler.data.0.path={listed}", "stages.upsampler.steps=4"]
    )
    assert "broken.png" in (tmp_path / "uhd_v2_upsampler/1_upsampler/bad_samples.csv").read_text()


def test_costs_are_not_told_of_an_up_sampler_alone(capsys):
    assert main(["flops", "uhd_v2_upsampler"]) != 0
    assert "trains an up-sampler" in capsys.readouterr().err
    assert find_task("upsampler") is UpsamplerTask


@pytest.mark.slow
def test_two_processes_train_one_up_sampler_and_go_on_where_they_were(settings, tmp_path):
    settings = [*settings, "stages.upsampler.steps=3", "save_steps=1", "stages.upsampler.batch=1"]
    script = "import sys; from stepwell.train.run import train; train('uhd_v2_upsampler', sys.argv[1:])"

    def run(folder):
        run_in_two(script, tmp_path, *settings, f"output={tmp_path}/{folder}")
        return tmp_path / folder / "uhd_v2_upsampler"

    through = run("through")
    shutil.copytree(tmp_path / "through", tmp_path / "stopped")
    stopped = tmp_path / "stopped/uhd_v2_upsampler"
    for name in ("model", "1_upsampler/finished", "1_upsampler/checkpoint-3"):
        shutil.rmtree(stopped / name)
    assert run("stopped") == stopped
    assert equal_weights(through / "model", stopped / "model")
