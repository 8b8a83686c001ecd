"""Settings that determine the contents of a data set."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Literal

from sharding.block import Budget

Duplicates = Literal["keep", "exact", "near"]


class SettingsError(ValueError):
    """Settings are out of range or contradict one another."""


@dataclass(frozen=True)
class ShardSettings:
    """Everything besides the sources that determines the bytes of the result."""

    cutoff: float = 5.0  # Å
    budget: Budget = field(default_factory=Budget)
    blocks_per_shard: int = 256
    val: float = 0.05  # share of the groups
    test: float = 0.0
    seed: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # label name → column
    fingerprints: bool = True  # find twins; if False, a crystal's group is its reduced formula
    duplicates: Duplicates = "exact"  # which twins of a crystal are dropped: none, equal ones, or near ones as well
    bucket_bytes: int = 64 * 2**20  # graphs that one task holds in memory at a time; more above 256 GiB in all

    def __post_init__(self) -> None:
        """Raise SettingsError for invalid settings."""
        if not 0.5 < self.cutoff <= 20:
            raise SettingsError(f"cutoff {self.cutoff} Å is outside 0.5–20 Å")
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise SettingsError(f"val {self.val} and test {self.test} must leave something to train on")
        if min(*astuple(self.budget), self.blocks_per_shard) < 1:
            raise SettingsError(f"{self.budget} and {self.blocks_per_shard} blocks per shard: each must be at least 1")
        if self.duplicates != "keep" and not self.fingerprints:
            raise SettingsError("duplicates are found by fingerprints: keep all duplicates, or leave fingerprints on")
