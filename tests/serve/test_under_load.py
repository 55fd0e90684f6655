"""Under load, and when things go wrong, a server says so, loses nothing that it took, and goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from running import Running, encoded, part, picture, run

from stepwell.images.limits import ImageError, ImageLimits
from stepwell.models.ask import Assistant
from stepwell.serve import app, completion
from stepwell.serve.decode import Decoder


def test_who_finds_no_place_is_told_when_to_come_again(reader: Assistant) -> None:
    with run(reader, batch=1, queue=2) as server, ThreadPoolExecutor(30) as pool, server.held() as free:
        asked = [pool.submit(server.ask, part(picture()), "What is it?") for _ in range(30)]
        server.until(lambda: sum(answer.done() for answer in asked) == 27)
        refused = [answer.result() for answer in asked if answer.done()]
        assert {answer.status_code for answer in refused} == {429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["code"] == "server_full"
        assert server.get("/health").status_code == 200  # while the model is held
        free.set()
        answers = [answer.result().status_code for answer in asked]
        assert answers.count(200) == 3
        server.until(lambda: server.service.scheduler.taken == 0)  # a place is kept until all is sent
        assert server.ask(part(picture()), "What is it?").status_code == 200


def test_health_answers_while_images_decode(reader: Assistant) -> None:
    """WEBPs of 25 million pixels take their decoders a second or so, in a call that holds Python's lock."""
    slow = encoded(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True, method=0)
    with run(reader, decoders=2) as server, ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(server.ask, part(slow), "What is it?") for _ in range(2)]
        server.until(lambda: server.service.scheduler.taken == 2)
        answered = 0
        while not any(answer.done() for answer in asked):
            assert server.get("/health").status_code == 200
            answered += 1
        assert answered > 10
        assert {answer.result().status_code for answer in asked} == {200}


def test_a_decoder_that_hangs_is_ended(reader: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    with run(reader, limits=ImageLimits(max_seconds=0.01), decoders=1) as server:
        server.service.decoder.seconds = 0.05
        noise = torch.randint(0, 256, (3000, 3000, 3), dtype=torch.uint8).numpy()
        slow = encoded(Image.fromarray(noise), "WEBP", lossless=True, method=0, quality=0)
        found = server.ask(part(slow), "What is it?")
        assert found.status_code == 400
        assert "seconds" in found.json()["error"]["message"]
        server.service.decoder.seconds = 30.0
        assert server.ask(part(picture()), "What is it?").status_code == 200


def test_an_idle_decoder_that_is_gone_is_replaced(reader: Assistant) -> None:
    with run(reader, decoders=2) as server:
        assert server.ask(part(picture()), "What is it?").status_code == 200
        workers = server.service.decoder._pool._pool_manager.worker_manager.workers
        os.kill(next(iter(workers)), signal.SIGKILL)
        for _ in range(3):
            time.sleep(0.5)
            assert server.ask(part(picture()), "What is it?").status_code == 200


def test_images_for_nobody_are_left(reader: Assistant) -> None:
    """Of a client that has gone, those that are still to come are not opened."""
    with run(reader, decoders=1) as server:
        opened: list[Any] = []
        free, decoder = threading.Event(), server.service.decoder
        open_one = decoder.open

        def slowly(*arguments: Any) -> Any:
            opened.append(arguments)
            assert free.wait(30)
            return open_one(*arguments)

        decoder.open = slowly
        body = {"messages": [{"role": "user", "content": [part(picture())] * 16}]}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1.0)
        server.until(lambda: server.service.scheduler.taken == 0)
        assert len(opened) == 1
        free.set()
        assert server.ask(part(picture()), "What?").status_code == 200
        assert len(opened) == 2


def test_the_end_of_a_server_waits_for_no_decoder(reader: Assistant) -> None:
    noise = torch.randint(0, 256, (4000, 4000, 3), dtype=torch.uint8).numpy()
    slow = encoded(Image.fromarray(noise), "PNG", compress_level=0)
    refused: list[str] = []
    with run(reader, decoders=1) as server:
        decoder = server.service.decoder

        def open_for_ever() -> None:
            try:
                while True:
                    decoder.open(slow, ImageLimits(max_bytes=10**8))
            except ImageError as error:
                refused.append(str(error))

        left = threading.Thread(target=open_for_ever, daemon=True)
        left.start()
    left.join(10)
    assert not left.is_alive()
    assert len(refused) == 1


@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_a_pool_raises_that_is_stopped_is_a_refusal(is_stopped: bool) -> None:
    """pebble closes its pipe under a task that is being sent."""
    decoder = Decoder(processes=1, seconds=5.0)

    def closed(*_: Any) -> Any:
        decoder._is_stopped = is_stopped
        raise TypeError("'NoneType' object cannot be interpreted as an integer")

    decoder._scheduled = decoder._waited = closed  # type: ignore[method-assign]
    with pytest.raises(ImageError if is_stopped else TypeError, match="stopping" if is_stopped else "None"):
        decoder.open(b"", ImageLimits())


def test_a_body_of_very_many_parts_is_refused_unread(server: Running) -> None:
    for raw in (b'{"metadata": [' + b"{}," * 300_000 + b"{}]}", b'{"user": "' + b"\\n" * 3_000_000 + b'"}'):
        found = server.post(content=raw, headers={"Content-Type": "application/json"})
        assert found.status_code == 413
        assert "too many parts" in found.text


def test_who_does_not_read_loses_the_place(reader: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_SENDING", 0.5)
    with run(reader, seconds=2.0) as server:

        async def endless(*_: Any) -> Any:
            while True:
                yield {"object": "x" * 100_000}

        monkeypatch.setattr(completion.Completion, "_chunks", endless)
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"messages": [{"role": "user", "content": "Hello?"}], "stream": True}).encode()
        with socket.create_connection((host, int(port))) as stalled:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n"
            stalled.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            server.until(lambda: server.service.scheduler.taken == 1)
            server.until(lambda: server.service.scheduler.taken == 0)


def test_jobs_that_wait_for_nobody_are_gone(reader: Assistant) -> None:
    with run(reader, batch=1) as server, server.held() as free, ThreadPoolExecutor(1) as pool:
        runs = pool.submit(server.ask, part(picture()), "What?")
        server.until(server.holds.is_set)
        body = {"messages": [{"role": "user", "content": "Who?"}]}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.5)
        server.until(lambda: server.service.scheduler.waiting == 0)
        free.set()
        assert runs.result().status_code == 200


@pytest.mark.parametrize("is_streamed", [False, True])
def test_memory_that_is_short_on_the_way_repeats_nothing(server: Running, is_streamed: bool) -> None:
    """A batch that fails in the middle is made again one by one: each tells what it had not told yet."""
    chat, how = server.service.chat, {"temperature": 2.0, "seed": 1, "max_tokens": 20}
    image = part(picture())
    alone = server.ask(image, "Who?", **how).json()["choices"][0]["message"]["content"]
    assert len(alone) > 8
    generate = chat.engine.generate
    sizes: list[int] = []

    def short_of_memory(prompts: Any, **options: Any) -> Any:
        sizes.append(len(prompts.input_ids))
        if sizes[-1] > 1:

            class Fails:
                def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                    if input_ids.shape[1] == 3:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return torch.zeros(len(input_ids), dtype=torch.bool)

            options["stopping_criteria"].append(Fails())
        return generate(prompts, **options)

    with server.held() as free, ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.ask, part(picture(200, 20)), "What is it?")  # which holds the thread
        server.until(server.holds.is_set)
        asked = [pool.submit(server.ask, image, "Who?", stream=is_streamed, **how) for _ in range(2)]
        server.until(lambda: server.service.scheduler.waiting == 2)
        chat.engine.generate = short_of_memory
        free.set()
        found = [answer.result() for answer in asked]
        assert first.result().status_code == 200
    assert sizes == [2, 1, 1]
    for answer in found:
        if is_streamed:
            events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
            text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            text = answer.json()["choices"][0]["message"]["content"]
        assert text == alone


def test_what_a_failed_batch_held_is_given_back(server: Running) -> None:
    chat = server.service.chat
    generate = chat.engine.generate
    held: list[Any] = []
    alive: list[bool] = []

    class Large:
        pass

    def short_of_memory(prompts: Any, **options: Any) -> Any:
        if len(prompts.input_ids) > 1:
            large = Large()
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(held[0]() is not None)
        return generate(prompts, **options)

    with server.held() as free, ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.ask, part(picture(200, 20)), "What is it?")
        server.until(server.holds.is_set)
        asked = [pool.submit(server.ask, "Who?") for _ in range(2)]
        server.until(lambda: server.service.scheduler.waiting == 2)
        chat.engine.generate = short_of_memory
        free.set()
        assert {answer.result().status_code for answer in [first, *asked]} == {200}
    assert alive == [False, False]


def test_a_log_that_cannot_be_written_stops_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        flush = write

    chat = server.service.chat
    monkeypatch.setattr(sys, "stderr", Full())

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError

    chat.engine.generate = broken
    try:
        assert server.ask("What?").status_code == 500
    finally:
        del chat.engine.generate
    assert server.ask("What?").status_code == 200
    assert server.get("/ready").status_code == 200


def test_a_request_of_too_much_memory_fails_alone(server: Running) -> None:
    chat = server.service.chat
    generate = chat.engine.generate

    def short_of_memory(prompts: Any, **options: Any) -> Any:
        if prompts.input_ids.shape[0] > 1 or prompts.input_ids.shape[1] > 150:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
        return generate(prompts, **options)

    chat.engine.generate = short_of_memory
    try:
        small, large = part(picture(200, 60)), part(picture(200, 60))
        with ThreadPoolExecutor(3) as pool:
            asked = [
                pool.submit(server.ask, small, "What?"),
                pool.submit(server.ask, large, "What? " * 100),
                pool.submit(server.ask, small, "Who?"),
            ]
            found = [answer.result() for answer in asked]
    finally:
        del chat.engine.generate
    assert [answer.status_code for answer in found] == [200, 500, 200]
    assert found[1].json()["error"]["code"] == "out_of_memory"
    assert server.ask(small, "What?").status_code == 200


def test_a_fault_is_told_without_its_words(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    chat = server.service.chat

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("hunter2-secret")

    chat.engine.generate = broken
    try:
        found = server.ask(part(picture()), "What?")
        streamed = server.ask(part(picture()), "What?", stream=True)
    finally:
        del chat.engine.generate
    assert found.status_code == streamed.status_code == 500
    logged = capsys.readouterr().err
    assert "hunter2" not in found.text + streamed.text + logged
    assert '"event": "fault", "error": "KeyError"' in logged
    assert server.ask(part(picture()), "What?").status_code == 200


def test_the_time_of_a_request_ends(reader: Assistant) -> None:
    with run(reader, seconds=0.5) as server, server.held():
        started = time.monotonic()
        found = server.ask(part(picture()), "What?")
        assert found.status_code == 504
        assert found.json()["error"]["code"] == "timeout"
        assert time.monotonic() - started < 20
        assert server.service.scheduler.taken == 0


def test_a_slow_body_ends(reader: Assistant) -> None:
    def dripping() -> Any:
        while True:
            yield b" "
            time.sleep(0.05)

    with run(reader, seconds=0.5) as server:
        headers = {"Content-Type": "application/json"}
        statuses: list[int] = []

        def post() -> None:
            try:
                statuses.append(server.post(content=dripping(), headers=headers).status_code)
            except httpx.TransportError:
                statuses.append(504)

        thread = threading.Thread(target=post, daemon=True)
        thread.start()
        server.until(lambda: server.service.scheduler.taken == 1)
        server.until(lambda: server.service.scheduler.taken == 0)
        thread.join(30)
        assert statuses == [504]


def test_what_runs_is_finished_and_the_rest_refused(reader: Assistant) -> None:
    with run(reader, batch=1) as server, ThreadPoolExecutor(2) as pool, server.held() as free:
        runs = pool.submit(server.ask, part(picture()), "What?")
        server.until(server.holds.is_set)
        waits = pool.submit(server.ask, part(picture()), "Who?")
        server.until(lambda: server.service.scheduler.waiting == 1)
        server.service.drain()
        refused = waits.result()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "server_stopping"
        assert server.ask(part(picture()), "Where?").status_code == 503
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        free.set()
        assert runs.result().status_code == 200


def test_what_is_counted(reader: Assistant) -> None:
    with run(reader) as server:
        usage = server.ask(part(picture()), "What?").json()["usage"]
        server.ask(part("data:"), "What?")
        lines = server.get("/metrics").text.splitlines()
        route = 'route="/v1/chat/completions"'
        assert f'stepwell_requests_total{{{route},status="200"}} 1.0' in lines
        assert f'stepwell_requests_total{{{route},status="400"}} 1.0' in lines
        assert f"stepwell_request_seconds_count{{{route}}} 2.0" in lines
        images = float(usage["prompt_tokens_details"]["image_tokens"])
        assert f'stepwell_tokens_total{{kind="images"}} {images}' in lines
        assert "stepwell_waiting 0.0" in lines
