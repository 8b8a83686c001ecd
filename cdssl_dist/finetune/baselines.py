"""Baselines reported with every result: the median (or class frequencies), and a linear model on element fractions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from cdssl_dist.data.labeled import volume_per_atom
from cdssl_dist.finetune.linear import ALPHAS as ALPHAS_OF_VECTORS
from cdssl_dist.finetune.splits import Split
from cdssl_dist.finetune.targets import Array, Task
from cdssl_dist.model.megnet import N_ELEMENTS
from sharding.graph import Multigraphs

ALPHAS = np.logspace(-4, 2, 13)  # ridge penalties for element fractions, which lie between 0 and 1
UNSEEN = 0.01  # share of a classifier's probability given to the class frequencies, so that no class has none


def element_fractions(graphs: Multigraphs) -> Array:
    """Share of each element in each crystal: (n, 119)."""
    graph = np.repeat(np.arange(len(graphs)), graphs.n_atoms)
    counts = np.bincount(graph * N_ELEMENTS + graphs.atomic_numbers, minlength=len(graphs) * N_ELEMENTS)
    return counts.reshape(len(graphs), N_ELEMENTS) / graphs.n_atoms[:, None]


def simple_features(graphs: Multigraphs) -> Array:
    """Element fractions, and the volume per atom in Å³: (n, 120)."""
    return np.column_stack([element_fractions(graphs), volume_per_atom(graphs)])


def vector_ridge() -> Pipeline:
    """A ridge on standardised features, its penalty chosen by leaving out one crystal at a time."""
    return make_pipeline(StandardScaler(), RidgeCV(alphas=ALPHAS_OF_VECTORS))


def baselines(task: Task, graphs: Multigraphs, targets: Array, split: Split) -> dict[str, Array]:
    """Predict all crystals by every baseline: name → (n, T) in the units of the targets, or (n, C) probabilities."""
    fractions = element_fractions(graphs)
    if task.classes:
        return _of_classes(task, fractions, targets, split)
    median, ridge = np.empty_like(targets), np.empty_like(targets)
    for t, target in enumerate(task.targets):
        values = target.learned(targets[:, t], graphs.n_atoms)
        known = _known(split.train, values)
        found = np.full(len(graphs), np.median(values[known]))
        median[:, t] = target.restored(found, graphs.n_atoms)
        if len(known) >= 3:  # with fewer, no penalty can be chosen, and the ridge is the median
            found = RidgeCV(alphas=ALPHAS).fit(fractions[known], values[known]).predict(fractions)
        ridge[:, t] = target.restored(found, graphs.n_atoms)
    return {"median": median, "ridge on composition": ridge}


def _of_classes(task: Task, fractions: Array, targets: Array, split: Split) -> dict[str, Array]:
    known = _known(split.train, targets[:, 0])
    right = targets[known, 0].astype(np.int64)
    share = (np.bincount(right, minlength=len(task.classes)) + 0.5) / (len(right) + 0.5 * len(task.classes))
    frequent = np.tile(share, (len(fractions), 1))
    linear = frequent.copy()
    if len(np.unique(right)) > 1:
        model = LogisticRegression(C=100.0, max_iter=2000).fit(fractions[known], right)
        linear *= UNSEEN  # classes without training crystals keep some probability
        linear[:, model.classes_] += (1 - UNSEEN) * model.predict_proba(fractions)
    return {"frequencies": frequent, "logistic on composition": linear}


def _known(index: NDArray[np.int64], values: Array) -> NDArray[np.int64]:
    return index[np.isfinite(values[index])]
