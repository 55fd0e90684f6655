"""The page in a real browser, the distribution's Chromium, without a window: what a person does, by keys."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from running import encoded

EXAMPLES = Path(__file__).parents[2] / "examples"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
PICTURES = os.environ.get("STEPWELL_PICTURES")
"""A folder that screenshots are written to, for the docs."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None, reason="no Chromium with its driver on this machine"
    ),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "stepwell", "demo", "--port", str(port), "--device", "cpu"]
    page = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end
            assert page.poll() is None, page.stderr and page.stderr.read()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        page.terminate()
        page.wait(30)


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1400"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, address: str) -> Any:
    browser.get(address)
    until(lambda: find(browser, "#message textarea"))
    return browser


def find(browser: Any, selector: str) -> Any:
    found = browser.find_elements("css selector", selector)
    return found[0] if found else None


def until(found: Any, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "it has not come about"
        time.sleep(0.1)
    return value


def upload(browser: Any, path: Path) -> None:
    find(browser, "#message input[type=file]").send_keys(str(path))
    until(lambda: find(browser, "#message [class*=thumbnail]"))


def answer(browser: Any, side: str = "left") -> str:
    return str(find(browser, f"#{side}-answer textarea").get_attribute("value"))


def costs(browser: Any, side: str = "left") -> str:
    return str(find(browser, f"#{side}-costs").text)


def keep(browser: Any, name: str) -> None:
    if PICTURES:
        browser.save_screenshot(str(Path(PICTURES) / name))


def test_a_picture_is_asked_by_keys_alone(page: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    upload(page, EXAMPLES / "receipt.jpg")
    for _ in range(30):
        if page.switch_to.active_element.tag_name == "textarea":
            break
        ActionChains(page).send_keys(Keys.TAB).perform()
    else:
        raise AssertionError("no number of tabs leads to the question")
    ActionChains(page).send_keys("What is the total?", Keys.ENTER).perform()
    until(lambda: "GFLOPs" in costs(page))
    assert re.fullmatch(r"\S.*", answer(page))
    assert re.match(
        r"\d+ visual and \d+ text tokens, \d+ new; [\d.]+ GFLOPs of vision, [\d.]+ s", costs(page)
    )
    assert until(lambda: find(page, "#left-drawn img"))
    keep(page, "page_asked.png")


def test_two_stand_side_by_side(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    upload(page, EXAMPLES / "receipt.jpg")
    find(page, "#beside input").click()
    find(page, "#message textarea").send_keys("What is the total?", Keys.ENTER)
    until(lambda: "GFLOPs" in costs(page, "right"))
    visual = [int(costs(page, side).split()[0]) for side in ("left", "right")]
    assert visual[0] > 3 * visual[1] > 0
    assert answer(page)
    assert find(page, "#right-drawn img")
    keep(page, "page_beside.png")


def test_a_detector_draws_what_it_finds(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    model = find(page, "#left-model input")
    model.click()
    model.send_keys(Keys.CONTROL, "a")
    model.send_keys("boards_tiny", Keys.ENTER)
    upload(page, EXAMPLES / "board_1.jpg")
    find(page, "#message textarea").send_keys(Keys.ENTER)
    until(lambda: "boxes in" in answer(page))
    assert until(lambda: find(page, "#left-drawn img"))
    keep(page, "page_predicted.png")


def test_a_bomb_is_refused_in_words(page: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    raw = bytearray(encoded(Image.new("1", (64, 64))))
    raw[16:24] = struct.pack(">II", 30000, 30000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(raw)
    upload(page, bomb)
    find(page, "#message textarea").send_keys("What is it?", Keys.ENTER)
    until(lambda: "Refused: an image of 30000 x 30000 pixels is too large" in answer(page))
    keep(page, "page_refused.png")
    page.refresh()
    until(lambda: find(page, "#message textarea")).send_keys("What is it?", Keys.ENTER)
    until(lambda: "Refused: a question and a picture are wanted" in answer(page))
