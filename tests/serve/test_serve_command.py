"""`stepwell serve` from a terminal: the official client, signals, and what cannot be served."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running import part, picture

KEY = "hunter2-secret"


@contextmanager
def served(*arguments: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "stepwell", "serve", *arguments, "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **variables})
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if '"event": "start"' in line:
                break
        else:
            raise AssertionError("it did not start")
        yield server, f"http://127.0.0.1:{json.loads(line)['port']}"
    finally:
        server.kill()
        server.wait(30)


@pytest.mark.slow
def test_a_signal_ends_a_server_in_order() -> None:
    with served("--max-new-tokens", "40", STEPWELL_API_KEY=KEY) as (server, url):
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport) as client:
            assert client.get(f"{url}/health").status_code == 200
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        asked: Any = [{"role": "user", "content": [part(picture()), {"type": "text", "text": "What is it?"}]}]
        how: Any = {"model": "reader_tiny", "temperature": 2.0, "seed": 1}
        whole = client.chat.completions.create(messages=asked, **how).choices[0].message.content
        pieces: list[str] = []
        begun = threading.Event()

        def stream() -> None:
            for chunk in client.chat.completions.create(messages=asked, stream=True, **how):
                pieces.append(chunk.choices[0].delta.content or "")
                begun.set()

        reading = threading.Thread(target=stream)
        reading.start()
        assert begun.wait(60)
        server.send_signal(signal.SIGTERM)
        reading.join(60)
        assert "".join(pieces) == whole
        assert server.wait(60) == 0
        assert server.stderr is not None
        rest = server.stderr.read()
        assert '"event": "stop"' in rest
        assert KEY not in rest
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


@pytest.mark.slow
def test_what_the_docs_show_is_answered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    (shown,) = re.findall(r"```python\n(.*?)```", (root / "docs/serve.md").read_text(), re.DOTALL)
    with served() as (_, url):
        exec(shown.replace("http://127.0.0.1:8000", url), {})
    assert capsys.readouterr().out.startswith("INVOICE NO : 17714/102/T0382 CompletionUsage")


@pytest.mark.slow
def test_a_detector_is_served_by_its_name() -> None:
    board = Path(__file__).parents[2] / "examples" / "board_1.jpg"
    with served("boards_tiny") as (server, url):
        headers = {"Content-Type": "image/jpeg"}
        found = httpx.post(f"{url}/v1/predict", content=board.read_bytes(), headers=headers, timeout=60)
        assert found.json()["objects"]
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0


def refused(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "stepwell", "serve", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_be_served_is_refused_in_a_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on port {port} of 127.0.0.1" in refused("--port", str(port))
    assert "hub names look like owner/name" in refused(str(tmp_path / "none"))
    assert "seconds" in refused("--max-request-seconds", "inf")
    assert "a host is allowed by its name" in refused("--allow-media", "http://example.org/")
    assert "API key" in refused("--api-key", "ä")
    assert "batch" in refused("--batch", "0")
