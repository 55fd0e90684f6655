"""What records of PIIP may ask for: the values of settings that our code has built in, by kind.

PIIP, arXiv 2501.07783; the keys are those of the golden files.
"""

from __future__ import annotations

from record import Required

__all__ = ["REQUIRED"]

INTERACTION: Required = {
    "n_levels": (1, None),
    "activation": ("gelu",),
    "norm": ("layernorm", "none"),
    "norm_eps": (1e-6, None),
}
RESIZE: Required = {
    "mode": ("bilinear",),
    "by": ("scale_factor",),
    "align_corners": (False,),
    "antialias": (False,),
}
SUM: Required = {
    "resize": ("bilinear",),
    "resize_align_corners": (False,),
    "sum_weights": ("scalar_per_branch",),
}
PROJECTOR: Required = {
    "norm": ("groupnorm", "layernorm"),
    "norm_eps": (1e-5,),
    "activation": ("gelu",),
    "resize": ("bilinear",),
    "resize_align_corners": (False,),
    "resize_before_linear": (True,),
    "combine": ("sum",),
}
REQUIRED: dict[str, Required] = {
    "piip.deform_attention": {"n_levels": (1,)},
    "piip.injector": {"interaction": INTERACTION},
    "piip.interaction_unit": {"interaction": INTERACTION, "exchange": ("simultaneous",)},
    "piip.interaction_block": {"interaction": INTERACTION, "exchange": ("simultaneous",)},
    "piip.backbone": {
        "interaction": INTERACTION,
        "exchange": ("simultaneous",),
        "image_resize": RESIZE,
        "grid_rule": ("layer_stride_floor", "patch16_floor"),
        "merge": {
            **SUM,
            "kernel_size": (3,),
            "conv_bias": (False,),
            "norm": ("groupnorm",),
            "norm_eps": (1e-5,),
            "activation": ("relu",),
            "resize_after_stack": (True,),
        },
        "pyramid": {"activation": ("gelu",), "norm": ("groupnorm",), "norm_eps": (1e-5,)},
    },
    "piip.classifier": {
        "interaction": INTERACTION,
        "exchange": ("simultaneous",),
        "image_resize": RESIZE,
        "grid_rule": ("ratio_truncate_then_ceil16",),
        "head_rule": ("first_patch", "cls", "merge"),
        "head_norm_eps": (1e-6,),
        "class_token_gets_position": (False,),
        "class_token_in_exchange": (False,),
        "head": {
            **SUM,
            "norm": ("layernorm",),
            "combine": ("mean",),
            "token_index": (0,),
            "sequence": ("patches_only",),
            "merge_norm": ("groupnorm",),
            "merge_norm_eps": (1e-5,),
            "merge_projection": ("linear",),
            "branch1_projection": (False,),
            "pool": ("mean",),
        },
    },
    "piip.llava_tower": {
        "interaction": INTERACTION,
        "exchange": ("simultaneous",),
        "image_resize": RESIZE,
        "grid_rule": ("layer_stride_floor",),
        "class_token_in_exchange": (False,),
        "output_layout": ("map",),
        "projector": PROJECTOR,
    },
    "piip.llava_projector": PROJECTOR,
    "piip.llava_preprocess": {
        "resample": ("bicubic",),
        "resample_on": ("uint8",),
        "antialias": (True,),
        "rescale_factor": (1 / 255,),
        "pad": {"square": ("centred_on_longer_side",)},
        "crop": {"resize": ("shorter_side",), "crop": ("centre",)},
    },
}
"""By kind, the values that our code has built in; a record may leave a key out, and n_levels is null without
deformable attention. Grid rules name how the official code counts cells: ours are what the encoders return,
which is the same wherever the official code runs."""
