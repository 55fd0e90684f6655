"""Any network of timm as an Encoder, by its name there: `timm:NAME`.

Vision transformers (ViT, DeiT, DINOv2 and v3, SigLIP, EVA, C-RADIO) have a layer per block; networks that
timm can take apart into stages (ConvNeXt, ResNet, Swin, ...) a layer per stage; any other has one layer,
behind which alone it can meet other branches. timm is imported when the first of them is built.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepwell.encoders.batch_statistics import BatchStatistics
from stepwell.encoders.encoder import run_layers, side_by_side, with_grid
from stepwell.folders import one_line
from stepwell.keys.checkpoint import Tensors, TensorSource
from stepwell.keys.engine import Plan, Target
from stepwell.ops.rearrange import tokens_to_map
from stepwell.structures import EncoderSpec, Size, TokenMap

__all__ = ["TimmBlocks", "TimmEncoder", "TimmNetwork", "TimmStages", "build_timm", "timm_spec"]

_Built = TypeVar("_Built")
_NOT_OURS_TO_SAY = {"cache_dir", "checkpoint_path", "model_name", "pretrained", "pretrained_cfg"} | {
    *("pretrained_cfg_overlay", "pretrained_strict"),
}
"""Arguments of timm.create_model that open files or ask the network."""


class TimmEncoder(BatchStatistics, ABC):
    """What all of them share. A subclass has `network`, timm's without what no layer needs, and cuts it."""

    network: nn.Module
    spec: EncoderSpec

    def __init__(self, name: str, arguments: dict[str, Any], *, checkpointing: bool) -> None:
        super().__init__()
        self.name = name
        self.arguments = arguments
        self.gradient_checkpointing = checkpointing  # as transformers looks for it

    @abstractmethod
    def stem(self, image: Tensor) -> TokenMap: ...

    @abstractmethod
    def run(self, state: TokenMap, first: int, last: int) -> TokenMap: ...

    def to_map(self, state: TokenMap) -> Tensor:
        """-> (B, C, H, W) of the patch tokens."""
        return tokens_to_map(state.tokens, state.size)

    def forward(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> the last layer's tokens."""
        return self.run(self.stem(image), 0, self.spec.depth - 1)

    @contextmanager
    def taking(self, image: Tensor) -> Iterator[None]:
        """timm asserts that an image has the size that a network was made for."""
        try:
            yield
        except AssertionError as error:
            size = "x".join(map(str, image.shape[2:]))
            raise ValueError(
                f"timm's {self.name} cannot take an image of {size}: {one_line(error)}"
            ) from None

    def plan(self, weights: TensorSource) -> tuple[Plan, TensorSource]:
        """What becomes of weights of the whole network, under timm's names or those that timm takes for them;
        and the weights under timm's names. Raises ValueError where timm cannot rename them.
        """
        whole = _without_memory(lambda: _create(self.name, self.arguments))
        state = {name: weights.read(name) for name in weights.shapes}
        rename = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
        if rename is not None:
            try:
                state = rename(state, whole)
            except Exception as error:  # any network's own code
                raise ValueError(
                    f"timm cannot read these weights for {self.name}: {one_line(error)}"
                ) from None
        ours, known = self.state_dict().keys(), whole.state_dict().keys()
        result = Plan()
        for name in state:
            # As it is, or as timm's wrappers of features rename it.
            places = (name, name.replace(".", "_", 1), f"model.{name}")
            place = next((f"network.{place}" for place in places if f"network.{place}" in ours), None)
            if place is not None:
                result.targets[place] = Target(place, (name,), lambda parts: parts[0])
            elif name in known:
                result.dropped[name] = "behind the last layer, not taken over"
            else:
                result.unknown.append(name)
        tensors = Tensors(state)
        tensors.notes = weights.notes
        return result, tensors


def build_timm(name: str, /, *, checkpointing: bool = False, **arguments: Any) -> TimmEncoder:
    """timm's network of this name, with or without the tag of its weights; random weights.

    arguments: of timm.create_model, such as img_size. A network of fixed image size takes that size only.
    Raises ValueError for what timm does not know or cannot take features from, ImportError without timm.
    """
    whole = _without_memory(lambda: _create(name, arguments))
    from timm.models import FeatureListNet
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    statistics = {key: tuple(whole.pretrained_cfg[key]) for key in ("mean", "std")}
    if type(whole).forward_features in (VisionTransformer.forward_features, Eva.forward_features):
        network = _create(name, {**arguments, "num_classes": 0, "dynamic_img_size": True})
        return TimmBlocks(network, statistics, name, arguments, checkpointing=checkpointing)
    network = _create(name, {**arguments, "features_only": True})
    for module in network.modules():
        if getattr(module, "inplace", False):  # what goes into a layer belongs to its caller
            module.inplace = False
    kind = TimmStages if isinstance(network, FeatureListNet) else TimmNetwork
    return kind(network, statistics, name, arguments, checkpointing=checkpointing)


def timm_spec(name: str, /, **arguments: Any) -> EncoderSpec:
    """`build_timm(...).spec` without weights in memory."""
    return _without_memory(lambda: build_timm(name, **arguments)).spec


class TimmBlocks(TimmEncoder):
    """A vision transformer, block by block; rotary positions are those of the grid."""

    def __init__(self, network: Any, statistics: dict[str, Any], *names: Any, checkpointing: bool) -> None:
        super().__init__(*names, checkpointing=checkpointing)
        needed = ("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks", "rope")
        for child, _ in network.named_children():
            if child not in needed:
                setattr(network, child, nn.Identity())
        self.network = network
        height, width = network.patch_embed.feat_ratio(as_scalar=False)
        if height != width:
            raise ValueError(f"timm's {self.name} has patches of {height}x{width}, which are no squares")
        self.patch: int = height
        depth = len(network.blocks)
        self.spec = EncoderSpec(
            dims=(network.embed_dim,) * depth, strides=(self.patch,) * depth, **statistics
        )

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> tokens with positions; a remainder smaller than a patch is dropped."""
        network: Any = self.network
        size = (image.shape[2] // self.patch, image.shape[3] // self.patch)
        if not all(size):
            raise ValueError(
                f"an image of {tuple(image.shape[2:])} is smaller than one patch of {self.patch}"
            )
        tokens = network.patch_embed(image[..., : size[0] * self.patch, : size[1] * self.patch])
        tokens = network._pos_embed(tokens)
        if isinstance(tokens, tuple):  # with rotary positions, which `run` asks for again
            tokens = tokens[0]
        elif network.patch_drop is not None:
            tokens = network.patch_drop(tokens)
        tokens = network.norm_pre(tokens)
        in_front = tokens.shape[1] - size[0] * size[1]
        assert in_front == network.num_prefix_tokens
        has_class_token = in_front > 0 and network.cls_token is not None
        return TokenMap(
            tokens[:, in_front:],
            size,
            tokens[:, :1] if has_class_token else None,
            tokens[:, has_class_token:in_front] if in_front > has_class_token else None,
        )

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Blocks first..last, both included; an empty range (last < first) returns `state` unchanged."""
        if last < first:
            return state
        network: Any = self.network
        blocks: Sequence[Callable[..., Tensor]] = network.blocks
        if getattr(network, "rope", None) is not None:
            rotary = network.rope.get_embed(shape=state.size)
            mixed = getattr(network, "rope_mixed", False)
            blocks = [
                partial(block, rope=rotary[i] if mixed else rotary) for i, block in enumerate(network.blocks)
            ]
        tokens = run_layers(blocks, side_by_side(state), first, last, checkpointing=self.checkpointing)
        return with_grid(tokens, state)


class TimmStages(TimmEncoder):
    """A network that timm cuts into modules in a row, some of which end a stage."""

    def __init__(self, network: Any, statistics: dict[str, Any], *names: Any, checkpointing: bool) -> None:
        super().__init__(*names, checkpointing=checkpointing)
        self.network = network
        self.channels_last: bool = str(network.output_fmt).endswith("NHWC")
        modules = list(network)
        ends = sorted(modules.index(name) for name in network.return_layers)
        self.before = modules[: ends[0]]
        self.layers = [modules[a + 1 : b + 1] for a, b in zip([ends[0] - 1, *ends], ends, strict=False)]
        dims, strides = network.feature_info.channels(), network.feature_info.reduction()
        if not self.before:  # the first stage embeds the image
            self.before, *self.layers = self.layers
            dims, strides = dims[1:], strides[1:]
        self.spec = EncoderSpec(dims=tuple(dims), strides=tuple(strides), **statistics)

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> what the first stage takes. Raises ValueError for a size it refuses."""
        with self.taking(image):
            return self._to_tokens(self._through(self.before, image))

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """Stages first..last, both included; an empty range (last < first) returns `state` unchanged."""
        if last < first:
            return state
        grid = state.tokens.unflatten(1, state.size)
        map = grid if self.channels_last else grid.permute(0, 3, 1, 2)
        layers = [partial(self._through, names) for names in self.layers]
        return self._to_tokens(run_layers(layers, map, first, last, checkpointing=self.checkpointing))

    def _through(self, names: Sequence[str], map: Tensor) -> Tensor:
        network: Any = self.network
        for name in names:
            map = network[name](map)
        return map

    def _to_tokens(self, map: Tensor) -> TokenMap:
        return _tokens(map if self.channels_last else map.permute(0, 2, 3, 1))


class TimmNetwork(TimmEncoder):
    """A network that is run as a whole, which happens in the stem; its one layer does nothing more."""

    def __init__(self, network: Any, statistics: dict[str, Any], *names: Any, checkpointing: bool) -> None:
        super().__init__(*names, checkpointing=checkpointing)
        self.network = network
        info = network.feature_info
        dim, stride = info.channels()[-1], info.reduction()[-1]
        self.spec = EncoderSpec(dims=(dim,), strides=(stride,), **statistics)

    def stem(self, image: Tensor) -> TokenMap:
        """(B, 3, height, width) -> tokens of the last map. Raises ValueError for a size that timm refuses."""
        with self.taking(image):
            return _tokens(self.network(image)[-1].permute(0, 2, 3, 1))

    def run(self, state: TokenMap, first: int, last: int) -> TokenMap:
        """-> `state`. Raises ValueError for layers that there are not."""
        if last >= first and (first, last) != (0, 0):
            raise ValueError(f"layers {first}..{last} asked of a network with layer 0 only")
        return state


def _tokens(grid: Tensor) -> TokenMap:
    """(B, H, W, C) -> tokens and their size."""
    size: Size = (grid.shape[1], grid.shape[2])
    return TokenMap(grid.flatten(1, 2), size)


def _without_memory(build: Callable[[], _Built]) -> _Built:
    """On the meta device; the few networks that compute with their starting values are built in memory."""
    try:
        with torch.device("meta"):
            return build()
    except NotImplementedError:
        return build()


def _create(name: str, arguments: dict[str, Any]) -> Any:
    if ":" in name:  # a place that timm would fetch from
        raise ValueError(f"timm:{name} is no network's name; weights are told apart from it")
    if refused := sorted(_NOT_OURS_TO_SAY & arguments.keys()):
        raise ValueError(f"timm:{name}: the argument {refused[0]!r} is not taken; weights come in as a part")
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"the encoder timm:{name} needs timm: pip install 'stepwell[timm]'") from error
    try:
        return timm.create_model(name, pretrained=False, **arguments)
    except NotImplementedError:
        raise
    except Exception as error:  # any network's own code
        raise ValueError(f"timm cannot build {name!r}: {one_line(error)}") from None
