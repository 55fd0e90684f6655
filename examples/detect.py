"""A pyramid of your own as the backbone of Deformable DETR learns to detect, from a COCO file.

python examples/detect.py COCO_FILE IMAGES [STEPS]      docs/detect.md; needs scipy
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from transformers.image_transforms import corners_to_center_format

import stepwell

SIZE = (256, 256)  # height and width that every image is resized to
pictures = stepwell.CocoFile(Path(sys.argv[1]), images=Path(sys.argv[2]))

branches = stepwell.pyramid_branches(("deit_s", 128), ("deit_t", 256), interactions=4)
backbone = stepwell.PyramidBackboneConfig(
    pyramid=stepwell.DenseSettings(branches=branches), out_features=["stage2", "stage3", "stage4"]
)
config = DeformableDetrConfig(
    use_timm_backbone=False,
    backbone=None,
    backbone_config=backbone,
    id2label=dict(enumerate(pictures.classes)),
    num_feature_levels=3,
    num_queries=50,
)
model = DeformableDetrForObjectDetection(config)
pyramid = next(part for part in model.modules() if isinstance(part, stepwell.PyramidBackbone))
processor = pyramid.image_processor()  # stepwell.load_parts(pyramid, ...) for pretrained branches


def prepared(picture: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image, resized and normalised, and its boxes: centre, width and height, as fractions."""
    image = stepwell.open_image(picture.path).resize(SIZE[::-1])
    things = [thing for thing in picture.annotations if not thing.is_crowd and thing.label is not None]
    height, width = picture.size
    boxes = torch.tensor([thing.box for thing in things]).reshape(-1, 4)
    boxes = corners_to_center_format(boxes / torch.tensor([width, height, width, height]))
    numbers = torch.tensor([thing.label for thing in things], dtype=torch.long)
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    return pixels, {"class_labels": numbers, "boxes": boxes}


optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
for step in range(int(sys.argv[3]) if len(sys.argv) > 3 else 50):
    pixels, labels = zip(*[prepared(pictures[i]) for i in torch.randint(len(pictures), (2,))], strict=True)
    loss = model(pixel_values=torch.stack(pixels), labels=list(labels)).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"step {step + 1}: {loss:.3f}", flush=True)
model.save_pretrained("detector")
