"""Ray, and the only file that knows it: a group of workers that run the training loop, restarted when one dies.

Checkpoints are ours, in the run folder; Ray's book-keeping of them is not used, so that what is resumed is decided by
one marker alone. The run folder must be visible to the driver and to every worker.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from cdssl_dist.config import Config

STOP_FILE: Final = "stop-requested"
POLL: Final = 1.0  # s


class ClusterError(RuntimeError):
    """The cluster could not run the job, or the guard stopped it; said in a few lines."""


class RunError(ValueError):
    """A run folder that belongs to another run."""


def launch(config: Config) -> bool:
    """Run ``train_loop.train`` on ``config.cluster.workers`` workers.

    Starts Ray in this process, with token authentication, or joins the cluster at ``cluster.address`` (inside a
    submitted job, the cluster it was submitted to).

    Returns:
        True when the run is complete, False when it was stopped and has saved its state.

    Raises:
        ClusterError: where workers failed more often than allowed, or the guard stopped the run.
        RunError: where the run folder holds another run.
    """
    folder = Path(config.run)
    stop = folder / STOP_FILE
    stop.unlink(missing_ok=True)
    _start_ray(config)
    # After Ray has started, which takes SIGTERM for itself.
    with _stop_on_signal(stop), _printed(folder / "train.log"), ThreadPoolExecutor(1) as waiting:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpu = config.cluster.gpus_per_worker > 0
        resources = {"CPU": config.cluster.cpus_per_worker}
        if gpu:
            resources["GPU"] = config.cluster.gpus_per_worker
        trainer = TorchTrainer(
            _worker,
            train_loop_config=config.model_dump(mode="json"),
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=config.cluster.workers, use_gpu=gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            # In a thread, so that Ray leaves Ctrl-C to us.
            waiting.submit(trainer.fit).result()
        except Exception as why:
            raise ClusterError(_short(why)) from None
        finally:
            ray.shutdown()
    status = json.loads((folder / "status.json").read_text())
    if status["state"] == "failed":
        raise ClusterError(status["reason"])
    if status["state"] == "refused":
        raise RunError(status["reason"])
    return bool(status["state"] == "done")


def _worker(content: dict[str, Any]) -> None:
    """One rank, in a Ray worker."""
    import torch
    import torch.distributed as dist

    from cdssl_dist.checkpoint import CheckpointError
    from cdssl_dist.guard import GuardStop
    from cdssl_dist.train_loop import train

    config = Config.model_validate(content)
    folder = Path(config.run)
    asked = _Throttled(folder / STOP_FILE) if dist.get_rank() == 0 else lambda: False
    if config.cluster.gpus_per_worker > 0:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    try:
        train(config, stop_requested=asked, echo=False)
    except (GuardStop, CheckpointError) as why:
        # All ranks raise it alike, and a restart would only meet it again: it is an outcome, not a failure of a worker.
        if dist.get_rank() == 0:
            state = "failed" if isinstance(why, GuardStop) else "refused"
            (folder / "status.json").write_text(json.dumps({"state": state, "reason": str(why)}))


class _Throttled:
    """Whether a file exists, looked up at most once a second."""

    def __init__(self, path: Path) -> None:
        self.path, self.next, self.answer = path, 0.0, False

    def __call__(self) -> bool:
        if not self.answer and time.monotonic() >= self.next:
            self.answer, self.next = self.path.exists(), time.monotonic() + POLL
        return self.answer


def _start_ray(config: Config) -> None:
    """Connect, or start a cluster of this machine's that only holders of its token can use."""
    # Ray listens on all interfaces. Without a token, whoever reaches a port runs code.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if not address and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the network
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    workers = config.cluster.workers
    ray.init(
        num_cpus=max(os.cpu_count() or 1, int(workers * config.cluster.cpus_per_worker) + 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


@contextlib.contextmanager
def _stop_on_signal(stop: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the workers to save and stop; a second one ends the driver at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: Any) -> None:
        print("asked to stop: saving a checkpoint first (once more to end at once)", file=sys.stderr, flush=True)
        stop.touch()
        signal.signal(number, before[number])

    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _printed(path: Path) -> Iterator[None]:
    """Print what is appended to a file while the block runs."""
    done = threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        at = start
        while True:
            last = done.wait(POLL)
            if path.exists():
                with open(path) as file:
                    file.seek(at)
                    sys.stderr.write(file.read())
                    sys.stderr.flush()
                    at = file.tell()
            if last:
                return

    thread = threading.Thread(target=follow, name="cdssl-printer", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _short(error: Exception) -> str:
    """The last line of each worker's failure, not pages of traces."""
    failures = getattr(error, "worker_failures", None) or {}
    lines = [f"worker {rank}: {str(why).strip().splitlines()[-1]}" for rank, why in failures.items()]
    return "; ".join(lines) or str(error).strip().splitlines()[-1]
