"""What ``cdssl verify`` found: one record for each thing that is not as the format says."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, and where."""

    code: str  # one of the documented codes
    text: str  # for people
    file: str = ""  # inside the data set
    offset: int | None = None  # of the bad bytes in the file, where they are known
    size: int | None = None
    block: int | None = None
    key: str | None = None  # of the crystal, the first where it is several
    count: int = 1  # how often it was met: edges, atoms, rows

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
    shards: int = 0  # what was read and checked
    blocks: int = 0
    graphs: int = 0
    edges: int = 0  # directed
    bytes: int = 0
    recomputed: int = 0  # blocks whose neighbour lists were built again
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def first_bad(self) -> Finding | None:
        """The first finding that names bytes: of a shard where there is one, else of a table."""
        located = [f for f in self.findings if f.offset is not None]
        shards = [f for f in located if f.file.endswith(".tar")]
        return next(iter(shards or located), None)

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
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
