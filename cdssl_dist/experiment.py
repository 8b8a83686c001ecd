"""A fine-tuning experiment: the pretrained network, the same from scratch, and baselines, on the same splits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.baselines import baselines
from cdssl_dist.export import EncoderCard
from cdssl_dist.heads import PropertyModel
from cdssl_dist.megnet import MEGNet
from cdssl_dist.predictor import network_of
from cdssl_dist.splits import Split
from cdssl_dist.targets import Array, Task
from cdssl_dist.tuning import FineTuning, Member, fit, outputs
from sharding.graph import Multigraphs

PRETRAINED, SCRATCH = "pretrained", "from scratch"


@dataclass(frozen=True)
class Outcome:
    """What came out. Only crystals that test have predictions: rows of the others are NaN."""

    predictions: dict[str, Array]  # arm → (n, T) or (n, C): the mean of its members
    deviations: dict[str, Array]  # arm with several members → the same shape
    fold: NDArray[np.int64]  # (n,): the split in which a crystal tests, −1 for none
    errors: dict[str, dict[str, float]]  # arm → metric → over all test crystals
    fold_errors: list[dict[str, dict[str, float]]]  # the same of each split
    members: dict[str, list[Member]]  # arm → its networks, over all splits

    def spread(self, arm: str, metric: str) -> float:
        """Standard error of the mean of a metric over the splits; NaN for one split."""
        values = [errors[arm][metric] for errors in self.fold_errors]
        return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


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
    tick: Callable[[str], None] = lambda arm: None,
) -> Outcome:
    """Train every arm on every split.

    Args:
        encoder, card: the pretrained network.
        graphs, targets: see ``tuning.fit``.
        task: what is learned.
        splits: one, or folds; a crystal tests in one of them at most.
        how: the training of the pretrained network; member i takes the seed ``how.seed + i``.
        scratch: that of the same network from scratch; None leaves it out.
        members: networks of an arm on each split, which differ by their seed.
        tick: called with the name of the arm after each epoch.
    """
    arms = {PRETRAINED: how} | ({SCRATCH: scratch} if scratch else {})
    fold = np.full(len(graphs), -1, np.int64)
    predictions: dict[str, Array] = {}
    deviations: dict[str, Array] = {}
    trained: dict[str, list[Member]] = {name: [] for name in arms}
    for number, split in enumerate(splits):
        if (fold[split.test] >= 0).any():
            raise ValueError("a crystal tests in two splits")
        fold[split.test] = number
        tested = graphs.take(split.test)
        for arm, settings in arms.items():
            each = []
            for i in range(members):
                own = replace(settings, seed=settings.seed + i)
                start = encoder if arm == PRETRAINED else new_encoder(card, own.seed)
                member = fit(start, card.expansion, graphs, targets, split, task, own, lambda arm=arm: tick(arm))  # type: ignore[misc]
                trained[arm].append(member)
                each.append(predict(member, card, tested, task))
            _fill(predictions, arm, split, np.mean(each, axis=0), len(graphs))
            if members > 1:
                _fill(deviations, arm, split, np.std(each, axis=0), len(graphs))
        for name, values in baselines(task, graphs, targets, split).items():
            _fill(predictions, name, split, values[split.test], len(graphs))
    every = np.flatnonzero(fold >= 0)
    errors = {arm: task.errors(targets[every], p[every]) for arm, p in predictions.items()}
    each_fold = [{arm: task.errors(targets[s.test], p[s.test]) for arm, p in predictions.items()} for s in splits]
    return Outcome(predictions, deviations, fold, errors, each_fold, trained)


def new_encoder(card: EncoderCard, seed: int) -> MEGNet:
    """A network of the same shape that has learned nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MEGNet(edge_features=card.centers, **card.model)


def permuted(encoder: MEGNet, seed: int) -> MEGNet:
    """A network with the weights of another, shuffled inside each tensor: their scale without what they learned."""
    shuffled = copy.deepcopy(encoder)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in shuffled.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=source)].view_as(weight))
    return shuffled


def predict(member: Member, card: EncoderCard, graphs: Multigraphs, task: Task) -> Array:
    """Predictions of one trained network, in the units of the targets."""
    network: PropertyModel = network_of(card, task.outputs)
    network.load_state_dict(member.weights)
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    return outputs(network, graphs, member.scaler, task)


def _fill(into: dict[str, Array], arm: str, split: Split, values: Array, n: int) -> None:
    into.setdefault(arm, np.full((n, values.shape[1]), np.nan))[split.test] = values
