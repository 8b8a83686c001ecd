"""A linear readout, solved on a frozen encoder: it takes seconds and needs no learning rate.

Fine-tuning is usually better; docs/results.md says where it is not.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.finetune.targets import Array
from cdssl_dist.model.embedding import embed_graphs
from cdssl_dist.model.heads import LinearReadout, PropertyModel
from sharding.graph import Multigraphs

ALPHAS: Final = np.logspace(-3, 5, 17)  # ridge penalties to choose from, for standardised vectors
INVERSE_PENALTY: Final = 0.1  # of the logistic regression
UNSEEN: Final = 0.01  # odds of a class without training crystals against the least likely other one, at the mean vector


def solve(model: PropertyModel, graphs: Multigraphs, wanted: Array, classes: int = 0) -> None:
    """Fit the linear readout of a model: a ridge whose penalty is chosen by leave-one-out, or a logistic regression.

    Args:
        model: its readout is set; its encoder is not changed.
        graphs: n training crystals.
        wanted: (n, T) standardised targets, NaN where missing, or (n, 1) class indices.
        classes: number of classes; 0 for regression.
    """
    readout = model.readout
    assert isinstance(readout, LinearReadout)
    vectors = embed_graphs(model.encoder, model.expansion, graphs).astype(np.float64)
    center, spread = vectors.mean(axis=0), vectors.std(axis=0)
    scale = np.where(spread > 1e-6 * np.abs(center), spread, math.inf)  # what hardly varies is noise in f32
    features = (vectors - center) / scale
    weight, bias = _logistic(features, wanted[:, 0], classes) if classes else _ridges(features, wanted)
    with torch.no_grad():
        for tensor, values in (
            (readout.center, center),
            (readout.scale, np.where(np.isinf(scale), 1.0, scale)),
            (readout.linear.weight, np.where(np.isinf(scale), 0.0, weight)),
            (readout.linear.bias, bias),
        ):
            tensor.copy_(torch.from_numpy(values))


def _ridges(features: Array, wanted: Array) -> tuple[Array, Array]:
    """Weights (T, F) and biases (T,)."""
    from sklearn.linear_model import RidgeCV  # a second to import, not needed to list models

    weight, bias = np.zeros((wanted.shape[1], features.shape[1])), np.zeros(wanted.shape[1])
    for t, column in enumerate(wanted.T):
        known = np.isfinite(column)
        if known.sum() < 3:  # too few to choose a penalty with
            bias[t] = column[known].mean()
            continue
        ridge = RidgeCV(alphas=ALPHAS).fit(features[known], column[known])
        weight[t], bias[t] = ridge.coef_, ridge.intercept_
    return weight, bias


def _logistic(features: Array, wanted: Array, classes: int) -> tuple[Array, Array]:
    """Weights (C, F) and biases (C,) of a softmax."""
    from sklearn.linear_model import LogisticRegression

    known = np.isfinite(wanted)
    right = wanted[known].astype(np.int64)
    seen: NDArray[np.int64] = np.unique(right)
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, -math.inf)
    bias[seen] = 0.0
    if len(seen) > 1:
        model = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000).fit(features[known], right)
        if len(seen) == 2:  # one row: log-odds of the second class
            weight[seen[1]], bias[seen[1]] = model.coef_[0], model.intercept_[0]
        else:
            weight[seen], bias[seen] = model.coef_, model.intercept_
    return weight, np.maximum(bias, bias[seen].min() + math.log(UNSEEN))
