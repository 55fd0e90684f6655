import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import stepwell
from stepwell.models.masks import CroppedMasks
from stepwell.ops.sliding_windows import Window

coco = pytest.importorskip("faster_coco_eval.core.mask")

SIZE = (40, 60)
CROP = torch.tensor([[True, True, False], [True, True, True]])


def detections(masks=True):
    windows = (Window(10, 20, 12, 23), Window(0, 0, 2, 3))
    return stepwell.Detections(
        boxes=torch.tensor([[20.0, 10.0, 23.0, 12.0], [0.0, 0.0, 3.0, 2.0]]),
        scores=torch.tensor([0.9, 0.25]),
        labels=torch.tensor([1, 0]),
        class_names=("cat", "dog"),
        image_size=SIZE,
        masks=CroppedMasks((CROP, CROP), windows, SIZE) if masks else None,
    )


def segmentation():
    labels = torch.zeros(SIZE, dtype=torch.uint8)
    labels[5:15, 30:50] = 2
    return stepwell.Segmentation(labels=labels, class_names=("sky", "sea", "boat"))


def classification():
    return stepwell.Classification(
        labels=torch.tensor([2, 0]),
        scores=torch.tensor([0.75, 0.2]),
        class_names=("a", "b", "c"),
        image_size=SIZE,
    )


def whole_mask():
    mask = np.zeros(SIZE, bool)
    mask[10:12, 20:23] = CROP.numpy()
    return mask


def test_masks_are_whole_when_they_are_asked_for():
    found = detections()
    assert (found.masks[0].numpy() == whole_mask()).all()
    assert found.masks.whole().shape == (2, *SIZE)
    assert found.masks.whole()[1].sum() == 5
    assert found.masks.area(0) == 5


def test_detections_as_json_and_as_coco():
    found = detections()
    first, second = found.to_dict()["objects"]
    assert {**first, "mask": None} == {
        "box": [20, 10, 23, 12],
        "score": pytest.approx(0.9),
        "class_id": 1,
        "class": "dog",
        "mask": None,
    }
    assert (coco.decode(first["mask"]) == whole_mask()).all()
    record = found.to_coco(7)[0]
    assert record["bbox"] == [20, 10, 3, 2]
    assert (record["image_id"], record["category_id"], record["area"]) == (7, 1, 5)
    assert record["segmentation"] == first["mask"]
    assert "segmentation" not in detections(masks=False).to_coco(7)[0]
    assert detections(masks=False).to_coco(7)[0]["area"] == 6
    assert second["class"] == "cat"


def test_objects_are_selected_by_number_or_by_whether_they_are_wanted():
    found = detections()
    for wanted in (torch.tensor([1]), found.scores < 0.5):
        one = found.select(wanted)
        assert (one.names(), one.masks.area(0)) == (["cat"], 5)
    assert found.select(found.scores > 0).masks.area(0) == found.masks.area(0)
    assert len(found.select(found.scores > 2)) == 0
    with pytest.raises(ValueError, match=r"of 2 objects as many are wanted or not, got \(3,\)"):
        found.select(torch.ones(3, dtype=torch.bool))


def test_a_segmentation_as_json_and_as_coco():
    found = segmentation()
    assert found.shares() == {0: pytest.approx(1 - 200 / 2400), 2: pytest.approx(200 / 2400)}
    assert len(found) == 2
    sky, boat = found.to_dict()["classes"]
    assert [sky["class"], boat["class"]] == ["sky", "boat"]
    assert (coco.decode(boat["mask"]) == (found.labels == 2).numpy()).all()
    record = found.to_coco(1)[1]
    assert (record["bbox"], record["area"]) == ([30, 5, 20, 10], 200)


def test_the_area_of_a_class_is_counted_and_not_made_of_its_rounded_share():
    labels = torch.zeros(1500, 2000, dtype=torch.uint8)
    labels[0, :1235] = 1
    assert stepwell.Segmentation(labels=labels, class_names=("land", "road")).to_coco(1)[1]["area"] == 1235


def test_classes_of_one_name_have_a_line_each():
    found = stepwell.Segmentation(labels=segmentation().labels, class_names=("sky", "sea", "sky"))
    assert [line.split() for line in found.lines()] == [["sky", "91.7%"], ["sky", "8.3%"]]


def test_a_classification_as_json_and_as_coco():
    assert classification().to_dict()["classes"][0] == {"class_id": 2, "class": "c", "score": 0.75}
    assert classification().to_coco(3)[1] == {
        "image_id": 3,
        "category_id": 0,
        "iscrowd": 0,
        "score": pytest.approx(0.2),
    }


def test_they_say_in_a_line_what_they_hold():
    assert repr(detections()) == "Detections(1 dog, 1 cat, boxes and masks in 60 x 40 pixels)"
    assert repr(segmentation()) == "Segmentation(92% sky, 8% boat of 60 x 40 pixels)"
    assert repr(classification()) == "Classification(c 0.75, a 0.20)"
    assert detections().lines()[0].split() == ["dog", "0.900", "20.0", "10.0", "23.0", "12.0"]


def test_objects_are_drawn_where_they_are_and_the_picture_is_left_alone():
    image = Image.new("RGB", (600, 400), "white")
    found = stepwell.Detections(
        boxes=torch.tensor([[100.0, 100.0, 200.0, 200.0]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([1]),
        class_names=("cat", "dog"),
        image_size=(400, 600),
        masks=CroppedMasks(
            (torch.ones(50, 50, dtype=torch.bool),), (Window(120, 120, 170, 170),), (400, 600)
        ),
    )
    pixels = np.array(found.draw(image))
    assert (np.array(image) == 255).all()
    changed = (pixels != 255).any(2)
    assert changed[100, 100:200].all()
    assert changed[100:200, 199].all()
    assert changed[120:170, 120:170].all()
    assert not changed[102:119, 102:198].any()
    assert not changed[201:].any()
    assert changed[80:100, 100:140].any()  # the caption


def drawn(*boxes, size=(600, 400)):
    """What changes on white, of objects of one class, the best first."""
    found = stepwell.Detections(
        boxes=torch.tensor(boxes),
        scores=torch.linspace(0.9, 0.5, len(boxes)),
        labels=torch.zeros(len(boxes), dtype=torch.int64),
        class_names=("cat",),
        image_size=size[::-1],
    )
    return (np.array(found.draw(Image.new("RGB", size, "white"))) != 255).any(2)


def test_a_caption_goes_below_where_it_would_hide_another_object():
    box, small = [100.0, 100.0, 200.0, 200.0], [105.0, 84.0, 125.0, 96.0]
    assert not drawn(box)[202:, :].any()
    changed = drawn(box, small)
    assert changed[203:215, 100:150].any()
    assert not changed[87:93, 108:122].any()


def test_a_caption_that_has_no_place_is_left_out():
    """The better of two boxes at one place has its own, in its top left corner."""
    box = [100.0, 0.0, 200.0, 400.0]
    alone, both = drawn(box), drawn(box, [102.0, 0.0, 198.0, 400.0])
    assert alone[3:15, 110:140].any()
    assert not both[20:390, 110:190].any()
    assert (both == alone)[3:15, 106:190].all()


def test_a_caption_at_the_upper_border_stands_in_its_own_box():
    changed = drawn([100.0, 0.0, 140.0, 30.0])
    assert changed[4:14, 105:135].any()
    assert not changed[30:].any()


def test_a_caption_at_the_right_border_is_whole():
    changed = drawn([590.0, 100.0, 598.0, 200.0])
    assert changed[85:98, 560:590].any(0).all()


def test_maps_and_classes_are_drawn():
    image = Image.new("RGB", (60, 40), "white")
    pixels = np.array(segmentation().draw(image))
    assert (pixels[39, 0] != pixels[14, 49]).any()
    assert (pixels[14, 30:50] == pixels[14, 49]).all()
    large = stepwell.Classification(**{**vars(classification()), "image_size": (400, 600)})
    changed = (np.array(large.draw(Image.new("RGB", (600, 400), "white"))) != 255).any(2)
    assert changed[:30, :60].any()
    assert not changed[100:].any()


@pytest.mark.parametrize("found", [detections(), segmentation(), classification()])
def test_a_picture_of_another_size_is_refused(found):
    with pytest.raises(ValueError, match="predicted on a picture of 60 x 40 pixels, got one of 40 x 60"):
        found.draw(Image.new("RGB", (40, 60)))


def test_supervision_is_given_what_it_takes(monkeypatch):
    given = SimpleNamespace(Detections=dict, Classifications=dict)
    monkeypatch.setitem(sys.modules, "supervision", given)
    found = detections().to_supervision()
    assert found["xyxy"].tolist() == detections().boxes.tolist()
    assert found["mask"].shape == (2, *SIZE)
    assert found["data"]["class_name"].tolist() == ["dog", "cat"]
    assert segmentation().to_supervision()["xyxy"].tolist() == [[0, 0, 60, 40], [30, 5, 50, 15]]
    assert classification().to_supervision()["class_id"].tolist() == [2, 0]
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        detections().to_supervision()


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 scores need as many"):
        stepwell.Detections(**{**vars(detections()), "boxes": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="2 labels need as many"):
        stepwell.Classification(**{**vars(classification()), "scores": torch.zeros(1)})
    with pytest.raises(ValueError, match="labels are"):
        stepwell.Segmentation(labels=torch.zeros(1, 2, 3), class_names=("a",))
    with pytest.raises(ValueError, match="window of its own size"):
        CroppedMasks((CROP,), (Window(0, 0, 3, 3),), SIZE)
