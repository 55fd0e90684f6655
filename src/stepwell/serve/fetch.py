"""Images of the web, from hosts that whoever runs the server has allowed; from no other.

A name on the list may still lead into the server's own network, or answer for ever: every address that it
resolves to has to be public, the one that was looked at is the one that is connected to, redirects are not
followed, and bytes and time are counted.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from urllib.parse import SplitResult, urlsplit

from stepwell.images.limits import ImageError

__all__ = ["Fetcher", "host_of", "is_public"]

_PORTS = {"http": 80, "https": 443}
_PART = 2**16
_EMBEDDED = [
    ipaddress.ip_network(text) for text in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")
]
"""Of IPv6, that lead to addresses of IPv4."""


class Fetcher:
    """hosts: "host", for the scheme's own port, or "host:port". max_bytes, seconds: of an image, and seconds
    once more to find its host's address.
    """

    def __init__(self, hosts: Collection[str], *, max_bytes: float, seconds: float = 10.0) -> None:
        self.hosts = frozenset(host_of(host) for host in hosts)
        self.max_bytes, self.seconds = max_bytes, seconds

    def get(self, url: str) -> bytes:
        """The body of a http or https URL; waits. Raises ImageError, which does not repeat it."""
        if not self.hosts:
            raise ImageError("this server fetches no images: send them as data: URLs")
        parts, port = _parts(url)
        host = parts.hostname or ""
        name = host.rstrip(".").lower()
        is_usual = port == _PORTS[parts.scheme]
        if f"{name}:{port}" not in self.hosts and not (is_usual and name in self.hosts):
            raise ImageError("this server fetches no images from that host: send them as data: URLs")
        addresses = _public_addresses(name, port, self.seconds)
        try:
            return self._body(parts, name, port, addresses)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(f"the image could not be fetched ({type(error).__name__})") from None

    def _body(self, parts: SplitResult, host: str, port: int, addresses: Sequence[str]) -> bytes:
        begun = time.monotonic()
        connection = HTTPConnection(host, port, timeout=self.seconds)
        plain = _connected(addresses, port, self.seconds)
        # The limit of a socket is for a single read: a byte a second would never meet it.
        is_late = threading.Event()
        sockets = [plain]
        left = max(0.0, begun + self.seconds - time.monotonic())
        end = threading.Timer(left, _hang_up, [sockets, is_late])
        end.daemon = True
        connection.sock = plain
        end.start()
        try:
            if parts.scheme == "https":
                context = ssl.create_default_context()
                secure = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
                connection.sock = secure
                sockets.append(secure)
                secure.do_handshake()
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            is_usual = port == _PORTS[parts.scheme]
            headers = {
                "Host": host if is_usual else f"{host}:{port}",
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "stepwell",
            }
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
            if response.status != 200:
                raise ImageError(f"the image could not be fetched: its host answers {response.status}")
            parts_read: list[bytes] = []
            total = 0
            while part := response.read1(_PART):
                total += len(part)
                if total > self.max_bytes:
                    raise ImageError(f"the file is larger than {self.max_bytes:,} bytes")
                parts_read.append(part)
            if is_late.is_set() or response.length:
                raise ImageError("the image did not arrive whole")
            return b"".join(parts_read)
        except Exception:
            if is_late.is_set():
                raise ImageError(f"fetching the image takes over {self.seconds:g} seconds") from None
            raise
        finally:
            end.cancel()
            connection.close()


def host_of(text: str) -> str:
    """An entry of a list of allowed hosts. Raises ValueError for an address of another form."""
    name, colon, port = text.strip().lower().partition(":")
    name = name.rstrip(".")
    if not name or set(name) & set("/@?#*[] \\") or (colon and not port.isdecimal()):
        raise ValueError("a host is allowed by its name, such as img.example.org or img.example.org:8443")
    return name + colon + port


def is_public(address: str) -> bool:
    """Whether an address is of the Internet at large, not of this machine or a network of its own."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    if mapped is not None:
        return is_public(str(mapped))
    if found.version == 6 and any(found in network for network in _EMBEDDED):
        return False
    return found.is_global and not found.is_multicast and not found.is_reserved


def _parts(url: str) -> tuple[SplitResult, int]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ImageError("that is no URL of an image") from None
    is_plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None or not is_plain:
        raise ImageError("an image is a data: URL, or a http or https URL of a host that this server allows")
    return parts, port or _PORTS[parts.scheme]


def _public_addresses(host: str, port: int, seconds: float) -> list[str]:
    found: list[str] = []

    def find() -> None:  # knows no limit of time, so that it may stay behind
        with suppress(OSError, UnicodeError):
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend([str(entry[4][0]) for entry in entries])

    finding = threading.Thread(target=find, daemon=True)
    finding.start()
    finding.join(seconds)
    addresses = list(found)
    if not addresses:
        raise ImageError("the host of the image is not found")
    if not all(map(is_public, addresses)):
        raise ImageError("the host of the image leads into a network that is not public")
    return addresses


def _connected(addresses: Sequence[str], port: int, seconds: float) -> socket.socket:
    """To the first that answers, in so many seconds for all. Raises OSError."""
    failure = OSError()
    for address in addresses:
        try:
            connected = socket.create_connection((address, port), timeout=seconds / len(addresses))
        except OSError as error:
            failure = error
        else:
            connected.settimeout(seconds)
            return connected
    raise failure


def _hang_up(sockets: Sequence[socket.socket], is_late: threading.Event) -> None:
    is_late.set()
    with suppress(OSError):
        socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)  # below TLS, which would wait
