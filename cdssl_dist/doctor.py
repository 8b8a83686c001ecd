"""``cdssl doctor``: check this machine and this installation, and say how to fix what fails."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cdssl_dist.mlops.mlflow_server import redact, tracking_uri
from sharding.commands import RUNS, Parser, command

PACKAGES: Final = ("torch", "torch-geometric", "deepspeed", "ray", "webdataset", "pymatgen", "mlflow", "numba", "gemmi")


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _python() -> str:
    if sys.version_info < (3, 11):  # noqa: UP036  pip's own check can be bypassed
        raise RuntimeError(f"Python {platform.python_version()}; 3.11 or newer is needed")
    return f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _torch() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"{len(names)} GPU: {', '.join(names)}; workers will use NCCL"
    return f"no GPU; workers will use gloo on {os.cpu_count()} CPU cores"


def _graph() -> str:
    import numpy as np

    from sharding.crystal import Crystal
    from sharding.graph import build

    cubic = Crystal("simple cubic", 5.0 * np.eye(3), np.zeros((1, 3)), np.array([84], np.uint8))
    graphs, _ = build([cubic], 5.0)
    if 2 * len(graphs.edge_src) != 6:
        raise RuntimeError("the neighbour search is wrong: a simple cubic cell at its cutoff must have 6 edges")
    return "neighbour search compiled, ties at the cutoff included"


def _disk() -> str:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < 2:
        raise RuntimeError(f"{free:.1f} GB free here; checkpoints and shards need at least 2 GB")
    return f"{free:,.0f} GB free here"


def _memory() -> str:
    shared = Path("/dev/shm")
    if not shared.exists() or shutil.disk_usage(shared).total < 0.2e9:
        raise RuntimeError("/dev/shm is missing or below 0.2 GB; Ray's object store needs that, and NCCL about 2 GB")
    return f"/dev/shm holds {shutil.disk_usage(shared).total / 1e9:.1f} GB"


def _temporary() -> str:
    with tempfile.NamedTemporaryFile():
        return f"{tempfile.gettempdir()} is writable"


def _auth() -> str:
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        raise RuntimeError(
            f"RAY_AUTH_MODE={mode}: anyone who can reach Ray's ports can run code; unset it, or set it to token"
        )
    return "Ray will ask for a token; it listens on all interfaces: keep its ports behind a firewall"


def _tracking() -> str:
    return f"registry at {redact(tracking_uri(None, RUNS))}"


CHECKS: Final[dict[str, Callable[[], str]]] = {
    "python": _python,
    "packages": _versions,
    "devices": _torch,
    "graphs": _graph,
    "disk": _disk,
    "memory": _memory,
    "temporary": _temporary,
    "security": _auth,
    "registry": _tracking,
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; return exit code 1 if one fails."""
    Parser("cdssl doctor", "Check this machine and this installation.").parse_args(argv)
    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok      {name:10} {check()}")
        except Exception as why:  # a check that cannot run has failed, whatever the reason
            failed += 1
            print(f"FAILED  {name:10} {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
