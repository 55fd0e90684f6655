"""A pyramid as backbone of the heads that transformers and torchvision have, and as a classifier."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from stepwell.encoders.vit import TransformerBlock
from stepwell.fuse.interaction import Interaction, InteractionConfig
from stepwell.models.dense import ClassifierSettings, DenseSettings
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.pyramid import BranchConfig
from stepwell.models.register import register
from stepwell.ops.double import Doubled, finished

IMAGE = (64, 96)
ANSWERS = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def branch(dim, size, **arguments):
    arguments = {"dim": dim, "depth": 2, "num_heads": 2, "class_token": False, **arguments}
    return BranchConfig(encoder="vit_nano", size=size, interactions=((0, 0), (1, 1)), arguments=arguments)


BRANCHES = (branch(32, 64), branch(16, 96))
DENSE = DenseSettings(branches=BRANCHES, interaction=InteractionConfig(num_heads=2))


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()


@pytest.fixture
def config():
    return PyramidBackboneConfig(DENSE, out_features=STAGES)


def build_upernet(config):
    small = {"hidden_size": 16, "auxiliary_in_channels": 32, "auxiliary_channels": 8, "num_labels": 3}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **small))


def build_mask2former(config):
    return Mask2FormerForUniversalSegmentation(
        Mask2FormerConfig(
            backbone_config=config,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_feedforward_dim=16,
            dim_feedforward=16,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=4,
            num_labels=3,
            train_num_points=64,
        )
    )


SMALL_DETR = {
    "use_timm_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
    "num_labels": 3,
}


def build_detr(config):
    return DetrForObjectDetection(DetrConfig(backbone_config=config, **SMALL_DETR))


def build_deformable_detr(config):
    return DeformableDetrForObjectDetection(DeformableDetrConfig(backbone_config=config, **SMALL_DETR))


def build_rt_detr(config):
    config = PyramidBackboneConfig(DENSE, out_features=STAGES[1:])
    return RTDetrForObjectDetection(
        RTDetrConfig(
            **{**SMALL_DETR, "encoder_ffn_dim": 32},
            backbone_config=config,
            encoder_hidden_dim=32,
            encoder_in_channels=[32, 32, 32],
            decoder_in_channels=[32, 32, 32],
            num_denoising=0,
            anchor_image_size=None,
        )
    )


@pytest.mark.parametrize(
    "build", [build_upernet, build_mask2former, build_detr, build_deformable_detr, build_rt_detr]
)
def test_heads_of_transformers_train_on_it_save_it_and_load_it(build, config, tmp_path):
    torch.manual_seed(0)
    model = build(config)
    image = torch.randn(2, 3, *IMAGE)
    out = model.train()(pixel_values=image)
    sum(out[name].square().sum() for name in ANSWERS if name in out).backward()
    backbone = next(m for m in model.modules() if isinstance(m, PyramidBackbone))
    assert backbone.pyramid.encoder.branches[0].patch_embed.proj.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, loaded = model.eval()(pixel_values=image), again(pixel_values=image)
    for name in ANSWERS:
        if name in expected:
            torch.testing.assert_close(loaded[name], expected[name])


class Maps(nn.Module):
    """What torchvision's detectors want: named maps of one width."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.out_channels = backbone, 16
        self.fpn = FeaturePyramidNetwork(backbone.num_features, 16)

    def forward(self, images):
        maps = self.backbone(images).feature_maps
        return self.fpn({str(i): x for i, x in enumerate(maps)})


def test_mask_rcnn_of_torchvision_trains_on_it_and_reloads(config):
    def build():
        return MaskRCNN(
            Maps(PyramidBackbone(config)),
            num_classes=3,
            min_size=64,
            max_size=96,
            rpn_anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4),
            box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 3, 1),
            mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 1),
            box_head=nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 1024)),
        )

    torch.manual_seed(0)
    model = build()
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 60.0, 40.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, *IMAGE, dtype=torch.uint8),
        }
    ]
    sum(model([torch.rand(3, *IMAGE)], targets).values()).backward()
    assert model.backbone.backbone.pyramid.encoder.branches[1].patch_embed.proj.weight.grad.abs().sum() > 0
    again = build()
    again.load_state_dict(model.state_dict())
    image = torch.rand(3, *IMAGE)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()([image])[0]["scores"], model.eval()([image])[0]["scores"])


def test_maps_have_the_widths_and_strides_they_are_said_to_have(config):
    backbone = PyramidBackbone(config).eval()
    maps = backbone(torch.randn(2, 3, *IMAGE)).feature_maps
    assert [tuple(x.shape) for x in maps] == [(2, 32, 16, 24), (2, 32, 8, 12), (2, 32, 4, 6), (2, 32, 2, 3)]
    assert backbone.channels == [32] * 4
    some = PyramidBackbone(PyramidBackboneConfig(DENSE, out_features=["stage2", "stage4"])).eval()
    some.load_state_dict(backbone.state_dict())
    image = torch.randn(1, 3, *IMAGE)
    for ours, expected in zip(some(image).feature_maps, backbone(image).feature_maps[1::2], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("merge_after", [(), (0,)])
def test_unfinished_maps_are_the_same_maps_and_no_others_are_made(merge_after):
    operations = ("up4", "up2") if merge_after else ("up4", "up2", "same")
    settings = replace(DENSE, merge_after=merge_after, operations=operations)
    names = [f"stage{i + 1}" for i in range(1, len(operations))]
    backbone = PyramidBackbone(PyramidBackboneConfig(settings, out_features=names)).eval()
    image, ran = torch.randn(1, 3, *IMAGE), []
    backbone.pyramid.neck.stages[0][0].register_forward_hook(lambda *_: ran.append("up4"))
    maps = backbone(image, finish=False).feature_maps
    assert not ran
    assert isinstance(maps[0], Doubled)
    for ours, expected in zip(maps, backbone(image).feature_maps, strict=True):
        torch.testing.assert_close(finished(ours), expected)
    assert ran


@pytest.mark.parametrize("part", ["pyramid", "pyramid.neck"])
def test_maps_are_finished_where_somebody_listens_to_all_of_them(part):
    backbone = PyramidBackbone(PyramidBackboneConfig(DENSE)).eval()
    image, heard = torch.randn(1, 3, *IMAGE), []
    backbone.get_submodule(part).register_forward_hook(lambda *call: heard.extend(call[2]))
    maps = backbone(image, finish=False).feature_maps
    assert len(heard) == 4
    assert all(ours is theirs for ours, theirs in zip(maps, heard, strict=True))


def test_a_backbone_is_saved_and_found_by_the_auto_classes(config, tmp_path):
    backbone = PyramidBackbone(config).eval()
    backbone.save_pretrained(tmp_path)
    image = torch.randn(1, 3, *IMAGE)
    for loaded in (PyramidBackbone.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert torch.equal(loaded.eval()(image).feature_maps[0], backbone(image).feature_maps[0])
    assert isinstance(AutoBackbone.from_config(config), PyramidBackbone)


RECOMPUTES = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing")


def runs_and_gradients(model, loss):
    """-> (forward runs of blocks and interactions, those during the backward pass included; gradients)."""
    runs, hooks = [], []
    for module in model.modules():
        if isinstance(module, TransformerBlock | Interaction):
            hooks.append(module.register_forward_pre_hook(lambda module, _: runs.append(module)))
    model.zero_grad()
    torch.manual_seed(0)  # whole messages are dropped at random
    loss().backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [sum(run is module for run in runs) for module in dict.fromkeys(runs)], gradients


def check_recomputation(model, switched, loss):
    """Switching it on in `switched` runs every part of `model` twice, with the same gradients."""
    once, expected = runs_and_gradients(model, loss)
    switched.gradient_checkpointing_enable()
    assert switched.is_gradient_checkpointing
    twice, gradients = runs_and_gradients(model, loss)
    assert set(once) == {1}
    assert twice == [2] * len(once)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    switched.gradient_checkpointing_disable()
    assert not switched.is_gradient_checkpointing
    assert runs_and_gradients(model, loss)[0] == once


@RECOMPUTES
def test_a_backbone_recomputes_blocks_and_interactions(config):
    backbone, image = PyramidBackbone(config).train(), torch.randn(1, 3, *IMAGE)
    check_recomputation(backbone, backbone, lambda: backbone(image).feature_maps[0].square().sum())


@RECOMPUTES
def test_a_classifier_recomputes_blocks_and_interactions():
    settings = ClassifierSettings(branches=BRANCHES, interaction=InteractionConfig(num_heads=2))
    model = PyramidForImageClassification(PyramidClassifierConfig(settings, num_labels=3)).train()
    image = torch.randn(1, 3, *IMAGE)
    check_recomputation(model, model, lambda: model(image, labels=torch.tensor([1])).loss)


@RECOMPUTES
def test_a_model_around_a_backbone_switches_it_too(config):
    model = build_rt_detr(config)
    outer, backbone = model.model, model.model.backbone.model
    outer.supports_gradient_checkpointing = True
    backbone.train()
    image = torch.randn(1, 3, *IMAGE)
    check_recomputation(backbone, outer, lambda: backbone(image).feature_maps[0].square().sum())


def test_a_baseline_of_one_branch_has_nothing_to_merge():
    settings = DenseSettings(branches=(branch(16, 96),), merge="none", neck_norm="layernorm")
    backbone = PyramidBackbone(PyramidBackboneConfig(settings))
    names = [name for name, _ in backbone.named_parameters()]
    assert not [name for name in names if "merge" in name]
    assert [tuple(x.shape[1:]) for x in backbone(torch.randn(1, 3, *IMAGE)).feature_maps] == [
        (16, 16, 24),
        (16, 8, 12),
        (16, 4, 6),
        (16, 2, 3),
    ]
    with pytest.raises(ValueError, match="2 branches"):
        DenseSettings(branches=BRANCHES, merge="none")


def test_branches_left_out_of_the_merge_have_no_stack():
    settings = DenseSettings(
        branches=BRANCHES, merge_branches=(0,), interaction=InteractionConfig(num_heads=2)
    )
    backbone = PyramidBackbone(PyramidBackboneConfig(settings)).eval()
    assert len(backbone.pyramid.merges[0].stacks) == 1
    assert backbone(torch.randn(1, 3, *IMAGE)).feature_maps[2].shape == (1, 32, 4, 6)
    with pytest.raises(ValueError, match=r"merge_branches \(0, 2\)"):
        DenseSettings(branches=BRANCHES, merge_branches=(0, 2))


@pytest.mark.parametrize("branches", [(), (0, 0)])
def test_merged_branches_are_named_once_each(branches):
    with pytest.raises(ValueError, match="each once"):
        DenseSettings(branches=BRANCHES, merge_branches=branches)


@pytest.mark.parametrize("merge_after", [(7,), (-1,), (1, 0), (0, 0)])
def test_merges_come_after_rising_interactions(merge_after):
    with pytest.raises(ValueError, match="must rise strictly within the 2 interactions"):
        DenseSettings(branches=BRANCHES, merge_after=merge_after, operations=())


@pytest.mark.parametrize("head", ["first_patch", "cls", "merge"])
def test_a_classifier_learns_is_saved_and_reloaded(head, tmp_path):
    branches = tuple(branch(32, size, class_token=head == "cls") for size in (64, 96))
    settings = ClassifierSettings(branches=branches, interaction=InteractionConfig(num_heads=2), head=head)
    config = PyramidClassifierConfig(settings, num_labels=5)
    model = PyramidForImageClassification(config)
    image, labels = torch.randn(2, 3, *IMAGE), torch.tensor([0, 3])
    out = model(image, labels=labels)
    assert out.logits.shape == (2, 5)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    out.loss.backward()
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(image).logits, model(image).logits)


@pytest.mark.parametrize("make", [PyramidBackboneConfig, PyramidClassifierConfig])
def test_misspelt_settings_are_refused_by_name(make):
    with pytest.raises(ValueError, match="pyramid: brnaches"):
        make({"brnaches": []})
    with pytest.raises(ValueError, match="out_fetures"):
        make(out_fetures=[])


@pytest.mark.parametrize("make", [PyramidBackboneConfig, PyramidClassifierConfig])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "vit_nanno"}, "branches.0.*unknown encoder 'vit_nanno'"),
        ({"encoder": "vit_nano", "arguments": {"foo": 1}}, "branches.0.*no argument 'foo'"),
    ],
)
def test_encoders_that_cannot_be_built_are_refused_at_once(make, change, words):
    with pytest.raises(ValueError, match=words):
        make({"branches": [{"size": 64, **change}]})


@pytest.mark.parametrize("build", [build_upernet, build_mask2former])
def test_heads_hand_over_what_transformers_hands_over(build, config):
    """To `backbone.forward` too, if they take it."""
    model, image = build(config).eval(), torch.randn(1, 3, *IMAGE)
    with torch.no_grad():
        expected = model(pixel_values=image)
        out = model(pixel_values=image, output_hidden_states=True, output_attentions=True, return_dict=False)
    assert isinstance(out, tuple)
    assert any(torch.equal(x, expected[name]) for name in ANSWERS if name in expected for x in tensors(out))


def tensors(out):
    return [x for x in out if isinstance(x, torch.Tensor)]


def test_a_backbone_takes_what_heads_hand_on_and_no_other_word(config):
    backbone, image = PyramidBackbone(config).eval(), torch.randn(1, 3, *IMAGE)
    handed = {"output_hidden_states": True, "output_attentions": True, "num_items_in_batch": 2}
    expected = backbone(image).feature_maps
    for call in (backbone, backbone.forward_with_filtered_kwargs):
        assert torch.equal(call(image, **handed, return_dict=True).feature_maps[0], expected[0])
        maps, states = call(image, **handed, return_dict=False)
        assert all(map(torch.equal, states, expected))
        assert torch.equal(maps[0], expected[0])
        with pytest.raises(TypeError, match="pixel_mask"):
            call(image, pixel_mask=image)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    settings = ClassifierSettings(
        branches=BRANCHES, interaction=InteractionConfig(num_heads=2, drop_path=0.0)
    )
    return PyramidForImageClassification(PyramidClassifierConfig(settings, num_labels=3))


def test_a_classifier_gives_tuples_where_asked_and_knows_no_other_word(classifier):
    image, labels = torch.randn(2, 3, *IMAGE), torch.tensor([0, 2])
    expected = classifier(image, labels=labels)
    loss, logits = classifier(image, labels=labels, return_dict=False, output_hidden_states=False)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(logits, expected.logits)
    (logits,) = classifier(image, return_dict=False, output_attentions=False)
    assert torch.equal(logits, expected.logits)
    with pytest.raises(TypeError, match="lables"):
        classifier(image, lables=labels)


def test_trainer_accumulates_batches_of_a_classifier_to_the_mean(classifier, tmp_path):
    """One step on two batches of one image moves the weights as one on a batch of two."""
    images = [{"pixel_values": torch.randn(3, *IMAGE), "labels": label} for label in (0, 2)]
    start, weights = classifier.state_dict(), []
    start = {name: tensor.clone() for name, tensor in start.items()}
    for batch in (1, 2):
        classifier.load_state_dict(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=2 // batch,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        Trainer(classifier, arguments, train_dataset=images).train()
        weights.append({name: tensor.clone() for name, tensor in classifier.state_dict().items()})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], msg=name)
    assert not torch.equal(weights[0]["pyramid.head.norms.0.weight"], start["pyramid.head.norms.0.weight"])


def test_folders_of_before_load_with_their_statistics(tmp_path):
    """Every field was written out, halves among them."""
    backbone = PyramidBackbone(PyramidBackboneConfig(DENSE))
    backbone.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    assert fields["pyramid"]["mean"] is None
    fields["pyramid"] |= {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(fields))
    again = PyramidBackbone.from_pretrained(tmp_path)
    assert again.config.settings.statistics == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = torch.randn(1, 3, *IMAGE)
    assert torch.equal(again.eval()(image).feature_maps[0], backbone.eval()(image).feature_maps[0])
