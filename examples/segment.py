"""A pyramid of your own as the backbone of UperNet learns to segment, from images and maps of labels.

python examples/segment.py IMAGES LABELS CLASSES [STEPS]      docs/segment.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import UperNetConfig, UperNetForSemanticSegmentation

import stepwell

SIDE = 224  # of the crops that are learned from, in pixels
images, labels, classes = map(Path, sys.argv[1:4])
pictures = stepwell.LabelMaps(images, labels, classes=classes)

branches = stepwell.pyramid_branches(("deit_s", 112), ("deit_t", 224), interactions=4)
backbone = stepwell.PyramidBackboneConfig(pyramid=stepwell.DenseSettings(branches=branches))
config = UperNetConfig(
    backbone_config=backbone,
    id2label=dict(enumerate(pictures.classes.names)),
    hidden_size=64,
    use_auxiliary_head=False,
)
model = UperNetForSemanticSegmentation(
    config
)  # stepwell.load_parts(model.backbone, ...) for pretrained branches
processor = model.backbone.image_processor()


def crop(sample: object) -> tuple[torch.Tensor, torch.Tensor]:
    """A random square of an image, normalised, and its labels; what lies outside of the image is ignored."""
    height, width = sample.labels.shape
    top, left = (int(torch.randint(max(side - SIDE, 0) + 1, ())) for side in (height, width))
    image = stepwell.open_image(sample.image).crop((left, top, left + SIDE, top + SIDE))
    known = torch.full((SIDE, SIDE), 255)
    cut = torch.from_numpy(sample.labels[top : top + SIDE, left : left + SIDE])
    known[: cut.shape[0], : cut.shape[1]] = cut
    return processor(image, return_tensors="pt").pixel_values[0], known


optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4)
for step in range(int(sys.argv[4]) if len(sys.argv) > 4 else 50):
    views, known = zip(*[crop(pictures[i]) for i in torch.randint(len(pictures), (2,))], strict=True)
    loss = model(pixel_values=torch.stack(views), labels=torch.stack(known)).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"step {step + 1}: {loss:.3f}", flush=True)
model.save_pretrained("segmenter")
