"""What a study consists of: cells, each one training on one sample of one target, and who is in which sample.

Samples are nested: for one seed, the crystals of a size are among those of every larger one; all arms get the same.
Nothing here trains; it is arithmetic on keys, so that who learns and who is evaluated can be tested in bulk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from cdssl_dist.finetune.splits import Indices, Split, hold_out
from cdssl_dist.finetune.targets import Target
from cdssl_dist.finetune.tuning import FineTuning
from cdssl_dist.model.export import EncoderCard
from cdssl_dist.study.config import Folds, Probe, StudyConfig
from cdssl_dist.study.data import EVALUATE, PREDICT, TRAIN, StudyCrystals, digest_of, open_crystals

VERSION: Final = 1  # of a cell: what was computed by another version is computed again
BEFORE: Final = (("readout", "set2set"), ("compile", False))  # settings of trainings from before there was a choice
LEAST: Final = 20  # crystals that a rate is chosen on


class StudyError(ValueError):
    """A study that cannot be done as asked: said in one line."""


@dataclass(frozen=True, order=True)
class Cell:
    """One training."""

    kind: Literal["sweep", "study", "predict"]
    target: str
    size: int  # labels, those held out for early stopping included
    seed: int
    arm: str
    lr: float = 0.0  # baselines have none

    def name(self) -> str:
        """For people and files."""
        rate = f"-{self.lr:g}" if self.kind == "sweep" else ""
        return f"{self.kind}-{self.target}-{self.size}-{self.seed}-{self.arm}{rate}"


@dataclass(frozen=True)
class Pulled:
    """An encoder on this machine's disk, or on one that all workers share."""

    folder: Path
    card: EncoderCard


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute a cell."""

    cell: Cell
    digest: str  # of all that decides the result
    out: Path
    crystals: Path  # see ``study.data.prepare``
    encoder: Pulled
    start: str  # of the arm; "" for what is not trained
    parts: tuple[str, ...]  # of the encoder that are taken; all where empty
    split: Split
    how: FineTuning
    target: Target
    probe: Probe | None = None

    def work(self, n_edges: NDArray[Any]) -> float:
        """Directed edges that pass through the network, a prediction counted as a third of a training."""
        parts = (self.split.train, self.split.val, self.split.test)
        train, val, test = (2.0 * float(n_edges[part].sum()) for part in parts)
        return self.how.epochs * (train + val / 3) + test / 3 if self.start else 0.0


class Samples:
    """Who trains and who is evaluated for one target.

    Args:
        crystals: of its data set.
        target: its name.
        config: of the study.
        seen: formulas that take no part.
    """

    def __init__(self, crystals: StudyCrystals, target: str, config: StudyConfig, seen: Collection[str] = ()) -> None:
        self.crystals, self.target, self.config = crystals, target, config
        self.folds = self._folds(config, target)
        self._order = np.argsort(np.array(crystals.graphs.keys))  # whatever the order of the file
        self._allowed = np.array([f not in seen for f in crystals.formulas], bool)

    @staticmethod
    def _folds(config: StudyConfig, target: str) -> Folds | None:
        split = config.data[config.targets[target].data].split
        return split if isinstance(split, Folds) else None

    def check(self, used: bool = False) -> None:
        """Whether there are crystals enough.

        Raises:
            StudyError: where a size is larger than the pool, or leaves nothing to choose a rate on.
        """
        sizes = self.config.sizes_of(self.target)
        least = min(len(self.pool(seed)) for seed in self.config.seeds)
        labels = self.crystals.labels[self.target]
        if least == 0:
            raise StudyError(
                f"targets.{self.target}: no crystal that may train has a label; is its column there, and of numbers?"
            )
        if self.config.targets[self.target].log and (bad := int((labels <= 0).sum())):
            raise StudyError(
                f"targets.{self.target}: its logarithm is to be learned, and {bad} labels are not above 0; say "
                "log: false, or drop these"
            )
        if sizes and sizes[-1] > least:
            raise StudyError(
                f"targets.{self.target}: {sizes[-1]} labels to learn from are asked for, and {least} crystals may "
                f"train; give it sizes of its own: targets.{self.target}.sizes=[…]"
            )
        if (sizes or used) and self.config.sweeps and not self.sweep_sizes():
            left = min(len(self.pool(seed)) for seed in self.config.sweep.seeds)
            hint = "; seeds on all folds leave none: report fewer, or give each arm one rate" if self.folds else ""
            raise StudyError(
                f"targets.{self.target}: no rate can be chosen with {left} crystals that are not evaluated; "
                f"sweep.sizes must leave {LEAST} of them{hint}"
            )
        if (sizes or used) and min(len(self.evaluated(seed)) for seed in self.config.seeds) == 0:
            raise StudyError(f"targets.{self.target}: no crystal to evaluate has a label")

    @functools.cache  # noqa: B019  few, and as long-lived as the study
    def pool(self, seed: int) -> Indices:
        """Crystals that may train: of the training part, or of all folds but the seed's, with a label.

        With folds, a seed of the sweep takes those that no seed of the study is evaluated on.
        """
        part = self.crystals.parts[self.target]
        if self.folds is None:
            return self._labeled(part == TRAIN)
        seeds = self.config.seeds if seed in self.config.sweep.seeds else (seed,)
        return self._labeled(~np.isin(part, [s % self.folds.k for s in seeds]))

    @functools.cache  # noqa: B019
    def evaluated(self, seed: int) -> Indices:
        """Those that every case is evaluated on: the same for all arms, sizes and, without folds, seeds."""
        part = self.crystals.parts[self.target]
        found = self._labeled(part == EVALUATE if self.folds is None else part == seed % self.folds.k)
        return np.sort(_shuffled(found, 0)[: self.config.evaluate_at_most])

    def split(self, cell: Cell) -> Split:
        """Who takes part in a cell.

        A rate is chosen on crystals of the pool that are not in the sample, and never on those evaluated.
        """
        order = _shuffled(self.pool(cell.seed), cell.seed)
        budget = self.budget(cell)
        train, val = hold_out(order[: cell.size], self.crystals.groups, budget.hold, cell.seed)
        if cell.kind == "sweep":
            return Split(train, val, order[cell.size :][: self.config.sweep.evaluate])
        tested = self.evaluated(cell.seed)
        if cell.kind == "predict":
            secret = (self.crystals.parts[self.target] == PREDICT) & self._allowed
            tested = np.concatenate([tested, np.flatnonzero(secret)])
        return Split(train, val, tested)

    def budget(self, cell: Cell) -> Any:
        """The budget of a cell's training."""
        predict = self.config.predict
        return predict.training if cell.kind == "predict" and predict else self.config.training

    def sweep_sizes(self) -> list[int]:
        """The sizes that rates are chosen at: those of the study that leave enough crystals to choose on."""
        most = min(len(self.pool(seed)) for seed in self.config.sweep.seeds) - LEAST
        return sorted(s for s in set(self.config.sweep.sizes) if s <= most)

    def sweep_size(self, size: int) -> int:
        """Whose rate a case takes."""
        return min(self.sweep_sizes(), key=lambda s: abs(math.log(s / size)))

    def _labeled(self, chosen: NDArray[np.bool_]) -> Indices:
        """Of the chosen crystals those with a label, in the order of their keys."""
        good = chosen & self._allowed & np.isfinite(self.crystals.labels[self.target])
        return self._order[good[self._order]]


def _shuffled(index: Indices, seed: int) -> Indices:
    return index[np.random.default_rng(seed).permutation(len(index))]


class Plan:
    """All cells of a study.

    Args:
        config: of the study.
        encoders: of each arm, one at least; all have one cutoff.
        crystals: of each data set, see ``study.data.prepare``.
        folder: of the study.
        seen: formulas that take no part.
    """

    def __init__(
        self,
        config: StudyConfig,
        encoders: dict[str, Pulled],
        crystals: dict[str, Path],
        folder: Path,
        seen: Collection[str] = (),
    ) -> None:
        self.config, self.encoders, self.crystals, self.folder = config, encoders, crystals, folder
        self.samples = {
            name: Samples(open_crystals(crystals[target.data]), name, config, seen)
            for name, target in config.targets.items()
        }
        self.vectors = {name: digest_of(probe.vectors) for name, probe in config.probes.items()}
        for name, samples in self.samples.items():
            samples.check(name in config.predict.targets if config.predict else False)

    def sweeps(self, errors: Mapping[Cell, float] | None = None) -> list[Cell]:
        """The trainings that rates are chosen by: of a case all rates on one seed, and the best of them on the others.

        One seed chooses roughly, and rates that are far off need no second (successive halving, arXiv:1502.07943).

        Args:
            errors: of those on the first seed, as far as they are known; others go no further.
        """
        errors = errors or {}
        first, *others = self.config.sweep.seeds
        wanted = dict.fromkeys(
            (cell.target, self.samples[cell.target].sweep_size(cell.size), cell.arm)
            for cell in self.cells()
            if cell.arm in self.config.arms and len(set(self.config.arms[cell.arm].rates)) > 1
        )
        cases = [
            [Cell("sweep", target, size, first, arm, rate) for rate in sorted(set(self.config.arms[arm].rates))]
            for target, size, arm in wanted
        ]
        found = [cell for case in cases for cell in case]
        for case in cases:
            ended = sorted((c for c in case if math.isfinite(errors.get(c, math.inf))), key=lambda c: errors[c])
            best = ended[: self.config.sweep.finalists]
            found += [replace(cell, seed=seed) for seed in others for cell in best]
        return found

    def cells(self) -> list[Cell]:
        """The trainings that are reported, without their rates: one seed after the other, the largest first."""
        arms: dict[str, tuple[int, ...] | None] = {name: arm.sizes for name, arm in self.config.arms.items()}
        arms |= dict.fromkeys(self.config.others)
        found = [
            Cell("study", target, size, seed, arm)
            for seed in self.config.seeds
            for target in self.config.targets
            for size in self.config.sizes_of(target)
            for arm, sizes in arms.items()
            if sizes is None or size in sizes
        ]
        found.sort(key=lambda cell: (self.config.seeds.index(cell.seed), -cell.size))
        predict = self.config.predict
        if predict:
            found += [
                Cell("predict", target, len(self.samples[target].pool(seed)), seed, arm)
                for seed in predict.seeds
                for target in predict.targets
                for arm in predict.arms
            ]
        return found

    def taking_part(self) -> list[str]:
        """Keys of all crystals that a reported cell reads, in order: a probe wants vectors of them."""
        found: set[str] = set()
        for target, size, seed in {(cell.target, cell.size, cell.seed) for cell in self.cells()}:
            samples = self.samples[target]
            split = samples.split(Cell("study", target, size, seed, self.config.reference))
            found.update(samples.crystals.graphs.keys[i] for part in (split.train, split.val, split.test) for i in part)
        return sorted(found)

    def job(self, cell: Cell) -> Job:
        """What computes a cell, and the digest of all that decides it."""
        config, samples = self.config, self.samples[cell.target]
        about = config.targets[cell.target]
        arm = config.arms.get(cell.arm)
        probe = config.probes.get(cell.arm)
        encoder = self.encoders.get(cell.arm) or next(iter(self.encoders.values()))
        card = encoder.card
        split, budget = samples.split(cell), samples.budget(cell)
        keys = samples.crystals.graphs.keys
        content: dict[str, Any] = {
            "version": VERSION,
            "code": "0.1.0",  # as the first cells have it; the version of the program decides nothing
            "data": samples.crystals.source,
            "cutoff": card.cutoff,
            "label": [config.data[about.data].column.format(target=cell.target), about.column, about.extensive]
            + ["log"] * about.log,
            "split": [_digest([keys[i] for i in part]) for part in (split.train, split.val, split.test)],
        }
        how = FineTuning(
            lr=cell.lr or 1.0,
            epochs=budget.epochs_of(max(len(split.train), 1)),
            batch_size=budget.batch_size,
            patience=budget.patience,
            weight_decay=budget.weight_decay,
            seed=cell.seed,
            freeze=card.model["blocks"] + 1 if arm and arm.frozen else 0,
            readout=arm.readout if arm else "set2set",
            compile=budget.compile,
        )
        if arm:
            shape = [card.model, card.centers, card.end, card.gamma]
            weights = "" if arm.start == "random" else card.weights_sha256  # another encoder leaves these cells alone
            settings = {name: value for name, value in asdict(how).items() if (name, value) not in BEFORE}
            content |= {"start": arm.start, "shape": shape, "weights": weights, "how": settings}
            content |= {"parts": sorted(arm.parts)} if arm.parts else {}
        elif probe:
            content["probe"] = [self.vectors[cell.arm], probe.composition]
        else:
            content["baseline"] = cell.arm
        digest = _digest(content)
        if probe:  # workers may stand elsewhere
            probe = probe.model_copy(update={"vectors": str(Path(probe.vectors).absolute())})
        out = self.folder / "cells" / f"{cell.name()}-{digest[:12]}.parquet"
        start, parts = (arm.start, arm.parts) if arm else ("", ())
        learned = about.learned(cell.target)
        return Job(cell, digest, out, self.crystals[about.data], encoder, start, parts, split, how, learned, probe)

    def with_rates(self, rates: dict[tuple[str, int, str], float]) -> Iterator[Cell]:
        """The reported cells for which a rate is known, with it."""
        for cell in self.cells():
            arm = self.config.arms.get(cell.arm)
            if arm is None:
                yield cell
            elif len(set(arm.rates)) == 1:
                yield replace(cell, lr=arm.rates[0])
            elif rate := rates.get((cell.target, self.samples[cell.target].sweep_size(cell.size), cell.arm)):
                yield replace(cell, lr=rate)


def choose_rates(errors: dict[Cell, float]) -> dict[tuple[str, int, str], float]:
    """Of the rates that ran on most seeds that with the lowest mean error: (target, sweep size, arm) → rate.

    One that diverged on any seed comes after all that never did.
    """
    found: dict[tuple[str, int, str], dict[float, list[float]]] = {}
    for cell, error in errors.items():
        found.setdefault((cell.target, cell.size, cell.arm), {}).setdefault(cell.lr, []).append(error)
    chosen = {}
    for case, by_rate in found.items():
        ended = {rate: values for rate, values in sorted(by_rate.items()) if np.isfinite(values).all()}
        if ended:
            chosen[case] = min(ended, key=lambda rate: (-len(ended[rate]), float(np.mean(ended[rate]))))
    return chosen


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
