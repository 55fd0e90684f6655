"""PUBLISHED: the configurations of the PIIP paper and of its release, and the baselines, by name.

What a checkpoint file does not hold is here: which family a branch is, window sizes, the layers between two
interactions, the ratio of the views, head rules, statistics. PIIP, arXiv 2501.07783, section IV, and the
configuration files of the official repository. Branch 1 (the largest network, the smallest view) comes first
in every list, while names give the largest view first, as the paper does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from stepwell.encoders.catalogue import ENCODERS
from stepwell.encoders.convnext import ConvNeXt
from stepwell.fuse.interaction import InteractionConfig
from stepwell.models.dense import SIMPLE, ClassifierSettings, DenseSettings
from stepwell.models.piip import PiipConfig
from stepwell.models.pyramid import BranchConfig
from stepwell.models.runs import layer_runs
from stepwell.structures import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD, Statistics

__all__ = ["PUBLISHED", "Published", "Task", "find_published"]

Task = Literal["detection", "segmentation", "classification", "chat"]
STAGE_MERGES = (0, 1, 10)  # of 12 interactions, those that end a stage of ConvNeXt, beside the last
REPOSITORY = "OpenGVLab/PIIP"


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published configuration.

    `quirk` says where the released code builds something else than its configuration. `file` is the path of
    the weights in `repository`; None means the whole repository is the model.
    """

    name: str
    task: Task
    branches: tuple[BranchConfig, ...]
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    merge: Literal["dense", "stages", "none"] = "dense"  # "none": one network, or no maps
    dino: bool = False  # the finest map is not returned
    head: Literal["first_patch", "cls", "merge"] = "first_patch"  # of a classifier
    num_classes: int | None = None
    text_dim: int | None = None  # width of the language model
    mean: Statistics = HALF_MEAN
    std: Statistics = HALF_STD
    repository: str | None = None
    file: str | None = None
    quirk: str = ""

    @property
    def released(self) -> str | None:
        """What `stepwell.load` takes: `repository`, or `repository:file`."""
        if self.repository is None or self.file is None:
            return self.repository
        return f"{self.repository}:{self.file}"

    def dense_settings(self) -> DenseSettings:
        """Of a detector or segmenter, for `PyramidBackbone`."""
        has_strides = ENCODERS[self.branches[-1].encoder].build is ConvNeXt
        by_stage = self.merge == "stages" or (self.merge == "none" and has_strides)
        return DenseSettings(
            branches=self.branches,
            interaction=self.interaction,
            merge=self.merge,
            merge_after=STAGE_MERGES if by_stage else (),
            operations=() if by_stage and has_strides else SIMPLE[self.dino :],
            neck_norm="layernorm" if self.merge == "none" else "groupnorm",
            mean=self.mean,
            std=self.std,
        )

    def classifier_settings(self) -> ClassifierSettings:
        """Of a classifier, for `PyramidForImageClassification`."""
        return ClassifierSettings(
            branches=self.branches,
            interaction=self.interaction,
            head=self.head,
            mean=self.mean,
            std=self.std,
        )

    def vision_config(self) -> PiipConfig:
        """Of an assistant, for `StepwellConfig`."""
        return PiipConfig(
            branches=self.branches,
            interaction=self.interaction,
            framing="pad",
            mean=self.mean,
            std=self.std,
        )


def find_published(name: str) -> Published | None:
    """By our name, by the released one (`OpenGVLab/PIIP:detection/<file>.pth`), or by its file name alone."""
    wanted = name.removesuffix(".pth").casefold()
    for published in PUBLISHED.values():
        aliases = [published.name, published.released or "", (published.file or "").rpartition("/")[2]]
        if published.task == "chat" and published.repository:
            aliases.append(published.repository.rpartition("/")[2])
        if wanted in [alias.removesuffix(".pth").casefold() for alias in aliases if alias]:
            return published
    return None


def _depth(encoder: str) -> int:
    arguments = ENCODERS[encoder].arguments
    depths = arguments.get("depths")
    return int(arguments["depth"]) if depths is None else sum(depths) + len(depths) - 1


def _branch(encoder: str, size: int, interactions: int = 12, **arguments: Any) -> BranchConfig:
    runs = layer_runs(_depth(encoder), interactions)
    return BranchConfig(encoder=encoder, size=size, interactions=runs, arguments=arguments)


DROP_PATH = {"t": 0.05, "s": 0.05, "b": 0.15, "l": 0.4, "h": 0.4, "6b": 0.4}  # detection, by network size
STEEP = (0.4, 0.3, 0.2)
LINEAR = ("augreg", "mae", "dinov2", "beitv2", "uniperceiver", "internvit")  # drop path grows with the layer
FAST = InteractionConfig(project=False, norm=False)  # the variant without projections and norms
IMAGENET: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def _size(encoder: str) -> str:
    """t, s, b, l, h or 6b."""
    return encoder.removesuffix("_384").rpartition("_")[2]


def _dense(
    encoder: str, size: int, drop_path: float, interactions: int = 12, **arguments: Any
) -> BranchConfig:
    """A branch of a detector or segmenter; the arguments that ConvNeXt does not have are left out for it.

    windows: one for all layers, or a list that is repeated over them.
    """
    family, windows = ENCODERS[encoder].family, arguments.get("windows")
    if family == "convnext":
        arguments = {}
    elif family in LINEAR:
        arguments["drop_path_schedule"] = "linear"
    if isinstance(windows, list):
        arguments["windows"] = windows * (_depth(encoder) // len(windows))
    return _branch(encoder, size, interactions, drop_path=drop_path, **arguments)


def _detector(
    name: str,
    encoders: str,
    sizes: tuple[int, ...],
    file: str | None,
    *,
    drop_path: tuple[float, ...] | None = None,
    interactions: int = 12,
    arguments: dict[str, Any] | None = None,
    prefix: str = "piip_det_",
    **fields: Any,
) -> Published:
    """encoders: names of the catalogue, branch 1 first; drop_path: by network size where none is given."""
    names = encoders.split()
    rates = drop_path or tuple(DROP_PATH[_size(encoder)] for encoder in names)
    branches = tuple(
        _dense(encoder, size, rate, interactions, **(arguments or {}))
        for encoder, size, rate in zip(names, sizes, rates, strict=True)
    )
    where: dict[str, Any] = {"repository": REPOSITORY, "file": f"detection/{file}.pth"} if file else {}
    return Published(name=f"{prefix}{name}", task="detection", branches=branches, **where, **fields)


def _joined(sizes: tuple[int, ...]) -> str:
    return "_".join(map(str, reversed(sizes)))


def _deit_detectors() -> list[Published]:
    found = []
    for sizes in ((448, 896, 1120), (448, 896, 1568), (672, 1120, 1568)):
        name = f"tsb_{_joined(sizes)}"
        file = f"mask_rcnn_deit_{name}_fpn_1x_coco_bs16"
        found.append(_detector(name, "deit3_b deit3_s deit_t", sizes, file, arguments={"windows": 14}))
    for sizes in ((448, 672, 1120), (448, 896, 1344), (672, 896, 1568), (672, 1120, 1568)):
        name = f"sbl_{_joined(sizes)}"
        file = f"mask_rcnn_deit_{name}_fpn_1x_coco_bs16"
        found.append(_detector(name, "deit3_l deit3_b deit3_s", sizes, file, arguments={"windows": 28}))
    for large in ((448, 672, 896, 1344), (448, 672, 1120, 1568), (448, 1120, 1568, 1792)):
        name = f"tsbl_{_joined(large)}"
        file = f"mask_rcnn_deit_{name}_fpn_1x_coco_bs16"
        built = "deit3_l deit3_b deit3_s deit3_s"
        quirk = "branch 4 is built from the settings of branch 3: a second ViT-S"
        found += [
            _detector(f"{name}_as_released_code", built, large, file, arguments={"windows": 28}, quirk=quirk),
            _detector(
                f"{name}_as_config",
                "deit3_l deit3_b deit3_s deit_t",
                large,
                None,
                arguments={"windows": 28},
                quirk="branch 4 is ViT-T, as the paper says; the released code does not build this",
            ),
        ]
    return found


def _pretrained_detectors() -> list[Published]:
    """PIIP-SBL 1568/1120/672 from other pretrainings (Table V)."""
    sizes, windows = (672, 1120, 1568), {"windows": 28}
    found = []
    for name, encoders, drop_path in (
        ("augreg", "augreg_l_384 augreg_b_384 augreg_s_384", STEEP),
        ("mae", "mae_l mae_b deit3_s", None),
        ("dinov2", "dinov2_l dinov2_b dinov2_s", STEEP),
        ("beit", "beitv2_l beitv2_b deit3_s", None),
        ("uniperceiver", "uniperceiver_l uniperceiver_b deit3_s", None),
    ):
        file = f"mask_rcnn_{name}_sbl_1568_1120_672_fpn_1x_coco_bs16"
        found.append(
            _detector(
                f"{name}_sbl_1568_1120_672", encoders, sizes, file, drop_path=drop_path, arguments=windows
            )
        )
    return found


def _large_detectors() -> list[Published]:
    """With InternViT-6B, and under DINO. The released ones attend globally; the paper used windows."""
    h6b, lh6b = "internvit_6b mae_h", "internvit_6b mae_h deit3_l_384"
    tanh = {"activation": "gelu_tanh"}
    fast: dict[str, Any] = {"interaction": FAST, "interactions": 4, "arguments": tanh}
    return [
        _detector(
            "dino_sbl_1792_1120_672",
            "deit3_l_384 deit3_b deit3_s",
            (672, 1120, 1792),
            "dino_4scale_deit_384_sbl_1792_1120_672_fpn_3x_coco_bs32_ms",
            arguments={"windows": [24, 24, 0], "position_grid": (24, 24)},
            dino=True,
            **IMAGENET,
        ),
        _detector("h6b_1024_512", h6b, (512, 1024), "mask_rcnn_internvit_h6b_1024_512_fpn_1x_coco_bs16_ms"),
        _detector(
            "dino_h6b_1024_768",
            h6b,
            (768, 1024),
            "dino_4scale_internvit_h6b_1024_768_fpn_1x_coco_bs32_ms",
            dino=True,
        ),
        _detector("lh6b_1536_1024_512", lh6b, (512, 1024, 1536), None, **fast),
        _detector("dino_lh6b_1536_1024_512", lh6b, (512, 1024, 1536), None, dino=True, **fast),
    ]


def _convnext_detectors() -> list[Published]:
    """Table II: ConvNeXt and ViT in every mixture, merged at four depths."""
    networks = {"ct": "convnext_t", "cs": "convnext_s", "cb": "convnext_b"}
    networks |= {"vt": "deit_t", "vs": "deit3_s", "vb": "deit3_b"}
    rates = {"ct": 0.3, "cs": 0.3, "cb": 0.4, "vt": 0.05, "vs": 0.05, "vb": 0.15}
    found = []
    for name in ("ct_cs_cb", "ct_vs_vb", "ct_cs_vb", "ct_vs_cb", "vt_cs_vb", "vt_cs_cb", "vt_vs_cb"):
        largest_first = name.split("_")[::-1]
        released = name == "ct_cs_cb"
        found.append(
            _detector(
                f"{'convnext_tsb' if released else name}_1024_672_448",
                " ".join(networks[part] for part in largest_first),
                (448, 672, 1024),
                "mask_rcnn_convnext-tsb_1024_672_448_regular-fpn" if released else None,
                drop_path=tuple(rates[part] for part in largest_first),
                arguments={"windows": 14},
                merge="stages",
                **IMAGENET,
            )
        )
    return found


def _baselines() -> list[Published]:
    """One network on one picture: Tables I, II and IV for detection, VIII for classification.

    ConvNeXt's twelve runs exchange nothing with anybody: they are where its maps of four strides leave.
    Its configuration normalises by halves, unlike the pyramids with ConvNeXt.
    """
    alone: dict[str, Any] = {"prefix": "", "merge": "none", "interactions": 0}
    by_stage = alone | {"interactions": 12}
    vitdet: dict[str, Any] = {"windows": [14, 14, 0]}
    vit = "mask_rcnn_deit_vit_{}_fpn_1x_coco_bs16"
    internvit = "mask_rcnn_internvit_6b_fpn_1x_coco_bs16_ms"
    found = [
        _detector("vitdet_b_1024", "deit3_b", (1024,), vit.format("b"), arguments=vitdet, **alone),
        _detector("vitdet_l_1024", "deit3_l", (1024,), vit.format("l"), arguments=vitdet, **alone),
        _detector("internvit_6b_1024", "internvit_6b", (1024,), internvit, **alone),
        _detector("convnext_b_1024", "convnext_b", (1024,), None, drop_path=(0.4,), **by_stage),
    ]
    for name, encoder in (("deit_b_224", "deit_b"), ("vit_l_224", "augreg_l")):
        branch = _branch(encoder, 224, 0, class_token=True, class_slot=True, layer_scale=None)
        found.append(_classified(name, (branch,), head="cls"))
    return found


def _classified(name: str, branches: tuple[BranchConfig, ...], **fields: Any) -> Published:
    return Published(
        name=name,
        task="classification",
        branches=branches,
        merge="none",
        num_classes=1000,
        **IMAGENET,
        **fields,
    )


def _segmenters() -> list[Published]:
    """Table VI, and the released ones, with InternViT-6B, whose FFN approximates GELU by tanh."""
    found = [
        _inferred("tsb", "deit3_b deit3_s deit_t", (336, 448, 896)),
        _inferred("sbl", "deit3_l deit3_b deit3_s", (336, 448, 1120)),
        _segmenter("internvit_6b_512", "internvit_6b", (512,), "upernet_internvit_6b_512", merge="none"),
    ]
    for small in (192, 256, 384, 512):
        file = f"upernet_internvit_h6b_{small}_512"
        name, encoders = f"piip_seg_h6b_512_{small}", "internvit_6b mae_h"
        found.append(_segmenter(name, encoders, (small, 512), file, interactions=12, interaction=FAST))
    return found


def _segmenter(
    name: str, encoders: str, sizes: tuple[int, ...], file: str, *, interactions: int = 0, **fields: Any
) -> Published:
    """Position tables are stored at the grid of the branch's own view."""
    branches = tuple(
        _dense(
            encoder,
            size,
            0.4,
            interactions,
            activation="gelu_tanh",
            position_grid=(size // 16, size // 16),
        )
        for encoder, size in zip(encoders.split(), sizes, strict=True)
    )
    return Published(
        name=name,
        task="segmentation",
        branches=branches,
        repository=REPOSITORY,
        file=f"segmentation/{file}_80k_ade20k_bs16_lr4e-5.pth",
        **IMAGENET,
        **fields,
    )


def _inferred(name: str, encoders: str, sizes: tuple[int, ...]) -> Published:
    """Table VI, whose configurations were not released; windows as its printed costs have them."""
    branches = tuple(
        _dense(encoder, size, DROP_PATH[_size(encoder)], windows=window)
        for encoder, size, window in zip(encoders.split(), sizes, (0, 28, 28), strict=True)
    )
    quirk = "no configuration was released: windows are inferred from the printed cost"
    found: dict[str, Any] = {
        "name": f"piip_seg_{name}_{_joined(sizes)}",
        "branches": branches,
        "quirk": quirk,
    }
    return Published(task="segmentation", **found, **IMAGENET)


def _classifiers() -> list[Published]:
    """Heads read the first patch token, as the released code does; drop path is constant over depth."""
    tsb = ("tsb", "deit_b deit_s deit_t", (0.2, 0.05, 0.05), "deit1", 1.0)
    sbl = ("sbl", "augreg_l augreg_b augreg_s", (0.4, 0.2, 0.05), "augreg", None)
    found = []
    for (name, encoders, rates, weights, layer_scale), sizes in (
        (tsb, (128, 192, 368)),
        (sbl, (96, 160, 320)),
        (sbl, (128, 192, 384)),
    ):
        branches = tuple(
            _branch(
                encoder,
                size,
                drop_path=rate,
                class_token=True,
                position_grid=(size // 16, size // 16),
                layer_scale=layer_scale,
            )
            for encoder, size, rate in zip(encoders.split(), sizes, rates, strict=True)
        )
        dashed = "-".join(map(str, reversed(sizes)))
        found.append(
            _classified(
                f"piip_cls_{name}_{_joined(sizes)}",
                branches,
                repository=REPOSITORY,
                file=f"classification/piip_3branch_{name}_{dashed}_cls_token_{weights}.pth",
                quirk="the heads read the first patch token, not the class token",
            )
        )
    return [*found, _from_scratch()]


def _from_scratch() -> Published:
    """PIIP-B (Table X): narrow networks, one head on the merged map; the window of branch 3 is inferred."""
    branches = tuple(
        _branch(
            "vit_b", size, dim=dim, num_heads=heads, windows=window, position_grid=(size // 16, size // 16)
        )
        for size, dim, heads, window in ((128, 640, 8, 0), (256, 320, 4, 0), (512, 160, 2, 16))
    )
    return _classified("piip_cls_b_512_256_128", branches, head="merge")


def _chats() -> list[Published]:
    """PIIP-LLaVA. ImageNet statistics although one branch or both are CLIP's."""
    found = []
    for release, encoders, sizes, interactions in (
        ("CLIP-BL_512-256_7B", "clip_l clip_b", (256, 512), 2),
        ("ConvNeXt-B_CLIP-L_640-224_7B", "clip_l convnext_b_clip", (224, 640), 2),
        ("CLIP-BL_512-448_7B", "clip_l_336 clip_b", (448, 512), 12),
        ("CLIP-BL_512-448_13B", "clip_l_336 clip_b", (448, 512), 12),
        ("ConvNeXt-B_CLIP-L_1024-336_7B", "clip_l_336 convnext_b_clip", (336, 1024), 12),
        ("ConvNeXt-B_CLIP-L_1024-336_13B", "clip_l_336 convnext_b_clip", (336, 1024), 24),
        ("ConvNeXt-L_CLIP-L_1024-336_7B", "clip_l_336 convnext_l_clip", (336, 1024), 12),
        ("ConvNeXt-L_CLIP-L_1024-336_13B", "clip_l_336 convnext_l_clip", (336, 1024), 24),
        ("Plus_ConvNeXt-L_CLIP-L_1024-336_7B", "clip_l_336 convnext_l_clip", (336, 1024), 12),
    ):
        joint = "-" if release.startswith("Plus") else "_"
        found.append(
            Published(
                name="piip_llava_" + release.lower().replace("-", "_"),
                task="chat",
                branches=tuple(
                    _branch(encoder, size, interactions)
                    for encoder, size in zip(encoders.split(), sizes, strict=True)
                ),
                merge="none",
                text_dim=5120 if release.endswith("13B") else 4096,
                **IMAGENET,
                repository=f"OpenGVLab/PIIP-LLaVA{joint}{release}",
            )
        )
    return found


PUBLISHED: dict[str, Published] = {
    published.name: published
    for group in (
        _deit_detectors,
        _pretrained_detectors,
        _large_detectors,
        _convnext_detectors,
        _baselines,
        _segmenters,
        _classifiers,
        _chats,
    )
    for published in group()
}
"""By our name: `piip_<task>_<networks>_<sizes>`, smallest network, largest view first; and the baselines."""
