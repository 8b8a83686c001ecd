"""Verify one shard in a single pass: its digest, its tar structure, and each of its blocks."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import safetensors
import xxhash
from numpy.typing import NDArray

from sharding import invariants
from sharding.block import BlockError, decode
from sharding.findings import Finding, Report
from sharding.graph import Multigraphs
from sharding.invariants import Problem, Rules
from sharding.place import Place
from sharding.verify_rows import GRAPHS, Rows, compare

_RECORD: Final = 512  # bytes of a tar header, and what members are padded to
_PIECE: Final = 2**20
_LARGEST: Final = 2**31  # bytes; larger members are not read into memory
_MEMBER: Final = re.compile(r"(\d{9,10})\.safetensors")


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to verify one shard."""

    place: Place
    entry: dict[str, Any]  # of the manifest: name, size, sha256
    blocks: dict[str, NDArray[Any]] | None  # its rows of the block table; None if that cannot be read
    rows: Rows | None  # of the graph table; None if that cannot be read
    split: str
    rules: Rules
    sample: float  # fraction of the blocks whose neighbour lists are recomputed
    seed: int  # of the sample


def check_shard(task: ShardTask) -> Report:
    """Verify a shard; return the findings and how much was read."""
    lost = None
    try:
        if task.rows is not None:
            task.rows.load()
    except (pa.ArrowException, OSError, KeyError) as why:
        task, lost = replace(task, rows=None), why
    check = _Check(task)
    if lost is not None:
        check.find("graph_table", f"the rows of its graphs cannot be read ({lost})")
    try:
        with task.place.open(check.name) as file:
            check.run(file)
    except FileNotFoundError:
        check.find("missing", "the shard is missing")
    except OSError as why:
        check.find("unreadable", f"cannot be read ({why.strerror or why})")
    check.report.findings.sort(key=lambda f: (f.offset is None, f.offset or 0))
    return check.report


class _Check:
    """The state of reading one shard."""

    def __init__(self, task: ShardTask) -> None:
        self.task, self.name = task, str(task.entry["name"])
        self.report = Report(shards=1)
        numbers = [] if task.blocks is None else task.blocks["block"].tolist()
        self.expected = {number: i for i, number in enumerate(numbers)}  # block → row; removed once the block is found
        self.first = numbers[0] if numbers else None

    def find(self, code: str, text: str, offset: int | None = None, size: int | None = None, **more: Any) -> None:
        self.report.findings.append(Finding(code, text, self.name, offset, size, **more))

    def run(self, file: BinaryIO) -> None:
        hashing = _Hashing(file, self.task.place.size(self.name))
        try:
            for name, offset, size, data in _members(hashing):
                self.member(name, offset, size, data)
        except _TarError as why:
            self.find("tar", str(why), why.offset, _RECORD)
        end = hashing.at
        rest = hashing.drain()
        if rest:
            self.find("tar", "there are non-zero bytes after the last member", end, hashing.at - end)
        self.report.bytes = hashing.at
        self.by_table(file, hashing.at)
        wanted, found = self.task.entry["size"], hashing.at
        if found < wanted:
            self.find("size", f"{found:,} bytes, {wanted:,} expected: its end is missing", found, wanted - found)
        elif found > wanted:
            self.find("size", f"{found:,} bytes, {wanted:,} expected: something was added", wanted, found - wanted)
        if hashing.sha256.hexdigest() != self.task.entry["sha256"]:
            exact = any(f.offset is not None for f in self.report.findings)
            whole = (None, None) if exact else (0, found)
            self.find("sha256", "the SHA-256 is not the one in the manifest", *whole)

    def member(self, name: str, offset: int, size: int, data: bytes | None) -> None:
        """One member of the tar file, which should be the block that the table says."""
        match = _MEMBER.fullmatch(name)
        number = int(match[1]) if match else -1
        if data is None:
            self.find("tar", f"the member {name!r:.80} of {size:,} bytes is too large or cut short", offset, size)
        elif match is None:
            self.find("tar", f"the member {name!r:.80} is not named as a block", offset, size)
        elif self.task.blocks is None:
            self.block(number, offset, data, None)
        elif number not in self.expected:
            self.find("tar", f"a member for block {number}, which is not listed here or was met before", offset, size)
        elif self.place(self.expected[number]) != (offset, size):
            at, length = self.place(self.expected[number])
            text = f"block {number} is {size} bytes at {offset}; the block table says {length} bytes at {at}"
            self.find("tar", text, offset, size, block=number)
        else:
            self.block(number, offset, data, self.expected.pop(number))

    def by_table(self, file: BinaryIO, end: int) -> None:
        """Read the blocks that were not among the tar members from where the block table says they are."""
        for number, row in self.expected.items():
            offset, size = self.place(row)
            if offset + size > end:
                self.find("cut", f"the block ends after the end of the file at {end}", offset, size, block=number)
                continue
            file.seek(offset)
            self.block(number, offset, file.read(size), row)

    def place(self, row: int) -> tuple[int, int]:
        assert self.task.blocks is not None
        return int(self.task.blocks["offset"][row]), int(self.task.blocks["size"][row])

    def block(self, number: int, offset: int, data: bytes, row: int | None) -> None:
        """Check the bytes of one block; without its row in the block table, only against the format."""
        task, at = self.task, (offset, len(data))
        known = None
        if row is not None and task.blocks is not None:
            known = {name: int(column[row]) for name, column in task.blocks.items()}
        if known and xxhash.xxh3_64_intdigest(data) != known["xxh3"]:
            return self.find("xxh3", "does not match its checksum", *at, block=number)
        try:
            graphs = decode(data)
            safetensors.deserialize(data)  # type: ignore[no-untyped-call]  # what others read with, stricter
        except (BlockError, safetensors.SafetensorError) as why:
            return self.find("undecodable", f"cannot be decoded: {why!s:.300}", *at, block=number)
        found = invariants.problems(graphs, task.rules)
        if known:
            found += _counted(graphs, known)
        if self.in_sample(number):
            found += invariants.incomplete(graphs, task.rules.cutoff)
            self.report.recomputed += 1
        for problem in found:
            self.find(problem.code, _said(problem, graphs), *at, **_named(problem, graphs, number))
        for problem in compare(task.rows, number, graphs, task.split) if task.rows else ():
            finding = Finding(problem.code, _said(problem, graphs), GRAPHS, **_named(problem, graphs, number))
            self.report.findings.append(finding)
        self.report.blocks += 1
        self.report.graphs += len(graphs)
        self.report.edges += 2 * len(graphs.edge_src)

    def in_sample(self, number: int) -> bool:
        """Whether to recompute a block: the first of a shard, and others by a hash of their number."""
        drawn = xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), self.task.seed) < self.task.sample * 2**64
        return self.task.sample > 0 and (drawn or number == self.first)


def _said(problem: Problem, graphs: Multigraphs) -> str:
    if problem.graph is None:
        return problem.text
    return f"{problem.text} ({problem.count:,}, the first in {graphs.keys[problem.graph]!r:.80})"


def _named(problem: Problem, graphs: Multigraphs, block: int) -> dict[str, Any]:
    key = None if problem.graph is None else graphs.keys[problem.graph]
    return {"block": block, "key": key, "count": problem.count}


def _counted(graphs: Multigraphs, row: dict[str, int]) -> Iterator[Problem]:
    counts = {
        "graphs": len(graphs),
        "atoms": len(graphs.positions),
        "edges": 2 * len(graphs.edge_src),
        "scored_edges": 2 * int(np.count_nonzero(graphs.edge_src != graphs.edge_dst)),
    }
    for name, count in counts.items():
        if count != row[name]:
            yield Problem("counts", f"holds {count:,} {name}; the block table says {row[name]:,}")


class _Hashing:
    """A file that is read forward, and hashed on the way."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.at, self.sha256 = 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.at += len(data)
        return data

    def drain(self) -> bytes:
        """Read to the end; return the first non-zero piece, if there is one."""
        kept = b""
        while piece := self.read(_PIECE):
            kept = kept or piece.strip(b"\0")
        return kept


class _TarError(ValueError):
    def __init__(self, text: str, offset: int) -> None:
        super().__init__(text)
        self.offset = offset


def _members(file: _Hashing) -> Iterator[tuple[str, int, int, bytes | None]]:
    """Yield name, offset, size and bytes of each member; an unreadable one has None for bytes and comes last.

    Raises:
        _TarError: at the first invalid record.
    """
    while len(record := file.read(_RECORD)) == _RECORD and record.strip(b"\0"):
        at = file.at - _RECORD
        try:
            header = tarfile.TarInfo.frombuf(record, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as why:
            raise _TarError(f"not the header of a member ({why})", at) from None
        if not header.isreg() or header.size < 0:
            raise _TarError(f"the member {header.name!r:.80} is not a plain file", at)
        begin, size = file.at, header.size
        if size > min(_LARGEST, file.size - begin):
            yield header.name, begin, size, None
            raise _TarError("a member that is too large, or cut short", at)
        yield header.name, begin, size, file.read(size)
        if file.read(-size % _RECORD).strip(b"\0"):
            raise _TarError("the padding of a member is not zero", begin + size // _RECORD * _RECORD)
    if len(record) < _RECORD:
        raise _TarError("the tar file has no end", file.at - len(record))
    if file.read(_RECORD) != bytes(_RECORD):
        raise _TarError("the tar file ends with one empty record, not two", file.at - _RECORD)
