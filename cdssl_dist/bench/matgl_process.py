"""matgl's MEGNet in a process and an environment of its own, stepped when it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np

from cdssl_dist.bench.common import PYTHON, BenchError
from sharding.graph import Multigraphs

ARRAYS: Final = ("lattice", "atomic_numbers", "positions", "n_atoms")


class Matgl:
    """A process that trains matgl's MEGNet on the same crystals in the same packs, one step at a time.

    Args:
        packs: the crystals of each pack.
        size: width, hidden, blocks.
        threads: CPU threads of torch.
    """

    def __init__(self, packs: list[Multigraphs], size: dict[str, int], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cdssl-bench-")
        crystals: dict[str, Any] = {n: np.concatenate([getattr(p, n) for p in packs]) for n in ARRAYS}
        path = Path(self._folder.name) / "crystals.npz"
        np.savez(path, packs=[len(p) for p in packs], **crystals)
        script = Path(__file__).with_name("matgl_step.py")
        self._process = subprocess.Popen(
            [str(PYTHON), str(script), str(path), json.dumps(size), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    @staticmethod
    def available() -> bool:
        """Whether the environment of ``make bench`` is here."""
        return PYTHON.exists()

    def per_edge(self) -> float:
        """Seconds of CPU per directed edge of one step, its collate included."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise BenchError("matgl's process ended; its message is above")
        return float(answer)

    def __enter__(self) -> Matgl:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._folder.cleanup()
