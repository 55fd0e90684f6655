"""The shipped reader at small views, and a server of it for the tests of a file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running import SIZES, Running, run

import stepwell
from stepwell.models.ask import Assistant


@pytest.fixture(scope="session")
def reader() -> Assistant:
    assistant: Assistant = stepwell.load("reader_tiny", device="cpu", vision={"sizes": SIZES})
    return assistant


@pytest.fixture(scope="module")
def server(reader: Assistant) -> Iterator[Running]:
    with run(reader) as running:
        yield running
