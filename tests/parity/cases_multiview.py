"""Golden files of LLaVA-UHD's stage 0, the training of the up-sampler: how each kind is built and run.

What the official code draws by chance was recorded, and is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cases_upsample import STACK_REQUIRED
from record import Case, Record, Required, check_required
from stepwell.fuse.downsample import LOGIT_DROPOUT, AttentionDownsampler, KernelDownsampler
from stepwell.fuse.upsample import KernelConfig, UpsamplerConfig, build_upsampler
from stepwell.keys.engine import Drop, Prefix, Rename, Rule, plan
from stepwell.keys.uhd import DOWNSAMPLER, multiview_rules
from stepwell.train.multiview import (
    Draws,
    Jitter,
    MultiviewTraining,
    UncertaintyHead,
    entropy,
    jitter,
    sampled_crf,
    total_variation,
)

__all__ = ["CASES"]

_LOGIT_DROPOUT: Required = {"keep_above": (LOGIT_DROPOUT,), "rescale": (False,)}
_BLUR: Required = {"kernel_size": (5,), "sigma": (1.0,), "border": ("reflect",)}
_HEAD: Required = {"offset": (0.1,), "output": ("exp",), "clamp_min": (1e-4,)}
_CRF = {"alpha": "place", "beta": "colour", "gamma": "near", "shift": "shift"}

DOWNSAMPLERS: Required = {
    "logit_dropout": _LOGIT_DROPOUT,
    "linear_dropout": (False,),
    "blur": _BLUR,
    "param_prefix": ("index",),
    "simple": {"kernel": ("abs_then_sum_normalised",)},
}
LOSSES: Required = {
    "entropy_clamp": (1e-7,),
    "uncertainty": _HEAD,
    "total_variation": ("squared_differences_over_numel",),
    "jitter_border": ("reflect",),
    "jitter_zoom": ("bilinear_scale_factor_before_crop",),
}
STEP: Required = {
    "upsampler": STACK_REQUIRED,
    "backbone": {"type": ("convolution",), "frozen": (True,)},
    "uncertainty_head": _HEAD,
    "blur": _BLUR,
    "logit_dropout": _LOGIT_DROPOUT,
    "crf": {
        "alpha": (0.1,),
        "beta": (0.15,),
        "gamma": (0.005,),
        "w1": (10.0,),
        "w2": (3.0,),
        "shift": (0.0,),
    },
    "crf_on_first_jitter_only": (True,),
    "entropy_weight": (0.0,),
    "tv_on": ("squared_norm_of_projected",),
    "loss_divided_by": ("n_jitters",),
    "random_projection_normalise": ("columns_to_unit_length",),
}


def _crf(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Their names of the CRF's settings -> ours."""
    renamed = {ours: settings[theirs] for theirs, ours in _CRF.items()}
    return {**renamed, "weights": (settings["w1"], settings["w2"])}


def _downsampler(record: Record) -> dict[str, Tensor]:
    s = record.settings
    check_required(s, DOWNSAMPLERS)
    outputs = {}
    for case in s["cases"]:
        i = case["index"]
        x, uniform = record.inputs[f"x{i}"], record.inputs[f"{s['logit_dropout']['input_prefix']}{i}"]
        down = AttentionDownsampler(case["dim"], case["kernel_size"], blur=case["blur_attn"])
        record.load_into(down, [Prefix(rf"{i}\.", "", DOWNSAMPLER), *_OTHERS])
        kept = uniform[..., 0] > s["logit_dropout"]["keep_above"]
        grid = (kept.shape[1], kept.shape[2])
        outputs[f"with_dropout{i}"] = down(x, grid, kept)
        outputs[f"no_dropout{i}"] = down(x, grid)
    if (simple := s["simple"]) is not None:
        kernel = KernelDownsampler(simple["kernel_size"])
        record.load_into(kernel, [Prefix(r"simple\.", "", DOWNSAMPLER), *_OTHERS])
        side = simple["final_size"]
        outputs[simple["output"]] = kernel(record.inputs[simple["input"]], (side, side))
    return outputs


_OTHERS: list[Rule] = [Drop(r"(\d+|simple)\..+", "of another of the cases")]


def _losses_and_jitter(record: Record) -> dict[str, Tensor]:
    s, inputs = record.settings, record.inputs
    check_required(s, LOSSES)
    image, x = inputs["guidance"], inputs["features"]
    positions = torch.stack([inputs["rows"], inputs["cols"]])
    head = UncertaintyHead(s["uncertainty"]["feat_dim"])
    name = s["uncertainty"]["param"]
    record.load_into(head, [Rename(rf"{name}\.(weight|bias)", r"conv.\1")])
    outputs = {
        "tv": total_variation(x),
        "entropy": entropy(inputs["prob"]),
        "scale": head(x),
    }
    for crf in ("crf", "crf_shifted"):
        outputs[crf] = sampled_crf(image, x, positions, **_crf(s[crf]))
    for case in s["jitters"]:
        outputs[case["output"]] = jitter(image, _view(case, case["pad"]))
    return outputs


def _view(case: Mapping[str, Any], pad: int) -> Jitter:
    return Jitter(pad, case["zoom"], case["row"], case["col"], case["flip"])


def _pretrain_step(record: Record) -> dict[str, Tensor]:
    """The losses of each view, and gradients of all that learns, added up over views."""
    s, inputs = record.settings, record.inputs
    check_required({name: value for name, value in s.items() if value is not None}, STEP)
    factors = sorted(s["levels"])
    rules = [Rename(r"model\.(weight|bias)", r"encoder.\1"), *multiview_rules(len(factors))]
    module = record.load_into(_module(s, len(factors)), rules)
    image = inputs["image"]
    levels = module.upsampler.levels(module.encoder(image), image, stop_gradient=module.stop_gradient)
    maps = [level.corrected() for level in levels]
    weights = {
        "reconstruction": 1 / s["n_jitters"],
        "crf": s["crf_weight"],
        "total_variation": s["tv_weight"],
    }
    outputs, totals = {}, []
    for i, case in enumerate(s["jitters"]):
        view = Draws(
            _view(case, s["max_pad"]),
            inputs.get(f"proj_{i}"),
            [inputs[f"uniform_{n}x_{i}"][..., 0] > s["logit_dropout"]["keep_above"] for n in factors],
            [_positions(inputs, f"_{n}x") for n in factors] if i == 0 else [],
        )
        terms = module.terms(image, maps, view, is_first=i == 0)
        totals.append(sum(weights[name] * term for level in terms for name, term in level.items()))
        if i == 0:
            outputs |= {f"crf_{n}x": level["crf"] for n, level in zip(factors, terms, strict=True)}
    outputs["loss_per_jitter"] = torch.stack(totals)
    outputs["loss_per_jitter"].sum().backward()
    targets = plan(record.params, rules).targets
    for name, parameter in module.named_parameters():
        (theirs,) = targets[name].sources
        if not theirs.startswith(s["gradient_exclude"]):
            gradient = parameter.grad.view(record.params[theirs].shape)
            outputs[f"{s['gradient_prefix']}{theirs}"] = gradient
    return outputs


def _positions(inputs: Mapping[str, Tensor], suffix: str = "") -> Tensor:
    return torch.stack([inputs[f"crf_rows{suffix}"], inputs[f"crf_cols{suffix}"]])


def _module(s: Mapping[str, Any], num_levels: int) -> MultiviewTraining:
    dim, stack, backbone = s["dim"], s["upsampler"], s["backbone"]
    config = UpsamplerConfig(kernel=KernelConfig(radius=stack["radius"], key_dim=stack["key_dim"]))
    downsamplers = [AttentionDownsampler(dim, s["kernel_size"]) for _ in range(num_levels)]
    return MultiviewTraining(
        nn.Conv2d(3, dim, backbone["kernel_size"], stride=backbone["stride"]),
        build_upsampler(config, dim, stack["num_stages"]),
        downsamplers,
        [UncertaintyHead(dim) for _ in range(num_levels if s["uncertainty"] else 0)],
        losses=("reconstruction", "crf", "total_variation"),
        stop_gradient=s["stage1_detached_before_stage2"],
    )


CASES: dict[str, Case] = {
    "uhd.downsampler": _downsampler,
    "uhd.losses_and_jitter": _losses_and_jitter,
    "uhd.pretrain_step": _pretrain_step,
}
