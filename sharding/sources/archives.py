"""Tar and zip archives, read from front to back as names and streams; nothing is extracted, damage is skipped.

``tarfile`` stops silently at a damaged header, which would lose every member after it. So we walk the headers here and
use ``tarfile`` only to decode their fields.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from sharding.sources.pieces import Fault
from sharding.sources.streams import DamagedError, Stream

BLOCK: Final = 512  # bytes; a tar archive is made of them
MAX_NAME: Final = 2**16  # bytes of a long name or an extended header
LINKS: Final = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


class Member(NamedTuple):
    """One file of an archive. It must be read, if at all, before the next one is requested."""

    path: str
    stream: Stream | None  # None for links
    kind: str = "a file"


def tar_members(stream: Stream) -> Iterator[Member | Fault]:
    """The members of a tar archive.

    After a damaged header, reading resumes at the next block that is a valid header.

    Raises:
        DamagedError: if the archive is truncated, that is, has no end marker.
    """
    number, lost, ended = 0, False, False
    long: dict[str, str] = {}  # what headers before the member's own say about it
    while True:
        header = stream.exactly(BLOCK)
        if not header and ended:
            return
        if len(header) < BLOCK:
            raise DamagedError("there is no end mark")
        ended = header.count(0) == BLOCK
        if ended:  # read on anyway: that checks the compression, and there may be a second archive
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.HeaderError("negative size")
        except tarfile.HeaderError as why:
            if not lost:
                text = f"the tar header is damaged ({why}); the next one is sought"
                yield Fault(f"member {number}", "unparsable", text)
            lost, long = True, {}
            continue
        lost = False
        size = int(long.get("size", info.size)) if _has_data(info) else 0
        body = stream.part(size + -size % BLOCK)
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            long |= _long_name(info, body)
        elif info.type in LINKS or info.isreg():
            part = body.part(size) if info.type not in LINKS else None
            yield Member(_printable(long.get("path", info.name)), part, LINKS.get(info.type, "a file"))
            number, long = number + 1, {}
        elif info.type != tarfile.GNUTYPE_LONGLINK:  # a folder, a device, a global header
            long = {}
        body.skip()


def _has_data(info: tarfile.TarInfo) -> bool:
    """Whether blocks of data follow a header: for unknown types too, says the standard."""
    return info.isreg() or not (info.issym() or info.islnk() or info.isdir() or info.isdev())


def _long_name(info: tarfile.TarInfo, body: Stream) -> dict[str, str]:
    """The path and size that a GNU or pax header gives to the member after it."""
    text = body.exactly(min(info.size, MAX_NAME))
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": text.rstrip(b"\0").decode("utf-8", "replace")}
    fields: dict[str, str] = {}
    while match := re.match(rb"(\d{1,9}) ([^=]+)=", text):
        end = max(int(match[1]), match.end())
        fields[match[2].decode("utf-8", "replace")] = text[match.end() : end - 1].decode("utf-8", "replace")
        text = text[end:]
    return {name: value for name, value in fields.items() if name == "path" or (name == "size" and value.isdecimal())}


def zip_members(file: Any) -> Iterator[Member | Fault]:
    """The members of a zip archive, which must be seekable.

    The list of members is at the end of a zip, so a truncated one has none: its members are then found one by one.

    Raises:
        DamagedError: if the archive is truncated.
    """
    try:
        archive = zipfile.ZipFile(file)
        _check_count(file, archive)
    except (zipfile.BadZipFile, OSError, ValueError, struct.error) as why:
        with contextlib.suppress(ValueError, OSError):  # a server without range requests
            file.seek(0)
        yield from _salvaged(Stream(file.read))
        raise DamagedError(f"the list of members is damaged ({why})") from None
    for info in archive.infolist():
        path = _printable(info.filename)
        if info.is_dir():
            continue
        if stat.S_ISLNK(info.external_attr >> 16):
            yield Member(path, None, "a symbolic link")
            continue
        try:
            with archive.open(info) as opened:
                yield Member(path, Stream(_checked(opened)))
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError, struct.error) as why:
            yield Fault(path, "unparsable", f"cannot be unpacked: {why}")  # encrypted, or a damaged header


def _check_count(file: Any, archive: zipfile.ZipFile) -> None:
    """Check that all members are listed, since ``zipfile`` accepts a list that ends early."""
    file.seek(-22 - len(archive.comment), os.SEEK_END)
    end = file.read(12)
    stated = int.from_bytes(end[10:], "little")
    if end[:4] == b"PK\x05\x06" and stated not in (0xFFFF, len(archive.infolist()) & 0xFFFF):
        raise zipfile.BadZipFile(f"{stated} members are announced, {len(archive.infolist())} are listed")


def _checked(opened: Any) -> Any:
    """Wrap ``read1`` of a member, so that a wrong checksum counts as damage."""

    def read(n: int) -> bytes:
        try:
            return opened.read1(n)
        except zipfile.BadZipFile as why:
            raise DamagedError(str(why)) from None

    return read


def _salvaged(stream: Stream) -> Iterator[Member]:
    """Find the members of a zip whose end is missing by their local headers, as far as these state sizes."""
    while (header := stream.exactly(30))[:4] == b"PK\x03\x04" and len(header) == 30:
        flags, method, size, _, n_name, n_extra = struct.unpack("<6xHH8xIIHH", header)
        path = _printable(stream.exactly(n_name).decode("utf-8" if flags & 0x800 else "cp437", "replace"))
        stream.exactly(n_extra)
        if flags & 0x9 or size == 0xFFFFFFFF or method not in (0, 8):  # encrypted, or of unknown size or method
            return
        body = stream.part(size)
        if not path.endswith("/"):
            yield Member(path, Stream(_inflated(body)) if method == 8 else body)
        body.skip()


def _inflated(body: Stream) -> Any:
    """Unpack raw deflate."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)

    def read(n: int) -> bytes:
        text = b""
        while not text and not unpacker.eof:
            packed = unpacker.unconsumed_tail or body.read()
            if not packed:
                raise DamagedError("the member is cut")
            text = unpacker.decompress(packed, n)
        return text

    return read


def _printable(path: str) -> str:
    """A name that can be written to any file or terminal."""
    return path.encode("utf-8", "replace").decode("utf-8")
