"""A folder of images for every class."""

from __future__ import annotations

import pytest
from PIL import Image

from stepwell.data.image_folder import ImageFolder


@pytest.fixture
def folder(tmp_path):
    """Two classes, with what lies about in people's folders."""
    for name in ("cat/b.PNG", "cat/a.jpg", "cat/more/c.webp", "dog/d.tif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    for name in ("cat/.DS_Store", "cat/Thumbs.db", "cat/._a.jpg", "classes.json", "cat/.cache/e.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    return tmp_path


def test_images_come_by_class_and_name(folder):
    source = ImageFolder(folder)
    assert source.classes == ("cat", "dog")
    found = [(sample.image.relative_to(folder).as_posix(), sample.label) for sample in source]
    assert found == [("cat/a.jpg", 0), ("cat/b.PNG", 0), ("cat/more/c.webp", 0), ("dog/d.tif", 1)]
    assert source.where(3) == str(folder / "dog" / "d.tif")


def test_classes_are_numbered_as_they_are_given(folder):
    source = ImageFolder(folder, classes=["dog", "cat"])
    assert [sample.label for sample in source] == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("classes", "complaint"),
    [
        (["cat"], "dog is of no class"),
        (["cat", "cow", "dog"], "has no folder cow"),
        (["cat", "cat", "dog"], "twice"),
    ],
)
def test_folders_and_classes_must_agree(folder, classes, complaint):
    with pytest.raises(ValueError, match=complaint):
        ImageFolder(folder, classes=classes)


def test_a_class_without_an_image_and_a_folder_without_classes_are_refused(folder, tmp_path):
    (folder / "cow").mkdir()
    with pytest.raises(ValueError, match=r"cow holds no image"):
        ImageFolder(folder)
    with pytest.raises(ValueError, match="has no folders"):
        ImageFolder(folder / "dog")
