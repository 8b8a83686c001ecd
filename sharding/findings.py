"""The findings of ``cdssl verify``: one record for each violation of the format."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One violation and where it was found."""

    code: str  # one of the documented codes
    text: str  # for people
    file: str = ""  # inside the data set
    offset: int | None = None  # of the bad bytes in the file, if known
    size: int | None = None
    block: int | None = None
    key: str | None = None  # of the crystal, or of the first of several
    count: int = 1  # number of occurrences: edges, atoms, rows

    def __str__(self) -> str:
        where = self.file
        if self.offset is not None and self.size is not None:
            where += f", bytes {self.offset}–{self.offset + self.size - 1}"
        if self.block is not None:
            where += f", block {self.block}"
        return f"{where}: {self.text} [{self.code}]"


@dataclass
class Report:
    """The outcome of a verification."""

    digest: str = ""  # of the manifest
    shards: int = 0  # these five count what was read and checked
    blocks: int = 0
    graphs: int = 0
    edges: int = 0  # directed
    bytes: int = 0
    recomputed: int = 0  # blocks whose neighbour lists were recomputed
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    @property
    def first_bad(self) -> Finding | None:
        """The first finding with a byte offset: in a shard if there is one, else in a table."""
        located = [f for f in self.findings if f.offset is not None]
        shards = [f for f in located if f.file.endswith(".tar")]
        return next(iter(shards or located), None)

    def as_dict(self) -> dict[str, Any]:
        """The report as a JSON object, for ``--json``."""
        first = self.first_bad
        checked = ("shards", "blocks", "graphs", "edges", "bytes", "recomputed")
        return {
            "ok": self.ok,
            "digest": self.digest,
            "checked": {name: getattr(self, name) for name in checked},
            "first_bad": first and {"file": first.file, "offset": first.offset, "size": first.size},
            "counts": dict(sorted(Counter(f.code for f in self.findings).items())),
            "findings": [asdict(f) for f in self.findings],
        }
