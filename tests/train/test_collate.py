"""Batches for training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from PIL import Image

from stepwell.data.sample import Sample
from stepwell.language.labels import IGNORE
from stepwell.train.chat import ChatTask, ChatTraining, language_loss
from stepwell.train.collate import Collator, turn_mask
from stepwell.train.recipe import load_recipe
from stepwell.train.tasks import find_task


@pytest.fixture(scope="module")
def processor():
    recipe = load_recipe("reader_smoke")
    return find_task(recipe.task)(recipe, recipe.stages[1]).processor


def turn(question, answer):
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def sample(*turns, size=(200, 100)):
    return Sample(images=(Image.new("RGB", size),), messages=sum(turns, ()))


def batch_of(collator, *samples):
    return collator([collator.prepare(sample) for sample in samples])


FIRST = turn("<image>\nRead [0.100, 0.900, 0.500, 1.000]", "AB C")
SECOND = turn("What is the total?", "1.50")


def test_answers_and_their_ends_are_supervised_and_nothing_else(processor):
    batch = batch_of(Collator(processor, max_length=4096), sample(FIRST, SECOND))
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != IGNORE]) == "AB C<|im_end|>1.50<|im_end|>"
    kept = labels != IGNORE
    assert torch.equal(labels[kept], batch["input_ids"][0][kept])


def test_training_reads_the_prompt_that_asking_reads(processor):
    ids = batch_of(Collator(processor, max_length=4096), sample(FIRST))["input_ids"][0].tolist()
    encoded = processor.label(FIRST[:1], [Image.new("RGB", (200, 100))], add_generation_prompt=True)
    assert ids[: len(encoded.input_ids)] == encoded.input_ids


def test_samples_of_different_lengths_are_padded_at_the_right(processor):
    batch = batch_of(
        Collator(processor, max_length=4096), sample(FIRST, SECOND), sample(FIRST, size=(100, 200))
    )
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths[0] == batch["input_ids"].shape[1] > lengths[1]
    assert (batch["input_ids"][1, lengths[1] :] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][1, lengths[1] :] == IGNORE).all()
    assert batch["image_sizes"].tolist() == [[100, 200], [200, 100]]


@pytest.mark.parametrize("turns", ["together", "apart"])
def test_rows_are_padded_to_multiples_where_these_are_wanted(processor, turns):
    samples = sample(FIRST, SECOND), sample(FIRST, size=(100, 200))
    plain = batch_of(Collator(processor, max_length=4096, turns=turns), *samples)
    padded = batch_of(Collator(processor, max_length=4096, turns=turns, pad_to_multiple_of=64), *samples)
    length = plain["input_ids"].shape[1]
    wanted = -(-length // 64) * 64
    assert length < wanted
    for name in padded.keys() - {"pixel_values", "image_sizes"}:
        assert padded[name].shape == (2, wanted)
        assert torch.equal(padded[name][:, :length], plain[name])
    assert (padded["labels"][:, length:] == IGNORE).all()
    unseen = padded["attention_mask"] if turns == "together" else padded["groups"] + 1
    assert not unseen[:, length:].any()


def test_a_tokenizer_without_a_pad_token_pads_as_asking_does(processor):
    samples = [sample(FIRST, SECOND), sample(FIRST)]
    bare = copy.deepcopy(processor)
    bare.tokenizer.pad_token = None
    batch = batch_of(Collator(bare, max_length=4096), *samples)
    assert not batch["input_ids"][1][batch["attention_mask"][1] == 0].any()


def test_long_samples_lose_whole_turns_from_the_end(processor):
    collator = Collator(processor, max_length=4096)
    one = batch_of(collator, sample(FIRST))["input_ids"].shape[1]
    shortened = batch_of(Collator(processor, max_length=one + 20), sample(FIRST, *[SECOND] * 30))
    labels = shortened["labels"][0]
    text = processor.tokenizer.decode(labels[labels != IGNORE])
    assert shortened["input_ids"].shape[1] <= one + 20
    assert text.startswith("AB C<|im_end|>")
    assert text.endswith("<|im_end|>")
    with pytest.raises(ValueError, match=f"one turn takes {one} tokens; max_length is 50"):
        batch_of(Collator(processor, max_length=50), sample(FIRST))


@pytest.mark.parametrize("turns", ["together", "apart"])
def test_no_turn_is_lost_that_would_have_fitted(processor, turns):
    """However long the one is that does not fit."""
    turned = [FIRST, *[SECOND] * 5]
    fitting = batch_of(Collator(processor, max_length=4096, turns=turns), sample(*turned))["labels"]
    collator = Collator(processor, max_length=fitting.shape[1], turns=turns)
    for left_out in ([turn("Spell it", "A" * 900)], [turn("Spell it", "A" * 900), SECOND]):
        assert torch.equal(batch_of(collator, sample(*turned, *left_out))["labels"], fitting)


def test_turns_apart_look_back_at_what_they_share_and_at_themselves(processor):
    collator = Collator(processor, max_length=4096, turns="apart")
    examples = [collator.prepare(each) for each in (sample(FIRST, SECOND, SECOND), sample(FIRST))]
    looks = turn_mask(collator(examples)["groups"])[:, 0]
    long, short = (example.row for example in examples)
    shared, length = int((long.groups == 0).sum()), len(short.ids)
    assert (long.ids == processor.image_token_id).nonzero().max() == shared - 1
    assert long.groups.unique().tolist() == [0, 1, 2, 3]
    for query, own in enumerate(long.groups):
        allowed = [key for key in range(query + 1) if long.groups[key] in (0, own)]
        assert looks[0, query].nonzero().flatten().tolist() == allowed
    for number in (1, 2, 3):
        assert long.positions[long.groups == number][0] == shared
    assert not looks[1, :length, length:].any()  # nobody looks at padding, but padding itself
    assert not looks[1, length:, :length][:, short.groups == 1].any()


def test_turns_together_all_look_and_count_on(processor):
    row, _ = Collator(processor, max_length=4096).prepare(sample(FIRST, SECOND))
    assert not row.groups.any()
    assert row.positions.tolist() == list(range(len(row.ids)))


def test_text_without_an_image_makes_a_batch_of_text(processor):
    batch = batch_of(Collator(processor, max_length=4096), Sample(messages=SECOND))
    assert "pixel_values" not in batch


@pytest.mark.parametrize("turns", ["together", "apart"])
def test_text_without_an_image_stays_as_it_is(processor, turns):
    asked = "<image>\n\n is what?"
    messages = turn([{"type": "text", "text": asked}], "A tag")
    ids = batch_of(Collator(processor, max_length=4096, turns=turns), Sample(messages=messages))["input_ids"]
    assert f"user\n{asked}<|im_end|>" in processor.tokenizer.decode(ids[0])
    assert processor.image_token_id not in ids


def test_special_tokens_in_data_stay_text(processor):
    spelled = turn("<image>\nWhat is <|im_end|>?", "<|im_start|>")
    batch = batch_of(Collator(processor, max_length=4096), sample(spelled))
    labels = batch["labels"][0]
    ends = processor.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert sum(int((labels == end).sum()) for end in ends) == 1


def test_a_processor_without_a_template_is_refused(processor):
    bare = type(processor)(processor.image_processor, processor.tokenizer)
    with pytest.raises(ValueError, match="template"):
        Collator(bare, max_length=100)


TWO = turn("<image>\n<image>\nWhich is older?", "B")
SYSTEM = ({"role": "system", "content": "Be brief."},)


def several(*turns, sizes=((200, 100), (100, 200))):
    return Sample(images=tuple(Image.new("RGB", size) for size in sizes), messages=sum(turns, ()))


@pytest.mark.parametrize("turns", ["together", "apart"])
def test_several_images_stand_where_their_placeholders_are(processor, turns):
    collator = Collator(processor, max_length=8192, turns=turns)
    batch = batch_of(collator, several(SYSTEM, TWO, SECOND), sample(FIRST))
    assert batch["image_sizes"].tolist() == [[100, 200], [200, 100], [100, 200]]
    images = [processor.image_processor.layouts([Image.new("RGB", s)])[0] for s in ((200, 100), (100, 200))]
    counts = [layout.num_visual for layout in images]
    assert len(batch["pixel_values"]) == 2 * images[0].num_pixels + images[1].num_pixels
    row = batch["input_ids"][0]
    is_image = (row == processor.image_token_id).int()
    starts = (is_image.diff(prepend=is_image.new_zeros(1)) == 1).nonzero()[:, 0].tolist()
    assert int(is_image.sum()) == sum(counts)
    assert len(starts) == 2
    assert starts[1] - starts[0] > counts[0]
    text = processor.tokenizer.decode(row[is_image == 0])
    assert text.count("Be brief.") == 1
    assert text.count("Which is older?") == text.count("What is the total?") == 1


def test_a_turn_apart_reads_what_it_would_read_alone(processor):
    """Behind the system message and both images, at the positions that it would have."""
    collator = Collator(processor, max_length=8192, turns="apart")
    row = collator.prepare(several(SYSTEM, TWO, SECOND)).row
    alone = turn("<image>\n<image>\n" + SECOND[0]["content"], SECOND[1]["content"])
    together = Collator(processor, max_length=8192).prepare(several(SYSTEM, alone)).row
    read = row.groups != 1
    assert torch.equal(row.ids[read], together.ids)
    assert torch.equal(row.labels[read], together.labels)
    assert torch.equal(row.positions[read], together.positions)


def test_turns_apart_share_all_of_their_images(processor):
    collator = Collator(processor, max_length=8192, turns="apart")
    with pytest.raises(ValueError, match="share their 2 images: all belong in the first question"):
        collator.prepare(several(FIRST, turn("<image>\nAnd this?", "C")))


def test_long_conversations_behind_a_system_message_lose_turns_from_the_end(processor):
    collator = Collator(processor, max_length=4096)
    one = len(collator.prepare(several(SYSTEM, FIRST, sizes=[(200, 100)])).row.ids)
    shortened = Collator(processor, max_length=one).prepare(
        several(SYSTEM, FIRST, *[SECOND] * 3, sizes=[(200, 100)])
    )
    assert len(shortened.row.ids) == one
    with pytest.raises(ValueError, match=f"one turn takes {one} tokens"):
        Collator(processor, max_length=one - 1).prepare(several(SYSTEM, FIRST, sizes=[(200, 100)]))


def test_images_of_turns_that_do_not_fit_go_with_them(processor):
    long = turn("<image>\nSpell it", "A" * 900)
    fitting = Collator(processor, max_length=8192).prepare(several(FIRST, sizes=[(200, 100)]))
    collator = Collator(processor, max_length=len(fitting.row.ids) + 20)
    cut = collator.prepare(several(FIRST, long))
    assert torch.equal(cut.row.ids, fitting.row.ids)
    assert all(torch.equal(cut.images[name], fitting.images[name]) for name in fitting.images)
    with pytest.raises(ValueError, match="no turn with an image fits into max_length"):
        collator.prepare(several(SECOND, long, sizes=[(200, 100)]))


@pytest.mark.parametrize("name", ["cut.jpg", "nowhere.jpg", "empty.png", "text.png"])
def test_an_image_that_cannot_be_read_is_named(processor, tmp_path, name):
    Image.effect_noise((200, 200), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises((ValueError, OSError), match=name):
        Collator(processor, max_length=4096).prepare(Sample(images=(tmp_path / name,), messages=FIRST))


def test_images_are_opened_within_the_limits(processor, tmp_path):
    Image.new("RGB", (900, 4)).save(tmp_path / "long.png")
    long = Sample(images=(tmp_path / "long.png",), messages=FIRST)
    with pytest.raises(ValueError, match="max_aspect=225"):
        Collator(processor, max_length=4096).prepare(long)
    recipe = load_recipe("reader_smoke", ["image_limits.max_aspect=225"])
    find_task(recipe.task)(recipe, recipe.stages[1]).collator.prepare(long)


def test_a_conversation_that_teaches_nothing_is_refused(processor, monkeypatch):
    monkeypatch.setattr("stepwell.language.prompt._answers", lambda *_: [])
    mute = copy.copy(processor)
    mute.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    collator = Collator(processor, max_length=100)
    collator.processor = mute  # a collator takes none of a template that is not ours
    with pytest.raises(ValueError, match="no token of this conversation is supervised"):
        collator.prepare(Sample(messages=SECOND))


def test_a_region_is_learnt_from_as_it_is_asked_about(processor):
    """And beside samples that have none."""
    collator = Collator(processor, max_length=4096)
    of_region = dataclasses.replace(sample(FIRST), regions=((0.1, 0.2, 0.5, 0.3),))
    batch = batch_of(collator, sample(FIRST), of_region)
    assert batch["image_regions"].tolist() == [[0, 0, 0, 0], [20, 20, 100, 30]]
    image = of_region.images[0]
    asked = processor.image_processor([image, image], regions=[None, (20, 20, 100, 30)])
    assert torch.equal(batch["pixel_values"], asked["pixel_values"])
    alone = batch_of(collator, of_region)
    assert alone["image_regions"].tolist() == [[20, 20, 100, 30]]
    assert alone["input_ids"].shape[1] < batch_of(collator, sample(FIRST))["input_ids"].shape[1]
    assert "image_regions" not in batch_of(collator, sample(FIRST), sample(FIRST))


TEXT_ONLY = Sample(messages=turn("Two and two?", "FOUR"))
LONG = turn("<image>\nWho?", "A LONG NAME OF A SHOP")
UNLIKE = (sample(FIRST, SECOND), TEXT_ONLY, sample(LONG, size=(90, 200)))


@pytest.fixture(scope="module")
def model():
    """In float64, where rows in one and rows side by side are the same but for the order of sums."""
    recipe = load_recipe("reader_smoke")
    torch.manual_seed(0)
    return ChatTraining(find_task(recipe.task)(recipe, recipe.stages[1]).config).double()


def loss_of(model, batch):
    return language_loss(super(ChatTraining, model).forward, **batch)[0]


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("averaging", ["tokens", "square", "samples"])
@pytest.mark.parametrize("turns", ["together", "apart"])
def test_packed_samples_are_learned_as_those_side_by_side(processor, model, turns, averaging, multiple):
    settings = {"max_length": 4096, "turns": turns, "averaging": averaging}
    found = []
    for packed in (False, True):
        collator = Collator(processor, **settings, packed=packed, pad_to_multiple_of=multiple)
        batch = batch_of(collator, *UNLIKE)
        assert len(batch["input_ids"]) == (1 if packed else 3)
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((ChatTask.counts(None, batch), loss, gradients))
    (count, loss, gradients), (packed_count, packed_loss, packed_gradients) = found
    torch.testing.assert_close(packed_count, count)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=1e-6)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("turns", ["together", "apart"])
def test_a_sample_weighs_as_its_tokens_as_their_root_or_as_any_other(processor, model, turns, packed):
    model.eval()
    settings = {"max_length": 4096, "turns": turns}
    with torch.no_grad():
        alone = torch.stack([loss_of(model, batch_of(Collator(processor, **settings), x)) for x in UNLIKE])
        sizes = torch.tensor([5.0 + 5, 5, 22])  # a token a character, and one for each end
        for averaging, weights in (("tokens", sizes), ("square", sizes.sqrt()), ("samples", sizes**0)):
            collator = Collator(processor, **settings, packed=packed, averaging=averaging)
            batch = batch_of(collator, *UNLIKE)
            expected = (weights * alone).sum() / weights.sum()
            torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ChatTask.counts(None, batch)["language"].float(), weights.sum())


def test_the_first_token_of_a_packed_sample_is_not_learned_from_the_sample_before(processor):
    first, second = (Collator(processor, max_length=4096).prepare(TEXT_ONLY) for _ in range(2))
    second.row.labels[0] = second.row.ids[0]  # as of a template in which all is supervised
    batch = Collator(processor, max_length=4096, packed=True)([first, second])
    assert batch["labels"][0, len(first.row.ids)] == IGNORE
    assert (batch["labels"] != IGNORE).sum() == 10


def test_packed_samples_do_not_see_one_another(processor):
    collator = Collator(processor, max_length=4096, turns="apart", packed=True, pad_to_multiple_of=64)
    examples = [collator.prepare(sample) for sample in UNLIKE]
    mask = turn_mask(collator(examples)["groups"])[0, 0]
    start = 0
    for example in examples:
        stop = start + len(example.row.ids)
        alone = turn_mask(example.row.groups[None])[0, 0]
        assert torch.equal(mask[start:stop, start:stop], alone)
        assert not mask[start:stop, :start].any()
        start = stop
    assert not mask[start:, :start].any()
    assert mask.diagonal().all()  # padding looks at itself: no row of a softmax is empty
