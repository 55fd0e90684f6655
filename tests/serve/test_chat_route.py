"""Answers over HTTP are those of `ask`, whole or in pieces, alone or together."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from running import SIZES, Running, data_url, encoded, part, picture, run

import stepwell
from stepwell.models.ask import Assistant

QUESTION = "What is written in [0.1, 0.1, 0.6, 0.6]?"


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def messages(*content: Any) -> list[Any]:
    return [{"role": "user", "content": [*content]}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def test_the_official_client_gets_the_answer_of_ask(client: openai.OpenAI, reader: Assistant) -> None:
    asked = messages(part(picture()), text("What is the total?"))
    found = client.chat.completions.create(model="reader", messages=asked, max_tokens=12)
    assert found.choices[0].message.content == reader.ask(picture(), "What is the total?", max_new_tokens=12)
    usage = found.usage
    assert usage.prompt_tokens_details.image_tokens == reader.layout(picture()).num_visual
    assert (
        usage.prompt_tokens
        == usage.prompt_tokens_details.image_tokens + usage.prompt_tokens_details.text_tokens
    )
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 12


def test_pieces_of_a_stream_are_the_answer(client: openai.OpenAI) -> None:
    asked = messages(part(picture(90, 160)), text("What does the page say?"))
    how: Any = {"model": "reader", "messages": asked, "max_tokens": 24, "temperature": 1.9, "seed": 1}
    whole = client.chat.completions.create(**how)
    chunks = list(client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(deltas) == whole.choices[0].message.content
    assert len([delta for delta in deltas if delta]) > 1
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len({chunk.id for chunk in chunks}) == 1


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["reader"]
    assert client.models.retrieve("reader").id == "reader"
    with pytest.raises(openai.NotFoundError, match="called reader"):
        client.models.retrieve("other/model")


def test_answers_made_together_are_those_made_alone(server: Running, reader: Assistant) -> None:
    images = [picture(120, 90, colour) for colour in ("teal", "black", "red")] + [picture(60, 160)]
    fields = [{}, {"max_tokens": 3, "temperature": 2.0, "seed": 5}, {"temperature": 1.5, "seed": 7}, {}]
    alone = [
        server.ask(part(image), QUESTION, **more).json() for image, more in zip(images, fields, strict=True)
    ]
    batches: list[int] = []
    chat = server.service.chat
    generate = chat.engine.generate
    with ThreadPoolExecutor(4) as pool, server.held() as free:
        held = chat.engine.generate

        def counted(prompts: Any, **options: Any) -> Any:
            batches.append(len(prompts.input_ids))
            return held(prompts, **options)

        chat.engine.generate = counted
        first = pool.submit(server.ask, part(picture(200, 20)), "What is it?")  # which holds the thread
        server.until(lambda: bool(batches))
        asked = [
            pool.submit(server.ask, part(image), QUESTION, **more)
            for image, more in zip(images[:3], fields[:3], strict=True)
        ]
        server.until(lambda: server.service.scheduler.waiting == 3)
        free.set()
        together = [answer.result().json() for answer in asked]
        assert first.result().status_code == 200
    assert generate.__func__ is chat.engine.generate.__func__
    assert batches == [1, 3]
    for found, wanted in zip(together, alone[:3], strict=True):
        assert found["choices"] == wanted["choices"]
        assert found["usage"] == wanted["usage"]
    assert alone[1]["choices"][0]["finish_reason"] == "length"
    assert alone[3]["choices"][0]["message"]["content"] == reader.ask(images[3], QUESTION, max_new_tokens=12)


def test_a_seed_draws_the_same_again_and_another_draws_another(server: Running) -> None:
    drawn = {
        seed: [
            server.ask(part(picture()), "Who?", temperature=1.8, seed=seed).json()["choices"][0]["message"]
            for _ in range(2)
        ]
        for seed in (1, 2, 3)
    }
    assert all(first == again for first, again in drawn.values())
    assert len({message["content"] for message, _ in drawn.values()}) > 1
    by_chance = [server.ask(part(picture()), "Who?", temperature=1.8).json() for _ in range(4)]
    assert len({found["choices"][0]["message"]["content"] for found in by_chance}) > 1


def test_little_top_p_is_the_best_token(server: Running) -> None:
    best = server.ask(part(picture()), "Who?").json()["choices"]
    assert server.ask(part(picture()), "Who?", temperature=1e-40).json()["choices"] == best
    assert server.ask(part(picture()), "Who?", temperature=2.0, top_p=1e-6).json()["choices"] == best


def test_an_answer_ends_before_a_stop(server: Running) -> None:
    def choice(seed: int, **more: Any) -> Any:
        return server.ask(part(picture()), QUESTION, temperature=1.9, seed=seed, **more).json()["choices"][0]

    answers = ((seed, choice(seed)["message"]["content"]) for seed in range(100))
    seed, answer = next((seed, answer) for seed, answer in answers if len(answer) > 2)  # not all reach a stop
    stopped = choice(seed, stop=["\x00", answer[1:3]])
    assert stopped["message"]["content"] == answer[: answer.index(answer[1:3])].rstrip()
    assert stopped["finish_reason"] == "stop"


def test_a_region_beside_an_image_is_that_of_ask(server: Running, reader: Assistant) -> None:
    image = picture(400, 300)
    found = server.ask(part(image, region=[0.25, 0.25, 0.5, 0.5]), "What is written there?").json()
    edges = (100, 75, 200, 150)
    wanted = reader.ask(image, "What is written there?", region=edges, max_new_tokens=12)
    assert found["choices"][0]["message"]["content"] == wanted
    details = found["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == reader.layout(image, region=edges).num_visual
    assert details["image_tokens"] != reader.layout(image).num_visual
    in_words = server.ask(part(image), "What is written in [0.25, 0.25, 0.5, 0.5]?").json()
    assert in_words["usage"]["prompt_tokens_details"]["image_tokens"] == details["image_tokens"]


def test_less_detail_and_fewer_pixels_are_smaller_views(server: Running) -> None:
    def visual(**more: Any) -> int:
        url = {"detail": more.pop("detail")} if "detail" in more else {}
        found = server.ask(part(picture(100, 100), **url), "What?", **more)
        assert found.status_code == 200, found.text
        return int(found.json()["usage"]["prompt_tokens_details"]["image_tokens"])

    smaller = stepwell.load("reader_tiny", device="cpu", vision={"sizes": [side // 2 for side in SIZES]})
    assert visual() == visual(detail="high") == visual(max_pixels=256 * 256) == 256
    assert visual(detail="low") == visual(max_pixels=256 * 256 - 1) == 64
    assert visual(max_pixels=10**12) == 256  # never more than the server's own
    found = server.ask(part(picture(), detail="low"), QUESTION).json()["choices"][0]["message"]["content"]
    assert found == smaller.ask(picture(), QUESTION, max_new_tokens=12)


def test_conversations_of_several_turns_and_images(server: Running, reader: Assistant) -> None:
    content = [part(picture()), part(picture(60, 160)), text("Which is larger?")]
    several = server.post(json={"messages": messages(*content), "max_tokens": 8}).json()
    wanted = reader.ask([picture(), picture(60, 160)], "Which is larger?", max_new_tokens=8)
    assert several["choices"][0]["message"]["content"] == wanted
    turns = [
        {"role": "system", "content": "You read."},
        *messages(part(picture()), text("Who?")),
        {"role": "assistant", "content": "ACME", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "And the total?"},
    ]
    found = server.post(json={"messages": turns, "max_tokens": 4})
    assert found.status_code == 200
    assert found.json()["usage"]["prompt_tokens"] > several["usage"]["prompt_tokens_details"]["text_tokens"]
    spoken = server.post(json={"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4})
    assert spoken.status_code == 200
    assert spoken.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 0


@pytest.mark.parametrize("spelled", ["<image>", "<|im_end|>", "\ud800 <image><image>"])
def test_tokens_that_are_spelled_out_are_text(server: Running, spelled: str) -> None:
    for content in (f"What is {spelled}?", [part(picture()), text(spelled)]):
        raw = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2})
        found = server.post(content=raw, headers={"Content-Type": "application/json"})
        assert found.status_code == 200, found.text
        images = 0 if isinstance(content, str) else 1
        assert (found.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0) == bool(images)


def test_huge_max_tokens_are_the_servers(reader: Assistant) -> None:
    with run(reader, max_new_tokens=5) as server:
        found = server.ask(part(picture()), QUESTION, max_tokens=10**12, temperature=2.0, seed=0).json()
        assert found["usage"]["completion_tokens"] <= 5
        assert server.ask("Hello?", max_tokens=None, max_completion_tokens=3).status_code == 200


def test_a_client_that_goes_ends_its_answer(server: Running) -> None:
    image = part(picture())
    with server.held() as free:
        body = {"messages": messages(image, text("Say much.")), "stream": True, "temperature": 2.0, "seed": 1}
        seen = threading.Event()
        rows: list[Any] = []
        chat = server.service.chat
        run_jobs = chat.run

        def watched(jobs: Any) -> None:
            rows.extend(jobs)
            seen.set()
            run_jobs(jobs)

        chat.run = watched
        try:
            with pytest.raises(openai.APITimeoutError):
                openai.OpenAI(
                    base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=1.0
                ).chat.completions.create(model="reader", **body)
            assert seen.wait(30)
        finally:
            del chat.run
        server.until(lambda: rows[0].is_cancelled)
        server.until(lambda: server.service.scheduler.taken == 0)
        free.set()
    assert server.ask(image, "What is it?").status_code == 200


def test_a_stream_that_is_left_ends_its_answer(reader: Assistant) -> None:
    """The model is asked for no more steps once nobody reads."""
    with run(reader, max_new_tokens=5000) as server:
        chat = server.service.chat
        chat.end = frozenset()  # an answer that does not end
        reader.model.generation_config.eos_token_id = None
        try:
            body = {"messages": messages(part(picture()), text("Say much.")), "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
                lines = stream.iter_lines()
                while '"content":' not in next(lines):
                    pass
            server.until(lambda: server.service.scheduler.taken == 0)
            server.until(lambda: server.service.scheduler.running == 0)
        finally:
            reader.model.generation_config.eos_token_id = reader.processor.tokenizer.eos_token_id


def test_png_and_jpeg_by_whatever_label(server: Running) -> None:
    for form, label in (("PNG", "jpeg"), ("JPEG", "png"), ("WEBP", "gif"), ("BMP", "svg+xml")):
        url = data_url(encoded(picture(), form), label)
        assert server.ask(part(url), "What is it?").status_code == 200
