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
    """What the guard did that must outlive a roll-back and a kill; ``guard-ledger.json``."""

    rollbacks: list[Rollback] = field(default_factory=list)

    def passed_over(self, cursor: int) -> bool:
        """Whether a roll-back made the checkpoint at ``cursor`` worthless."""
        return self.resume_point(cursor) is None

    def resume_point(self, cursor: int) -> int | None:
        """Where to go on from a checkpoint at ``cursor``; None where the checkpoint was rolled back over.

        A roll-back from b to a makes checkpoints between the two worthless, and sends that of a on to b.
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
        """One more."""
        return Ledger([*self.rollbacks, rollback])

    def known_at(self, cursor: int) -> Ledger:
        """The roll-backs that a run which goes on from a checkpoint at ``cursor`` has behind it.

        Later ones are of a life that was given up, by removing the checkpoints that it left.
        """
        return Ledger([rollback for rollback in self.rollbacks if rollback.to <= cursor])

    def write(self, folder: Path) -> None:
        """Synced before anything is reloaded, so that a kill cannot forget it."""
        write_atomically(folder / "guard-ledger.json", json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: Path) -> Ledger:
        """The ledger of a run; empty for a new one."""
        path = folder / "guard-ledger.json"
        if not path.exists():
            return Ledger()
        return Ledger([Rollback(**r) for r in json.loads(path.read_text())["rollbacks"]])
