"""`stepwell serve` under load, on this machine's own address, beside a plain loop of `ask` in a process."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
from measure import Row, Worker

RECEIPT = Path(__file__).parents[1] / "examples" / "receipt.jpg"
QUESTION, NEW_TOKENS = "What is written there?", 16
REGIONS = [(0.1, 0.1 + 0.05 * i, 0.6, 0.13 + 0.05 * i) for i in range(16)]
COUNT, CLIENTS, LOOPED = 2000, 16, 100
BATCH, QUEUE = 8, 8
OVERLOAD = 10 * (BATCH + QUEUE)
CROWDED = 30.0  # seconds

LOAD_HEADER = (
    "| requests | a second | by a loop of `ask` | ratio | p50 s | p99 s | GiB before | GiB after |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)
OVERLOAD_HEADER = (
    "| clients at once | answered | refused (429) | lost | /health, p50 ms | p99 ms | most ms |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def rows() -> list[Row]:
    return [(f"{COUNT} close looks of a receipt by {CLIENTS} clients", _load)]


def overload_rows() -> list[Row]:
    return [(f"{OVERLOAD} clients for {BATCH + QUEUE} places", _overload)]


def loop() -> Callable[[], None]:
    """The same questions, one after the other."""
    import stepwell
    from stepwell.views.region import region_of_fractions

    assistant = stepwell.load("reader_tiny", device="cpu")
    raw = RECEIPT.read_bytes()

    def run() -> None:
        for i in range(LOOPED):
            image = stepwell.open_image(raw)
            region = region_of_fractions(REGIONS[i % len(REGIONS)], (image.height, image.width))
            assistant.ask(image, QUESTION, region=region, max_new_tokens=NEW_TOKENS)

    return run


class _Server:
    def __enter__(self) -> _Server:
        options = ["--port", "0", "--device", "cpu", "--batch", str(BATCH), "--queue", str(QUEUE)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stepwell", "serve", *options], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if '"event": "start"' in line)
        self.url = f"http://127.0.0.1:{json.loads(line)['port']}"
        self._reader = subprocess.Popen(  # the log goes on, to nobody
            ["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._reader.wait(10)

    def gib(self) -> float:
        """Of the server and its decoders."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        lines = [
            line
            for process in [str(self.process.pid), *children]
            for line in Path(f"/proc/{process}/status").read_text().splitlines()
        ]
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 2**20


def _body(i: int) -> dict[str, Any]:
    url = f"data:image/jpeg;base64,{base64.b64encode(RECEIPT.read_bytes()).decode()}"
    image = {"type": "image_url", "image_url": {"url": url}, "region": REGIONS[i % len(REGIONS)]}
    content = [image, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS}


async def _asked(url: str, count: int, clients: int) -> list[tuple[int, float]]:
    """Status and seconds of each request."""
    bodies = [json.dumps(_body(i)).encode() for i in range(len(REGIONS))]
    left = iter(range(count))
    found: list[tuple[int, float]] = []
    limits = httpx.Limits(max_connections=clients)

    async def client(asking: httpx.AsyncClient) -> None:
        for i in left:
            started = time.perf_counter()
            answer = await asking.post(
                f"{url}/v1/chat/completions",
                content=bodies[i % len(bodies)],
                headers={"Content-Type": "application/json"},
            )
            found.append((answer.status_code, time.perf_counter() - started))

    async with httpx.AsyncClient(timeout=300, limits=limits) as asking:
        await asyncio.gather(*(client(asking) for _ in range(clients)))
    return found


def _load() -> Iterator[str]:
    with Worker(("serving", "loop")) as plain:
        plain.ready()
        plain.go()
        looped = [LOOPED / plain.go()[0] for _ in range(3)]
    with _Server() as server:
        asyncio.run(_asked(server.url, 4 * CLIENTS, CLIENTS))
        before, started = server.gib(), time.perf_counter()
        found = asyncio.run(_asked(server.url, COUNT, CLIENTS))
        rate, after = COUNT / (time.perf_counter() - started), server.gib()
    if lost := [status for status, _ in found if status != 200]:
        raise RuntimeError(f"{len(lost)} of {COUNT} requests were not answered: {lost[0]}")
    seconds = quantiles([seconds for _, seconds in found], n=100)
    cells = [
        str(COUNT),
        f"{rate:.2f}",
        f"{median(looped):.2f}",
        f"{rate / median(looped):.2f}x",
        *(f"{seconds[i]:.2f}" for i in (49, 98)),
        *(f"{gib:.2f}" for gib in (before, after)),
    ]
    yield f"| {' | '.join(cells)} |"


def _overload() -> Iterator[str]:
    with _Server() as server, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        asyncio.run(_asked(server.url, 16, 8))
        asking = apart.submit(_health, server.url)  # whose own clients do not keep it waiting
        statuses = asyncio.run(_crowded(server.url))
        waits = asking.result()
    answered, refused = statuses.count(200), statuses.count(429)
    milliseconds = quantiles([1000 * wait for wait in waits], n=100)
    cells = [
        *map(str, (OVERLOAD, answered, refused, len(statuses) - answered - refused)),
        *(f"{number:.0f}" for number in (milliseconds[49], milliseconds[98], 1000 * max(waits))),
    ]
    yield f"| {' | '.join(cells)} |"


def _health(url: str) -> list[float]:
    """Seconds of each of its answers, ten times a second."""
    waits: list[float] = []
    end = time.perf_counter() + CROWDED
    with httpx.Client(timeout=60) as asking:
        while time.perf_counter() < end:
            started = time.perf_counter()
            asking.get(f"{url}/health").raise_for_status()
            waits.append(time.perf_counter() - started)
            time.sleep(0.1)
    return waits


async def _crowded(url: str) -> list[int]:
    """Statuses of clients that ask again half a second after they are refused."""
    found: list[int] = []
    body, end = json.dumps(_body(0)).encode(), time.perf_counter() + CROWDED

    async def client(asking: httpx.AsyncClient) -> None:
        while time.perf_counter() < end:
            answer = await asking.post(
                f"{url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
            )
            found.append(answer.status_code)
            if answer.status_code == 429:
                await asyncio.sleep(0.5)

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=OVERLOAD)) as asking:
        await asyncio.gather(*(client(asking) for _ in range(OVERLOAD)))
    return found
