"""What is learned from labels: which targets there are, how they are scaled, and how far a prediction is off.

Shapes: n crystals, T targets, C classes. A missing label is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """One thing to predict.

    A target that grows with the cell (a heat capacity of the whole cell, a total energy) is divided by the number of
    atoms before it is learned and multiplied again afterwards: what the network pools are means, which do not grow.
    Of a positive target with a long tail (a dielectric constant) the logarithm is learned: few large labels would
    otherwise set the scale for all. The median of a logarithm is the logarithm of the median, which an absolute error
    asks for.
    """

    name: str
    unit: str = ""
    per_atom: bool = False
    log: bool = False

    def learned(self, values: Array, n_atoms: NDArray[Any]) -> Array:
        """What is learned of values in the target's unit: (n,), (n,) → (n,); NaN where there is no logarithm."""
        values = values / n_atoms if self.per_atom else values
        return np.log(np.where(values > 0, values, np.nan)) if self.log else values

    def restored(self, learned: Array, n_atoms: NDArray[Any]) -> Array:
        """The values again: (n,), (n,) → (n,)."""
        with np.errstate(over="ignore"):  # what is not finite is found where it is used
            values = np.exp(learned) if self.log else learned
        return values * n_atoms if self.per_atom else values


@dataclass(frozen=True)
class Task:
    """Regression of one or several targets, or classification by one."""

    targets: tuple[Target, ...]
    classes: tuple[str, ...] = ()  # none: regression

    @property
    def outputs(self) -> int:
        """Columns of a prediction: T, or C."""
        return len(self.classes) or len(self.targets)

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return self.classes or tuple(t.name for t in self.targets)

    @staticmethod
    def read(content: dict[str, Any]) -> Task:
        """From what ``dataclasses.asdict`` made of it."""
        return Task(tuple(Target(**t) for t in content["targets"]), tuple(content["classes"]))

    def errors(self, true: Array, predicted: Array) -> dict[str, float]:
        """How far predictions are off, in the units of the targets.

        Args:
            true: (n, T), or (n, 1) indices of classes.
            predicted: (n, T), or (n, C) probabilities.

        Returns:
            Regression: the mean absolute error by name of target. Classification: ``log_loss`` (nats) and ``accuracy``.
            NaN where nothing is known, infinite where a prediction is not finite.
        """
        if self.classes:
            known = np.isfinite(true[:, 0])
            if not known.any():
                return {"log_loss": np.nan, "accuracy": np.nan}
            right = true[known, 0].astype(np.int64)
            chance = predicted[known, right]
            hits = predicted[known].argmax(axis=1) == right
            return {"log_loss": float(-np.log(np.maximum(chance, 1e-12)).mean()), "accuracy": float(hits.mean())}
        off = np.abs(predicted - true)
        off[np.isfinite(true) & ~np.isfinite(off)] = np.inf
        return {
            t.name: float(column[known].mean()) if known.any() else np.nan
            for t, column, known in zip(self.targets, off.T, np.isfinite(true).T, strict=True)
        }


@dataclass(frozen=True)
class Scaler:
    """Between targets in their units and what the network learns: as each target wants it, mean 0, deviation 1."""

    center: Array  # (T,)
    scale: Array  # (T,)
    targets: tuple[Target, ...]

    @staticmethod
    def fit(task: Task, targets: Array, n_atoms: NDArray[Any]) -> Scaler:
        """From the labels of the training crystals; a constant target keeps the scale 1.

        Raises:
            ValueError: where a target has no label at all, or one without a logarithm where that is learned.
        """
        if task.classes:
            return Scaler(np.zeros(1), np.ones(1), task.targets)
        for target, column in zip(task.targets, targets.T, strict=True):
            known = column[np.isfinite(column)]
            if not len(known):
                raise ValueError(f"no training crystal has a label of {target.name}: nothing can be learned of it")
            if target.log and not (known > 0).all():
                raise ValueError(
                    f"the logarithm of {target.name} is to be learned, and {(known <= 0).sum()} of {len(known)} labels "
                    f"are not above 0, the smallest {known.min():g}; learn it as it is, or drop these"
                )
        values = _by_target(Target.learned, task.targets, targets, n_atoms)
        center, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        constant = spread <= 1e-12 * np.maximum(np.abs(center), 1e-300)
        return Scaler(center, np.where(constant, 1.0, spread), task.targets)

    def forward(self, targets: Array, n_atoms: NDArray[Any]) -> Array:
        """Units → network: (n, T) → (n, T)."""
        return (_by_target(Target.learned, self.targets, targets, n_atoms) - self.center) / self.scale

    def back(self, outputs: Array, n_atoms: NDArray[Any]) -> Array:
        """Network → units: (n, T) → (n, T)."""
        return _by_target(Target.restored, self.targets, outputs * self.scale + self.center, n_atoms)


def _by_target(
    change: Callable[[Target, Array, NDArray[Any]], Array],
    targets: tuple[Target, ...],
    values: Array,
    n_atoms: NDArray[Any],
) -> Array:
    columns = zip(targets, values.T, strict=True)
    return np.stack([change(target, column, n_atoms) for target, column in columns], axis=1)
