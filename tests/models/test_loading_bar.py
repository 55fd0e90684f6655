"""transformers' bar is left out where we load, and nowhere else."""

from __future__ import annotations

import sys
import threading

import pytest
from transformers.utils import logging

import stepwell
from stepwell.models.loading_bar import no_loading_bar


@pytest.fixture(autouse=True)
def bars_are_on():
    were_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not were_on:
        logging.disable_progress_bar()


@pytest.fixture
def folder(assistant, tmp_path):
    assistant.model.save_pretrained(tmp_path)
    assistant.processor.save_pretrained(tmp_path)
    return tmp_path


def test_loading_draws_a_bar_only_where_it_is_asked_for(folder, capsys):
    capsys.readouterr()
    stepwell.load(folder)
    assert capsys.readouterr().err == ""
    stepwell.load(folder, loading_bar=True)
    assert "Loading weights" in capsys.readouterr().err


def test_bars_and_hooks_of_the_user_are_as_they_were_behind_an_error_too(folder):
    drawn = []

    def theirs(bar, arguments, keywords):
        drawn.append(keywords.get("disable", False))
        return bar(*arguments, **keywords)

    before = logging.set_tqdm_hook(theirs)
    try:
        stepwell.load(folder)
        (folder / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="safetensors"):
            stepwell.load(folder)
        logging.tqdm([], desc="theirs")
        assert drawn == [True, False]
        assert logging.is_progress_bar_enabled()
    finally:
        assert logging.set_tqdm_hook(before) is theirs


def test_bars_of_other_threads_are_drawn(capsys):
    inside, outside = threading.Event(), threading.Event()

    def load():
        with no_loading_bar(), no_loading_bar():
            inside.set()
            outside.wait(10)
            print(logging.tqdm([]).disable)

    thread = threading.Thread(target=load)
    thread.start()
    inside.wait(10)
    with no_loading_bar():
        pass
    assert not logging.tqdm([], file=sys.stderr).disable
    outside.set()
    thread.join()
    assert capsys.readouterr().out == "True\n"
    assert logging.set_tqdm_hook(None) is None
