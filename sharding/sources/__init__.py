"""Sources of crystals, and the registry of their readers.

A *source* is a generator of records. A record is cheap to make (a slice of a file, a row, a crystal) and is turned
into crystals by ``parse`` in a worker process, which takes most of the time. The order of records depends on the source
alone; tasks are numbered in that order, so that a rerun finds what an earlier run has done.

What cannot be read is refused, with one of these reasons: ``unparsable``; ``truncated``, the source ends too early or
is damaged from there on; ``too_large``; ``species``, unknown elements; ``partial_occupancy``; ``no_atoms``;
``singular_cell``; ``not_periodic``, a molecule.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sharding.crystal import Crystal, Refusal, RefusedError


@dataclass(frozen=True, slots=True)
class Record:
    """One piece of a source, not parsed yet."""

    position: str  # where in the source, for the quarantine
    payload: Any  # what ``parse`` takes; travels to another process


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """User options for reading, the same for all sources."""

    labels: dict[str, str] = field(default_factory=dict)  # label name → column in the source, dotted where nested
    limit: int | None = None  # read this many records (rows, files), then stop
    occupancy: Literal["refuse", "majority"] = "refuse"  # for a disordered crystal: refuse it, or keep the commonest
    keys: frozenset[str] | None = None  # only the crystals with these keys
    max_record_bytes: int = 256 * 2**20  # of one crystal, decompressed: guards against decompression bombs
    name: str | None = None  # of the source, if another source's file has the same name


class SourceError(ValueError):
    """A source cannot be opened or read; the message is one line."""


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        name: as the user wrote it, for the quarantine and the manifest (no absolute path).
        licence: of the data, where the source states one.
        cite: how to cite it.
        units: label name → unit, where the source states them.
        options: what it was opened with; a rerun with other options must not continue its work.
        records: makes a new iterator of records.
        parse: record → crystals; raises ``RefusedError`` for a record that is no crystal.
    """

    name: str
    records: Callable[[], Iterator[Record]]
    parse: Callable[[Record], Iterable[Crystal | Refusal]]
    licence: str = "unknown"
    cite: str = ""
    units: dict[str, str] = field(default_factory=dict)
    options: ReadOptions | None = None  # that it was opened with


# The registry. A module is imported when its scheme or file extension is first used: unused readers cost nothing.
# A module of the first two kinds has one public function ``open_source(spec, options) -> Source``.
SCHEMES: dict[str, str] = {
    "aflow": "aflow",
    "mp": "materials_project",
    "optimade": "optimade_api",
}
_BY_ENDING: dict[str, str] = {
    ".aselmdb": "ase_db",
    ".db": "ase_db",
    ".parquet": "optimade",
}
# Formats that are read as forward-only streams may be compressed, in folders or in archives. Their modules have two
# functions, ``split(stream, stem, options)`` and ``parse(piece, options)``; ``files`` does the rest.
FORMATS: dict[str, str] = {
    ".cif": "cif",
    ".mcif": "cif",
    ".csv": "table",
    ".json": "json_files",
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".contcar": "poscar",
    ".poscar": "poscar",
    ".vasp": "poscar",
    ".extxyz": "xyz",
    ".xyz": "xyz",
}
ARCHIVES: dict[str, str] = {".tar": "tar", ".tgz": "tar", ".tbz2": "tar", ".txz": "tar", ".zip": "zip"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


def open_source(spec: str, options: ReadOptions | None = None) -> Source:
    """Open a source by name.

    Args:
        spec: a scheme with its argument (``aflow:``, ``optimade:https://…``), or the path or the URL of a file or a
            folder.
        options: which columns are labels, and how much to read.

    Raises:
        SourceError: if no reader handles the name, or the file is missing.
    """
    options = options or ReadOptions()
    scheme = spec.split(":", 1)[0] if ":" in spec else ""
    if scheme in SCHEMES:
        return replace(load(SCHEMES[scheme]).open_source(spec, options), options=options)
    if "://" not in spec and not os.path.exists(spec):
        raise SourceError(f"{spec}: no such file")
    ending = os.path.splitext(spec.lower())[1]
    return replace(load(_BY_ENDING.get(ending, "files")).open_source(spec, options), options=options)


def open_sources(specs: Sequence[str], options: ReadOptions) -> list[Source]:
    """Open several sources; files of the same name are told apart by their folders.

    Crystals without ids are named after their file, and would otherwise be confused with one another.

    Raises:
        SourceError: see ``open_source``.
    """
    names = _names([spec for spec in specs if spec.split(":", 1)[0] not in SCHEMES])
    return [open_source(spec, replace(options, name=names.get(spec))) for spec in specs]


def _names(specs: Sequence[str]) -> dict[str, str]:
    """For paths that share their last part, the shortest suffixes that tell them apart."""
    parts = {spec: spec.rstrip("/").split("/") for spec in specs}
    names: dict[str, str] = {}
    length, left = 1, set(parts)
    while left:
        met = Counter(tuple(mine[-length:]) for mine in parts.values())
        told = {spec for spec in left if met[tuple(parts[spec][-length:])] == 1 or length >= len(parts[spec])}
        names |= {spec: "/".join(parts[spec][-length:]) for spec in told if length > 1}
        left -= told
        length += 1
    return names


def known() -> str:
    """The schemes and endings that have a reader, for a message."""
    schemes = ", ".join(f"{scheme}:" for scheme in SCHEMES)
    endings = ", ".join(sorted({*_BY_ENDING, *FORMATS, *ARCHIVES}))
    return f"{schemes}; {endings}, POSCAR, CONTCAR, also with {', '.join(COMPRESSIONS)}; and folders of them"


def payload(record: Record) -> list[Crystal]:
    """``parse`` for sources whose records are already crystals. A module-level function, as it is sent to workers."""
    return [record.payload]


def numbered(crystals: Iterable[Crystal]) -> Iterator[Record]:
    """Crystals as records."""
    return (Record(str(i), crystal) for i, crystal in enumerate(crystals))


def from_crystals(crystals: Iterable[Crystal], name: str = "python", **about: Any) -> Source:
    """Make a source from crystals in memory; ``about`` may give licence, cite and units."""
    return Source(
        name=name,
        records=functools.partial(numbered, crystals),
        parse=payload,
        **about,
    )


def parse_records(source: Source, records: Iterable[Record]) -> Iterator[Crystal | Refusal]:
    """Parse records, turning failures into refusals, so that a bad record affects no other."""
    keys = source.options.keys if source.options else None
    for record in records:
        try:
            for item in source.parse(record):
                if keys is not None and item.key not in keys:
                    continue
                yield item if isinstance(item, Refusal) or item.position else item.at(record.position)
        except RefusedError as why:
            yield Refusal("", source.name, record.position, why.code, why.text[:300])


def load(module: str) -> Any:
    """A module of this package, by name."""
    return importlib.import_module(f"sharding.sources.{module}")
