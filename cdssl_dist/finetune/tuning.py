"""Training one network on labels: a function from an encoder, graphs and targets to weights. No files, no servers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from cdssl_dist.finetune.linear import solve
from cdssl_dist.finetune.splits import Indices, Split
from cdssl_dist.finetune.targets import Array, Scaler, Task
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.embedding import batch_of, parts
from cdssl_dist.model.heads import READOUTS, PropertyModel, ReadoutName
from cdssl_dist.model.megnet import MEGNet
from sharding.graph import Multigraphs

HALF_EDGES: Final = 65_536  # of one forward pass: a batch of large cells is cut, and its gradients are added


class TuningError(ValueError):
    """Labels that nothing can be learned from, or a training that went wrong: said in one line."""


class DivergedError(TuningError):
    """The loss, or every validation error, was not finite."""


@dataclass(frozen=True)
class FineTuning:
    """How a network is trained on labels."""

    lr: float = 1e-3
    epochs: int = 60  # at most
    batch_size: int = 32  # crystals
    patience: int = 20  # epochs without a better validation error
    warmup: int = 0  # epochs in which the readout alone learns
    freeze: int = 0  # stages of the encoder that stay as they are: 1 embedding and input layers, 2 the first block, …
    layer_decay: float = 1.0  # the rate of a stage is that of the next one times this
    weight_decay: float = 1e-5
    readout: ReadoutName = "set2set"  # linear: solved on the encoder as it is, and nothing of the above matters
    compile: bool = False  # by torch, for long trainings: a minute or so at first
    seed: int = 0
    threads: int = 1  # batches are small: more threads mostly wait for each other

    def __post_init__(self) -> None:
        """Raises TuningError for what cannot be."""
        for name in ("lr", "epochs", "batch_size", "patience", "layer_decay", "threads"):
            if not getattr(self, name) > 0:
                raise TuningError(f"{name} must be above 0, not {getattr(self, name)}")
        if min(self.warmup, self.freeze, self.weight_decay) < 0:
            raise TuningError("warmup, freeze and weight_decay must not be below 0")
        if self.readout not in READOUTS:
            raise TuningError(f"readout must be one of {', '.join(READOUTS)}, not {self.readout}")


def check_members(members: int, readout: ReadoutName) -> None:
    """Whether there can be an ensemble of so many networks.

    Raises:
        TuningError: where there can not.
    """
    if members < 1:
        raise TuningError(f"{members} members: one network at least answers")
    if members > 1 and readout == "linear":
        raise TuningError(f"{members} members: a linear readout is solved, and all of them would be the same")


@dataclass(frozen=True)
class Member:
    """One trained network."""

    weights: dict[str, Tensor]
    scaler: Scaler
    history: list[dict[str, float]]  # a line an epoch: epoch, loss (standardised), val (units of the targets), lr
    best: int  # the epoch whose weights these are
    readout: ReadoutName = "set2set"


def fit(
    encoder: MEGNet,
    expansion: GaussianExpansion,
    graphs: Multigraphs,
    targets: Array,
    split: Split,
    task: Task,
    how: FineTuning,
    tick: Callable[[], None] = lambda: None,
) -> Member:
    """Train an encoder with a new readout; the weights with the best validation error are kept.

    The loss is the absolute error of the standardised targets (the cross entropy of classes), over the labels that are
    there. Early stopping watches the error in the unit of the target; where there are several, the mean
    error of them as they are learned. Without validation crystals nothing is stopped, and the last weights are kept.
    A linear readout is solved instead, on the encoder as it is, and has a history of one line; nothing is stopped
    early, so that the validation crystals train, too.

    Args:
        encoder: pretrained or new; not changed.
        expansion: that it was trained with.
        graphs: n crystals, built with the encoder's cutoff.
        targets: (n, T), NaN where missing; (n, 1) indices of classes.
        split: only ``train`` and ``val`` are read.
        task, how: what and how.
        tick: called after each epoch.

    Raises:
        TuningError: where there is no label to learn from; ``DivergedError`` where the loss is no longer finite.
    """
    train = split.train[np.isfinite(targets[split.train]).any(axis=1)]
    val = split.val[np.isfinite(targets[split.val]).any(axis=1)]
    if len(train) == 0:
        raise TuningError("no training crystal has a label")
    n_atoms = graphs.n_atoms.astype(np.float64)
    try:
        scaler = Scaler.fit(task, targets[train], n_atoms[train])
    except ValueError as why:
        raise TuningError(str(why)) from None
    wanted = torch.from_numpy(scaler.forward(targets, n_atoms)).float()
    history: list[dict[str, float]] = []
    best, best_weights, best_epoch = math.inf, {}, 0

    with _quiet(how):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        own = copy.deepcopy(encoder).requires_grad_(True)
        model = PropertyModel(own, expansion, task.outputs, how.readout).to(device)
        if how.readout == "linear":
            tick()
            return _solved(model, graphs, targets, np.concatenate([train, val]), scaler, task)
        if how.compile:
            _compile(own)
        stages = stages_of(model)
        optimizer = _optimizer(stages, how)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
        shuffle = np.random.default_rng(how.seed)
        for epoch in range(how.epochs):
            for number, stage in enumerate(stages[:-1]):
                learns = epoch >= how.warmup and number >= how.freeze
                for weight in stage:
                    weight.requires_grad_(learns)
            model.train()
            total = 0.0
            for batch in _batches(shuffle.permutation(train), how.batch_size):
                optimizer.zero_grad()
                loss = _backward(model, graphs, batch, wanted, task)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss is {loss} in epoch {epoch}: a lower learning rate than {how.lr} helps"
                    )
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                total += loss * len(batch)
            line = {"epoch": float(epoch), "loss": total / len(train), "lr": optimizer.param_groups[-1]["lr"]}
            schedule.step()
            tick()
            error = math.nan
            if len(val):
                predicted = outputs(model, graphs.take(val), scaler, task)
                error = line["val"] = stopping_error(task, targets[val], predicted, scaler, n_atoms[val])
            history.append(line)
            if error < best or not len(val):
                best, best_epoch = error, epoch
                best_weights = {name: weight.clone() for name, weight in model.state_dict().items()}
            if len(val) and epoch - best_epoch >= how.patience:
                break
    if not best_weights:
        raise DivergedError("no validation error was ever finite: a lower learning rate may help")
    return Member({n: w.cpu() for n, w in best_weights.items()}, scaler, history, best_epoch, how.readout)


def _solved(
    model: PropertyModel, graphs: Multigraphs, targets: Array, train: Indices, scaler: Scaler, task: Task
) -> Member:
    """The member whose readout is solved, with a history of one line."""
    n_atoms = graphs.n_atoms.astype(np.float64)
    wanted = scaler.forward(targets[train], n_atoms[train])
    solve(model, graphs.take(train), wanted, len(task.classes))
    found = outputs(model, graphs.take(train), scaler, task)
    if task.classes:
        loss = task.errors(targets[train], found)["log_loss"]
    else:
        loss = float(np.nanmean(np.abs(scaler.forward(found, n_atoms[train]) - wanted)))
    line = {"epoch": 0.0, "loss": loss, "lr": 0.0}
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    return Member(weights, scaler, [line], 0, "linear")


def stopping_error(task: Task, true: Array, predicted: Array, scaler: Scaler, n_atoms: Array) -> float:
    """One number for early stopping: the error of the one target in its unit, or the mean of several as learned."""
    errors = task.errors(true, predicted)
    if task.classes:
        return errors["log_loss"]
    if len(task.targets) > 1:
        errors = task.errors(scaler.forward(true, n_atoms), scaler.forward(predicted, n_atoms))
    known = [error for error in errors.values() if not math.isnan(error)]
    return float(np.mean(known)) if known else math.nan


def stages_of(model: PropertyModel) -> list[list[nn.Parameter]]:
    """Weights by how near they are to the input: embedding and input layers, each block, the readout."""
    encoder = model.encoder
    blocks = [list(block.parameters()) for block in encoder.blocks]
    later = {id(weight) for block in blocks for weight in block}
    return [[w for w in encoder.parameters() if id(w) not in later], *blocks, list(model.readout.parameters())]


@torch.inference_mode()
def outputs(model: PropertyModel, graphs: Multigraphs, scaler: Scaler, task: Task) -> Array:
    """Predictions in the units of the targets, (n, T), or probabilities of the classes, (n, C)."""
    model.eval()
    device = next(model.parameters()).device
    rows = np.empty((len(graphs), task.outputs))
    for part in parts(graphs, HALF_EDGES):
        found = model(batch_of(graphs.take(part), device))[: len(part)].double()
        rows[part] = (found.softmax(dim=1) if task.classes else found).cpu().numpy()
    return rows if task.classes else scaler.back(rows, graphs.n_atoms)


def _backward(model: PropertyModel, graphs: Multigraphs, batch: Indices, wanted: Tensor, task: Task) -> float:
    """Add the gradients of the mean loss over the labels of a batch; large cells go through in parts."""
    device = next(model.parameters()).device
    labels = int(torch.isfinite(wanted[batch]).sum())
    chosen = graphs.take(batch)
    total = 0.0
    for part in parts(chosen, HALF_EDGES):
        predicted = model(batch_of(chosen.take(part), device))[: len(part)]
        target = wanted[batch[part]].to(device)
        known = torch.isfinite(target)
        if task.classes:
            right = torch.where(known[:, 0], target[:, 0], -100).long()
            loss = nn.functional.cross_entropy(predicted, right, ignore_index=-100, reduction="sum")
        else:
            loss = (predicted - target)[known].abs().sum()
        loss = loss / max(labels, 1)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _compile(encoder: MEGNet) -> None:
    from cdssl_dist.model.compiled import NoCompilerError, compile_encoder  # imports that others do without

    try:
        compile_encoder(encoder)
    except NoCompilerError as why:
        raise TuningError(f"compile: {why}") from None


def _optimizer(stages: list[list[nn.Parameter]], how: FineTuning) -> torch.optim.AdamW:
    top = len(stages) - 1
    if how.freeze > top:
        raise TuningError(f"freeze={how.freeze}: the encoder has {top} stages (input layers and {top - 1} blocks)")
    groups: list[dict[str, Any]] = [
        {"params": stage, "lr": how.lr * how.layer_decay ** (top - i)} for i, stage in enumerate(stages)
    ]
    return torch.optim.AdamW(groups, weight_decay=how.weight_decay, fused=True)


def _batches(order: Indices, size: int) -> Iterator[Indices]:
    for at in range(0, len(order), size):
        yield order[at : at + size]


@contextmanager
def _quiet(how: FineTuning) -> Iterator[None]:
    """Seed torch, and leave its generators and threads as they were.

    Denormal numbers are zeros meanwhile: where a network has come to say one number for all, its gradients and their
    moments fade into them, and a processor takes twice the time for a step.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        torch.set_num_threads(how.threads)
        torch.set_flush_denormal(True)
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            torch.set_num_threads(threads)
