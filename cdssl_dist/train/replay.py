"""Replay of one step: the packs and crystals it held, and what each contributed to the loss and the gradient.

Runs in plain torch on this machine, without Ray or DeepSpeed, with the weights of the newest committed checkpoint at
or before the step. Nothing is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from cdssl_dist.config import Config, load
from cdssl_dist.data.batch import GraphBatch, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.model.megnet import segment_sum
from cdssl_dist.model.pretext import Denoising
from cdssl_dist.train.checkpoint import CheckpointError, newest, opened
from cdssl_dist.train.ledger import Ledger
from cdssl_dist.train.setup import model_and_task, plan_of
from sharding.block import decode

WORST: Final = 5  # crystals that are listed


@dataclass(frozen=True)
class PackReport:
    """The contribution of one pack to the step."""

    pack: int
    blocks: list[int]
    edges: int  # scored
    loss: float  # per scored edge of the pack
    norm: float  # gradient norm of its part of the step's loss
    graphs: list[tuple[str, float]]  # key and squared error per scored edge; non-finite ones first, then the largest


@dataclass(frozen=True)
class Replay:
    """A recomputed step."""

    step: int
    weights_of: int  # cursor of the checkpoint
    loss: float  # of the step
    norm: float  # of its gradient
    packs: list[PackReport]

    @property
    def worst(self) -> PackReport:
        """The pack with the largest gradient norm; a non-finite one before all others."""
        return max(self.packs, key=lambda p: math.inf if not math.isfinite(p.norm) else p.norm)


def parse_place(text: str) -> tuple[Path, int]:
    """Parse ``RUN:STEP``.

    Raises:
        CheckpointError: if it is anything else.
    """
    run, colon, step = text.rpartition(":")
    if not colon or not run or not step.isdecimal():
        raise CheckpointError(f"{text!r}: give RUN:STEP, e.g. runs/mp:1234 (events.jsonl names steps)")
    return Path(run), int(step)


def replay(run: Path, step: int) -> Replay:
    """Recompute a step.

    Raises:
        CheckpointError: if the folder is not a run, there is no such step, or no committed checkpoint at or before it,
            or the data set is another one.
    """
    if not (run / "config.yaml").exists():
        raise CheckpointError(f"{run}: not the folder of a run (no config.yaml)")
    config = load(run / "config.yaml")
    if step >= config.schedule.steps:
        raise CheckpointError(f"{run}: step {step} is not one of its {config.schedule.steps} steps")
    found = newest(run / "checkpoints", Ledger.read(run), before=step)
    if found is None:
        raise CheckpointError(f"{run}: no committed checkpoint at or before step {step} is left")
    data = DataSet(config.data_path)
    if data.manifest.digest != found.progress.data_digest:
        raise CheckpointError(f"{config.data_path}: not the data set that {found.folder} was trained on")
    model, task = _model_and_task(config, data.manifest.cutoff, found.folder)
    plan = plan_of(config, data)
    total = max(plan.edges_of(step), 1)

    gradient = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    packs = []
    for lane, entries in enumerate(plan.step(step)):
        batch = widen(data.pack(entries, plan.table, None))
        squared = _squared_by_graph(task, model, batch)
        model.zero_grad()
        (squared.sum() / total).backward()  # type: ignore[no-untyped-call]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        for sum_, g in zip(gradient, grads, strict=True):
            sum_ += g
        blocks = [int(plan.table.block[e.index]) for e in entries]
        keys = [key for block in blocks for key in decode(data.read(block)).keys]
        scored = segment_sum(batch.scored[:, None].float(), batch.graph_of_edge, batch.n_graphs)[:, 0]
        each = (squared.detach() / scored.clamp(min=1)).tolist()
        order = sorted(range(len(keys)), key=lambda i: -math.inf if not math.isfinite(each[i]) else -each[i])
        edges = int(batch.scored.sum())
        packs.append(
            PackReport(
                pack=lane,
                blocks=blocks,
                edges=edges,
                loss=float(squared.detach().sum()) / max(edges, 1),
                norm=float(torch.nn.utils.get_total_norm(grads)),
                graphs=[(keys[i], each[i]) for i in order],
            )
        )
    loss = sum(p.loss * p.edges for p in packs) / total
    return Replay(step, found.progress.cursor, loss, float(torch.nn.utils.get_total_norm(gradient)), packs)


def _squared_by_graph(task: Denoising, model: nn.Module, batch: GraphBatch) -> Tensor:
    """Sum of squared errors over the scored edges of each graph: (G,). Loss terms of options are omitted."""
    noisy, clean = task.distances(batch)
    target = task.expand(clean).index_select(0, batch.half)
    predicted, *_ = task.recovered(model, task.expand(noisy), clean, batch)
    error = (predicted - target) * batch.scored[:, None]
    return segment_sum(error.square().sum(dim=1, keepdim=True), batch.graph_of_edge, batch.n_graphs)[:, 0]


def _model_and_task(config: Config, cutoff: float, folder: Path) -> tuple[nn.Module, Denoising]:
    plain = config.engine.model_copy(update={"compile": False, "kernels": "torch", "recompute": False})
    model, task = model_and_task(config.model_copy(update={"engine": plain}), torch.device("cpu"), cutoff)
    own = dict(model.named_parameters())
    with torch.no_grad(), opened(folder) as where:
        if missing := [name for name in own if f"weight/{name}" not in where]:
            raise CheckpointError(f"{folder}: weights are missing: {', '.join(missing)}")
        for name, weight in own.items():
            weight.copy_(where[f"weight/{name}"].get_tensor(f"weight/{name}"))
    return (model.to(torch.bfloat16) if config.engine.precision == "bf16" else model), task


def table(found: Replay) -> str:
    """Format a replay as text."""
    behind = found.step - found.weights_of
    lines = [
        f"step {found.step}, with the weights of the checkpoint {behind} steps before it: "
        f"loss {found.loss:.4g} per scored edge, gradient norm {found.norm:.4g}",
        "",
        "pack    edges  loss/edge  gradient norm  blocks",
    ]
    for p in found.packs:
        blocks = " ".join(map(str, p.blocks))
        lines.append(f"{p.pack:4}  {p.edges:7,}  {p.loss:9.4g}  {p.norm:13.4g}  {blocks}")
    worst = found.worst
    lines += ["", f"worst in pack {worst.pack}, of {len(worst.graphs)} crystals:    loss/edge"]
    return "\n".join(lines + [f"  {key:42} {loss:9.4g}" for key, loss in worst.graphs[:WORST]])
