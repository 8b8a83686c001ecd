"""What is learned from labels: targets and classes, their scaling, and the errors of predictions.

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
    """One property to predict.

    An extensive target (a total energy, the heat capacity of a whole cell) is divided by the number of atoms before it
    is learned and multiplied again afterwards, because the network pools means, which do not grow with the cell. For a
    positive target with a long tail (a dielectric constant), the logarithm is learned; otherwise, a few large labels
    would set the scale for all. The absolute error still fits: it is minimised by the median, and the median of the
    logarithm is the logarithm of the median.
    """

    name: str
    unit: str = ""
    per_atom: bool = False
    log: bool = False

    def learned(self, values: Array, n_atoms: NDArray[Any]) -> Array:
        """Convert values in the target's unit to what is learned: (n,), (n,) → (n,); NaN if there is no logarithm."""
        values = values / n_atoms if self.per_atom else values
        return np.log(np.where(values > 0, values, np.nan)) if self.log else values

    def restored(self, learned: Array, n_atoms: NDArray[Any]) -> Array:
        """Invert ``learned``: (n,), (n,) → (n,)."""
        with np.errstate(over="ignore"):  # infinite values are noticed where they are used
            values = np.exp(learned) if self.log else learned
        return values * n_atoms if self.per_atom else values


@dataclass(frozen=True)
class Task:
    """Regression of one or several targets, or classification of one."""

    targets: tuple[Target, ...]
    classes: tuple[str, ...] = ()  # empty: regression

    @property
    def outputs(self) -> int:
        """Columns of a prediction: T, or C."""
        return len(self.classes) or len(self.targets)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of these columns."""
        return self.classes or tuple(t.name for t in self.targets)

    @staticmethod
    def read(content: dict[str, Any]) -> Task:
        """Restore a task from the result of ``dataclasses.asdict``."""
        return Task(tuple(Target(**t) for t in content["targets"]), tuple(content["classes"]))

    def errors(self, true: Array, predicted: Array) -> dict[str, float]:
        """Errors of predictions, in the units of the targets.

        Args:
            true: (n, T), or (n, 1) class indices.
            predicted: (n, T), or (n, C) probabilities.

        Returns:
            Regression: the mean absolute error by name of target. Classification: ``log_loss`` (nats) and ``accuracy``.
            NaN if there is no label; a mean absolute error is infinite if a prediction is not finite.
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
    """Converts between targets in their units and what the network learns: see ``Target``; then mean 0, deviation 1."""

    center: Array  # (T,)
    scale: Array  # (T,)
    targets: tuple[Target, ...]

    @staticmethod
    def fit(task: Task, targets: Array, n_atoms: NDArray[Any]) -> Scaler:
        """Fit to the labels of the training crystals; a constant target gets the scale 1.

        Raises:
            ValueError: if a target has no label at all, or its logarithm is learned and a label is not above 0.
        """
        if task.classes:
            return Scaler(np.zeros(1), np.ones(1), task.targets)
        for target, column in zip(task.targets, targets.T, strict=True):
            known = column[np.isfinite(column)]
            if not len(known):
                raise ValueError(f"no training crystal has a label of {target.name}, so it cannot be learned")
            if target.log and not (known > 0).all():
                raise ValueError(
                    f"the logarithm of {target.name} is to be learned, but {(known <= 0).sum()} of {len(known)} labels "
                    f"are not above 0 (the smallest is {known.min():g}); learn it without logarithm, or drop these"
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
