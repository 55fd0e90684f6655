"""/v1/predict answers with the JSON of `stepwell predict`, from JSON or from an image's own bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from running import Running, data_url, run

import stepwell
from stepwell.serve.predict import Predict

BOARD = Path(__file__).parents[2] / "examples" / "board_1.jpg"


@pytest.fixture(scope="module")
def boards() -> Any:
    return stepwell.load("boards_tiny", device="cpu")


@pytest.fixture(scope="module")
def server(boards: Any) -> Iterator[Running]:
    with run(boards, name="boards") as running:
        yield running


def as_json(found: Any) -> Any:
    return json.loads(json.dumps(found.to_dict()))


def test_the_answer_is_that_of_predict(server: Running, boards: Any) -> None:
    url = data_url(BOARD.read_bytes(), "jpeg")
    wanted = boards.predict(BOARD)
    assert len(wanted) > 2
    assert server.post("/v1/predict", json={"image": url, "model": "boards"}).json() == as_json(wanted)
    few = server.post("/v1/predict", json={"image": url, "threshold": 0.01, "max_detections": 2}).json()
    assert few == as_json(boards.predict(BOARD, threshold=0.01, max_detections=2))
    tiles = server.post("/v1/predict", json={"image": url, "tiles": {"scale": 1.5}}).json()
    assert tiles == as_json(boards.predict(BOARD, tiles=stepwell.Tiles(scale=1.5)))
    assert tiles != as_json(wanted)
    cut = server.post("/v1/predict", json={"image": url, "tiles": True}).json()
    assert cut == as_json(boards.predict(BOARD, tiles=stepwell.Tiles()))


def test_where_nobody_waits_no_further_tile_is_looked_at(boards: Any) -> None:
    looked_at: list[int] = []
    told: list[Any] = []
    options = {"threshold": None, "max_detections": None, "tiles": stepwell.Tiles(scale=2.0)}
    job = SimpleNamespace(
        image=stepwell.open_image(BOARD), options=options, is_cancelled=False, tell=told.append
    )

    def leave(*_: Any) -> None:
        looked_at.append(1)
        job.is_cancelled = True

    hook = boards.register_forward_hook(leave)
    Predict(boards, max_pixels=1e9).run([job])
    hook.remove()
    assert (looked_at, told) == ([1], [])
    job.is_cancelled = False
    Predict(boards, max_pixels=1e9).run([job])
    assert [as_json(one) for one in told] == [as_json(boards.predict(BOARD, tiles=options["tiles"]))]


def test_an_image_may_be_the_body(server: Running, boards: Any) -> None:
    raw, headers = BOARD.read_bytes(), {"Content-Type": "image/jpeg"}
    wanted = as_json(boards.predict(BOARD, threshold=0.2))
    assert server.post("/v1/predict?threshold=0.2", content=raw, headers=headers).json() == wanted
    tiles = server.post("/v1/predict?tile_scale=1.5", content=raw, headers=headers).json()
    assert tiles == as_json(boards.predict(BOARD, tiles=stepwell.Tiles(scale=1.5)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "image: it is missing"),
        ({"image": "board.jpg"}, "data: URL"),
        ({"image": "data:image/png;base64,AAAA"}, "not an image"),
        ({"threshold": 2}, "threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"tiles": {"overlap": 1.0}}, "overlap"),
        ({"tiles": {"side": 9}}, "tiles"),
        ({"tiles": {"scale": 16}}, "too many for this picture"),
        ({"tiles": {"size": 32, "overlap": 0.9, "scale": 8}}, "too many for this picture"),
        ({"model": "other"}, "called boards"),
    ],
)
def test_bad_requests_are_refused_in_a_line(server: Running, fields: Any, words: str) -> None:
    body = {"image": data_url(BOARD.read_bytes())} if fields and "image" not in fields else {}
    found = server.post("/v1/predict", json={**body, **fields})
    assert found.status_code in (400, 404)
    assert words in found.json()["error"]["message"]
    assert server.service.scheduler.taken == 0


def test_a_detector_answers_no_questions(server: Running) -> None:
    assert server.ask("Hello?").status_code == 404
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "boards"
