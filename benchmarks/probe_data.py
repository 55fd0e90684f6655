"""The data of the vision probes: words cut out of receipts, tiles of aerial images, photos of groceries, each
with its frozen map.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from frozen_maps import Samples, extract
from PIL import Image
from torch import Tensor

from stepwell.data.coco import CocoFile
from stepwell.data.image_folder import ImageFolder
from stepwell.data.label_maps import LabelMaps
from stepwell.images.open import open_image
from stepwell.train.multiview import HiddenMap

SIDE = 224
WORD = (56, 224)  # pixels of a word's image, (height, width)
WORDS_PER_RECEIPT, LONGEST_WORD, WIDEST_WORD = 12, 14, 5.0  # the last: width by height
TILES_PER_IMAGE = 12
WHITE = (255, 255, 255)


class Words(NamedTuple):
    samples: Samples
    texts: list[str]
    columns: Tensor  # (N,): of the 2x map, as far as the word goes
    receipts: Tensor  # (N,): the place of each word's receipt among all


def read_words(encoder: HiddenMap, folder: Path, split: str, per_receipt: int | None = None) -> Words:
    """Lines without a blank; where a receipt has more than `per_receipt`, some drawn by chance."""
    source = CocoFile(folder / "annotations" / f"textlines_{split}.json", images=folder)
    generator = torch.Generator().manual_seed(0)
    images: list[Image.Image] = []
    texts: list[str] = []
    widths: list[int] = []
    receipts: list[int] = []
    for number in range(len(source)):
        receipt = source[number]
        words = [each for each in receipt.annotations if is_word(each.fields["text"].strip(), each.box)]
        order = torch.randperm(len(words), generator=generator)[:per_receipt].tolist()
        page = open_image(receipt.path)
        for word in (words[i] for i in order):
            image, width = on_white(page.crop(tuple(round(edge) for edge in word.box)))
            images.append(image)
            widths.append(width)
            texts.append(word.fields["text"].strip().upper())
            receipts.append(number)
    samples = extract(encoder, images, WORD)
    columns = (2 * samples.maps.shape[3] * torch.tensor(widths) / WORD[1]).ceil().long()
    return Words(samples, texts, columns, torch.tensor(receipts))


def is_word(text: str, box: tuple[float, ...]) -> bool:
    left, top, right, bottom = box
    fits = 2 <= len(text) <= LONGEST_WORD and right - left <= WIDEST_WORD * (bottom - top)
    return fits and not any(character.isspace() for character in text)


def on_white(crop: Image.Image) -> tuple[Image.Image, int]:
    """A word at the left of an image of size WORD, at its height, narrower where it would be too wide; and
    how many pixels of the width it takes."""
    height, width = WORD
    canvas = Image.new("RGB", (width, height), WHITE)
    at_height = min(width, max(1, round(crop.width * height / crop.height)))
    canvas.paste(crop.resize((at_height, height), Image.Resampling.BICUBIC))
    return canvas, at_height


class Tiles(NamedTuple):
    samples: Samples
    labels: Tensor  # (N, SIDE, SIDE), IGNORED where there is none
    num_classes: int
    images: Tensor  # (N,): the place of each tile's image among all


def read_tiles(encoder: HiddenMap, folder: Path, split: str) -> Tiles:
    """Whole tiles from the top left corner on; where an image has more, some drawn by chance."""
    source = LabelMaps(folder / "images" / split, folder / "labels" / split, classes=folder / "classes.json")
    generator = torch.Generator().manual_seed(0)
    crops, labels, images = [], [], []
    for number in range(len(source)):
        sample = source[number]
        picture, classes = open_image(sample.image), torch.from_numpy(sample.labels)
        rows, columns = (length // SIDE for length in classes.shape)
        for place in torch.randperm(rows * columns, generator=generator)[:TILES_PER_IMAGE].tolist():
            top, left = SIDE * (place // columns), SIDE * (place % columns)
            crops.append(picture.crop((left, top, left + SIDE, top + SIDE)))
            labels.append(classes[top : top + SIDE, left : left + SIDE])
            images.append(number)
    return Tiles(
        extract(encoder, crops, (SIDE, SIDE)),
        torch.stack(labels),
        len(source.classes.names),
        torch.tensor(images),
    )


class Photos(NamedTuple):
    samples: Samples
    labels: Tensor  # (N,)


def read_photos(encoder: HiddenMap, source: ImageFolder) -> Photos:
    photos = [source[i] for i in range(len(source))]
    samples = extract(encoder, (open_image(photo.image) for photo in photos), (SIDE, SIDE))
    return Photos(samples, torch.tensor([photo.label for photo in photos]))
