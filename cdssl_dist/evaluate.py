"""Sums over many packs without training: the reference of skill_edge, and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdssl_dist.batch import GraphBatch, widen
from cdssl_dist.loader import DataSet, Loader
from cdssl_dist.loss import BINS, SUMS, Baseline, fit_baseline, metrics_of
from cdssl_dist.plan import EpochPlan
from cdssl_dist.pretext import Denoising

VALIDATION_SEED: Final = 0  # one noise for all validations of all runs, so that their figures compare


def sum_over_split(
    data: DataSet,
    plan: EpochPlan,
    split: str,
    packs: int | None,
    function: Callable[[GraphBatch], Tensor],
    zero: Tensor,
) -> Tensor:
    """Σ function(batch) over the first packs of a plan with ``last='pad'``, all ranks together; a collective."""
    steps = plan.steps_before(1)
    if packs is not None:
        steps = min(steps, -(-packs // plan.packs_per_step))
    shape = data.shape(split, plan.blocks_per_pack)
    total = zero.clone()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = Loader(data, plan, shape, rank=rank, world_size=world_size, first=0, last=steps)
    with torch.no_grad(), loader as found:
        for step in found:
            for raw in step.packs:
                total += function(widen(raw.to(zero.device)))
    dist.all_reduce(total)
    return total


def fit_reference(data: DataSet, plan: EpochPlan, task: Denoising, packs: int, device: torch.device) -> Baseline:
    """Fit what can be said without messages, on training packs; a collective."""
    end = task.expansion.end
    zero = torch.zeros(BINS, task.expansion.centers + 1, dtype=torch.float64, device=device)
    return fit_baseline(sum_over_split(data, plan, "train", packs, lambda b: task.baseline_sums(b, end), zero), end)


class Validation:
    """The validation split of a data set, always with the noise of epoch 0.

    Args:
        data: the data set.
        task: of the training; only the noise seed is replaced.
        reference: for skill_edge.
        blocks_per_pack, packs_per_step: as in training.
        packs: how many of them, all where None.
        device: of this rank.
    """

    def __init__(
        self,
        data: DataSet,
        task: Denoising,
        reference: Baseline,
        blocks_per_pack: int,
        packs_per_step: int,
        packs: int | None,
        device: torch.device,
    ) -> None:
        self.data, self.reference, self.packs, self.device = data, reference, packs, device
        self.task = replace(task, seed=VALIDATION_SEED)
        self.plan = EpochPlan(data.table("val"), VALIDATION_SEED, blocks_per_pack, packs_per_step, last="pad")

    def run(self, model: nn.Module) -> dict[str, float]:
        """The metrics of a model; a collective."""

        def figures(batch: GraphBatch) -> Tensor:
            _, sums = self.task.loss(model, batch, self.reference)
            assert sums is not None
            return sums

        zero = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)
        model.eval()
        sums = sum_over_split(self.data, self.plan, "val", self.packs, figures, zero)
        model.train()
        return metrics_of(sums, self.task.expansion.centers)

    def digest(self) -> str:
        """Figures of two encoders may be compared where this is equal: same blocks, σ, noise, cutoff and expansion."""
        blocks = self.data.checksums[self.plan.table.block].tobytes()
        shape = None if self.packs is None else [self.packs, self.plan.blocks_per_pack, self.plan.packs_per_step]
        about = {
            "task": asdict(self.task),
            "graph": self.data.manifest.graph,
            "blocks": hashlib.sha256(blocks).hexdigest(),
            "subset": shape,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
