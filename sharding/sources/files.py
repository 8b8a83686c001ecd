"""Files in any text format, alone or compressed, in folders and in archives: one stream of pieces for all of them.

An archive is read from front to back and never extracted, so its paths are only names. The files of a folder are read
in the order of their names. Files whose extension no reader handles, such as a README among the CIFs, are skipped.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import posixpath
from collections.abc import Generator, Iterator
from typing import Any, Final

from sharding.commands import one_line
from sharding.crystal import Crystal, Refusal
from sharding.sources import (
    _BY_ENDING,
    ARCHIVES,
    FORMATS,
    ReadOptions,
    Record,
    Source,
    SourceError,
    known,
    load,
)
from sharding.sources.archives import Member, tar_members, zip_members
from sharding.sources.pieces import Fault, Piece, batched, parsed
from sharding.sources.streams import (
    DamagedError,
    Stream,
    TooLargeError,
    base_name,
    decompressed,
    filesystem,
    opened,
    redacted,
    stream_of,
    uncompressed_name,
)

VASP_NAMES: Final = ("POSCAR", "CONTCAR")
APART: Final = "and must be named as a source of its own"


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open a file, a folder or an archive of files.

    Raises:
        SourceError: if there is no reader for it, it cannot be opened, or a table lacks a column.
    """
    name = options.name or base_name(spec)
    if not _is_folder(spec):
        module = format_of(name)
        if module is None and _archive_kind(name) is None:
            raise SourceError(f"{redacted(spec)}: no reader for this kind of source; known are {known()}")
        with opened(spec, forward=module is not None) as file:
            if module is not None and hasattr(load(module), "check"):
                load(module).check(decompressed(stream_of(file, spec), name), redacted(spec), options)
    return Source(
        name=name,
        records=functools.partial(_records, spec, name, options),
        parse=functools.partial(_parse, name, options),
    )


def format_of(path: str) -> str | None:
    """The module that reads a file, by its name; None where there is none."""
    if _is_poscar(path):
        return "poscar"
    return FORMATS.get(_ending(path))


def _is_poscar(path: str) -> bool:
    """``POSCAR``, ``CONTCAR_relaxed``, ``POSCAR.1.gz``; not ``POSCARs.tar``."""
    named = posixpath.basename(path).startswith(VASP_NAMES)
    return named and _ending(path) not in {*FORMATS, *ARCHIVES, *_BY_ENDING}


def _ending(path: str) -> str:
    return os.path.splitext(uncompressed_name(path).lower())[1]


def _archive_kind(path: str) -> str | None:
    return ARCHIVES.get(_ending(path))


def _records(spec: str, name: str, options: ReadOptions) -> Iterator[Record]:
    with contextlib.closing(_pieces(spec, name, options)) as pieces:
        yield from batched(pieces, name, options)


def _parse(name: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    return parsed(_parse_piece, name, options, record.payload)


def _parse_piece(piece: Piece, options: ReadOptions) -> Iterator[Crystal | Fault]:
    return load(piece.format).parse(piece, options)


def _pieces(spec: str, name: str, options: ReadOptions) -> Generator[Piece | Fault]:
    stems = _Stems(whole=options.name is not None)
    if not _is_folder(spec):
        with opened(spec, forward=_archive_kind(name) != "zip") as file:
            yield from _file_pieces(file, spec, name, "", stems, options)
        return
    empty = True
    for path, relative in _walk(spec):
        if "://" not in path and os.path.isdir(path):
            yield Fault(relative, "unparsable", f"is a link to a folder, {APART}")
            continue
        if format_of(relative) is None and _archive_kind(relative) is None:
            if _ending(relative) in _BY_ENDING:
                yield Fault(relative, "unparsable", f"is not read in a folder, {APART}")
            continue
        empty = False
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(opened(path, forward=_archive_kind(relative) != "zip"))
            except SourceError as why:
                if "://" not in path and not os.path.lexists(path):  # it was listed a moment ago
                    raise SourceError(f"{path}: vanished while its folder was read; run again") from None
                yield Fault(relative, "unparsable", str(why))
                continue
            yield from _file_pieces(file, path, relative, relative, stems, options)
    if empty:
        others = sorted(ending for ending in _BY_ENDING)
        raise SourceError(
            f"{redacted(spec)}: no file in this folder has a reader that works in folders; list files of "
            f"{', '.join(others)} one by one; known are {known()}"
        )


def _file_pieces(
    file: Any, spec: str, path: str, where: str, stems: _Stems, options: ReadOptions
) -> Iterator[Piece | Fault]:
    """The pieces of one file or archive; ``where`` is prefixed to every position."""
    if format_of(path) is not None:
        yield from _stream_pieces(stream_of(file, spec), path, where, stems, options)
        return
    if _archive_kind(path) == "zip":
        members = zip_members(file)
    else:
        members = tar_members(decompressed(stream_of(file, spec), path))
    empty = True
    try:
        for member in members:
            if isinstance(member, Fault):
                empty = False
                yield member._replace(position=posixpath.join(where, member.position))
                continue
            inside = posixpath.join(where, member.path)
            if _hidden(member.path):
                continue
            if format_of(member.path) is not None:
                empty = False
                yield from _member_pieces(member, inside, stems, options)
            elif _archive_kind(member.path) is not None:
                yield Fault(inside, "unparsable", "is an archive inside an archive, which is not read")
            elif _ending(member.path) in _BY_ENDING:
                yield Fault(inside, "unparsable", f"is not read in an archive, {APART}")
        if empty:
            yield Fault(where, "unparsable", f"no file in the archive has a reader; known are {known()}")
    except DamagedError as why:
        yield Fault(where, "truncated", f"the archive cannot be read to its end: {why}")


def _member_pieces(member: Member, where: str, stems: _Stems, options: ReadOptions) -> Iterator[Piece | Fault]:
    if member.stream is None:
        yield Fault(where, "unparsable", f"is {member.kind}, which is not followed")
    else:
        yield from _stream_pieces(member.stream, member.path, where, stems, options)


def _stream_pieces(
    stream: Stream, path: str, where: str, stems: _Stems, options: ReadOptions
) -> Iterator[Piece | Fault]:
    """The pieces of one stream in a text format, and a fault if it cannot be split, ends too early or is too large."""
    module = format_of(path) or ""
    key = stems.of(path, where)
    try:
        for piece in load(module).split(decompressed(stream, path), key, options):
            position = f"{where}: {piece.position}" if where and piece.position else where or piece.position or path
            if isinstance(piece, Piece):
                yield Piece(piece.key, position, piece.text, piece.stem, piece.named, piece.columns, module, piece.last)
            else:
                yield piece._replace(position=position)
    except TooLargeError as why:
        yield Fault(where, "too_large", str(why), key)
    except DamagedError as why:
        yield Fault(where, "truncated", f"cannot be read to its end: {why}", key)
    except SourceError:
        raise
    except (ValueError, TypeError, AttributeError, csv.Error) as why:  # wrong encoding, invalid header
        yield Fault(where, "unparsable", f"cannot be read: {one_line(why)}", key)


class _Stems:
    """Prefixes for the keys of crystals without ids: the stem of their file, with its folders if the stem is taken.

    Args:
        whole: whether to include the folders for every file.
    """

    def __init__(self, whole: bool) -> None:
        self.whole, self.met = whole, set[str]()

    def of(self, path: str, where: str) -> str:
        """The stem of a file; for a file named POSCAR or CONTCAR, the path of its folder."""
        name = uncompressed_name(path)
        folder, base = posixpath.split(name)
        inside = name if _is_poscar(path) else os.path.splitext(name)[0]
        short = inside if self.whole else posixpath.basename(inside)
        if base in VASP_NAMES:
            short = folder.strip("./") or base
        stem = next((s for s in (short, inside, path, where) if s not in self.met), short)
        self.met.add(stem)
        return stem


def _hidden(path: str) -> bool:
    """Files that systems leave behind: ``.DS_Store``, ``__MACOSX/._x.cif``."""
    return any((part.startswith(".") and part.strip(".")) or part == "__MACOSX" for part in path.split("/"))


def _is_folder(spec: str) -> bool:
    if "://" not in spec:
        return os.path.isdir(spec)
    if format_of(base_name(spec)) is not None or _archive_kind(base_name(spec)) is not None:
        return False  # do not ask the server: a web server has no folders
    system, path = filesystem(spec)
    return bool(system.isdir(path))


def _walk(spec: str) -> Iterator[tuple[str, str]]:
    """Walk a folder and those below, in the order of names; yield the path to open and the path inside the folder.

    Links to files are followed, since the folder is the user's own. Links to folders are not, since they may form
    cycles; they are yielded themselves.
    """
    if "://" in spec:
        system, root = filesystem(spec)
        for path in sorted(system.find(root)):
            relative = path[len(root) :].lstrip("/")
            if not _hidden(relative):
                yield system.unstrip_protocol(path), relative
        return

    def refuse(why: OSError) -> None:
        raise SourceError(f"{spec}: a folder cannot be read ({why})")

    for folder, folders, names in os.walk(spec, onerror=refuse):
        folders.sort()
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *linked]):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, spec).replace(os.sep, "/")
            relative = relative.encode("utf-8", "replace").decode()  # a name need not be text
            if not _hidden(relative):
                yield path, relative
