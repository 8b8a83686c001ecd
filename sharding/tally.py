"""Count the contents of a data set, batch by batch, in memory that does not grow with it."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sharding.crystal import ATOMIC_NUMBER, SYMBOLS

_LARGEST: Final = 10  # crystals listed by name
_EXAMPLES: Final = 3  # refusals shown for each reason
_SIZE: Final = re.compile(r"(\d+) directed edges")  # in the refusal text of an oversized crystal


def ratio(one: float, other: float) -> float:
    """``one / other``, or 0 if ``other`` is 0."""
    return one / other if other else 0.0


class Sizes:
    """Exact counts of each size; memory grows only with the number of different sizes."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, values: NDArray[Any]) -> None:
        """Count some more."""
        found, times = np.unique(values, return_counts=True)
        self.counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))

    def over(self, limit: int) -> int:
        """How many are above a limit."""
        return sum(times for size, times in self.counts.items() if size > limit)

    def summary(self) -> dict[str, Any]:
        """Mean, quantiles, and a histogram in powers of two; a bin holds sizes above ``over`` and up to ``to``."""
        sizes = np.array(sorted(self.counts), np.int64)
        if len(sizes) == 0:
            return {"mean": 0.0, "median": 0, "p99": 0, "max": 0, "histogram": []}
        times = np.array([self.counts[int(size)] for size in sizes])
        reached = np.cumsum(times) / times.sum()
        quantile = {name: int(sizes[np.searchsorted(reached, q)]) for name, q in (("median", 0.5), ("p99", 0.99))}
        bins = np.ceil(np.log2(np.maximum(sizes, 1))).astype(int)
        graphs = np.bincount(bins, weights=times).astype(int)[bins[0] :].tolist()
        histogram = [
            {"over": 2 ** (i - 1) if i else 0, "to": 2**i, "graphs": n} for i, n in enumerate(graphs, int(bins[0]))
        ]
        mean = float((sizes * times).sum() / times.sum())
        return {"mean": mean, **quantile, "max": int(sizes[-1]), "histogram": histogram}


class Values:
    """The values of a label."""

    def __init__(self) -> None:
        self.rows = self.present = 0
        self.sum, self.low, self.high = 0.0, np.inf, -np.inf

    def add(self, values: NDArray[Any]) -> None:
        """Add values; non-finite ones count as missing."""
        there = values[np.isfinite(values)].astype(np.float64)
        self.rows += len(values)
        self.present += len(there)
        self.sum += float(there.sum())
        self.low, self.high = min(self.low, there.min(initial=np.inf)), max(self.high, there.max(initial=-np.inf))

    def summary(self) -> dict[str, float | None]:
        """``missing`` is a fraction; the other entries are None if every value is missing."""
        some = self.present > 0
        return {
            "missing": 1 - ratio(self.present, self.rows),
            "mean": self.sum / self.present if some else None,
            "min": float(self.low) if some else None,
            "max": float(self.high) if some else None,
        }


class Rows:
    """Statistics of the graph table."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        self.atoms, self.edges = Sizes(), Sizes()
        self.labels = {name: Values() for name in labels}
        self.sources: Counter[str] = Counter()
        self.largest: list[tuple[int, int, str, str]] = []  # edges, atoms, key, formula
        self._letters = np.zeros(27 * 27, np.int64)

    def add(self, batch: pa.RecordBatch) -> None:
        """Add a batch of rows."""
        atoms, edges = (np.asarray(batch[name]).astype(np.int64) for name in ("n_atoms", "n_edges"))
        self.atoms.add(atoms)
        self.edges.add(edges)
        for name, values in self.labels.items():
            values.add(np.asarray(batch[f"y.{name}"].to_numpy(zero_copy_only=False)))
        for row in batch["source"].value_counts().to_pylist():
            self.sources[row["values"]] += row["counts"]
        self._letters += _symbols("".join(batch["formula"].to_pylist()))
        top = np.argsort(-edges, kind="stable")[:_LARGEST].tolist()
        named = [(int(edges[i]), int(atoms[i]), *(batch[n][i].as_py() for n in ("key", "formula"))) for i in top]
        self.largest = sorted([*self.largest, *named], key=lambda row: (-row[0], row[2]))[:_LARGEST]

    def elements(self) -> dict[str, int]:
        """How many crystals hold each element, the commonest first."""
        counts = {symbol: int(self._letters[_letters(symbol)]) for symbol in SYMBOLS[1:]}
        return {s: n for s, n in sorted(counts.items(), key=lambda item: (-item[1], ATOMIC_NUMBER[item[0]])) if n}


def _symbols(formulas: str) -> NDArray[np.int64]:
    """How often each pair of a capital and a small letter (or none) occurs: a reduced formula names an element once."""
    text = np.frombuffer(formulas.encode() + b" ", np.uint8).astype(np.int64)
    capital = np.flatnonzero((text >= ord("A")) & (text <= ord("Z")))
    after = text[capital + 1] - ord("a") + 1
    return np.bincount((text[capital] - ord("A")) * 27 + np.where((after > 0) & (after < 27), after, 0), minlength=729)


def _letters(symbol: str) -> int:
    return (ord(symbol[0]) - ord("A")) * 27 + (ord(symbol[1]) - ord("a") + 1 if len(symbol) > 1 else 0)


class Refusals:
    """Statistics of the quarantine."""

    def __init__(self) -> None:
        self.examples: dict[str, list[dict[str, str]]] = {}
        self.oversized = Sizes()
        self.unknown = 0  # oversized, but the text does not state the size

    def add(self, refusal: dict[str, str]) -> None:
        """Add one line."""
        some = self.examples.setdefault(refusal["code"], [])
        if len(some) < _EXAMPLES:
            some.append({name: str(refusal[name]) for name in ("key", "source", "position", "text")})
        if refusal["code"] == "oversized":
            match = _SIZE.search(refusal["text"])
            self.unknown += match is None
            self.oversized.counts.update([int(match[1])] if match else [])
