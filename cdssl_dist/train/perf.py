"""Throughput of the loop: edges and graphs per second, the share of the machine's peak, and time waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from cdssl_dist.data.batch import RawPack
from cdssl_dist.model.cost import matmul_flops
from cdssl_dist.train.system import SystemMeter

T = TypeVar("T")


class Meter:
    """Counts work since the last report.

    Args:
        device: of this rank.
        precision: of the model; the peak is measured once, on a matrix product in this precision.
        flops_per_edge: of matrix products, forward and backward; recomputation and padding are not counted.
    """

    def __init__(self, device: torch.device, precision: str, flops_per_edge: float) -> None:
        self.device, self.flops_per_edge = device, flops_per_edge
        self.peak = matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.seconds_per_step = 0.0
        self.system = SystemMeter(device)
        self.restart()

    def restart(self) -> None:
        """Reset the counts, e.g. after a validation."""
        self.started = time.perf_counter()
        self.waited = 0.0
        self.edges = self.graphs = self.steps = 0

    def timed(self, steps: Iterable[T]) -> Iterator[T]:
        """Pass steps through and note how long each was waited for."""
        iterator = iter(steps)
        while True:
            before = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return
            self.waited += time.perf_counter() - before
            self.steps += 1
            yield step

    def add(self, raw: RawPack) -> None:
        """Count one processed pack."""
        self.graphs += int(raw.block_graphs[:-1].sum())
        self.edges += 2 * int(raw.n_edges[:-1].sum())

    def rates(self, share: float) -> dict[str, float]:
        """Return the metrics ``perf/*`` and, for this machine, ``system/*``; reset the counts.

        Args:
            share: this rank's share of the packs of a step, by which edges and graphs are scaled up to all ranks.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        self.seconds_per_step = elapsed / max(self.steps, 1)
        rates = {
            "perf/graphs_s": self.graphs / share / elapsed,
            "perf/edges_s": self.edges / share / elapsed,
            "perf/mfu": self.edges * self.flops_per_edge / elapsed / self.peak,
            "perf/data_wait": self.waited / elapsed,
        } | self.system.sample()
        self.restart()
        return rates
