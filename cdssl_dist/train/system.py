"""The load of this rank's machine: CPU, memory, network, GPU; and the error raised when memory runs out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil
import torch

GB = 1e9


class OutOfMemory(RuntimeError):
    """Memory ran out; the message names the step and its packs, and what to change."""


class SystemMeter:
    """Measures load since the last sample.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        psutil.cpu_percent()  # counts from here
        self.before = self._network()

    def sample(self) -> dict[str, float]:
        """Return the metrics ``system/*``: fractions of the whole machine, rates over all interfaces but loopback."""
        now, (then, received, sent) = self._network(), self.before
        elapsed, self.before = max(now[0] - then, 1e-9), now
        values = {
            "system/cpu": psutil.cpu_percent() / 100.0,
            "system/memory": psutil.virtual_memory().percent / 100.0,
            "system/process_gb": self.process.memory_info().rss / GB,
            "system/received_mb_s": (now[1] - received) / 1e6 / elapsed,
            "system/sent_mb_s": (now[2] - sent) / 1e6 / elapsed,
        }
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            values["system/gpu_memory"] = 1.0 - free / total
            values["system/gpu_peak_gb"] = torch.cuda.max_memory_allocated(self.device) / GB
            with contextlib.suppress(ModuleNotFoundError, RuntimeError):  # needs nvidia-ml-py
                values["system/gpu"] = torch.cuda.utilization(self.device) / 100.0
        return values

    @staticmethod
    def _network() -> tuple[float, int, int]:
        """Return the current time, and bytes received and sent since the machine was started."""
        counters = [c for name, c in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        return time.monotonic(), sum(c.bytes_recv for c in counters), sum(c.bytes_sent for c in counters)


@contextlib.contextmanager
def memory_errors(where: Callable[[], str]) -> Iterator[None]:
    """Turn the various errors of a failed allocation into one that says where it happened.

    Args:
        where: describes the work under way.

    Raises:
        OutOfMemory: instead of the original error, for GPU or host memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as why:
        first = " ".join(str(why).split())
        # torch has no class for host memory: "[enforce fail at alloc_cpu.cpp:121] … can't allocate memory"
        known = isinstance(why, (torch.OutOfMemoryError, MemoryError))
        if not known and "allocate memory" not in first:
            raise
        raise OutOfMemory(
            f"out of memory: {where()}. All packs have the same shape, so any of them would fail: lower "
            f"data.blocks_per_pack, or shard with a smaller --block-edges ({first[:200]})"
        ) from why
