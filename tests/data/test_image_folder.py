"""A folder of images for every class, and images alone."""

from __future__ import annotations

import pytest
from PIL import Image

from stepwell.data.image_folder import ImageFolder, Images


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


def test_images_alone_are_all_below_a_folder(folder):
    source = Images(folder)
    names = ["cat/a.jpg", "cat/b.PNG", "cat/more/c.webp", "dog/d.tif"]
    assert [path.relative_to(folder).as_posix() for path in source] == names
    assert (len(source), source.where(3)) == (4, str(folder / "dog/d.tif"))


def test_images_alone_are_those_of_a_list(folder, tmp_path):
    listed = folder / "list.txt"
    listed.write_text(f"dog/d.tif\r\n\ncat\\a.jpg\n{folder}/cat/b.PNG\n", encoding="utf-8-sig")
    expected = [folder / name for name in ("dog/d.tif", "cat/a.jpg", "cat/b.PNG")]
    assert list(Images(listed)) == expected
    (tmp_path / "elsewhere").mkdir()
    moved = listed.rename(tmp_path / "elsewhere/list.txt")
    assert list(Images(moved, images=folder)) == expected


def test_images_alone_that_are_not_there_are_refused(folder, tmp_path):
    (folder / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.txt lists no image"):
        Images(folder / "empty.txt")
    with pytest.raises(ValueError, match=r"\.cache holds no image|holds no image"):
        Images(folder / ".ipynb_checkpoints")
    with pytest.raises(ValueError, match="beside it would be ignored"):
        Images(folder, images=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Images(folder / "nowhere")
