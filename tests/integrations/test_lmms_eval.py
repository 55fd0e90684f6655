"""The plug-in of lmms-eval: what it reads of a task, and with lmms-eval a whole run of its command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest

from stepwell.evaluate.run import evaluate
from stepwell.integrations import lmms_eval
from stepwell.integrations.lmms_eval import Options, as_messages

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/lmms_eval"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Options(128, ())),
        ({"until": None, "do_sample": False}, Options(128, ())),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}, Options(16, ())),
        ({"do_sample": False, "temperature": 0.7}, Options(128, ())),
        ({"do_sample": True, "temperature": 0.0}, Options(128, ())),
        ({"until": ["\n\n", "ASSISTANT:", ""]}, Options(128, ("ASSISTANT:",))),
        ({"until": "END", "repetition_penalty": 1.0}, Options(128, ("END",))),
    ],
)
def test_arguments_of_greedy_answers_are_read(given, expected, recwarn):
    assert Options.read(given) == expected
    assert not recwarn.list


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"do_sample": True, "top_p": 0.9}, "do_sample=True, top_p=0.9"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"num_return_sequences": 3}, "num_return_sequences=3"),
        ({"max_new_tokens": 0}, "at least 1, got 0"),
        ({"max_new_tokens": "16"}, "got '16'"),
    ],
)
def test_arguments_of_other_answers_are_refused(given, told):
    with pytest.raises(ValueError, match=r"greedy|know no|max_new_tokens") as refused:
        Options.read(given)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_arguments_that_nobody_knows_are_warned_of():
    with pytest.warns(UserWarning, match="image_aspect_ratio='original'"):
        Options.read({"image_aspect_ratio": "original", "max_new_tokens": 8})


def test_answers_are_cut_before_the_first_text_that_ends_them():
    options = Options(8, ("Q:", "\nEND"))
    assert options.cut("one \nEND Q: two") == "one"
    assert options.cut("one Q: two \nEND") == "one"
    assert options.cut("one two ") == "one two "


def test_messages_keep_their_order_and_text_in_the_place_of_an_image_is_a_file():
    picture = object()
    parts = [
        {"type": "text", "text": "A"},
        {"type": "image", "url": picture},
        {"type": "image", "url": "a.png"},
        {"type": "image", "url": "data:image/png;base64,AA"},
    ]
    system, user = as_messages(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    )
    assert system == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert user["content"][0] == {"type": "text", "text": "A"}
    assert [part["image"] for part in user["content"][1:]] == [
        picture,
        Path("a.png"),
        "data:image/png;base64,AA",
    ]


@pytest.mark.parametrize("kind", ["video", "audio"])
def test_videos_and_sounds_are_refused(kind):
    with pytest.raises(ValueError, match=kind):
        as_messages([{"role": "user", "content": [{"type": kind, "url": "a.mp4"}]}])


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_module_is_there_and_the_class_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'stepwell\[lmms-eval\]'"):
        _ = lmms_eval.StepwellModel
    with pytest.raises(AttributeError):
        _ = lmms_eval.NoSuchName


@pytest.fixture(scope="module")
def plugin():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: docs/integrations.md")
    from lmms_eval.models import get_model

    return get_model("stepwell")


def requests_of(task, kind="test", given=None):
    return [
        SimpleNamespace(
            args=("context", lambda row: row, given or {"max_new_tokens": 4}, place, "mine", kind)
        )
        for place in range(len(task))
    ]


def ask(image, text):
    return [{"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": text}]}]


def test_requests_of_several_tasks_have_answers_and_tokens_in_their_order(plugin, assistant, folder, draw):
    rows = [
        ask(draw(90, 60, 1), "What?"),
        [{"role": "user", "content": "Hello"}],
        ask(draw(40, 80, 2), "Hm?"),
    ]
    model = plugin.create_from_arg_string(
        f"model={folder},device=cpu,batch_size=2", {"batch_size": 1, "device": None}
    )
    assert model.batch_size == 2  # what --model_args says goes before the command's own default
    model.task_dict = {"mine": {"test": rows}}
    requests = requests_of(rows)
    requests[2] = SimpleNamespace(args=(*requests[2].args[:2], {"max_new_tokens": 2}, *requests[2].args[3:]))
    results = model.generate_until(requests)
    assert results[0].text == assistant.ask(rows[0][0]["content"][0]["url"], "What?", max_new_tokens=4)
    assert results[2].text == assistant.ask(rows[2][0]["content"][0]["url"], "Hm?", max_new_tokens=2)
    for result, row in zip(results, rows, strict=True):
        prompt = assistant.processor.prompt([as_messages(row)])["input_ids"]
        assert result.token_counts.input_tokens == prompt.shape[1]
        assert result.token_counts.output_tokens > 0


@pytest.fixture
def logged(plugin):
    """What lmms-eval's own log is told; it silences Python's warnings."""
    from loguru import logger

    lines = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)


def test_a_sample_that_cannot_be_answered_is_empty_and_told(plugin, folder, logged):
    rows = [ask("missing.png", "What?"), [{"role": "user", "content": "Hello"}]]
    model = plugin(str(folder), device="cpu")
    model.task_dict = {"mine": {"test": rows}}
    first, second = model.generate_until(requests_of(rows))
    (line,) = logged
    assert line.startswith("mine, 0: no answer, ")
    assert "missing.png" in line
    assert first.text == ""
    assert first.token_counts.to_dict() == {}
    assert second.text


def test_arguments_that_are_left_aside_are_told_once(plugin, folder, logged):
    rows = [[{"role": "user", "content": text}] for text in ("Hello", "And?")]
    model = plugin(str(folder), device="cpu")
    model.task_dict = {"mine": {"test": rows}}
    model.generate_until(requests_of(rows, given={"max_new_tokens": 2, "crop": True}))
    (line,) = logged
    assert "crop=True" in line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pretrained": "x"}, "--model_args may be model, batch_size"),
        ({"batch_size": "auto"}, "batch_size must be a whole number"),
        ({"model": "boards_tiny"}, "answers no questions"),
    ],
)
def test_what_the_plugin_cannot_do_is_refused_in_a_line(plugin, options, told):
    with pytest.raises(ValueError, match=told):
        plugin(**{"device": "cpu", **options})


def test_several_processes_likelihoods_and_rounds_are_refused(plugin, folder, monkeypatch):
    model = plugin(str(folder), device="cpu")
    for refused in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(ValueError, match="generate_until"):
            refused([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        plugin(str(folder))


def test_the_entry_point_is_the_manifest(plugin):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (value,) = groups["lmms_eval.models"].values()
    found = EntryPoint("stepwell", value, "lmms_eval.models").load()()
    assert found.model_id == "stepwell"
    module, _, name = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is plugin


@pytest.mark.slow
def test_a_local_task_scores_as_stepwell_evaluate_does(plugin, assistant, folder, draw, tmp_path):
    """The example's task by lmms-eval's own command, offline."""
    lines = []
    for number in range(5):
        draw(60 + 20 * number, 50, number).save(tmp_path / f"{number}.png")
        answer = assistant.ask(tmp_path / f"{number}.png", "What?")
        blanks = f"{answer[:1]}  {answer[1:]}"  # lmms-eval's own score squeezes them
        said = answer if number < 2 else (answer[:-2], blanks, "other")[number - 2]
        lines.append({"image": f"{number}.png", "question": "What?", "answers": [said]})
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = {**os.environ, **offline, "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}

    def run(*words):
        return subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, check=True, timeout=1800
        )

    run(str(EXAMPLE / "make_parquet.py"), "q.jsonl")
    run(
        *("-m", "lmms_eval", "--model", "stepwell", "--model_args", f"model={folder},device=cpu"),
        *("--batch_size", "2", "--tasks", "stepwell_questions", "--include_path", str(EXAMPLE)),
        *("--output_path", "out", "--log_samples"),
    )
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_*.jsonl")
    ours = evaluate(assistant, tmp_path / "q.jsonl", metric="anls", output=tmp_path / "ours")
    theirs = json.loads(results.read_text())["results"]["stepwell_questions"]["anls,none"]
    assert theirs == pytest.approx(ours.scores.score)
    assert 0.4 < theirs < 1
    counted = [json.loads(line)["token_counts"] for line in samples.read_text().splitlines()]
    assert all(count[0]["input_tokens"] > 10 and count[0]["output_tokens"] > 0 for count in counted)
