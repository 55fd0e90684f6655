"""The reader's batches and losses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from stepwell.data.sample import Sample
from stepwell.reader.line_head import frames_along
from stepwell.reader.page import Line, PageSample
from stepwell.reader.task import ReaderTask
from stepwell.train.recipe import load_recipe
from stepwell.train.run import mixture

LINE = Line(text="AB C", box=(20, 70, 100, 90), edges=(20, 40, 60, 80, 100))
FIRST = ("<image>\nRead [0.100, 0.700, 0.500, 0.900]", "AB C", LINE)
SECOND = ("What is the total?", "1.50", None)


def conversation(*turns):
    roles = ("user", "assistant")
    return tuple(
        {"role": role, "content": text} for turn in turns for role, text in zip(roles, turn[:2], strict=True)
    )


def sample(*turns, size=(200, 100)):
    return PageSample(
        images=(Image.new("RGB", size),),
        messages=conversation(*turns),
        spelled=tuple(line for *_, line in turns),
        lines=(LINE,),
    )


def make_task(stage=1, **changes):
    """A stage of reader_smoke with other fields."""
    recipe = load_recipe("reader_smoke")
    return ReaderTask(recipe, recipe.stages[stage].model_copy(update=changes))


def prepared(task, *samples):
    """A batch of them."""
    return task.collate([task.prepare(sample) for sample in samples])


def batch_of(task, *indices):
    source = mixture(task, seed=0)
    return task.collate([source[i].sample for i in indices])


def test_pointers_name_the_cell_of_each_next_character():
    task = make_task(turns="together")
    batch = prepared(task, sample(FIRST, SECOND))
    (pointers,) = batch["pointers"]
    rows, cols = task.processor.geometry.layout((100, 200)).views[-1].grid
    assert (
        len(pointers["visual"]) == rows * cols == (batch["input_ids"] == task.processor.image_token_id).sum()
    )
    following = batch["input_ids"][0][pointers["positions"] + 1]
    assert task.processor.tokenizer.decode(following) == "AB C"
    middles = torch.tensor([30.0, 50.0, 70.0, 90.0])
    assert pointers["cells"].tolist() == (int(0.8 * rows) * cols + (middles / 200 * cols).long()).tolist()


def test_frames_are_as_dense_in_the_view_as_asked_for():
    (frames,) = last_views(prepared(make_task(frame_step=8.0), sample(FIRST))["frames"])
    spacing = (frames["points"][1, 0] - frames["points"][0, 0]) * 256  # the last view is 256 pixels wide
    assert spacing == pytest.approx(8.0, abs=1e-3)


def test_every_loss_of_a_stage_sends_gradients_to_the_encoders():
    task = make_task()
    module, batch = task.build(), batch_of(task, 0, 1)
    losses = module(**batch)
    assert set(losses) == {"language", "frames", "pointer"}
    kernel = next(p for n, p in module.named_parameters() if "branches.1" in n and p.ndim == 4)
    for loss in losses.values():
        module.zero_grad()
        loss.backward(retain_graph=True)
        assert kernel.grad.abs().sum() > 0


def test_a_loss_that_is_not_named_is_not_computed():
    task = make_task(losses={"frames": 1.0})
    module = task.build()
    module.lm_head.register_forward_hook(lambda *_: pytest.fail("the language model ran"))
    assert set(module(**batch_of(task, 0))) == {"frames"}


def test_the_pointer_reads_the_head_that_the_stage_names():
    tasks = [make_task(losses={"pointer": 1.0}, pointer_head=head) for head in (0, 1)]
    first, second = (task.build().eval() for task in tasks)
    second.load_state_dict(first.state_dict())  # which starts out with another head that looks
    batch = batch_of(tasks[0], 0, 1)
    assert abs(first(**batch)["pointer"] - second(**batch)["pointer"]) > 1e-3


def test_the_language_loss_is_the_models_own():
    task = make_task(turns="together", losses={"language": 1.0})
    module, batch = task.build(), batch_of(task, 0, 1)
    names = ("input_ids", "attention_mask", "labels", "pixel_values", "image_sizes")
    own = super(type(module), module).forward(**{name: batch[name] for name in names}).loss
    torch.testing.assert_close(module(**batch), {"language": own})


def test_questions_apart_are_learned_as_if_they_were_asked_alone():
    torch.manual_seed(0)
    apart, together = (make_task(turns=turns, losses={"language": 1.0}) for turns in ("apart", "together"))
    module = apart.build()
    page = mixture(apart, seed=0).sources[0][1]
    contents = [message["content"] for message in page.messages]
    assert len(contents) > 4
    at_once = module(**prepared(apart, page))["language"]
    alone = []
    for question, answer in zip(contents[::2], contents[1::2], strict=True):
        question = "<image>\n" + question.removeprefix("<image>\n")
        single = replace(page, messages=conversation((question, answer)))
        alone += [module(**prepared(together, single))["language"]] * (len(answer) + 1)
    torch.testing.assert_close(at_once, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("averaging", ["tokens", "square"])
def test_packed_pages_have_the_losses_of_those_side_by_side(averaging):
    losses = {"language": 1.0, "pointer": 1.0, "frames": 1.0, "ctc": 1.0, "tokens": 1.0}
    found = []
    for packed in (False, True):
        task = make_task(losses=losses, packed=packed, averaging=averaging, pad_to_multiple_of=64)
        torch.manual_seed(0)
        module, source = task.build().double(), mixture(task, seed=0).sources[0]
        batch = prepared(task, source[0], sample(FIRST, SECOND), Sample(messages=conversation(("A?", "B"))))
        counts = task.counts(batch)
        found.append({name: (loss.item(), float(counts[name])) for name, loss in module(**batch).items()})
    assert found[1].keys() == losses.keys()
    for name, values in found[0].items():
        assert found[1][name] == pytest.approx(values, rel=1e-5), name


def test_pages_weigh_by_the_roots_of_their_points_where_losses_are_averaged_so():
    losses = {"pointer": 1.0, "frames": 1.0, "ctc": 1.0}
    alike, rooted = (make_task(losses=losses, averaging=averaging) for averaging in ("tokens", "square"))
    torch.manual_seed(0)
    module = alike.build().eval()
    pages = [mixture(alike, seed=0).sources[0][0], sample(FIRST)]
    alone = [prepared(alike, page) for page in pages]
    means, pair = [module(**batch) for batch in alone], prepared(alike, *pages)
    sizes = {
        "pointer": [len(batch["pointers"][0]["positions"]) for batch in alone],
        "frames": [len(last_views(batch["frames"])[0]["points"]) for batch in alone],
        "ctc": [len(last_views(batch["spelled"])[0]["points"]) for batch in alone],
    }
    for task, power in ((alike, 0.0), (rooted, 0.5)):
        module.stage = task.stage
        for name, loss in module(**pair).items():
            weights = [size**power for size in sizes[name]]
            expected = sum(w * mean[name] for w, mean in zip(weights, means, strict=True)) / sum(weights)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
            assert float(task.counts(pair)[name]) == pytest.approx(sum(weights))


def test_text_without_an_image_costs_no_frames_and_no_pointers():
    task = make_task()
    batch = prepared(task, Sample(messages=conversation(("Two and two?", "FOUR"))))
    losses = task.build()(**batch)
    assert losses["frames"] == losses["pointer"] == 0
    assert losses["language"] > 0


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("pointer_layers=[-3, 3]", "head 0 of layers -3, 3, counted from 0, but .* has 3 layers of 2 heads"),
        ("pointer_head=2", "head 2 of layers 1, 2, counted from 0, but .* has 3 layers of 2 heads"),
    ],
)
@pytest.mark.parametrize("stage", [0, 1])  # the first only begins with the head of the second
def test_a_pointer_that_the_decoder_has_not_is_refused(stage, override, complaint):
    recipe = load_recipe("reader_smoke", [f"stages.answer.{override}"])
    with pytest.raises(ValueError, match=complaint):
        ReaderTask(recipe, recipe.stages[stage])


@pytest.mark.parametrize("left", [0, 1])
def test_a_decoder_of_another_kind_is_refused_where_the_task_looks_into_it(left):
    gpt = "model.text={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 4096}"
    neither = ["model.start_looking=false", "stages.answer.losses={language: 1.0}"]
    recipe = load_recipe("reader_smoke", [gpt, neither[left]])
    with pytest.raises(ValueError, match="llama, mistral, qwen2, not of 'gpt2'"):
        ReaderTask(recipe, recipe.stages[1])
    recipe = load_recipe("reader_smoke", [gpt, *neither])
    assert ReaderTask(recipe, recipe.stages[1]).build()


def test_the_head_that_begins_to_look_is_the_one_that_is_told_where():
    pointer = ["stages.answer.pointer_layers=[0, 2]", "stages.answer.pointer_head=1"]
    layers = []
    for looking in ("true", "false"):
        recipe = load_recipe("reader_smoke", [*pointer, f"model.start_looking={looking}"])
        torch.manual_seed(0)
        layers.append(ReaderTask(recipe, recipe.stages[0]).build().model.language_model.layers)
    queries = [[layer.self_attn.q_proj.weight.unflatten(0, (2, -1)) for layer in each] for each in layers]
    started = [(i, head) for i in range(3) for head in (0, 1) if (queries[0][i] != queries[1][i])[head].any()]
    assert started == [(0, 1), (2, 1)]


def last_views(targets):
    """Of images whose finest view is the second of two."""
    assert all(of_views.keys() == {1} for of_views in targets)
    return [of_views[1] for of_views in targets]


@pytest.mark.parametrize("framing", ["pad", "crop"])
def test_what_points_into_a_square_lies_where_the_image_lies_in_it(framing):
    task = make_task(vision={"framing": framing})
    batch = prepared(task, sample(FIRST))
    side = 200 if framing == "pad" else 100
    left, top = (0, -50) if framing == "pad" else (50, 0)
    (pointers,) = batch["pointers"]
    rows, cols = task.collator.processor.geometry.layout((100, 200)).views[-1].grid
    middles = [30.0, 50.0, 70.0, 90.0] if framing == "pad" else [50.0, 70.0, 90.0]  # the first is cut off
    row = int((80 - top) / side * rows)
    assert pointers["cells"].tolist() == [row * cols + int((x - left) / side * cols) for x in middles]
    (frames,) = last_views(batch["frames"])
    torch.testing.assert_close(frames["points"][0, 1].item(), (80 - top) / side)


def close_up(region=(0.2, 0.6, 0.4, 1.0)):
    page = sample(FIRST)
    return replace(page, regions=(region,))


def test_points_of_a_close_up_lie_in_what_the_last_view_shows():
    task = make_task(losses={"language": 1.0, "frames": 1.0, "ctc": 1.0, "pointer": 1.0}, turns="together")
    batch = prepared(task, close_up())
    layout = task.processor.geometry.close_up((100, 200), (40, 60, 80, 100))
    (left, top, right, bottom), (rows, cols) = layout.views[-1].box, layout.views[-1].grid
    assert left > 0
    (frames,), (pointers,) = last_views(batch["frames"]), batch["pointers"]
    middle = (80 - top) / (bottom - top)
    torch.testing.assert_close(frames["points"][:, 1], torch.full_like(frames["points"][:, 1], middle))
    x = frames["points"][:, 0] * (right - left) + left
    assert x.min() >= max(left, 20)
    assert x.max() < min(right, 100)
    middles = (torch.tensor([30.0, 50.0, 70.0, 90.0]) - left) / (right - left)
    seen = (middles >= 0) & (middles <= 1)
    assert 0 < seen.sum() < 4  # nothing is asked of letters that are not seen
    cells = int(middle * rows) * cols + (middles[seen] * cols).long()
    assert pointers["cells"].tolist() == cells.tolist()
    assert len(pointers["visual"]) == rows * cols
    losses = task.build()(**batch)
    assert set(losses) == {"language", "frames", "ctc", "pointer"}
    assert all(loss.isfinite() for loss in losses.values())


def test_the_line_head_reads_the_map_of_the_image_that_its_targets_are_of():
    torch.manual_seed(0)
    task = make_task(losses={"frames": 1.0, "ctc": 1.0})
    module = task.build().eval()
    pages = [mixture(task, seed=0).sources[0][i] for i in (0, 1)]
    pages.insert(1, replace(pages[0], images=(pages[0].image.resize((96, 200)),), lines=()))
    together = module(**prepared(task, *pages))
    alone = [module(**prepared(task, page)) for page in (pages[0], pages[2])]
    for name in ("frames", "ctc"):
        mean = torch.stack([losses[name] for losses in alone]).mean()
        torch.testing.assert_close(together[name], mean, rtol=1e-4, atol=1e-4)
    assert "encode" not in vars(module.model.vision)


def test_lines_that_are_spread_give_frames_where_the_stage_says_so():
    guessed = replace(sample(FIRST), lines=(replace(LINE, exact=False),))
    assert prepared(make_task(), guessed)["frames"] == [{}]
    (frames,) = last_views(prepared(make_task(spread=True), guessed)["frames"])
    assert len(frames["points"]) > 0


@pytest.mark.parametrize(
    ("field", "value", "loss"),
    [
        ("frame_step", "2.0", "frames or ctc or tokens"),
        ("spread", "true", "frames or tokens"),
        ("pointer_head", "1", "pointer"),
    ],
)
def test_a_field_of_a_loss_that_the_stage_has_not_is_refused(field, value, loss):
    with pytest.raises(ValueError, match=f"{field} is of the loss {loss}, which the stage does not name"):
        load_recipe(
            "reader_smoke",
            ["stages.answer.losses={language: 1.0}", f"stages.answer.{field}={value}"],
        )


def test_cut_lines_are_a_source_of_the_recipe(tmp_path):
    Image.new("L", (300, 200), 255).save(tmp_path / "scan.png")
    annotations = [{"image_id": 1, "text": "ABC", "bbox": [20, 30 * i, 90, 20]} for i in range(1, 6)]
    file = {"images": [{"id": 1, "file_name": "scan.png"}], "annotations": annotations}
    (tmp_path / "lines.json").write_text(json.dumps(file))
    data = {"kind": "cut_lines", "path": f"{tmp_path}/lines.json", "images": str(tmp_path), "reads": 2}
    recipe = load_recipe("reader_smoke", [f"stages.answer.data={json.dumps([data])}"])
    task = ReaderTask(recipe, recipe.stages[1])
    example = task.prepare(task.source(recipe.stages[1].data[0])[0])
    assert len(example.spelled[0][1]["lengths"]) > 4
    assert len(example.pointers["positions"]) == 6  # two answers of three characters


def test_the_heads_own_words_for_what_visual_tokens_show_are_a_loss():
    task = make_task(losses={"tokens": 1.0}, frame_step=8.0)
    module = task.build().eval()
    blank = replace(sample(FIRST), lines=())
    batch = prepared(task, sample(FIRST), blank)
    losses = module(**batch)
    assert set(losses) == {"tokens"}
    tokens, _ = module.get_image_features(batch["pixel_values"], batch["image_sizes"])
    rows, cols = task.processor.geometry.layout((100, 200)).views[-1].grid
    words = module.lm_head(module.model.language_model.norm(tokens)).log_softmax(1).unflatten(0, (rows, cols))
    ids = task.processor.tokenizer.convert_tokens_to_ids([*"ABC"])
    step = 8.0 * 200 / 256  # in pixels of the image, of which the last view has 256
    expected = []
    for i in range(13):
        x = 20 + step * (i + 0.5)
        letter = int((x - 20) / 20)
        if letter != 2:  # a blank
            cell = words[int(0.8 * rows), int(x / 200 * cols)]
            expected.append(-cell[ids[min(letter, 2)]])
    torch.testing.assert_close(losses["tokens"], torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)
    assert module(**prepared(task, blank))["tokens"] == 0
    assert task.counts(batch)["tokens"] == len(expected)


def test_edges_that_end_on_a_step_do_not_end_the_run():
    line = Line(text="AB", box=(0.1, 0, 0.7, 1), edges=(0.1, 0.4, 0.7), exact=True)
    assert len(frames_along([line], (0, 0, 1, 1), step=0.2)["points"]) == 3
