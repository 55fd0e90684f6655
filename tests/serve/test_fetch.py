"""Images of the web come from allowed hosts alone, whose addresses are public, whole and in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from running import Running, encoded, part, picture, run

from stepwell.images.limits import ImageError
from stepwell.models.ask import Assistant
from stepwell.serve import fetch
from stepwell.serve.fetch import Fetcher, host_of, is_public

HOST = "images.example.org"


class _Host(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        getattr(self, f"_{self.path.strip('/').partition('?')[0]}")()

    def log_message(self, *_: Any) -> None:
        pass

    def _head(self, length: int | None = None, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _image(self) -> None:
        raw = encoded(picture())
        self._head(len(raw))
        self.wfile.write(raw)

    def _moved(self) -> None:
        self._head(0, 302, Location="http://127.0.0.1:1/image")

    def _endless(self) -> None:
        self._head()
        while True:
            self.wfile.write(b"x" * 65536)

    def _drip(self) -> None:
        self._head(10**6)
        while True:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _slow_head(self) -> None:
        while True:
            self.wfile.write(b"H")
            time.sleep(0.05)

    def _torn(self) -> None:
        self._head(10**6)
        self.wfile.write(b"x" * 100)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            pass  # a client that hangs up

    host = Quiet(("127.0.0.1", 0), _Host)
    thread = threading.Thread(target=host.serve_forever, daemon=True)
    thread.start()
    yield host.server_address[1]
    host.shutdown()


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """resolved(addresses): what names resolve to; the list of names that were looked up."""

    def to(*addresses: str) -> list[str]:
        names: list[str] = []
        real = socket.getaddrinfo

        def found(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
            if host != HOST:
                return real(host, port, *more, **options)
            names.append(host)
            kind = socket.AF_INET
            return [(kind, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(fetch.socket, "getaddrinfo", found)
        return names

    return to


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine counts as public, or no host could be asked."""
    monkeypatch.setattr(fetch, "is_public", lambda address: True)


def fetcher(port: int, **limits: Any) -> Fetcher:
    return Fetcher([f"{HOST}:{port}"], **{"max_bytes": 100_000, "seconds": 1.0, **limits})


def test_an_allowed_host_is_asked_once_by_its_address(port: int, resolved: Any, here: None) -> None:
    names = resolved("127.0.0.1")
    raw = fetcher(port).get(f"http://{HOST.upper()}.:{port}/image?a=b")
    assert raw == encoded(picture())
    assert names == [HOST]  # a name that resolves to something else the second time is not asked twice


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("moved", "answers 302"),
        ("endless", "larger than 100,000 bytes"),
        ("drip", "takes over 1 seconds"),
        ("slow_head", "takes over 1 seconds"),
        ("torn", "could not be fetched|not arrive whole"),
    ],
)
def test_hosts_that_answer_badly(port: int, resolved: Any, here: None, path: str, words: str) -> None:
    resolved("127.0.0.1")
    started = time.monotonic()
    with pytest.raises(ImageError, match=words) as refused:
        fetcher(port).get(f"http://{HOST}:{port}/{path}")
    assert time.monotonic() - started < 20
    assert HOST not in str(refused.value)


def test_names_that_nobody_knows_and_name_servers_that_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> list[Any]:
        time.sleep(20)
        return []

    def unknown(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror

    for lookup in (silent, unknown):
        monkeypatch.setattr(fetch.socket, "getaddrinfo", lookup)
        started = time.monotonic()
        with pytest.raises(ImageError, match="host of the image is not found"):
            fetcher(80, seconds=0.2).get(f"http://{HOST}/image")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:1::", "fe80::1%eth0", "192.0.2.1", "240.0.0.1"),
    ],
)
def test_addresses_that_are_not_public(resolved: Any, address: str) -> None:
    assert not is_public(address)
    resolved("93.184.216.34", address)  # one of several is enough
    with pytest.raises(ImageError, match="not public"):
        Fetcher([HOST], max_bytes=100).get(f"http://{HOST}/a.png")


def test_addresses_that_are_public() -> None:
    assert all(map(is_public, ("93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946")))


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}.evil.org/a",
        f"http://evil.org/{HOST}",
        f"http://{HOST}@evil.org/a",
        f"http://user:pass@{HOST}/a",
        f"http://{HOST}:8080/a",
        f"https://{HOST}:80/a",
        f"ftp://{HOST}/a",
        f"//{HOST}/a",
        f"http://{HOST}\\@evil.org/a",
        f"http://{HOST}/a b",
        f"http://{HOST}/\r\nHost: evil.org",
        f"http://{HOST}:port/a",
        "http:///a",
        "http://[::1/a",
        "",
    ],
)
def test_other_hosts_and_forms_are_refused_unasked(resolved: Any, url: str) -> None:
    names = resolved("127.0.0.1")
    with pytest.raises(ImageError):
        Fetcher([HOST], max_bytes=100).get(url)
    assert names == []


def test_hosts_are_written_as_names() -> None:
    assert host_of(" Images.Example.org. ") == HOST
    assert host_of(f"{HOST}:8443") == f"{HOST}:8443"
    for wrong in ("", "http://a.org", "a.org/b", "a.org:b", "*.a.org", "[::1]", "a:b:c", ":80", "u@a.org"):
        with pytest.raises(ValueError, match="a host is allowed by its name"):
            host_of(wrong)


def test_a_server_shows_an_image_of_an_allowed_host(
    reader: Assistant, port: int, resolved: Any, here: None
) -> None:
    resolved("127.0.0.1")
    with run(reader, media_hosts=frozenset([f"{HOST}:{port}"])) as server:
        found = server.ask(part(f"http://{HOST}:{port}/image"), "What is it?")
        sent = server.ask(part(picture()), "What is it?")
        assert found.json()["choices"] == sent.json()["choices"]
        for path in ("moved", "torn"):
            refused = server.ask(part(f"http://{HOST}:{port}/{path}"), "What is it?")
            assert refused.status_code == 400
            assert HOST not in refused.text


def test_a_server_that_allows_no_host_asks_none(server: Running, port: int, resolved: Any) -> None:
    names = resolved("127.0.0.1")
    found = server.ask(part(f"http://{HOST}:{port}/image"), "What is it?")
    assert found.status_code == 400
    assert "fetches no images" in found.json()["error"]["message"]
    assert names == []
