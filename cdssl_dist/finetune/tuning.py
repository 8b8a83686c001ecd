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

HALF_EDGES: Final = 65_536  # of one forward pass: a batch of large cells is split, and its gradients are summed


class TuningError(ValueError):
    """Labels that cannot be learned, settings that are invalid, or a training that failed; the message is one line."""


class DivergedError(TuningError):
    """The loss, or every validation error, was not finite."""


@dataclass(frozen=True)
class FineTuning:
    """How a network is trained on labels."""

    lr: float = 1e-3
    epochs: int = 60  # at most
    batch_size: int = 32  # crystals
    patience: int = 20  # epochs without a better validation error
    warmup: int = 0  # first epochs, in which only the readout is trained
    freeze: int = 0  # frozen stages of the encoder: 1 embedding and input layers, 2 also the first block, …
    layer_decay: float = 1.0  # the learning rate of a stage is that of the next one times this
    weight_decay: float = 1e-5
    readout: ReadoutName = "set2set"  # linear: solved on the frozen encoder; the settings above do not apply
    compile: bool = False  # use torch.compile, for long trainings: it takes about a minute at first
    seed: int = 0
    threads: int = 1  # batches are small: more threads mostly wait for each other

    def __post_init__(self) -> None:
        """Raise TuningError for values that are out of range."""
        for name in ("lr", "epochs", "batch_size", "patience", "layer_decay", "threads"):
            if not getattr(self, name) > 0:
                raise TuningError(f"{name} must be above 0, not {getattr(self, name)}")
        if min(self.warmup, self.freeze, self.weight_decay) < 0:
            raise TuningError("warmup, freeze and weight_decay must not be below 0")
        if self.readout not in READOUTS:
            raise TuningError(f"readout must be one of {', '.join(READOUTS)}, not {self.readout}")


def check_members(members: int, readout: ReadoutName) -> None:
    """Check that an ensemble can have this many members.

    Raises:
        TuningError: if it cannot.
    """
    if members < 1:
        raise TuningError(f"{members} members: at least one is needed")
    if members > 1 and readout == "linear":
        raise TuningError(f"{members} members: a linear readout is solved, so all of them would be the same")


@dataclass(frozen=True)
class Member:
    """One trained network."""

    weights: dict[str, Tensor]
    scaler: Scaler
    history: list[dict[str, float]]  # one entry per epoch: epoch, loss (standardised), val (see ``stopping_error``), lr
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
    """Train an encoder with a new readout, and keep the weights with the best validation error.

    The loss is the mean absolute error of the standardised targets (for classes, the cross entropy) over the labels
    present. Early stopping watches ``stopping_error``. Without validation crystals, there is no early stopping, and the
    last weights are kept. A linear readout is solved instead, on the frozen encoder: its history has one entry, and
    since nothing is stopped early, it learns from the validation crystals, too.

    Args:
        encoder: pretrained or new; not changed.
        expansion: expansion of distances that the encoder was trained with.
        graphs: n crystals, built with the encoder's cutoff.
        targets: (n, T), NaN where missing, or (n, 1) class indices.
        split: only ``train`` and ``val`` are read.
        task: what is learned.
        how: settings of the training.
        tick: called after each epoch.

    Raises:
        TuningError: if there is no label to learn from.
        DivergedError: if the loss, or every validation error, is not finite.
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
                        f"the loss is {loss} in epoch {epoch}: use a learning rate that is lower than {how.lr}"
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
    """Solve the linear readout; return the member, with a history of one entry."""
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
    """The error that early stopping watches: of a single target in its unit, or the mean over several as learned."""
    errors = task.errors(true, predicted)
    if task.classes:
        return errors["log_loss"]
    if len(task.targets) > 1:
        errors = task.errors(scaler.forward(true, n_atoms), scaler.forward(predicted, n_atoms))
    known = [error for error in errors.values() if not math.isnan(error)]
    return float(np.mean(known)) if known else math.nan


def stages_of(model: PropertyModel) -> list[list[nn.Parameter]]:
    """Weights in stages, from input to output: embedding and input layers, each block, the readout."""
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
    """Accumulate the gradients of a batch's mean loss over its labels, large batches in parts; return the loss."""
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
    from cdssl_dist.model.compiled import NoCompilerError, compile_encoder  # imported only if needed

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

    Denormal numbers are flushed to zero meanwhile: once a network predicts the same number for all crystals, its
    gradients and Adam's moments decay into denormals, and a step takes a CPU twice as long.
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
