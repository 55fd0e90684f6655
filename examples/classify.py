"""A pyramid of your own learns to tell images apart, from a folder of images for every class.

python examples/classify.py FOLDER [STEPS]      docs/classify.md
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, pipeline

import stepwell

photos = stepwell.ImageFolder(Path(sys.argv[1]))
branches = stepwell.pyramid_branches(("deit_s", 112), ("deit_t", 224), interactions=4)
config = stepwell.PyramidClassifierConfig(
    pyramid=stepwell.ClassifierSettings(branches=branches), id2label=dict(enumerate(photos.classes))
)
model = stepwell.PyramidForImageClassification(
    config
)  # pretrained branches: stepwell.load_parts, docs/weights.md
processor = model.image_processor()


def collate(samples: list) -> dict[str, torch.Tensor]:
    images = [stepwell.open_image(sample.image) for sample in samples]
    labels = torch.tensor([sample.label for sample in samples])
    return {"pixel_values": processor(images, return_tensors="pt").pixel_values, "labels": labels}


arguments = TrainingArguments(
    "runs",
    max_steps=int(sys.argv[2]) if len(sys.argv) > 2 else 100,
    per_device_train_batch_size=8,
    learning_rate=3e-4,
    remove_unused_columns=False,
    report_to="none",
)
Trainer(model, arguments, data_collator=collate, train_dataset=photos).train()
model.save_pretrained("classifier")  # with its image processor, so that a pipeline takes the folder

classify = pipeline("image-classification", model="classifier")
for guess in classify(str(photos[0].image), top_k=2):
    print(f"{photos[0].image.name}: {guess['label']} {guess['score']:.2f}")
