"""What strangers send: each is refused in one line that repeats nothing of it, and the server goes on."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from running import Running, data_url, encoded, part, picture, run

from stepwell.models.ask import Assistant

SECRET = "hunter2-secret"


def png_of(width: int, height: int) -> bytes:
    """Small, and of a huge size by its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compressobj(9)
    body = rows.compress(b"\0" * 1000) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(form: str, **options: Any) -> bytes:
    return encoded(Image.new("L" if form == "GIF" else "RGB", (9000, 9000)), form, **options)


def truncated() -> bytes:
    return encoded(picture(300, 300), "JPEG")[:-600]


BAD_IMAGES: dict[str, bytes | str] = {
    "png bomb": png_of(30000, 30000),
    "wide png": png_of(60000, 10),
    "empty": b"",
    "html": b"<!doctype html><title>" + SECRET.encode() + b"</title>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "fits": b"SIMPLE  =                    T" + b" " * 2850,
    "truncated": truncated(),
    "strip": encoded(picture(1, 9000)),
    "bad base64": "data:image/png;base64,@@@" + SECRET,
    "no base64": "data:image/png," + SECRET,
    "local path": "/etc/passwd",
    "relative path": "README.md",
    "file url": "file:///etc/passwd",
    "http": "http://example.org/" + SECRET,
    "loopback": "http://127.0.0.1:8000/health",
    "loopback 6": "http://[::1]/",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "decimal": "http://2130706433/",
    "mapped": "http://[::ffff:127.0.0.1]/",
    "ftp": "ftp://example.org/a.png",
    "nothing": "",
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_are_refused_in_a_line(server: Running, name: str) -> None:
    bad = BAD_IMAGES[name]
    found = server.ask(part(data_url(bad) if isinstance(bad, bytes) else bad), "What is it?")
    assert_refused(found, 400, "messages")
    assert server.service.scheduler.taken == 0


@pytest.mark.parametrize(
    ("form", "options"),
    [("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True, "method": 0}), ("GIF", {})],
)
def test_bombs_of_other_kinds_are_refused(server: Running, form: str, options: dict[str, Any]) -> None:
    assert_refused(server.ask(part(bomb(form, **options)), "What is it?"), 400, "messages")


GOOD_IMAGES = {
    "1x1": encoded(picture(1, 1)),
    "cmyk": encoded(picture().convert("CMYK"), "JPEG"),
    "palette": encoded(picture().convert("P")),
    "grey of 16 bits": encoded(Image.fromarray(np.full((9, 9), 40000, "uint16"))),
    "transparent": encoded(Image.new("RGBA", (20, 20), (1, 2, 3, 0))),
    "animated": encoded(picture(), "GIF", save_all=True, append_images=[picture(colour="red")]),
}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_odd_images_are_answered(server: Running, name: str) -> None:
    assert server.ask(part(GOOD_IMAGES[name]), "What is it?").status_code == 200


def test_images_are_upright(server: Running, reader: Assistant) -> None:
    image = picture(200, 60)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encoded(image, "JPEG", exif=exif)
        found = server.ask(part(turned), "What is it?").json()["usage"]["prompt_tokens_details"][
            "image_tokens"
        ]
        assert found == reader.layout(io.BytesIO(turned)).num_visual


BAD_BODIES: dict[str, tuple[Any, int, str | None]] = {
    "no messages": ({"messages": []}, 400, "messages"),
    "no body": ({}, 400, "messages"),
    "a list": ([1], 400, None),
    "unknown field": ({"messages": [{"role": "user", "content": "a"}], SECRET: 1}, 400, None),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": SECRET}]}]},
        400,
        "messages.0.content.0",
    ),
    "tool": ({"messages": [{"role": "tool", "content": SECRET}]}, 400, "messages.0.role"),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{"a": 1}]}, 400, "tools"),
    "many answers": ({"messages": [{"role": "user", "content": "a"}], "n": 10**9}, 400, "n"),
    "no tokens": ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}, 400, "max_tokens"),
    "hot": ({"messages": [{"role": "user", "content": "a"}], "temperature": 3}, 400, "temperature"),
    "empty stop": ({"messages": [{"role": "user", "content": "a"}], "stop": ["", "a"]}, 400, None),
    "other model": ({"messages": [{"role": "user", "content": "a"}], "model": SECRET}, 404, "model"),
    "much text": ({"messages": [{"role": "user", "content": "a" * 100_001}]}, 400, "messages"),
    "too many tokens": ({"messages": [{"role": "user", "content": "a b " * 20_000}]}, 400, "messages"),
    "the assistant's": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_in_a_line(server: Running, name: str) -> None:
    body, status, param = BAD_BODIES[name]
    assert_refused(server.post(json=body), status, param)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"messages": NaN}'])
def test_what_is_no_json_is_refused(server: Running, raw: bytes) -> None:
    assert server.post(content=raw, headers={"Content-Type": "application/json"}).status_code == 400


@pytest.mark.parametrize(
    "region", [[0, 0, 2, 2], [0.5, 0, 0.5, 1], [0, 0, 1], "all", [0, 0, float("1e400"), 1]]
)
def test_a_region_that_is_none_is_refused(server: Running, region: Any) -> None:
    raw = json.dumps({"messages": [{"role": "user", "content": [part(picture(), region=region)]}]})
    found = server.post(content=raw, headers={"Content-Type": "application/json"})
    assert found.status_code == 400
    assert "region" in found.json()["error"]["message"]


def test_a_thousand_images_are_too_many(server: Running) -> None:
    image = part(picture(2, 2))
    assert_refused(server.ask(*[image] * 1000, "How many?"), 400, "messages")
    assert server.ask(*[image] * 3, "How many?").status_code == 200


def test_bodies_are_as_long_as_is_allowed(server: Running) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), "uint8")
    three = encoded(Image.fromarray(noise))  # 3 MB
    assert len(three) > 3_000_000
    assert server.ask(part(three), "What is it?").status_code == 200
    assert server.ask(part(picture()), "a", user="x" * 50_000_000).status_code == 413

    def endless() -> Iterator[bytes]:
        yield b'{"user": "'
        for _ in range(300):
            yield b"x" * 1_000_000

    sent = []

    def counted() -> Iterator[bytes]:
        for piece in endless():
            sent.append(len(piece))
            yield piece

    try:
        found = server.post(content=counted(), headers={"Content-Type": "application/json"})
        assert found.status_code == 413
    except httpx.TransportError:  # it hung up in the middle
        pass
    assert sum(sent) < 150_000_000
    assert server.service.scheduler.taken == 0


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=a", "", "application/x-www-form-urlencoded"]
)
def test_types_that_browsers_send_unasked_are_refused(server: Running, kind: str) -> None:
    found = server.post(content=b'{"messages": []}', headers={"Content-Type": kind})
    assert_refused(found, 415, None)


def test_no_page_of_another_site_may_ask(server: Running) -> None:
    found = httpx.options(
        f"{server.url}/v1/chat/completions",
        headers={"Origin": "https://example.org", "Access-Control-Request-Method": "POST"},
    )
    assert found.status_code == 405
    answered = server.post(json={"messages": []}, headers={"Origin": "https://example.org"})
    for response in (found, answered):
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_routes_and_methods(server: Running) -> None:
    assert server.get("/v1/chat/completions").status_code == 405
    assert server.get(f"/{SECRET}").status_code == 404
    assert SECRET not in server.get(f"/{SECRET}").text
    assert server.post("/v1/predict", json={"image": "data:"}).status_code == 404
    assert server.get("/health").json() == {"status": "ok"}
    assert server.get("/ready").status_code == 200


def test_a_key_is_asked_for(reader: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    with run(reader, api_key=SECRET) as server:
        for shown in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": SECRET},
            {"Authorization": "Bearer \xe9"},
        ):
            headers = {name: value.encode("latin-1") for name, value in shown.items()}
            found = server.post(json={"messages": []}, headers=headers)
            assert_refused(found, 401, None)
            assert found.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": f"Bearer {SECRET}"}
        assert server.post(json={"messages": []}, headers=right).status_code == 400
        assert server.get("/health").status_code == 200
    assert SECRET not in "".join(capsys.readouterr())


def test_the_log_tells_no_text_and_no_image(
    server: Running, reader: Assistant, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = encoded(picture())
    server.ask(part(raw), f"What is {SECRET}?")
    server.ask(part("data:image/png;base64," + SECRET), SECRET)
    server.post(f"/{SECRET}?{SECRET}", content=SECRET)
    logged = ""

    def are_logged() -> bool:
        nonlocal logged
        logged += capsys.readouterr().err
        return logged.count("\n") == 3

    server.until(are_logged)
    lines = [json.loads(line) for line in logged.splitlines()]
    assert [line["status"] for line in lines] == [200, 400, 404]
    assert {line["route"] for line in lines} == {"/v1/chat/completions", "other"}
    assert lines[0]["tokens"]["images"] == reader.layout(picture()).num_visual
    assert SECRET not in logged
    assert base64.b64encode(raw).decode()[:20] not in logged


def assert_refused(found: Any, status: int, param: str | None) -> None:
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    message = error["message"]
    assert message
    assert "\n" not in message
    for words in (SECRET, "/etc", "README", "example.org", "169.254", "site-packages", "ImageLimits"):
        assert words not in found.text
