"""The ledger of a run: the roll-backs, which no checkpoint resets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sharding.manifest import write_atomically


@dataclass(frozen=True)
class Rollback:
    """Weights went back to a checkpoint; data went on."""

    to: int  # cursor of the checkpoint that was loaded
    resumed_at: int  # cursor from which the run went on
    reason: str


@dataclass(frozen=True)
class Ledger:
    """Guard actions that must survive a roll-back and a kill; ``guard-ledger.json``."""

    rollbacks: list[Rollback] = field(default_factory=list)

    def discarded(self, cursor: int) -> bool:
        """Whether a roll-back discarded the checkpoint at ``cursor``."""
        return self.resume_point(cursor) is None

    def resume_point(self, cursor: int) -> int | None:
        """Return the step at which a run resumes from a checkpoint at ``cursor``; None if a roll-back discarded it.

        A roll-back from b to a discards the checkpoints after a and before b; from the one at a, the run resumes at b.
        """
        for rollback in reversed(self.rollbacks):
            if cursor >= rollback.resumed_at:
                return cursor
            if cursor > rollback.to:
                return None
            if cursor == rollback.to:
                return rollback.resumed_at
        return cursor

    def with_rollback(self, rollback: Rollback) -> Ledger:
        """Return the ledger with one more roll-back."""
        return Ledger([*self.rollbacks, rollback])

    def up_to(self, cursor: int) -> Ledger:
        """Return the roll-backs that precede a resume from the checkpoint at ``cursor``.

        Later ones belong to a continuation that was abandoned by removing its checkpoints.
        """
        return Ledger([rollback for rollback in self.rollbacks if rollback.to <= cursor])

    def write(self, folder: Path) -> None:
        """Write and sync the ledger; done before anything is reloaded, so that a kill cannot lose a roll-back."""
        write_atomically(folder / "guard-ledger.json", json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Ledger:
        """The ledger of a run; empty for a new one."""
        path = folder / "guard-ledger.json"
        if not path.exists():
            return Ledger()
        return Ledger([Rollback(**r) for r in json.loads(path.read_text())["rollbacks"]])
