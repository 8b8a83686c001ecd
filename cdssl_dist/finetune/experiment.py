"""A fine-tuning experiment: the pretrained network, the same from scratch, and baselines, on the same splits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.finetune.baselines import baselines
from cdssl_dist.finetune.predictor import network_of
from cdssl_dist.finetune.splits import Split
from cdssl_dist.finetune.targets import Array, Task
from cdssl_dist.finetune.tuning import FineTuning, Member, TuningError, check_members, fit, outputs
from cdssl_dist.finetune.uncertainty import Uncertainty, factor, measured
from cdssl_dist.model.export import EncoderCard
from cdssl_dist.model.heads import PropertyModel
from cdssl_dist.model.megnet import MEGNet
from sharding.graph import Multigraphs

PRETRAINED, SCRATCH, LINEAR = "pretrained", "from scratch", "linear on frozen vectors"
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # like the builtin ``map``, or ``Executor.map``


@dataclass(frozen=True)
class Outcome:
    """Results of an experiment. Only test crystals have predictions; the rows of all others are NaN."""

    predictions: dict[str, Array]  # arm → (n, T) or (n, C): the mean of its members
    deviations: dict[str, Array]  # arm with several members → standard deviation between them, same shape
    fold: NDArray[np.int64]  # (n,): the split in which a crystal is tested, −1 for none
    errors: dict[str, dict[str, float]]  # arm → metric → value over all test crystals
    fold_errors: list[dict[str, dict[str, float]]]  # the same for each split
    members: dict[str, list[Member]]  # arm → its networks, over all splits
    uncertainty: dict[str, Uncertainty] = field(default_factory=dict)  # target → calibration; of an ensemble only

    def spread(self, arm: str, metric: str) -> float:
        """Standard error of the mean of a metric over the splits; NaN for one split."""
        values = [errors[arm][metric] for errors in self.fold_errors]
        return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Problem:
    """What all trainings of an experiment share; each is one call of ``train``, in this process or another."""

    encoder: MEGNet
    card: EncoderCard
    graphs: Multigraphs
    targets: Array
    task: Task
    splits: tuple[Split, ...]
    arms: dict[str, FineTuning]

    def train(self, which: tuple[int, str, int], tick: Callable[[], None] = lambda: None) -> tuple[Member, Array]:
        """Train one network.

        Args:
            which: the number of the split, the arm, and the number of the member.
            tick: called after each epoch.

        Returns:
            The network, and its predictions for the validation crystals of the split, then for its test crystals.
        """
        number, arm, i = which
        split, settings = self.splits[number], self.arms[arm]
        how = replace(settings, seed=settings.seed + i)
        start = self.encoder if arm == PRETRAINED else new_encoder(self.card, how.seed)
        try:
            member = fit(start, self.card.expansion, self.graphs, self.targets, split, self.task, how, tick)
        except TuningError as why:
            raise type(why)(f"{arm}: {why}") from None
        held = [predict(member, self.card, self.graphs.take(part), self.task) for part in (split.val, split.test)]
        return member, np.concatenate(held)


def compare(
    encoder: MEGNet,
    card: EncoderCard,
    graphs: Multigraphs,
    targets: Array,
    task: Task,
    splits: Sequence[Split],
    how: FineTuning,
    scratch: FineTuning | None = None,
    members: int = 1,
    tick: Callable[[], None] = lambda: None,
    elsewhere: Map | None = None,
) -> Outcome:
    """Train every arm on every split.

    Args:
        encoder, card: the pretrained network.
        graphs, targets: see ``tuning.fit``.
        task: what is learned.
        splits: one split, or folds; no crystal may be tested in two of them.
        how: settings of the pretrained network; member i uses the seed ``how.seed + i``.
        scratch: settings of the same network trained from scratch; None leaves it out.
        members: networks per arm and split, which differ only in their seed.
        tick: called after each epoch.
        elsewhere: a map that trains in other processes, with the same results; by default, networks are trained here
            one after the other.

    Raises:
        ValueError: if a crystal is tested in two splits.
        TuningError: if a training fails; the message names the arm.
    """
    check_members(members, how.readout)
    arms = {PRETRAINED: how} | ({SCRATCH: scratch} if scratch else {})
    fold = np.full(len(graphs), -1, np.int64)
    for number, split in enumerate(splits):
        if (fold[split.test] >= 0).any():
            raise ValueError("a crystal is tested in two splits")
        fold[split.test] = number
    problem = Problem(encoder, card, graphs, targets, task, tuple(splits), arms)
    which = [(number, arm, i) for number in range(len(splits)) for arm in arms for i in range(members)]
    trained: dict[str, list[Member]] = {name: [] for name in arms}
    said: dict[tuple[int, str], list[Array]] = {}
    for (number, arm, _), (member, predicted) in zip(which, _trained(problem, which, tick, elsewhere), strict=True):
        trained[arm].append(member)
        said.setdefault((number, arm), []).append(predicted)

    predictions: dict[str, Array] = {}
    deviations: dict[str, Array] = {}
    for (number, arm), each in said.items():
        split = splits[number]
        _fill(predictions, arm, split, np.mean(each, axis=0)[len(split.val) :], len(graphs))
        if members > 1:
            _fill(deviations, arm, split, np.std(each, axis=0)[len(split.val) :], len(graphs))
    for split in splits:
        if how.readout != "linear":  # otherwise this baseline is the pretrained arm itself
            solved = fit(encoder, card.expansion, graphs, targets, split, task, replace(how, readout="linear"))
            _fill(predictions, LINEAR, split, predict(solved, card, graphs.take(split.test), task), len(graphs))
        for name, values in baselines(task, graphs, targets, split.merge_val()).items():
            _fill(predictions, name, split, values[split.test], len(graphs))
    every = np.flatnonzero(fold >= 0)
    errors = {arm: task.errors(targets[every], p[every]) for arm, p in predictions.items()}
    each_fold = [{arm: task.errors(targets[s.test], p[s.test]) for arm, p in predictions.items()} for s in splits]
    ensembles = [said[number, PRETRAINED] for number in range(len(splits))] if members > 1 and not task.classes else []
    worth = _uncertainty(task, targets, splits, ensembles) if ensembles else {}
    return Outcome(predictions, deviations, fold, errors, each_fold, trained, worth)


def _trained(
    problem: Problem, which: Sequence[tuple[int, str, int]], tick: Callable[[], None], elsewhere: Map | None
) -> Iterator[tuple[Member, Array]]:
    if elsewhere is None:
        yield from (problem.train(one, tick) for one in which)
        return
    for member, predicted in elsewhere(problem.train, which):
        for _ in member.history:
            tick()
        yield member, predicted


def _uncertainty(
    task: Task, targets: Array, splits: Sequence[Split], ensembles: Sequence[Sequence[Array]]
) -> dict[str, Uncertainty]:
    """Calibrate the deviations of the ensembles (one per split) and check them on test crystals, for each target."""
    found = {}
    for t, target in enumerate(task.targets):
        held: list[tuple[Array, Array]] = []  # errors and deviations of validation crystals
        tested: list[tuple[Array, Array, Array]] = []  # the same for test crystals, with the factor of their split
        for split, each in zip(splits, ensembles, strict=True):
            labels = targets[np.concatenate([split.val, split.test]), t]
            off = np.abs(np.mean(each, axis=0)[:, t] - labels)
            std, n = np.std(each, axis=0)[:, t], len(split.val)
            held.append((off[:n], std[:n]))
            tested.append((off[n:], std[n:], np.full(len(split.test), factor(*held[-1]))))
        overall = factor(np.concatenate([off for off, _ in held]), np.concatenate([std for _, std in held]))
        off, std, factors = (np.concatenate(parts) for parts in zip(*tested, strict=True))
        found[target.name] = measured(off, std, factors, overall)
    return found


def new_encoder(card: EncoderCard, seed: int) -> MEGNet:
    """Create a network of the same shape with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MEGNet(edge_features=card.centers, **card.model)


def permuted(encoder: MEGNet, seed: int) -> MEGNet:
    """Copy a network with the weights shuffled within each tensor: their scale is kept, what they learned is not."""
    shuffled = copy.deepcopy(encoder)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in shuffled.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=source)].view_as(weight))
    return shuffled


def predict(member: Member, card: EncoderCard, graphs: Multigraphs, task: Task) -> Array:
    """Predict by one trained network, in the units of the targets (or class probabilities)."""
    network: PropertyModel = network_of(card, task.outputs, member.readout)
    network.load_state_dict(member.weights)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return outputs(network, graphs, member.scaler, task)


def _fill(into: dict[str, Array], arm: str, split: Split, values: Array, n: int) -> None:
    into.setdefault(arm, np.full((n, values.shape[1]), np.nan))[split.test] = values
