"""Makes transformers' Auto classes know ours; `import stepwell` runs it."""

from __future__ import annotations

import sys

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForInstanceSegmentation,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
)

from stepwell.models.assistant import StepwellForConditionalGeneration, StepwellModel
from stepwell.models.config import StepwellConfig
from stepwell.models.dense_config import StepwellDetectorConfig, StepwellSegmenterConfig
from stepwell.models.detection_processor import StepwellDetectionImageProcessor
from stepwell.models.detector import StepwellForInstanceSegmentation, StepwellForObjectDetection
from stepwell.models.image_processor import StepwellImageProcessor
from stepwell.models.perception import (
    PyramidBackbone,
    PyramidBackboneConfig,
    PyramidClassifierConfig,
    PyramidForImageClassification,
)
from stepwell.models.perception_processor import StepwellSegmentationImageProcessor
from stepwell.models.processor import StepwellProcessor
from stepwell.models.segmenter import StepwellForSemanticSegmentation
from stepwell.models.upsampler import StepwellUpsampler, StepwellUpsamplerConfig

__all__ = ["MODELS", "register"]

MODELS: dict[str, type[PreTrainedModel]] = {
    StepwellConfig.model_type: StepwellForConditionalGeneration,
    PyramidBackboneConfig.model_type: PyramidBackbone,
    PyramidClassifierConfig.model_type: PyramidForImageClassification,
    StepwellDetectorConfig.model_type: StepwellForObjectDetection,
    StepwellSegmenterConfig.model_type: StepwellForSemanticSegmentation,
    StepwellUpsamplerConfig.model_type: StepwellUpsampler,
}
"""By the model_type of a folder's config.json."""


def register() -> None:
    """Assistants, detectors and segmenters with their processors, backbones, classifiers, up-samplers.

    TRL and `transformers serve` look the class that a folder names up among transformers' own.
    """
    for kind in MODELS.values():  # transformers puts a second of itself into sys.modules while it is imported
        setattr(sys.modules["transformers"], kind.__name__, kind)
    AutoConfig.register(StepwellConfig.model_type, StepwellConfig, exist_ok=True)
    AutoModel.register(StepwellConfig, StepwellModel, exist_ok=True)
    AutoModelForImageTextToText.register(StepwellConfig, StepwellForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(StepwellConfig, StepwellProcessor, exist_ok=True)
    backends = dict.fromkeys(("pil", "torchvision"), StepwellImageProcessor)  # ours is the same in both
    AutoImageProcessor.register(StepwellConfig, image_processor_classes=backends, exist_ok=True)
    AutoConfig.register(StepwellUpsamplerConfig.model_type, StepwellUpsamplerConfig, exist_ok=True)
    AutoModel.register(StepwellUpsamplerConfig, StepwellUpsampler, exist_ok=True)
    for config, auto in (
        (PyramidBackboneConfig, AutoBackbone),
        (PyramidClassifierConfig, AutoModelForImageClassification),
        (StepwellDetectorConfig, AutoModelForObjectDetection),
        (StepwellSegmenterConfig, AutoModelForSemanticSegmentation),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for kind in (AutoModel, auto):
            kind.register(config, MODELS[config.model_type], exist_ok=True)
    AutoModelForInstanceSegmentation.register(
        StepwellDetectorConfig, StepwellForInstanceSegmentation, exist_ok=True
    )
    for config, processor in (
        (StepwellDetectorConfig, StepwellDetectionImageProcessor),
        (StepwellSegmenterConfig, StepwellSegmentationImageProcessor),
    ):
        of_both = dict.fromkeys(("pil", "torchvision"), processor)
        AutoImageProcessor.register(config, image_processor_classes=of_both, exist_ok=True)
    for names, config, model in (
        (MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, StepwellDetectorConfig, StepwellForObjectDetection),
        (
            MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
            StepwellDetectorConfig,
            StepwellForInstanceSegmentation,
        ),
        (
            MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
            StepwellSegmenterConfig,
            StepwellForSemanticSegmentation,
        ),
        (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            PyramidClassifierConfig,
            PyramidForImageClassification,
        ),
    ):  # pipelines look models up there by name
        names[config.model_type] = model.__name__
