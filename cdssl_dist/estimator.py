"""Fine-tuning as scikit-learn estimators.

>>> from cdssl_dist import CrystalRegressor  # doctest: +SKIP
>>> model = CrystalRegressor("models:/cdssl-encoder@champion").fit(structures, moduli)  # doctest: +SKIP
>>> model.predict(others)  # doctest: +SKIP
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from cdssl_dist.data.labeled import formulas_of
from cdssl_dist.data.structures import RefusedStructuresError, as_list, graphs_of
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.predictor import Prediction, Predictor, network_of, property_card, write_property
from cdssl_dist.finetune.splits import Split, hold_out
from cdssl_dist.finetune.targets import Array, Target, Task
from cdssl_dist.finetune.tuning import FineTuning, Member, check_members, fit
from cdssl_dist.mlops.model_card import write_model_card
from cdssl_dist.mlops.models import CHAMPION
from cdssl_dist.model.heads import ReadoutName
from sharding.graph import Multigraphs, concatenate


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """Base class of the regressor and the classifier.

    Args:
        encoder: ``models:/NAME@ALIAS``, a folder, or a ``CrystalEncoder``.
        registry_uri: URI of the MLflow server or SQLite file; see ``CrystalEncoder.from_registry``.
        epochs, batch_size, lr, patience, warmup, freeze, layer_decay, readout: see ``tuning.FineTuning``.
        members: number of networks in the ensemble.
        validation: fraction of the crystals, in whole formulas, held out for early stopping; if it is 0, or there are
            fewer than three formulas, the last weights are kept.
        random_state: seed, or None or a ``RandomState`` to draw a seed from.
    """

    def __init__(
        self,
        encoder: Any = CHAMPION,
        *,
        registry_uri: str | None = None,
        epochs: int = 60,
        batch_size: int = 32,
        lr: float = 1e-3,
        patience: int = 20,
        warmup: int = 0,
        freeze: int = 0,
        layer_decay: float = 1.0,
        readout: ReadoutName = "set2set",
        members: int = 1,
        validation: float = 0.1,
        random_state: Any = 0,
    ) -> None:
        self.encoder = encoder
        self.registry_uri = registry_uri
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.patience = patience
        self.warmup = warmup
        self.freeze = freeze
        self.layer_decay = layer_decay
        self.readout = readout
        self.members = members
        self.validation = validation
        self.random_state = random_state

    def _fit(self, structures: Any, targets: Array, task: Task) -> Self:
        how = FineTuning(
            lr=self.lr,
            epochs=self.epochs,
            batch_size=self.batch_size,
            patience=self.patience,
            warmup=self.warmup,
            freeze=self.freeze,
            layer_decay=self.layer_decay,
            readout=self.readout,
        )
        found = self.encoder
        if not isinstance(found, CrystalEncoder):
            found = CrystalEncoder.from_registry(str(found), self.registry_uri)
        items = as_list(structures)
        if len(items) != len(targets):
            raise ValueError(f"{len(items)} structures and {len(targets)} targets: each structure needs one target")
        graphs = _graphs(items, found.cutoff)
        formulas = formulas_of(graphs)
        check_members(self.members, self.readout)
        first = self.random_state
        if not isinstance(first, numbers.Integral):  # None, or a generator
            first = check_random_state(first).randint(2**31 - self.members)
        if first < 0:
            raise ValueError(f"random_state={first}: must not be negative")
        members: list[Member] = []
        for seed in range(int(first), int(first) + self.members):
            train, val = hold_out(np.arange(len(items)), formulas, self.validation, seed)
            own = FineTuning(**asdict(how) | {"seed": seed})
            split = Split(train, val, val[:0])
            members.append(fit(found.network, found.card.expansion, graphs, targets, split, task, own))
        self._keep(members, found, task, graphs, how)
        return self

    def _keep(
        self, members: Sequence[Member], encoder: CrystalEncoder, task: Task, graphs: Multigraphs, how: FineTuning
    ) -> None:
        ref = self.encoder if isinstance(self.encoder, str) else repr(encoder)
        own = property_card(encoder.card, ref, members, task, graphs, asdict(how) | {"members": self.members})
        networks = [network_of(own, task.outputs, own.readout) for _ in members]
        for network, member in zip(networks, members, strict=True):
            network.load_state_dict(member.weights)
        self.members_ = list(members)
        self.history_ = [member.history for member in members]
        self.predictor_ = Predictor(networks, [m.scaler for m in members], task, own)

    def _predict(self, structures: Any) -> Prediction:
        check_is_fitted(self, "predictor_")
        predictor = self.predictor_
        return predictor.predict(_graphs(as_list(structures), predictor.card.cutoff))

    def save(self, folder: str | Path) -> Path:
        """Write the fitted model, for ``cdssl predict --model FOLDER`` or ``registry.register``; nothing is pickled."""
        check_is_fitted(self, "predictor_")
        write_property(Path(folder), self.members_, self.predictor_.card)
        write_model_card(Path(folder))
        return Path(folder)

    def __sklearn_tags__(self) -> Any:
        """Declare that the input is a list of structures, not a table of numbers."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.non_deterministic = False
        return tags


class CrystalRegressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """Regression by fine-tuning an encoder; see ``_Estimator`` for the parameters."""

    __doc__ = f"Regression by fine-tuning an encoder.\n{(_Estimator.__doc__ or '').partition(chr(10))[2]}"

    def fit(
        self, X: Any, y: Any, *, per_atom: bool | Sequence[bool] = False, log: bool | Sequence[bool] = False
    ) -> Self:
        """Train.

        Args:
            X: structures, as ``CrystalEncoder.embed`` takes them.
            y: (n,) or (n, T) targets, NaN where missing.
            per_atom: whether a target is extensive, and learned per atom; one flag for all, or one per target.
            log: whether to learn the logarithm of a target (positive, long-tailed); one flag for all, or one each.

        Raises:
            RefusedStructuresError: if inputs are not ordered crystals; names their rows.
            TuningError: if a target has no label.
        """
        targets = np.asarray(y, np.float64)
        if not len(targets):
            raise ValueError("there are no structures")
        self.one_ = targets.ndim == 1
        targets = targets.reshape(len(targets), -1)
        flags = zip(
            *(_flags(n, f, targets.shape[1]) for n, f in {"per_atom": per_atom, "log": log}.items()), strict=True
        )
        targets = np.where(np.isfinite(targets), targets, np.nan)
        task = Task(tuple(Target(f"y{t}", "", *flag) for t, flag in enumerate(flags)))
        return self._fit(X, targets, task)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict.

        Args:
            X: structures.
            return_std: also return the standard deviation over the ensemble members.

        Returns:
            Predictions in the shape of ``y``, (n,) or (n, T); with ``return_std``, a pair of such arrays.
        """
        mean, std = self._predict(X)
        mean, std = (mean[:, 0], std[:, 0]) if self.one_ else (mean, std)
        return (mean, std) if return_std else mean


class CrystalClassifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """Classification by fine-tuning an encoder; see ``_Estimator`` for the parameters."""

    __doc__ = f"Classification by fine-tuning an encoder.\n{(_Estimator.__doc__ or '').partition(chr(10))[2]}"

    def fit(self, X: Any, y: Any) -> Self:
        """Train on structures and their classes, (n,): names or numbers, None or NaN if unknown.

        Raises:
            RefusedStructuresError: if inputs are not ordered crystals; names their rows.
        """
        given = list(y)  # not np.asarray(y): an array of strings would turn NaN into "nan"
        known = np.array([_is_known(v) for v in given], bool)
        labels = np.asarray([v for v, there in zip(given, known, strict=True) if there])
        self.classes_, found = np.unique(labels, return_inverse=True)
        index = np.full(len(given), np.nan)
        index[known] = found
        if len(self.classes_) < 2:
            raise ValueError(f"y holds {len(self.classes_)} class: at least 2 are needed")
        names = tuple(map(str, self.classes_.tolist()))
        return self._fit(X, index[:, None], Task((Target("y"),), names))

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probability of each of ``classes_``: (n, C)."""
        return self._predict(X).mean

    def predict(self, X: Any) -> NDArray[Any]:
        """The most probable class: (n,)."""
        chance = self.predict_proba(X)
        return np.asarray(self.classes_[chance.argmax(axis=1)])


def _is_known(value: Any) -> bool:
    try:
        return value is not None and bool(value == value)  # only NaN differs from itself
    except TypeError:  # pandas.NA has no truth value
        return False


def _flags(name: str, given: bool | Sequence[bool], targets: int) -> list[bool]:
    """One flag for each target."""
    flags = [bool(given)] * targets if isinstance(given, (bool, np.bool_)) else list(map(bool, given))
    if len(flags) != targets:
        raise ValueError(f"{len(flags)} values of {name} for {targets} targets")
    return flags


def _graphs(items: list[Any], cutoff: float) -> Multigraphs:
    refused: dict[int, str] = {}
    parts = list(graphs_of(items, cutoff, refused))
    if refused:
        raise RefusedStructuresError(refused, len(items), "leave these out")
    if not items:
        raise ValueError("there are no structures")
    return concatenate(parts)
