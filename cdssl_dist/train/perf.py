"""Throughput of the loop: edges and graphs a second, the share of the machine's speed, and waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from cdssl_dist.data.batch import RawPack
from cdssl_dist.train.system import SystemMeter

T = TypeVar("T")


class Meter:
    """Counts since the last report.

    Args:
        device: of this rank.
        precision: of the model; the peak is that of a matrix product in it, measured once.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.peak = matmul_flops(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        self.flops_per_pack = 0.0  # forward and backward, counted on the first pack
        self.seconds_per_step = 0.0
        self.system = SystemMeter(device)
        self.restart()

    def restart(self) -> None:
        """Forget what was counted: after a validation, say."""
        self.started = time.perf_counter()
        self.waited = 0.0
        self.edges = self.graphs = self.packs = self.steps = 0

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

    def counted(self, function: Callable[..., T], *args: Any) -> T:
        """Call the forward pass; the first time, count its FLOPs."""
        if self.flops_per_pack:
            return function(*args)
        with FlopCounterMode(display=False) as counter:
            result = function(*args)
        # A linear layer's backward pass is two products of the size of its forward one.
        self.flops_per_pack = 3.0 * counter.get_total_flops()
        return result

    def add(self, raw: RawPack) -> None:
        """One pack was processed."""
        self.packs += 1
        self.graphs += int(raw.block_graphs[:-1].sum())
        self.edges += 2 * int(raw.n_edges[:-1].sum())

    def rates(self, world_size: int) -> dict[str, float]:
        """The metrics ``perf/*``, of all ranks (which do equal work), ``system/*`` of this machine, and a new start."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        self.seconds_per_step = elapsed / max(self.steps, 1)
        rates = {
            "perf/graphs_s": world_size * self.graphs / elapsed,
            "perf/edges_s": world_size * self.edges / elapsed,
            "perf/mfu": self.packs * self.flops_per_pack / elapsed / self.peak,
            "perf/data_wait": self.waited / elapsed,
        } | self.system.sample()
        self.restart()
        return rates


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """FLOP/s of a matrix product, the best of five: what ``perf/mfu`` is measured against."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best
