"""Pretrained weights into an encoder: a folder, a file, or a name on the hub, of timm, transformers or the
authors of a network.

Whose names the tensors have is told by the names themselves, and held to them strictly: every tensor is used,
renamed or dropped for a reason, and none of the encoder's is left over. Position tables and patch kernels are
resized to the encoder's, which is how PIIP (arXiv 2501.07783) takes weights of patch 14 over at patch 16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.resnet import ResNet
from stepwell.encoders.table_fit import TableFit
from stepwell.encoders.timm_encoder import TimmEncoder
from stepwell.encoders.vit import VisionTransformer
from stepwell.folders import commit_of, download, is_url, read_config
from stepwell.keys.backbones import Naming, backbone_rules, recognise
from stepwell.keys.checkpoint import Tensors, TensorSource, open_checkpoint
from stepwell.keys.engine import AS_IT_IS, Plan, Rule, Target, plan
from stepwell.keys.fill import fill
from stepwell.keys.report import Report
from stepwell.structures import Size

__all__ = ["find_weights", "load_encoder_state", "load_encoder_weights"]

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
"""transformers' names -> ours."""


def load_encoder_weights(
    encoder: nn.Module,
    source: str | Path,
    *,
    naming: Naming | None = None,
    image_size: Size | None = None,
    revision: str | None = None,
) -> Report:
    """Fill an encoder from a folder or a file (.safetensors, .pth, .bin, .npz), from `owner/name` on the hub,
    or from `timm:NAME`, timm's own weights there.

    naming: whose names the tensors have, where these do not say it themselves; image_size: of the
    pretraining, by default what config.json beside the weights says, or a square; revision: of a name on the
    hub, a commit, branch or tag. -> what became of every tensor, and which commit it was. Raises
    FileNotFoundError, HubError, CheckpointError for what cannot be read safely, and ValueError (FitError,
    with the report) for what does not fit; the encoder is then as it was.
    """
    path = find_weights(str(source), revision)
    config = read_config(path if path.is_dir() else path.parent)
    tensors = open_checkpoint(path)
    notes = _differences(encoder, config)
    report = _load(encoder, tensors, str(source), naming, image_size or _image_size(config))
    report.notes += notes
    report.commit = commit_of(path)
    return report


def load_encoder_state(
    encoder: nn.Module,
    state: Mapping[str, Tensor],
    *,
    naming: Naming | None = None,
    image_size: Size | None = None,
) -> Report:
    """The same for tensors in memory."""
    return _load(encoder, Tensors(state), "these weights", naming, image_size)


def find_weights(source: str, revision: str | None = None) -> Path:
    """A folder or file on this machine; otherwise owner/name or timm:NAME, fetched from the hub.

    Safetensors are fetched where a repository has them, else what torch.save wrote. Raises FileNotFoundError,
    HubError, and ValueError for a revision of what is on this machine.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision {revision}: {source} is on this machine, as one version")
        return path
    if is_url(source):
        raise FileNotFoundError(
            f"{source} is a URL: name a file, a folder, owner/name on the hub or timm:NAME"
        )
    repository = f"timm/{source.removeprefix('timm:')}" if source.startswith("timm:") else source
    if repository.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file or folder: {source}")
    folder = download(repository, ["*.json", "model*.safetensors"], revision=revision)
    if not any(folder.glob("*.safetensors")):
        folder = download(repository, ["*.json", "pytorch_model*.bin"], revision=revision)
    return folder


def _load(
    encoder: nn.Module, tensors: TensorSource, name: str, naming: Naming | None, image_size: Size | None
) -> Report:
    is_ours = tensors.shapes.keys() == encoder.state_dict().keys()  # an encoder of ours, saved as it is
    if isinstance(encoder, VisionTransformer):
        return _load_vit(
            encoder, tensors, name, None if is_ours else naming or _naming(tensors, name), image_size
        )
    if is_ours:
        return fill(encoder, plan(tensors.shapes, [AS_IT_IS]), tensors, name=name)
    counts = [key for key in encoder.state_dict() if key.endswith("num_batches_tracked")]
    absent = dict.fromkeys(counts, "counts from 0")
    if isinstance(encoder, TimmEncoder):
        return fill(encoder, *encoder.plan(tensors), name=name, absent=absent)
    if isinstance(encoder, ConvNeXt | ResNet):
        rules = backbone_rules(naming or _naming(tensors, name), depths=encoder.depths)
        return fill(encoder, plan(tensors.shapes, rules), tensors, name=name, absent=absent)
    raise ValueError(f"weights of others are not known for a {type(encoder).__name__}")


def _naming(tensors: TensorSource, name: str) -> Naming:
    naming = recognise(tensors.shapes)
    if naming is None:
        first = ", ".join(list(tensors.shapes)[:3])
        raise ValueError(f"{name}: the names of its tensors ({first}, ...) are none that are known here")
    return naming


def _load_vit(
    encoder: VisionTransformer,
    tensors: TensorSource,
    name: str,
    naming: Naming | None,
    image_size: Size | None,
) -> Report:
    """naming: None is our own."""
    if naming is None:
        renaming = plan(tensors.shapes, [AS_IT_IS])
        table = encoder.state_dict().get("position.table")
        is_alike = table is not None and tensors.shapes["position.table"] == tuple(table.shape)
        grid = encoder.position_grid if is_alike else None
    else:
        first_plan = plan(tensors.shapes, _rules(encoder, naming, None))
        grid = _source_grid(encoder, tensors, first_plan, image_size)
        renaming = plan(tensors.shapes, _rules(encoder, naming, grid))
        _place_distillation_token(renaming, tensors, grid)
    resized = _fit(renaming, tensors, TableFit.of(encoder, grid))
    scales = [key for key in encoder.state_dict() if key.endswith(".gamma")]
    absent = dict.fromkeys(scales, "not in the source, left as it was")
    report = fill(encoder, renaming, tensors, name=name, absent=absent)
    report.resized = resized
    return report


def _rules(encoder: VisionTransformer, naming: Naming, grid: Size | None) -> list[Rule]:
    return backbone_rules(
        naming,
        class_token=encoder.class_token is not None,
        class_slot=encoder.class_slot,
        registers=encoder.registers is not None,
        final_norm=encoder.final_norm,
        grid=grid,
        depth=encoder.spec.depth,
    )


def _source_grid(
    encoder: VisionTransformer, tensors: TensorSource, renaming: Plan, image_size: Size | None
) -> Size | None:
    """The grid of the source's tables: image over patch; else a square, which is None, as pretrainings have
    it; else the encoder's own.
    """
    kernel, table = (renaming.targets.get(name) for name in ("patch_embed.proj.weight", "position.table"))
    if kernel is not None and image_size is not None:
        patch = tensors.meta(kernel.sources[0]).shape
        height, width = patch[:2] if "/" in kernel.sources[0] else patch[-2:]  # JAX has it in front
        return image_size[0] // height, image_size[1] // width
    if table is not None:
        rows = math.prod(tensors.shapes[table.sources[0]][:-1])
        if rows - math.isqrt(rows) ** 2 > 2 and rows - math.prod(encoder.position_grid) in (0, 1, 2):
            return encoder.position_grid
    return None


def _place_distillation_token(renaming: Plan, tensors: TensorSource, grid: Size | None) -> None:
    """DeiT's second token has a row of the position table, which a register does not: it is added to it."""
    token, table = (renaming.targets.get(name) for name in ("registers", "position.table"))
    if token is None or table is None:
        return
    rows = math.prod(tensors.shapes[table.sources[0]][:-1])
    if rows - (math.isqrt(rows) ** 2 if grid is None else math.prod(grid)) == 2:
        renaming.targets["registers"] = Target(
            "registers",
            (*token.sources, *table.sources),
            lambda parts: parts[0] + parts[1].flatten(0, -2)[1],
        )


def _fit(renaming: Plan, tensors: TensorSource, fit: TableFit) -> dict[str, str]:
    """Tables and kernels of the plan come out resized. -> which of them change, from which shape to which."""
    resized = {}
    for name, target in renaming.targets.items():
        try:
            before = target.make(tensors.meta)
            after = fit(name, before)
        except (RuntimeError, ValueError, IndexError):  # `fill` says that it does not fit
            continue
        if after is not before:
            resized[name] = f"{_dims(before)} -> {_dims(after)}"
            renaming.targets[name] = Target(name, target.sources, _then(target, fit))
    return resized


def _then(target: Target, fit: TableFit) -> Any:
    return lambda parts: fit(target.name, target.transform(parts))


def _dims(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _image_size(config: Mapping[str, Any]) -> Size | None:
    """Height and width of the pretraining images, None where config.json does not say. Raises ValueError for
    what is no size.
    """
    timm = config.get("pretrained_cfg")
    timm_size = timm.get("input_size") if isinstance(timm, Mapping) else None
    size = _vision(config).get("image_size", timm_size[1:] if isinstance(timm_size, list) else None)
    if size is None:
        return None
    if isinstance(size, Mapping):
        size = [size.get("height"), size.get("width")]
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"config.json says image_size {size!r}, which is no height and width in pixels")
    return sides[0], sides[1]


def _differences(encoder: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """What no tensor shows: heads, which have to agree; notes on what else differs in how it is computed."""
    fields = _vision(config)
    heads, activation = fields.get("num_attention_heads"), fields.get("hidden_act")
    if not isinstance(encoder, VisionTransformer) or type(heads) is not int:
        return []
    block: Any = encoder.blocks[0]
    if heads != block.attn.num_heads:
        raise ValueError(f"config.json says {heads} attention heads, this encoder has {block.attn.num_heads}")
    theirs = {
        "layer_norm_eps": fields.get("layer_norm_eps"),
        "hidden_act": ACTIVATIONS.get(activation, activation) if isinstance(activation, str) else None,
    }
    ours = {"layer_norm_eps": block.norm1.eps, "hidden_act": block.mlp.activation}
    return [
        f"{key} is {theirs[key]} in config.json and {value} in this encoder"
        for key, value in ours.items()
        if theirs[key] is not None and theirs[key] != value
    ]


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the vision tower: its own, where a text half lies beside them."""
    fields = config.get("vision_config")
    return fields if isinstance(fields, Mapping) else config
