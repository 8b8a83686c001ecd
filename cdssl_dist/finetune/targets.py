"""What is learned from labels: which targets there are, how they are scaled, and how far a prediction is off.

Shapes: n crystals, T targets, C classes. A missing label is NaN.
"""

from __future__ import annotations

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
    """

    name: str
    unit: str = ""
    per_atom: bool = False


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

    @property
    def metric(self) -> str:
        """What early stopping watches; smaller is better."""
        return "log_loss" if self.classes else "mae"

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
            NaN where nothing is known.
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
        return {
            t.name: float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else np.nan
            for t, column in zip(self.targets, off.T, strict=True)
        }


@dataclass(frozen=True)
class Scaler:
    """Between targets in their units and what the network learns: per atom where asked, mean 0, deviation 1."""

    center: Array  # (T,)
    scale: Array  # (T,)
    per_atom: NDArray[np.bool_]  # (T,)

    @staticmethod
    def fit(task: Task, targets: Array, n_atoms: NDArray[Any]) -> Scaler:
        """From the labels of the training crystals; a constant target keeps the scale 1.

        Raises:
            ValueError: where a target has no label at all.
        """
        per_atom = np.array([t.per_atom for t in task.targets])
        values = targets / _divisor(per_atom, n_atoms)
        if task.classes:
            return Scaler(np.zeros(1), np.ones(1), per_atom)
        without = [t.name for t, column in zip(task.targets, values.T, strict=True) if not np.isfinite(column).any()]
        if without:
            raise ValueError(f"no training crystal has a label of {', '.join(without)}: nothing can be learned of it")
        center, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        constant = spread <= 1e-12 * np.maximum(np.abs(center), 1e-300)
        return Scaler(center, np.where(constant, 1.0, spread), per_atom)

    def forward(self, targets: Array, n_atoms: NDArray[Any]) -> Array:
        """Units → network: (n, T) → (n, T)."""
        return (targets / _divisor(self.per_atom, n_atoms) - self.center) / self.scale

    def back(self, outputs: Array, n_atoms: NDArray[Any]) -> Array:
        """Network → units: (n, T) → (n, T)."""
        return (outputs * self.scale + self.center) * _divisor(self.per_atom, n_atoms)


def _divisor(per_atom: NDArray[np.bool_], n_atoms: NDArray[Any]) -> Array:
    return np.where(per_atom, n_atoms[:, None].astype(np.float64), 1.0)
