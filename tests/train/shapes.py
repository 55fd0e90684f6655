"""Drawn pictures of coloured shapes with their boxes, masks, maps of labels and classes, as data sets."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

CLASSES = ("square", "disc")
COLOURS = ((220, 60, 40), (40, 90, 220))


def draw_shapes(rng: random.Random, size: tuple[int, int], count: int):
    """-> an RGB picture of (height, width), its map of labels, 0 is ground, and (class, box, polygon)."""
    height, width = size
    image, labels = Image.new("RGB", (width, height), (230, 230, 220)), Image.new("L", (width, height))
    shapes = []
    for _ in range(count):
        side = rng.randint(min(size) // 4, min(size) // 2)
        left, top = rng.randint(0, width - side), rng.randint(0, height - side)
        kind, box = rng.randrange(2), (left, top, left + side, top + side)
        for canvas, fill in ((image, COLOURS[kind]), (labels, kind + 1)):
            draw = ImageDraw.Draw(canvas)
            (draw.rectangle if kind == 0 else draw.ellipse)(
                (left, top, left + side - 1, top + side - 1), fill=fill
            )
        corners = [left, top, left + side, top, left + side, top + side, left, top + side]
        shapes.append((kind, box, corners))
    return image, labels, shapes


def write_coco(
    folder: Path, *, images: int, seed: int = 0, sizes=((64, 96), (96, 64)), count: int = 2
) -> Path:
    rng, folder = random.Random(seed), folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    told, annotations = [], []
    for i in range(images):
        size = sizes[i % len(sizes)]
        image, _, shapes = draw_shapes(rng, size, count)
        image.save(folder / "images" / f"{seed}_{i}.png")
        told.append({"id": i, "file_name": f"{seed}_{i}.png", "height": size[0], "width": size[1]})
        for kind, (left, top, right, bottom), corners in shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": kind + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "segmentation": [corners],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    path = folder / f"{seed}.json"
    path.write_text(json.dumps({"images": told, "annotations": annotations, "categories": categories}))
    return path


def write_label_maps(folder: Path, *, images: int, seed: int = 0, size=(64, 96)) -> Path:
    rng = random.Random(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(images):
        image, labels, _ = draw_shapes(rng, size, 2)
        image.save(folder / "images" / f"{i}.png")
        labels.save(folder / "labels" / f"{i}.png")
    (folder / "classes.json").write_text(json.dumps(["ground", *CLASSES]))
    return folder


def write_image_folder(folder: Path, *, images: int, seed: int = 0, size=(64, 96)) -> Path:
    """images: of each class."""
    rng = random.Random(seed)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            while True:
                image, _, shapes = draw_shapes(rng, size, 1)
                if shapes[0][0] == k:
                    break
            image.save(folder / name / f"{i}.png")
    return folder
