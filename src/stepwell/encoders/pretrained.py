"""Pretrained weights into an encoder: a folder, a file, or a name on the hub, of timm or transformers.

Only safetensors are opened. The config.json beside them says whose names the tensors have and for what image
size the position embedding was made; tables and patch kernels are resized to the encoder's, which is how PIIP
(arXiv 2501.07783) takes weights of patch 14 over at patch 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stepwell.encoders.convnext import ConvNeXt
from stepwell.encoders.vit import VisionTransformer
from stepwell.folders import download, read_config
from stepwell.keys.backbones import Naming, backbone_rules
from stepwell.keys.engine import Rule, convert, plan
from stepwell.layers.position import resize_patch_kernel, resize_position_embedding, resize_relative_table
from stepwell.structures import Size

__all__ = ["fit_tables", "load_encoder_state", "load_encoder_weights", "spread_shared_table"]

VisionEncoder = VisionTransformer | ConvNeXt

TRANSFORMERS_NAMINGS: dict[str, Naming] = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "convnext": "convnext_hf",
    "vit": "transformers_vit",
    "vit_mae": "transformers_vit",
    "dinov2": "transformers_vit",
    "beit": "transformers_beit",
}
"""`model_type` of a transformers config -> whose names its tensors have."""


def load_encoder_weights(
    encoder: VisionEncoder,
    source: str | Path,
    *,
    naming: Naming | None = None,
    image_size: Size | None = None,
) -> dict[str, str]:
    """Fill an encoder from a local folder or .safetensors file, or from a repository on the hub.

    `naming` and `image_size` (of the pretraining) say what config.json would; a file without one needs them.
    -> what was not taken over, and why: tensors of the source, and layer scales of ours that it lacks.
    Raises FileNotFoundError, HubError, and ValueError for other formats, unknown names and what does not fit.
    """
    path = _local(str(source))
    config = read_config(path if path.is_dir() else path.parent)
    return load_encoder_state(
        encoder,
        _read_tensors(path),
        naming=naming or _naming(config, encoder, path),
        image_size=image_size or _image_size(config),
    )


def load_encoder_state(
    encoder: VisionEncoder,
    state: Mapping[str, Tensor],
    *,
    naming: Naming,
    image_size: Size | None = None,
) -> dict[str, str]:
    """The same for tensors in memory."""
    rules = _rules(encoder, naming)
    if isinstance(encoder, ConvNeXt):
        ours = convert(state, rules)
    else:
        state = spread_shared_table(state, encoder.spec.depth)
        ours = _fit(encoder, convert(state, rules), image_size)
    try:
        missing, unexpected = encoder.load_state_dict(ours, strict=False)
    except RuntimeError as error:  # a shape differs
        raise ValueError(f"{error}; check the encoder's name and arguments") from None
    scales = {name: "not in the source, left as it was" for name in missing if name.endswith(".gamma")}
    if lacking := sorted(set(missing) - scales.keys()):
        raise ValueError(f"the source lacks {len(lacking)} tensors of this encoder: {', '.join(lacking[:4])}")
    if unexpected:
        some = ", ".join(sorted(unexpected)[:4])
        raise ValueError(f"this encoder has no place for {len(unexpected)} tensors: {some}")
    return plan(state, rules).dropped | scales


def _rules(encoder: VisionEncoder, naming: Naming) -> list[Rule]:
    if isinstance(encoder, ConvNeXt):
        return backbone_rules(naming, depths=encoder.depths)
    return backbone_rules(
        naming,
        class_token=encoder.class_token is not None,
        class_slot=encoder.class_slot,
        final_norm=encoder.final_norm,
    )


def _fit(encoder: VisionTransformer, state: dict[str, Tensor], image_size: Size | None) -> dict[str, Tensor]:
    kernel = state.get("patch_embed.proj.weight")
    grid = None
    if kernel is not None and image_size is not None:
        grid = (image_size[0] // kernel.shape[2], image_size[1] // kernel.shape[3])
    return fit_tables(
        state,
        patch=encoder.spec.stride,
        source_grid=grid,
        position_grid=encoder.position_grid,
        class_slot=encoder.class_slot,
        windows=encoder.windows,
    )


def spread_shared_table(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A BEiT checkpoint that shares one relative table between all blocks -> one per block, in its names."""
    state = dict(state)
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    state.pop("rel_pos_bias.relative_position_index", None)
    if shared is not None:
        state |= {f"blocks.{i}.attn.relative_position_bias_table": shared for i in range(depth)}
    return state


def fit_tables(
    state: Mapping[str, Tensor],
    *,
    patch: int,
    source_grid: Size | None,
    position_grid: Size,
    class_slot: bool = False,
    windows: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Our names -> our names, patch kernel, position embedding and relative tables resized for an encoder.

    `source_grid` is the grid of the source's tables, None where it is the encoder's own; `position_grid`,
    `class_slot` and `windows` are the encoder's. Relative tables may end in three rows for a class token,
    which are dropped.
    """
    fitted = dict(state)
    for name, tensor in state.items():
        if name == "patch_embed.proj.weight":
            fitted[name] = resize_patch_kernel(tensor, patch)
        elif name == "position.table":
            fitted[name] = _fit_position(tensor, source_grid or position_grid, position_grid, class_slot)
        elif name.endswith(".attn.relative_table"):
            window = windows[int(name.split(".")[1])]
            target = (window, window) if window else position_grid
            fitted[name] = _fit_relative(tensor, source_grid or target, target)
    return fitted


def _fit_position(table: Tensor, source: Size, target: Size, class_slot: bool) -> Tensor:
    has_slot = table.shape[0] == source[0] * source[1] + 1
    if class_slot and not has_slot:
        raise ValueError(
            f"no row for a class token among {table.shape[0]} for grid {source}; set class_slot=False"
        )
    table = table[1:] if has_slot and not class_slot else table
    return resize_position_embedding(table, source, target, class_slot=class_slot)


def _fit_relative(table: Tensor, source: Size, target: Size) -> Tensor:
    rows = (2 * source[0] - 1) * (2 * source[1] - 1)
    if table.shape[0] not in (rows, rows + 3):
        raise ValueError(
            f"a relative table for windows {source} has {rows} rows (and 3), not {table.shape[0]}"
        )
    return resize_relative_table(table[:rows], source, target)


def _local(source: str) -> Path:
    """A folder or file on this machine; otherwise owner/name, fetched from the hub."""
    path = Path(source)
    if path.exists():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such file or folder: {source}")
    return download(source, ["config.json", "model*.safetensors"])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    files = [path]
    if path.is_dir():  # timm's folders may hold a second copy under another library's names
        files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files or any(file.suffix != ".safetensors" for file in files):
        names = sorted(p.name for p in path.iterdir())[:4] if path.is_dir() else [path.name]
        raise ValueError(
            f"{path} holds no safetensors ({', '.join(names)}); other formats can run code: convert them"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is not a readable safetensors file ({type(error).__name__})") from error
    return tensors


def _naming(config: Mapping[str, Any], encoder: VisionEncoder, path: Path) -> Naming:
    if "architecture" in config:  # timm
        if isinstance(encoder, ConvNeXt):
            return "convnext_timm"
        return "timm_beit" if encoder.relative else "timm_vit"
    kind = str(config.get("model_type", "missing"))
    if kind not in TRANSFORMERS_NAMINGS:
        known = ", ".join(sorted(TRANSFORMERS_NAMINGS))
        raise ValueError(f"{path}: model_type {kind} in config.json is none of {known}; say naming=...")
    return TRANSFORMERS_NAMINGS[kind]


def _image_size(config: Mapping[str, Any]) -> Size | None:
    """Height and width of the pretraining images, None where config.json does not say."""
    timm = config.get("pretrained_cfg", {}).get("input_size", [None])[1:]
    size = config.get("vision_config", config).get("image_size", timm or None)
    if isinstance(size, int):
        return size, size
    return None if size is None else (int(size[0]), int(size[1]))
