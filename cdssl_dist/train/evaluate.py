"""Evaluation over many packs: the baseline of skill_edge, and validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.loader import BadBlocks, Loader
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.loss import BINS, Baseline, fit_baseline
from cdssl_dist.model.pretext import Denoising
from cdssl_dist.train.together import raise_together
from sharding.manifest import DataSetError

VALIDATION_SEED: Final = 0  # the same noise in all validations of all runs, so that metrics are comparable


def sum_over_split(
    data: DataSet,
    plan: EpochPlan,
    split: str,
    packs: int | None,
    function: Callable[[GraphBatch], Tensor],
    zero: Tensor,
    bad_blocks: BadBlocks,
) -> tuple[Tensor, list[int]]:
    """Sum function(batch) over the first packs of a plan with ``last='pad'``, on all ranks together; a collective.

    Returns:
        The sum, and the numbers of the bad blocks that it leaves out.

    Raises:
        BadBlockError: on all ranks, if one met a bad block that ends the run, or too many.
        DataSetError: if no block is left, and as raised by ``Loader``.
    """
    steps = plan.steps_before(1)
    if packs is not None:
        steps = min(steps, -(-packs // plan.packs_per_step))
    shape = data.shape(split, plan.blocks_per_pack)
    total = zero.clone()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    loader = Loader(
        data,
        plan,
        shape,
        rank=rank,
        world_size=world_size,
        first=0,
        end=steps,
        bad_blocks=bad_blocks,
        defer_errors=True,
    )
    skipped: list[int] = []
    error = ""
    with torch.no_grad(), loader as found:
        for step in found:
            skipped += step.skipped
            error = error or step.error
            for raw in step.packs:
                total += function(widen(raw.to(zero.device)))
    raise_together(error)
    dist.all_reduce(total)
    skipped = gathered(skipped)
    if skipped and len(skipped) == sum(len(pack) for step in range(steps) for pack in plan.step(step)):
        raise DataSetError(f"{data.name}: all blocks of the split {split!r} that were asked for are bad")
    return total, skipped


def gathered(numbers: Sequence[int]) -> list[int]:
    """Gather the numbers of all ranks, in ascending order; a collective."""
    found: list[Sequence[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(found, list(numbers))
    return sorted(number for rank in found for number in rank)


def fitted_baseline(
    data: DataSet, plan: EpochPlan, task: Denoising, packs: int, device: torch.device, bad_blocks: BadBlocks
) -> Baseline:
    """Fit the baseline, which uses no messages, on the readable training packs; a collective."""
    zero = torch.zeros(BINS, task.expansion.centers + 1, dtype=torch.float64, device=device)
    sums, _ = sum_over_split(data, plan, "train", packs, task.baseline_sums, zero, bad_blocks)
    return fit_baseline(sums, task.expansion.end)


class Validation:
    """The validation split of a data set, always with the noise of epoch 0.

    Args:
        data: the data set.
        task: the training task; only its noise seed is replaced.
        baseline: for skill_edge.
        blocks_per_pack, packs_per_step: as in training.
        packs: number of packs, rounded up to whole steps; all if None.
        device: of this rank.
        bad_blocks: with ``skip``, metrics cover only the readable blocks, and have another digest.

    Attributes:
        skipped: bad blocks left out of the latest metrics.
    """

    def __init__(
        self,
        data: DataSet,
        task: Denoising,
        baseline: Baseline,
        *,
        blocks_per_pack: int,
        packs_per_step: int,
        packs: int | None,
        device: torch.device,
        bad_blocks: BadBlocks,
    ) -> None:
        self.data, self.baseline, self.packs, self.device = data, baseline, packs, device
        self.bad_blocks, self.skipped = bad_blocks, list[int]()
        self.task = replace(task, seed=VALIDATION_SEED)
        self.plan = EpochPlan(data.table("val"), VALIDATION_SEED, blocks_per_pack, packs_per_step, last="pad")

    def run(self, model: nn.Module) -> dict[str, float]:
        """Compute the metrics of a model; a collective."""

        def figures(batch: GraphBatch) -> Tensor:
            _, sums = self.task.loss(model, batch, self.baseline)
            assert sums is not None
            return sums

        zero = torch.zeros(len(self.task.sums), dtype=torch.float64, device=self.device)
        model.eval()
        sums, self.skipped = sum_over_split(self.data, self.plan, "val", self.packs, figures, zero, self.bad_blocks)
        model.train()
        return self.task.metrics(sums)

    def digest(self) -> str:
        """Digest of blocks, σ, noise, cutoff and expansion: metrics of two encoders are comparable if it is equal."""
        block = self.plan.table.block
        blocks = self.data.checksums[block[~np.isin(block, self.skipped)]].tobytes()
        shape = None if self.packs is None else [self.packs, self.plan.blocks_per_pack, self.plan.packs_per_step]
        about = {
            "task": asdict(self.task),
            "graph": self.data.manifest.graph,
            "blocks": hashlib.sha256(blocks).hexdigest(),
            "subset": shape,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
