"""The cells of a study, each one training on one sample of one target, and the crystals in each sample.

Samples are nested: for one seed, the crystals of a size are among those of every larger one; all arms get the same.
Nothing is trained here. It is arithmetic on keys, so the choice of crystals can be tested in bulk.
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

VERSION: Final = 1  # of a cell: cells of other versions are computed again
LATER_DEFAULTS: Final = (("readout", "set2set"), ("compile", False))  # defaults of newer settings, left out of digests
MIN_CRYSTALS: Final = 20  # crystals needed to choose a rate


class StudyError(ValueError):
    """A study that cannot be done as configured; the message is one line."""


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
        """Name of the cell in messages and of its file."""
        rate = f"-{self.lr:g}" if self.kind == "sweep" else ""
        return f"{self.kind}-{self.target}-{self.size}-{self.seed}-{self.arm}{rate}"


@dataclass(frozen=True)
class Pulled:
    """An encoder on this machine's disk, or on one that all workers share."""

    folder: Path
    card: EncoderCard


@dataclass(frozen=True)
class Job:
    """Everything a process needs to compute a cell."""

    cell: Cell
    digest: str  # of everything that determines the result
    out: Path
    crystals: Path  # see ``study.data.prepare``
    encoder: Pulled
    start: str  # of the arm; "" for probes and baselines
    parts: tuple[str, ...]  # of the pretrained encoder that are kept; all if empty
    split: Split
    how: FineTuning
    target: Target
    probe: Probe | None = None

    def work(self, n_edges: NDArray[Any]) -> float:
        """Cost in directed edges that pass through the network; prediction counts as a third of training."""
        parts = (self.split.train, self.split.val, self.split.test)
        train, val, test = (2.0 * float(n_edges[part].sum()) for part in parts)
        return self.how.epochs * (train + val / 3) + test / 3 if self.start else 0.0


class Samples:
    """Which crystals are trained on and evaluated, for one target.

    Args:
        crystals: crystals of the target's data set.
        target: name of the target.
        config: configuration of the study.
        seen: formulas to leave out everywhere.
    """

    def __init__(self, crystals: StudyCrystals, target: str, config: StudyConfig, seen: Collection[str] = ()) -> None:
        self.crystals, self.target, self.config = crystals, target, config
        self.folds = self._folds(config, target)
        self._order = np.argsort(np.array(crystals.graphs.keys))  # independent of the order in the file
        self._allowed = np.array([f not in seen for f in crystals.formulas], bool)

    @staticmethod
    def _folds(config: StudyConfig, target: str) -> Folds | None:
        split = config.data[config.targets[target].data].split
        return split if isinstance(split, Folds) else None

    def check(self, used: bool = False) -> None:
        """Check that there are enough crystals, with usable labels.

        Args:
            used: whether ``predict`` uses the target, which may then have no sizes.

        Raises:
            StudyError: if a size is larger than the pool, too few crystals are left to choose a rate, or labels are
                missing or unusable.
        """
        sizes = self.config.sizes_of(self.target)
        least = min(len(self.pool(seed)) for seed in self.config.seeds)
        labels = self.crystals.labels[self.target]
        if least == 0:
            raise StudyError(
                f"targets.{self.target}: no crystal that may train has a label; does its column exist, with numbers?"
            )
        if self.config.targets[self.target].log and (bad := int((labels <= 0).sum())):
            raise StudyError(
                f"targets.{self.target}: its logarithm is to be learned, but {bad} labels are not above 0; set "
                "log: false, or drop these"
            )
        if sizes and sizes[-1] > least:
            raise StudyError(
                f"targets.{self.target}: a size of {sizes[-1]} labels is asked for, but only {least} crystals may "
                f"train; give it sizes of its own: targets.{self.target}.sizes=[…]"
            )
        if (sizes or used) and self.config.sweeps and not self.sweep_sizes():
            left = min(len(self.pool(seed)) for seed in self.config.sweep.seeds)
            hint = "; seeds on all folds leave none: use fewer, or give each arm one rate" if self.folds else ""
            raise StudyError(
                f"targets.{self.target}: no rate can be chosen with only {left} crystals that are not evaluated; "
                f"a size of sweep.sizes must leave {MIN_CRYSTALS} of them{hint}"
            )
        if (sizes or used) and min(len(self.evaluated(seed)) for seed in self.config.seeds) == 0:
            raise StudyError(f"targets.{self.target}: no crystal to evaluate has a label")

    @functools.cache  # noqa: B019  few, and as long-lived as the study
    def pool(self, seed: int) -> Indices:
        """Labeled crystals that may be trained on: the training part, or all folds but the seed's.

        With folds, a sweep seed gets the crystals on which no seed of the study is evaluated.
        """
        part = self.crystals.parts[self.target]
        if self.folds is None:
            return self._labeled(part == TRAIN)
        seeds = self.config.seeds if seed in self.config.sweep.seeds else (seed,)
        return self._labeled(~np.isin(part, [s % self.folds.k for s in seeds]))

    @functools.cache  # noqa: B019
    def evaluated(self, seed: int) -> Indices:
        """Crystals on which every case is evaluated: the same for all arms, sizes and, without folds, seeds."""
        part = self.crystals.parts[self.target]
        found = self._labeled(part == EVALUATE if self.folds is None else part == seed % self.folds.k)
        return np.sort(_shuffled(found, 0)[: self.config.evaluate_at_most])

    def split(self, cell: Cell) -> Split:
        """The crystals of a cell.

        A sweep evaluates on crystals of the pool outside the sample, never on those of the reported cells.
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
        """The sizes at which rates are chosen: those of ``sweep.sizes`` that leave enough crystals to choose on."""
        most = min(len(self.pool(seed)) for seed in self.config.sweep.seeds) - MIN_CRYSTALS
        return sorted(s for s in set(self.config.sweep.sizes) if s <= most)

    def sweep_size(self, size: int) -> int:
        """The sweep size whose rate a size uses: the nearest one, by its logarithm."""
        return min(self.sweep_sizes(), key=lambda s: abs(math.log(s / size)))

    def _labeled(self, chosen: NDArray[np.bool_]) -> Indices:
        """The chosen crystals that have a label and are not left out, in the order of their keys."""
        good = chosen & self._allowed & np.isfinite(self.crystals.labels[self.target])
        return self._order[good[self._order]]


def _shuffled(index: Indices, seed: int) -> Indices:
    return index[np.random.default_rng(seed).permutation(len(index))]


class Plan:
    """All cells of a study.

    Args:
        config: configuration of the study.
        encoders: encoder of each arm, at least one; all have the same cutoff.
        crystals: folder of each data set's crystals, see ``study.data.prepare``.
        folder: folder of the study.
        seen: formulas to leave out everywhere.
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
        """The trainings that choose the rates: per case, all rates on the first seed, and the best on the others.

        One seed is enough to drop rates that are far off (as in successive halving, arXiv:1502.07943).

        Args:
            errors: known errors of cells on the first seed; rates without one are not run on the other seeds.
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
        """The reported cells, without their rates: seed by seed, the largest size first."""
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
        """Sorted keys of all crystals in the splits of reported cells: a probe needs a vector for each."""
        found: set[str] = set()
        for target, size, seed in {(cell.target, cell.size, cell.seed) for cell in self.cells()}:
            samples = self.samples[target]
            split = samples.split(Cell("study", target, size, seed, self.config.reference))
            found.update(samples.crystals.graphs.keys[i] for part in (split.train, split.val, split.test) for i in part)
        return sorted(found)

    def job(self, cell: Cell) -> Job:
        """The job that computes a cell, with the digest of everything that determines the result."""
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
            "code": "0.1.0",  # fixed, so that a new version of the program keeps finished cells
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
            weights = "" if arm.start == "random" else card.weights_sha256  # another encoder keeps these cells valid
            settings = {name: value for name, value in asdict(how).items() if (name, value) not in LATER_DEFAULTS}
            content |= {"start": arm.start, "shape": shape, "weights": weights, "how": settings}
            content |= {"parts": sorted(arm.parts)} if arm.parts else {}
        elif probe:
            content["probe"] = [self.vectors[cell.arm], probe.composition]
        else:
            content["baseline"] = cell.arm
        digest = _digest(content)
        if probe:  # workers may have another working directory
            probe = probe.model_copy(update={"vectors": str(Path(probe.vectors).absolute())})
        out = self.folder / "cells" / f"{cell.name()}-{digest[:12]}.parquet"
        start, parts = (arm.start, arm.parts) if arm else ("", ())
        learned = about.learned(cell.target)
        return Job(cell, digest, out, self.crystals[about.data], encoder, start, parts, split, how, learned, probe)

    def with_rates(self, rates: dict[tuple[str, int, str], float]) -> Iterator[Cell]:
        """The reported cells whose rate is known (or that need none), with that rate."""
        for cell in self.cells():
            arm = self.config.arms.get(cell.arm)
            if arm is None:
                yield cell
            elif len(set(arm.rates)) == 1:
                yield replace(cell, lr=arm.rates[0])
            elif rate := rates.get((cell.target, self.samples[cell.target].sweep_size(cell.size), cell.arm)):
                yield replace(cell, lr=rate)


def choose_rates(errors: dict[Cell, float]) -> dict[tuple[str, int, str], float]:
    """Choose the rate with the lowest mean error of those that ran on most seeds: (target, sweep size, arm) → rate.

    A rate that diverged on any seed is never chosen.
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
