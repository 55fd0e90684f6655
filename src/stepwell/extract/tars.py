"""Pictures in tars, as WebDataset and img2dataset write them: found by their headers, read where they lie.

Nothing is unpacked to the disk, a member's name is never a path, and a header may be no larger than `HEADER`
bytes: tarfile itself reads as many as a header says, and keeps every member it has seen.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO

from stepwell.data.image_folder import ENDINGS
from stepwell.extract.rows import Part, Row, plain_text

__all__ = ["HEADER", "tar_rows"]

HEADER = 2**20
"""Bytes of a member's headers, long names and other fields counted."""

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)


def tar_rows(path: str) -> Iterator[Row]:
    """A row for each member whose name ends as a picture's does, in their order; ids are PATH/MEMBER.

    What is no plain file (a link, a sparse file) is a row with an error. Where the tar is damaged or cut off,
    a last row says so. Raises OSError for a file that cannot be read.
    """
    where = os.path.abspath(path)
    with open(where, "rb") as file:
        headers = _Headers(file)
        try:
            for member in _members(headers):
                if _is_picture(member):
                    yield _row(path, where, member)
        except OSError:
            raise
        except Exception as error:  # tarfile raises whatever it likes on damaged files
            reason = " ".join(str(error).split())[:100] or type(error).__name__
            message = f"no plain tar, damaged or cut off from byte {headers.begins} on ({reason})"
            yield Row(plain_text(path), None, str(headers.begins), message)


class _Headers:
    """A file of which no member's headers may take more than `HEADER` bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.begins = 0
        self.left = HEADER

    def next_member(self, begins: int) -> None:
        self.begins, self.left = begins, HEADER

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise tarfile.ReadError(f"headers of over {HEADER} bytes")
        self.left -= size
        return self.file.read(size)

    def seek(self, place: int, whence: int = 0) -> int:
        return self.file.seek(place, whence)

    def tell(self) -> int:
        return self.file.tell()


def _members(headers: _Headers) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
        while True:
            begins = tar.offset if tar.firstmember is None else 0
            headers.next_member(begins)
            member = tar.next()
            tar.members.clear()  # it would keep all
            if member is None:
                break
            if member.size < 0 or tar.offset <= begins:  # such a size would lead back for ever
                raise tarfile.ReadError("a member of negative size")
            yield member
        headers.next_member(tar.offset)
        headers.seek(tar.offset)
        if headers.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # which tarfile takes for an end
            raise tarfile.ReadError("no mark of its end")
        if headers.file.read(HEADER).strip(b"\0"):  # `cat a.tar b.tar`, of which tarfile reads the first
            raise tarfile.ReadError("more follows behind the mark of its end")


def _is_picture(member: tarfile.TarInfo) -> bool:
    name = os.path.basename(member.name)
    is_shown = not name.startswith(".")
    return is_shown and os.path.splitext(name)[1].lower() in ENDINGS and not member.isdir()


def _row(path: str, where: str, member: tarfile.TarInfo) -> Row:
    name = plain_text(f"{path}/{member.name}")
    mark = f"{member.offset_data} {member.size}"
    if member.type not in _PLAIN or member.sparse is not None:
        return Row(name, None, mark, "no plain file in the tar, but a link or the like")
    return Row(name, Part(where, member.offset_data, member.size), mark)
