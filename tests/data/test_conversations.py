"""LLaVA files as a source."""

from __future__ import annotations

import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from stepwell.data.conversations import Conversations
from stepwell.images.limits import ImageLimits
from stepwell.images.open import open_image


def write(path, entries):
    path.write_text(json.dumps(entries))
    return path


def turn(speaker, value):
    return {"from": speaker, "value": value}


def test_placeholders_move_to_the_front_and_paths_start_at_the_folder(tmp_path):
    entry = {
        "image": "a/b.jpg",
        "conversations": [turn("human", "What is it? <image>"), turn("gpt", "A cat")],
    }
    source = Conversations(write(tmp_path / "x.json", [entry]), images=tmp_path / "images")
    assert len(source) == 1
    assert source[0].image == tmp_path / "images" / "a" / "b.jpg"
    question, answer = source[0].messages
    assert question == {"role": "user", "content": "<image>\nWhat is it?"}
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "A cat"}]}


def test_text_alone_keeps_its_words(tmp_path):
    entry = {"conversations": [turn("human", " what does <image> mean? "), turn("gpt", "A place.")]}
    sample = Conversations(write(tmp_path / "x.json", [entry]))[0]
    assert sample.image is None
    assert sample.messages[0]["content"] == [{"type": "text", "text": " what does <image> mean? "}]


@pytest.mark.parametrize("image", ["", None, []])
def test_an_empty_image_is_no_image(tmp_path, image):
    entry = {"image": image, "conversations": [turn("human", "<image> tags?"), turn("gpt", "Text.")]}
    sample = Conversations(write(tmp_path / "x.json", [entry]))[0]
    assert sample.image is None
    assert sample.messages[0]["content"] == [{"type": "text", "text": "<image> tags?"}]


def test_one_leading_answer_is_dropped(tmp_path):
    turns = [turn("gpt", "Hello"), turn("human", "Hi"), turn("gpt", "Yes?")]
    messages = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))[0].messages
    assert [message["role"] for message in messages] == ["user", "assistant"]


@pytest.mark.parametrize("speakers", [["human"], ["human", "human"], ["gpt", "gpt", "human"], ["system"]])
def test_turns_that_do_not_alternate_are_refused(tmp_path, speakers):
    turns = [turn(speaker, "x") for speaker in speakers]
    source = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))
    with pytest.raises(ValueError, match=r"user and assistant must take turns, got (none|user|assistant)"):
        source[0]


def test_an_unknown_speaker_is_refused(tmp_path):
    turns = [turn("human", "x"), turn("bot", "y")]
    source = Conversations(write(tmp_path / "x.json", [{"conversations": turns}]))
    with pytest.raises(ValueError, match="turn 1 is from 'bot'; expected one of human, gpt"):
        source[0]


def test_a_system_message_comes_first(tmp_path):
    turns = [turn("system", "Be brief."), turn("human", "<image>\nHi"), turn("gpt", "Yes")]
    sample = Conversations([{"image": "a.png", "conversations": turns}], images=tmp_path)[0]
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant"]
    assert sample.messages[1]["content"] == "<image>\nHi"


ASKED, ANSWERED = "<image>\nWhat?", "A cat"


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "a.png", "conversations": [turn("human", ASKED), turn("gpt", ANSWERED)]},
        {"image": ["a.png"], "conversations": [turn("human", ASKED), turn("gpt", ANSWERED)]},
        {"images": ["a.png"], "messages": [turn("human", ASKED), turn("gpt", ANSWERED)]},
        {
            "image": {"path": "a.png", "bytes": None},
            "messages": [turn("user", ASKED), turn("assistant", ANSWERED)],
        },
        {
            "images": ["a.png"],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
                {"role": "assistant", "content": [{"type": "text", "text": ANSWERED}]},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
                },
                {"role": "assistant", "content": ANSWERED},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "What?"},
                    ],
                },
                {"role": "assistant", "content": ANSWERED},
            ],
        },
        {
            "image": "",
            "images": ["a.png"],
            "conversations": [],
            "messages": [
                {"from": None, "value": None, "role": "user", "content": ASKED},
                {"from": None, "value": None, "role": "assistant", "content": ANSWERED},
            ],
        },
        {"image": "a.png", "conversations": {"from": ["human", "gpt"], "value": [ASKED, ANSWERED]}},
        {
            "image": "a.png",
            "conversations": [
                {"role": "user", "content": [{"type": "text", "text": ASKED}]},
                {"from": "gpt", "value": ANSWERED},
            ],
        },
    ],
)
def test_every_way_of_writing_one_conversation_reads_the_same(tmp_path, entry):
    sample = Conversations(write(tmp_path / "x.json", [entry]))[0]
    assert sample.image == tmp_path / "a.png"
    assert sample.messages == (
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERED}]},
    )


def test_several_images_keep_their_places(tmp_path):
    turns = [
        turn("human", "<image> or <image>?"),
        turn("gpt", "One"),
        turn("human", "Is it <image>?"),
        turn("gpt", "No"),
    ]
    sample = Conversations([{"image": ["a.png", "b.png", "c.png"], "conversations": turns}], images=tmp_path)[
        0
    ]
    assert sample.images == tuple(tmp_path / name for name in ("a.png", "b.png", "c.png"))
    assert sample.messages[0]["content"] == "<image> or <image>?"
    assert sample.messages[2]["content"] == "<image>\nIs it ?"  # as LLaVA-NeXT moves a single one
    with pytest.raises(ValueError, match="3 images has no one image"):
        _ = sample.image


def test_bytes_of_datasets_and_images_stay_what_they_are():
    picture = Image.new("RGB", (4, 4))
    turns = [turn("human", ASKED), turn("gpt", ANSWERED)]
    for image in ({"bytes": b"x", "path": "a.png"}, picture, "data:image/png;base64,AAAA", "https://a/b.png"):
        assert Conversations([{"image": image, "conversations": turns}])[0].images == (image,)


TURNS = [turn("human", ASKED), turn("gpt", ANSWERED)]


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("text", "an entry is an object with conversations or messages, got a str"),
        ({"image": "a.png"}, "it has no turns under conversations or messages"),
        ({"image": "a.png", "conversations": []}, "it has no turns"),
        ({"image": "a.png", "conversations": None}, "it has no turns"),
        ({"image": "a.png", "conversations": "Hi"}, "it has no turns"),
        ({"conversations": ["Hi", "Yes"]}, "turn 0 is a str, not a speaker and a text"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, r"turn 0 is from \['human'\]"),
        ({"image": "a.png", "conversations": [turn("human", ASKED), turn("gpt", "")]}, "an answer is empty"),
        (
            {"image": "a.png", "conversations": [turn("human", ASKED), turn("gpt", " \n")]},
            "an answer is empty",
        ),
        (
            {"image": "a.png", "conversations": [turn("human", ASKED), turn("gpt", 3)]},
            "turn 1 says 3, which is no text",
        ),
        ({"conversations": [turn("human", None), turn("gpt", "A")]}, "turn 0 says None, which is no text"),
        ({"conversations": [turn("human", " "), turn("gpt", "A")]}, "a question is empty"),
        ({"conversations": [turn("human", "x"), turn("gpt", "\ud83d")]}, "it has .* half a character"),
        (
            {"image": "a.png", "conversations": [turn("human", "What?"), turn("gpt", "A")]},
            "0 <image> placeholders for 1",
        ),
        ({"image": "a.png", "conversations": TURNS + TURNS}, "2 <image> placeholders for 1 images"),
        (
            {
                "image": "a.png",
                "conversations": [turn("human", "<image>\n<image>\nOlder?"), turn("gpt", "A")],
            },
            "2 <image> placeholders for 1 images",
        ),
        (
            {"conversations": [turn("system", "\udcff"), turn("human", "x"), turn("gpt", "y")]},
            "it has bytes that are no UTF-8",
        ),
        ({"image": ["a.png", "b.png"], "conversations": TURNS}, "1 <image> placeholders for 2 images"),
        ({"conversations": TURNS}, "1 <image> placeholders for 0 images"),
        ({"image": "", "conversations": TURNS}, "1 <image> placeholders for 0 images"),
        ({"image": ["a.png", ""], "conversations": TURNS}, "one of its 2 images has no name"),
        (
            {
                "image": "a.png",
                "messages": [
                    {"role": "user", "content": [{"type": "image", "image": "b.png"}]},
                    {"role": "assistant", "content": "A"},
                ],
            },
            "images stand in its turns and beside them",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "video"}]},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "content of type 'video' has no place in a message by user",
        ),
    ],
)
def test_an_entry_that_cannot_be_learned_from_says_why(tmp_path, entry, complaint):
    source = Conversations(write(tmp_path / "x.json", [entry]))
    with pytest.raises(ValueError, match=complaint) as refusal:
        source[0]
    assert "\n" not in str(refusal.value)
    assert source.where(0) == f"{tmp_path / 'x.json'}, entry 0"


def test_a_file_that_is_no_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold a JSON list, or JSON a line, got a dict"):
        Conversations(write(tmp_path / "x.json", {"conversations": []}))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("lines", [False, True])
def test_a_list_or_a_value_a_line_in_any_unicode(tmp_path, encoding, ending, lines):
    entries = [{"conversations": [turn("human", "\u00dcber \u2028?"), turn("gpt", str(i))]} for i in range(3)]
    dumped = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    text = "\r\n\n".join(dumped) + "\n" if lines else f"[{','.join(dumped)}]"
    (tmp_path / f"x.{ending}").write_bytes(text.encode(encoding))
    source = Conversations(tmp_path / f"x.{ending}")
    assert len(source) == 3
    assert [sample.messages[1]["content"][0]["text"] for sample in source] == ["0", "1", "2"]
    assert source[0].messages[0]["content"][0]["text"] == "\u00dcber \u2028?"


def test_a_damaged_line_spoils_no_other(tmp_path):
    good = json.dumps({"conversations": [turn("human", "x"), turn("gpt", "y")]}).encode()
    (tmp_path / "x.jsonl").write_bytes(
        b"\n".join([good, b'{"conversations": [', b"", good, good.replace(b"x", b"\xff")])
    )
    source = Conversations(tmp_path / "x.jsonl")
    assert len(source) == 4
    with pytest.raises(ValueError, match="not JSON"):
        source[1]
    assert source.where(1) == f"{tmp_path / 'x.jsonl'}, line 2"
    assert source.where(2) == f"{tmp_path / 'x.jsonl'}, line 4"
    assert source[2].messages[1]["content"][0]["text"] == "y"
    with pytest.raises(ValueError, match="it has bytes that are no UTF-8"):
        source[3]


def test_a_file_that_is_no_json_says_where(tmp_path):
    (tmp_path / "x.json").write_text('[{"a": 1},\n{"b" 2}]')
    with pytest.raises(ValueError, match=r"x\.json is not JSON: .*line 2"):
        Conversations(tmp_path / "x.json")


def test_a_file_that_is_no_text_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_bytes("{}\n{}".encode("utf-16")[:-1])
    with pytest.raises(ValueError, match=r"x\.jsonl begins as utf-16"):
        Conversations(tmp_path / "x.jsonl")


def test_paths_of_windows_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").touch()
    (tmp_path / "c\\d.png").touch()
    turns = [turn("human", ASKED), turn("gpt", ANSWERED)]
    entries = [{"image": name, "conversations": turns} for name in ("a\\b.png", "c\\d.png")]
    found = [sample.image for sample in Conversations(entries, images=tmp_path)]
    assert all(path.is_file() for path in found)


def test_a_prompt_stands_once_behind_every_question(tmp_path):
    short = "Answer in a word."
    entries = [
        {
            "image": "b.jpg",
            "conversations": [
                turn("human", "<image>\nWhat is it?"),
                turn("gpt", "A cat"),
                turn("human", f"How old?\n{short}"),
                turn("gpt", "Nine"),
            ],
        },
        {"conversations": [turn("human", "Who? "), turn("gpt", "I.")]},
    ]
    with_image, text = Conversations(write(tmp_path / "x.json", entries), prompt=short)
    contents = [message["content"] for message in with_image.messages]
    assert contents[0] == f"<image>\nWhat is it?\n{short}"
    assert contents[2] == f"How old?\n{short}"
    assert contents[1] == [{"type": "text", "text": "A cat"}]
    assert text.messages[0]["content"] == [{"type": "text", "text": f"Who?\n{short}"}]


BOX = [0.1, 0.2, 0.3, 0.4]


def content(*regions):
    images = [{"type": "image", "path": f"{i}.jpg", "region": region} for i, region in enumerate(regions)]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "!"},
    ]


@pytest.mark.parametrize(
    ("entry", "regions"),
    [
        ({"image": "a.jpg", "region": BOX}, (tuple(BOX),)),
        ({"image": "a.jpg", "region": [BOX]}, (tuple(BOX),)),
        ({"image": "a.jpg", "region": None}, ()),
        ({"image": "a.jpg"}, ()),
        ({"image": ["a.jpg", "b.jpg"], "region": [None, BOX]}, (None, tuple(BOX))),
        ({"messages": content(BOX)}, (BOX,)),
        ({"messages": content(None, BOX)}, (None, BOX)),
        ({"messages": content(None)}, ()),
    ],
)
def test_regions_stand_beside_their_images(entry, regions):
    count = len(entry["image"]) if isinstance(entry.get("image"), list) else 1
    turns = [turn("human", "<image>" * count + "?"), turn("gpt", "!")]
    entry = entry if "messages" in entry else {**entry, "conversations": turns}
    assert Conversations([entry])[0].regions == regions


@pytest.mark.parametrize("region", [[BOX, BOX], "0.1,0.2,0.3,0.4", [0.1, 0.2], [0.3, 0.2, 0.1, 0.4]])
def test_what_is_no_region_beside_an_image_is_refused(region):
    turns = [turn("human", "<image>?"), turn("gpt", "!")]
    with pytest.raises(ValueError, match="region"):
        Conversations([{"image": "a.jpg", "region": region, "conversations": turns}])[0]


@pytest.mark.parametrize(
    "entry",
    [
        {"messages": content(None), "region": BOX},
        {"image": "a.jpg", "messages": [{"role": "user", "content": [{"type": "image", "region": BOX}]}]},
    ],
)
def test_a_region_stands_where_its_image_does(entry):
    with pytest.raises(ValueError, match="a region stands where its image does"):
        Conversations([entry])[0]


def parquet(path, entries):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(entries), path)


def test_parquet_is_read_as_its_rows_would_be_in_json(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(picture, "PNG")
    turns = [[turn("human", "<image>\nWhat?"), turn("gpt", f"A{i}")] for i in range(5)]
    rows = [
        {"image": {"bytes": picture.getvalue(), "path": None}, "conversations": turns[i], "region": BOX}
        for i in range(5)
    ]
    parquet(tmp_path / "part-0.parquet", rows[:3])
    parquet(tmp_path / "part-1.parquet", rows[3:])
    source = Conversations(tmp_path / "part-*.parquet")
    assert len(source) == 5
    expected = Conversations(rows)
    for i in range(5):
        assert source[i].messages == expected[i].messages
        assert source[i].regions == (tuple(BOX),)
        assert open_image(source[i].image).size == (20, 30)
    assert source.where(4) == f"{tmp_path}/part-*.parquet, entry 4"
    assert len(Conversations(tmp_path / "part-1.parquet")) == 2


def test_paths_and_messages_in_parquet(tmp_path):
    rows = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
            ]
        }
    ]
    parquet(tmp_path / "a.parquet", rows)
    sample = Conversations(tmp_path / "a.parquet", images=tmp_path / "images")[0]
    assert sample.image == tmp_path / "images" / "a.jpg"
    assert sample.messages[0]["content"] == "<image>\n?"


def test_what_is_no_parquet_is_refused_in_a_line(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet") as told:
        Conversations(tmp_path / "a.parquet")
    assert "\n" not in str(told.value)
    for name in ("b.parquet", "b-*.parquet"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            Conversations(tmp_path / name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[train\]'"):
        Conversations(tmp_path / "a.parquet")


def test_images_in_parquet_stay_closed_until_they_are_opened_under_limits(tmp_path):
    datasets = pytest.importorskip("datasets")
    content = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(content, "PNG")
    rows = {
        "image": [{"bytes": content.getvalue(), "path": None}],
        "others": [[{"bytes": content.getvalue(), "path": None}]],
        "conversations": [[turn("human", "<image>\nWhat?"), turn("gpt", "Red.")]],
    }
    image = datasets.Image()
    text = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features(
        {"image": image, "others": datasets.List(image), "conversations": datasets.List(text)}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = Conversations(tmp_path / "a.parquet")
    assert source.entries[0]["others"] == rows["others"][0]
    (found,) = source[0].images
    assert found == rows["image"][0]
    assert open_image(found).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ValueError, match="pixels"):
        open_image(found, limits=ImageLimits(max_pixels=100))


def test_a_system_text_beside_the_turns_is_the_first_of_them(tmp_path):
    entry = {"system": "Be brief.", "conversations": [turn("human", "Hi"), turn("gpt", "Yes?")]}
    messages = Conversations(write(tmp_path / "x.json", [entry]))[0].messages
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == [{"type": "text", "text": "Be brief."}]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"image": "a.png", "images": ["b.png"]}, "it has image and images; give one of them"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "it has conversations and messages"),
        (
            {"conversations": [turn("human", "Hi"), {**turn("gpt", "Yes?"), "weight": 0}]},
            "all answers are learned, also one of weight 0",
        ),
    ],
)
def test_what_would_be_left_out_in_silence_is_refused(tmp_path, more, complaint):
    entry = {"conversations": [turn("human", "Hi"), turn("gpt", "Yes?")], **more}
    with pytest.raises(ValueError, match=complaint):
        Conversations(write(tmp_path / "x.json", [entry]))[0]
