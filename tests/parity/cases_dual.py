"""Golden files of INF-LLaVA (arXiv 2407.16198): crops, the enhancement, and the whole vision.

Letters: B batch, n crops per side, C width, N visual tokens of an image, D the language model's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from record import Case, Record, Required, Unsupported, checked
from stepwell.fuse.dual import DualEnhancement, EnhancementConfig, WindowCrossAttention
from stepwell.keys.backbones import backbone_rules
from stepwell.keys.engine import Prefix, Rename
from stepwell.keys.inf import CROSS_ATTENTION, ENHANCEMENT
from stepwell.models.inf import InfConfig
from stepwell.ops.choose import preferred
from stepwell.ops.crops import merge_blocks, merge_strides, split_blocks, split_strides

__all__ = ["CASES"]

ENHANCED: Required = {
    "norm_eps": (1e-5,),
    "activation": ("gelu",),
    "resize": ("bilinear",),
    "resize_align_corners": (False,),
    "shared_attention": (True,),
    "global_query_windows": ("contiguous_blocks",),
    "local_query_windows": ("strided",),
    "fuse_order": (["ffn_crop_of_enhanced_local", "ffn_stride_of_enhanced_global"],),
    "input_layout": ("tokens",),
}
REQUIRED: dict[str, Required] = {
    "inf.crop_merge": {
        "image_layout": ("NCHW",),
        "feature_layout": ("NHWC",),
        "index_order": ("row_times_n_plus_col",),
        "local_rule": ("contiguous_blocks",),
        "global_rule": ("strided",),
    },
    "inf.attention": {
        "residual": ("query_input", None),
        "norm": ("layernorm_after_residual", None),
        "norm_eps": (1e-5,),
        "linear_order": (["query", "key", "value", "output"],),
    },
    "inf.enhancement": ENHANCED,
    "inf.encode_images": {
        "image": {"layout": ("CHW",), "dtype": ("uint8",), "batch": (1,)},
        "vision": {
            "family": ("clip",),
            "activation": ("quick_gelu",),
            "norm_eps": (1e-5,),
            "select_feature": ("patch",),
        },
        "image_resize": ("bicubic",),
        "image_resize_antialias": (False,),
        "enhancement": ENHANCED,
        "combine": ("mean_of_low_and_enhanced",),
        "projector": {"activation": ("gelu", None)},
    },
}
"""By kind, the values that our code has built in; a record may leave a key out."""


def _crop_merge(record: Record) -> dict[str, Tensor]:
    n = record.settings["n"]
    cells = record.inputs["image"].movedim(1, -1)
    features = torch.stack([record.inputs[f"feat.{k}"] for k in range(n * n)], 1)
    outputs = {
        "recombine_local": merge_blocks(features, (n, n)),
        "recombine_global": merge_strides(features, (n, n)),
    }
    for name, split in (("local", split_blocks), ("global", split_strides)):
        crops = split(cells, (n, n)).movedim(-1, 2)
        outputs |= {f"{name}.{k}": crop for k, crop in enumerate(crops.unbind(1))}
    return outputs


def _attention(record: Record) -> dict[str, Tensor]:
    s = record.settings
    if s["qkv_bias"] != s["out_bias"]:
        raise Unsupported("biases in some of the attention's linears alone")
    module = WindowCrossAttention(
        s["d_model"],
        num_heads=s["heads"],
        bias=s["qkv_bias"],
        out_projection=True,
        residual=s["residual"] is not None,
        norm=s["norm"] is not None,
    )
    record.load_into(module, CROSS_ATTENTION)
    asking, keys, values = (record.inputs[name] for name in "qkv")
    q, k = (
        layer(x).unflatten(2, (s["heads"], -1)).transpose(1, 2)
        for layer, x in ((module.query, asking), (module.key, keys))
    )
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    return {"y": module(asking, keys, values), "attn": weights}


def _enhancement(record: Record) -> dict[str, Tensor]:
    s = record.settings
    n, cells = s["n"], s["grid"]
    if s["out_grid"] != cells:
        raise Unsupported(f"out_grid {s['out_grid']}: ours is that of a crop, {cells}")
    module = DualEnhancement(s["channel"], EnhancementConfig(num_heads=s["heads"]))
    record.load_into(module, ENHANCEMENT)
    local, strided = (
        torch.stack([record.inputs[f"{name}.{k}"] for k in range(n * n)], 1).unflatten(2, (cells, cells))
        for name in ("local", "global")
    )
    outputs = {"y": module(local, strided, (n, n)).flatten(1, 2)}
    if s["intermediate_outputs"]:
        maps = module.enhanced(local, strided, (n, n), (range(n), range(n)))
        assert module.fusion is not None
        of_global, of_local, fused = (merge_strides(x, (n, n)) for x in (*maps, module.fusion(*maps, (n, n))))
        outputs |= {
            "recombined_local": merge_blocks(local, (n, n)),
            "recombined_global": merge_strides(strided, (n, n)),
            "enhanced_global": of_global,
            "enhanced_local": of_local,
            "fused_hr": fused,
        }
    return outputs


def _encode_images(record: Record) -> dict[str, Tensor]:
    s = record.settings
    image, vision = s["image"], s["vision"]
    low, high = s["low_size"], s["high_size"]
    if image["size"] not in (low, high) or high != s["n"] * low or vision["image_size"] != low:
        raise Unsupported(f"an image of {image['size']} for views of {low} and {high}")
    config = InfConfig(
        size=low,
        resolutions=(low, high),
        small_input=image["size"] == low,
        every_crop=preferred() == "reference",
        select_layer=vision["select_layer"],
        enhancement=EnhancementConfig(num_heads=s["enhancement"]["heads"]),
        projector=s["projector"]["projector_type"],
        arguments={
            "dim": vision["hidden_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
            "patch": vision["patch_size"],
            "position_grid": [low // vision["patch_size"]] * 2,
        },
    )
    model = config.build(s["projector"]["hidden_size"])
    tower = backbone_rules("clip", class_token=True, class_slot=True)
    parts = (
        (vision["param_prefix"], "branches.0.", tower),
        (s["enhancement"]["param_prefix"], "enhancement.", ENHANCEMENT),
        (s["projector"]["param_prefix"], "projector.", [Rename(r"(?:\d+\.)?(?:weight|bias)", r"\g<0>")]),
    )
    record.load_into(model, [Prefix(name.replace(".", r"\."), ours, rules) for name, ours, rules in parts])
    mean, std = (torch.tensor(image[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (record.inputs[image["input"]].float() * image["rescale_factor"] - mean) / std
    layout = model.geometry.layout((high, high))
    grid = (s["n"], s["n"])
    (features,) = model.encode([pixels], [layout])
    num_local, crops, has_small = model.geometry.parts(grid)
    maps = torch.stack([shown.map for shown in features.maps]).movedim(1, -1)
    local, strided, small = maps[None].split([num_local, len(crops), int(has_small)], 1)
    enhanced = model.enhancement(local, strided, grid) if model.enhancement is not None else local
    whole = small[:, 0] if has_small else strided[:, len(crops) // 2]
    return {
        "feat_low": whole.flatten(1, 2),
        "feat_dem": enhanced.flatten(1, 2),
        "feat_mean": ((whole + enhanced) / 2).flatten(1, 2),
        "visual_tokens": features.tokens[None],
    }


CASES: dict[str, Case] = {
    kind: checked(case, REQUIRED)
    for kind, case in {
        "inf.crop_merge": _crop_merge,
        "inf.attention": _attention,
        "inf.enhancement": _enhancement,
        "inf.encode_images": _encode_images,
    }.items()
}
