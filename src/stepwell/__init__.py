"""Stepwell reads big images well and cheaply.

    import stepwell
    model = stepwell.load()
    print(model.ask("receipt.jpg", "How much is the total?"))

Importing loads neither torch nor transformers: public names arrive when they are used, and the model classes
are registered with transformers' Auto classes as soon as those are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from stepwell.models.watch import register_when_needed
from stepwell.version import __version__ as __version__

if TYPE_CHECKING:
    from stepwell.data.coco import CocoFile as CocoFile
    from stepwell.data.conversations import Conversations as Conversations
    from stepwell.data.image_folder import ImageFolder as ImageFolder
    from stepwell.data.label_maps import LabelMaps as LabelMaps
    from stepwell.data.yolo import YoloFiles as YoloFiles
    from stepwell.encoders.catalogue import build_encoder as build_encoder
    from stepwell.fuse.dual import EnhancementConfig as EnhancementConfig
    from stepwell.fuse.interaction import InteractionConfig as InteractionConfig
    from stepwell.fuse.upsample import UpsamplerConfig as UpsamplerConfig
    from stepwell.fuse.windows import WindowConfig as WindowConfig
    from stepwell.heads.cascade import CascadeConfig as CascadeConfig
    from stepwell.heads.dino import DinoConfig as DinoConfig
    from stepwell.heads.rcnn import RcnnConfig as RcnnConfig
    from stepwell.heads.upernet import UperNetConfig as UperNetConfig
    from stepwell.images.limits import ImageError as ImageError
    from stepwell.images.limits import ImageLimits as ImageLimits
    from stepwell.images.open import open_image as open_image
    from stepwell.models.anyres import AnyResConfig as AnyResConfig
    from stepwell.models.ask import Assistant as Assistant
    from stepwell.models.assistant import StepwellForConditionalGeneration as StepwellForConditionalGeneration
    from stepwell.models.config import StepwellConfig as StepwellConfig
    from stepwell.models.dense import ClassifierSettings as ClassifierSettings
    from stepwell.models.dense import DenseSettings as DenseSettings
    from stepwell.models.dense_config import StepwellDetectorConfig as StepwellDetectorConfig
    from stepwell.models.dense_config import StepwellSegmenterConfig as StepwellSegmenterConfig
    from stepwell.models.dense_heads import DetectionImages as DetectionImages
    from stepwell.models.dense_heads import SegmentationImages as SegmentationImages
    from stepwell.models.detector import StepwellForInstanceSegmentation as StepwellForInstanceSegmentation
    from stepwell.models.detector import StepwellForObjectDetection as StepwellForObjectDetection
    from stepwell.models.inf import InfConfig as InfConfig
    from stepwell.models.llava_hr import LlavaHrConfig as LlavaHrConfig
    from stepwell.models.parts import load_parts as load_parts
    from stepwell.models.perception import PyramidBackbone as PyramidBackbone
    from stepwell.models.perception import PyramidBackboneConfig as PyramidBackboneConfig
    from stepwell.models.perception import PyramidClassifierConfig as PyramidClassifierConfig
    from stepwell.models.perception import PyramidForImageClassification as PyramidForImageClassification
    from stepwell.models.piip import PiipConfig as PiipConfig
    from stepwell.models.plain import PlainConfig as PlainConfig
    from stepwell.models.predictions import Classification as Classification
    from stepwell.models.predictions import Detections as Detections
    from stepwell.models.predictions import Segmentation as Segmentation
    from stepwell.models.processor import StepwellProcessor as StepwellProcessor
    from stepwell.models.pyramid import BranchConfig as BranchConfig
    from stepwell.models.pyramid import pyramid_branches as pyramid_branches
    from stepwell.models.pyramid_shared import PyramidSharedConfig as PyramidSharedConfig
    from stepwell.models.segmenter import StepwellForSemanticSegmentation as StepwellForSemanticSegmentation
    from stepwell.models.uhd import UhdV1Config as UhdV1Config
    from stepwell.models.uhd import UhdV2Config as UhdV2Config
    from stepwell.ops.choose import prefer as prefer
    from stepwell.views.tiling import Tiles as Tiles
    from stepwell.weights.load import load as load

_ROOMS = {
    "AnyResConfig": "models.anyres",
    "Assistant": "models.ask",
    "BranchConfig": "models.pyramid",
    "Classification": "models.predictions",
    "ClassifierSettings": "models.dense",
    "CocoFile": "data.coco",
    "Conversations": "data.conversations",
    "CascadeConfig": "heads.cascade",
    "DenseSettings": "models.dense",
    "DetectionImages": "models.dense_heads",
    "Detections": "models.predictions",
    "DinoConfig": "heads.dino",
    "EnhancementConfig": "fuse.dual",
    "ImageError": "images.limits",
    "ImageFolder": "data.image_folder",
    "ImageLimits": "images.limits",
    "InfConfig": "models.inf",
    "InteractionConfig": "fuse.interaction",
    "LabelMaps": "data.label_maps",
    "LlavaHrConfig": "models.llava_hr",
    "PiipConfig": "models.piip",
    "PlainConfig": "models.plain",
    "PyramidBackbone": "models.perception",
    "PyramidBackboneConfig": "models.perception",
    "PyramidClassifierConfig": "models.perception",
    "PyramidForImageClassification": "models.perception",
    "PyramidSharedConfig": "models.pyramid_shared",
    "RcnnConfig": "heads.rcnn",
    "Segmentation": "models.predictions",
    "SegmentationImages": "models.dense_heads",
    "StepwellConfig": "models.config",
    "StepwellDetectorConfig": "models.dense_config",
    "StepwellForConditionalGeneration": "models.assistant",
    "StepwellForInstanceSegmentation": "models.detector",
    "StepwellForObjectDetection": "models.detector",
    "StepwellForSemanticSegmentation": "models.segmenter",
    "StepwellProcessor": "models.processor",
    "StepwellSegmenterConfig": "models.dense_config",
    "Tiles": "views.tiling",
    "UhdV1Config": "models.uhd",
    "UhdV2Config": "models.uhd",
    "UperNetConfig": "heads.upernet",
    "UpsamplerConfig": "fuse.upsample",
    "WindowConfig": "fuse.windows",
    "YoloFiles": "data.yolo",
    "build_encoder": "encoders.catalogue",
    "load": "weights.load",
    "load_parts": "models.parts",
    "open_image": "images.open",
    "prefer": "ops.choose",
    "pyramid_branches": "models.pyramid",
}

__all__ = [*_ROOMS]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'stepwell' has no attribute {name!r}")
    return getattr(import_module(f"stepwell.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])


register_when_needed()
