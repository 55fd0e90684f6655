"""A region of an image, from whoever names it to the tokens of every system."""

from __future__ import annotations

import json
from copy import copy

import pytest
import torch
from visions import PLAIN, VISIONS

from stepwell.models.ask import Assistant
from stepwell.models.ask_file import answer_lines, read_question_lines
from stepwell.models.processor import StepwellProcessor
from stepwell.structures import NO_REGION

SIZE, REGION, FRACTIONS = (600, 400), (120, 80, 300, 120), [0.2, 0.2, 0.5, 0.3]


@pytest.fixture(scope="module", params=sorted(VISIONS.keys() - {"plain"}))
def several(build, request):
    """An assistant of every kind that shows parts of images."""
    return build(VISIONS[request.param])


def asked(image, region=None, **kwargs):
    part = {"type": "image", "image": image, **({} if region is None else {"region": region}), **kwargs}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]


def test_the_layout_of_a_region_is_the_systems(several, draw):
    image = draw(*SIZE)
    layout = several.layout(image, region=REGION)
    assert layout == several.model.model.vision.geometry.close_up((400, 600), REGION)
    features = several.encode(image, region=REGION)
    assert features.layout == layout
    assert len(features.tokens) == layout.num_visual
    assert several.layout(image) == several.encode(image).layout
    assert several.layout(image).cut is None


def test_messages_and_tensors_tell_the_model_the_region(several, draw):
    image = draw(*SIZE)
    batch = several.processor.prompt([asked(image, FRACTIONS), asked(image)])
    assert batch["image_regions"].tolist() == [list(REGION), list(NO_REGION)]
    features = several.model.get_image_features(
        batch["pixel_values"], batch["image_sizes"], batch["image_regions"]
    )
    expected = [several.encode(image, region=region).tokens for region in (REGION, None)]
    for found, tokens in zip(features, expected, strict=True):
        torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
    assert "image_regions" not in several.processor.prompt([asked(image)])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate_takes_what_the_processor_returns(assistant, draw, options):
    image, other = draw(*SIZE), draw(90, 60, 1)
    batch = assistant.processor.prompt([asked(image, FRACTIONS), asked(other)])
    torch.manual_seed(0)
    ids = assistant.model.generate(**batch, max_new_tokens=6, **options)
    assert ids.shape[0] == 2 * options.get("num_return_sequences", 1)
    if not options.get("do_sample"):
        alone = assistant.processor.prompt([asked(image, FRACTIONS)])
        single = assistant.model.generate(**alone, max_new_tokens=6, **options)
        length = alone["input_ids"].shape[1]
        assert ids[0, batch["input_ids"].shape[1] :].tolist() == single[0, length:].tolist()


def test_asking_about_regions_together_is_asking_singly(assistant, draw):
    image, other = draw(*SIZE), draw(*SIZE, 1)
    questions = [
        (image, "What?", REGION),
        (image, "What?"),
        (image, "What?", (0, 0, 60, 40)),
        (other, "What?", REGION),
        ([image, other], "What?", [None, REGION]),
        ([image], "What?", REGION),
        (image, "What?", None),
    ]
    together = assistant.ask_many(questions, max_new_tokens=8)
    singly = [
        assistant.ask(images, text, region=region[0] if region else None, max_new_tokens=8)
        for images, text, *region in questions
    ]
    assert together == singly
    assert together[0] != together[1]
    assert together[0] == together[5]
    assert together[1] == together[6]


def test_a_region_may_be_of_any_kind_of_numbers(assistant, draw):
    image = draw(*SIZE)
    answers = {
        assistant.ask(image, "What?", region=region, max_new_tokens=8)
        for region in (REGION, list(REGION), torch.tensor(REGION), (120.0, 80.0, 300.0, 120.0))
    }
    assert len(answers) == 1


@pytest.mark.parametrize(
    ("images", "region", "words"),
    [
        (1, (0.2, 0.2, 0.5, 0.3), "seem to be fractions"),
        (1, (700, 0, 800, 40), "lies outside the image, which is 600 x 400 pixels"),
        (1, "120,80,300,120", "a region is"),
        (1, 7, "a region is"),
        (1, {"left": 1}, "a region is"),
        (2, REGION, "of 2 images give a list of as many regions"),
        (2, [REGION], "of 2 images give a list of as many regions"),
    ],
)
def test_what_is_no_region_is_refused_in_a_line(assistant, draw, images, region, words):
    given = draw(*SIZE) if images == 1 else [draw(*SIZE)] * images
    with pytest.raises(ValueError, match=rf"^[^\n]*{words}[^\n]*$"):
        assistant.ask(given, "What?", region=region)


def test_of_one_view_there_is_no_part(build, draw):
    with pytest.raises(ValueError, match="one view, which always shows the whole image"):
        build(PLAIN).ask(draw(*SIZE), "What?", region=REGION)


def test_what_is_encoded_has_its_region(assistant, draw):
    image = draw(*SIZE)
    features = assistant.encode(image, region=REGION)
    assert assistant.ask(features, "What?") == assistant.ask(image, "What?", region=REGION)
    with pytest.raises(ValueError, match="has its region: give it to encode"):
        assistant.ask(features, "What?", region=REGION)


def test_regions_of_messages_are_fractions_and_belong_to_images(assistant, draw):
    with pytest.raises(ValueError, match="in fractions of the image's sides"):
        assistant.processor.prompt([asked(draw(*SIZE), list(REGION))])
    with pytest.raises(ValueError, match="1 regions were given for 2 images"):
        assistant.processor(text=["<image><image>"], images=[draw(9, 9)] * 2, regions=[REGION])


def test_a_region_stands_where_its_image_does(assistant, draw):
    image, processor = draw(*SIZE), assistant.processor
    alone = [{"type": "image", "region": FRACTIONS}, {"type": "text", "text": "?"}]
    with pytest.raises(ValueError, match="a region stands in the part that holds its image"):
        processor.apply_chat_template(
            [{"role": "user", "content": alone}], images=[image], tokenize=True, return_dict=True
        )
    with pytest.raises(ValueError, match="regions stand in the messages and beside them"):
        processor.apply_chat_template(
            asked(image, FRACTIONS), regions=[REGION], tokenize=True, return_dict=True
        )


def test_lines_of_json_may_have_a_region(assistant, draw, tmp_path):
    for i in range(2):
        draw(*SIZE, i).save(tmp_path / f"{i}.png")
    lines = [
        {"image": "0.png", "question": ["What?", "Who?"], "region": FRACTIONS},
        {"image": ["0.png", "1.png"], "question": "What?", "region": [None, FRACTIONS]},
        {"image": "1.png", "question": "What?", "region": [0.2, 0.2, 5, 0.3]},
        {"image": "1.png", "question": "What?"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    first, second = (tmp_path / f"{i}.png" for i in range(2))
    told = list(answer_lines(assistant, read_question_lines(path), max_new_tokens=8, batch_size=2))
    assert told[0]["answer"] == assistant.ask(first, ["What?", "Who?"], region=REGION, max_new_tokens=8)
    expected = assistant.ask([first, second], "What?", region=[None, REGION], max_new_tokens=8)
    assert told[1]["answer"] == expected
    assert "in fractions of the image's sides" in told[2]["error"]
    assert told[3]["answer"] == assistant.ask(second, "What?", max_new_tokens=8)
    for wrong in ([0.1, 0.2], "0.1,0.2,0.3,0.4", [FRACTIONS, None], {"left": 0}):
        path.write_text(json.dumps({"image": "0.png", "question": "What?", "region": wrong}), "utf-8")
        with pytest.raises(ValueError, match="line 1: "):
            read_question_lines(path)


IN_WORDS = "Read [0.200, 0.200, 0.500, 0.300]"


@pytest.fixture
def reader(assistant):
    """An assistant that takes boxes in questions for regions."""
    processor = copy(assistant.processor)
    processor.boxes_are_regions = True
    return Assistant(assistant.model, processor)


def test_a_box_in_words_is_a_region_where_the_processor_says_so(assistant, reader, draw):
    image = draw(*SIZE)
    close = assistant.ask(image, IN_WORDS, region=REGION, max_new_tokens=8)
    whole = assistant.ask(image, IN_WORDS, max_new_tokens=8)
    assert close != whole
    assert reader.ask(image, IN_WORDS, max_new_tokens=8) == close
    assert reader.layouts((image, IN_WORDS)) == [assistant.layout(image, region=REGION)]
    reader.boxes_are_regions = False
    assert reader.ask(image, IN_WORDS, max_new_tokens=8) == whole
    assert reader.layouts((image, IN_WORDS)) == [assistant.layout(image)]


def test_a_box_in_words_says_nothing_where_a_region_is_given_or_images_are_several(assistant, reader, draw):
    image, other = draw(*SIZE), draw(*SIZE, 1)
    for images, region in ((image, (0, 0, 60, 40)), ([image, other], None), (assistant.encode(image), None)):
        assert reader.ask(images, IN_WORDS, region=region, max_new_tokens=8) == assistant.ask(
            images, IN_WORDS, region=region, max_new_tokens=8
        )


def test_messages_tell_the_box_in_their_last_question(assistant, reader, draw):
    image = draw(*SIZE)
    told = asked(image)
    told[0]["content"][1]["text"] = IN_WORDS
    assert reader.processor.prompt([told])["image_regions"].tolist() == [list(REGION)]
    assert "image_regions" not in assistant.processor.prompt([told])
    answer = {"role": "assistant", "content": "A"}
    then = {"role": "user", "content": "And the total?"}
    assert "image_regions" not in reader.processor.prompt([[*told, answer, then]])
    told[0]["content"][0]["region"] = [0.0, 0.0, 0.1, 0.1]
    assert reader.processor.prompt([told])["image_regions"].tolist() == [[0, 0, 60, 40]]


@pytest.mark.parametrize("is_told", [True, False])
def test_whether_boxes_are_regions_is_saved(assistant, reader, is_told, tmp_path):
    processor = reader.processor if is_told else assistant.processor
    processor.save_pretrained(tmp_path)
    assert StepwellProcessor.from_pretrained(tmp_path).boxes_are_regions == is_told
