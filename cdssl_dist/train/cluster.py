"""The driver's side of Ray: a group of workers that run the training loop, restarted when one dies.

Checkpoints are our own, in the run folder, and Ray's checkpointing is not used, so that the marker alone decides what
is resumed. The run folder must be visible to the driver and to every worker. Code that runs in a worker is in ``rank``.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from cdssl_dist.config import Config
from cdssl_dist.train import rank
from cdssl_dist.train.runlog import append_event, update_status
from sharding.commands import one_line
from sharding.ray_start import LOCAL, start_ray

POLL: Final = 0.5  # s
PREEMPTED: Final = 75  # exit code of a run that was stopped and can be resumed


class ClusterError(RuntimeError):
    """The cluster could not run the job, or the run failed, e.g. stopped by the guard."""


class RunError(ValueError):
    """The run folder belongs to another run, or a worker lacks what the configuration asks for."""


class _StoppedError(Exception):
    """Asked to stop, without a checkpoint of this moment."""


def launch(config: Config) -> bool:
    """Run ``train.loop.train`` on the workers of a Ray cluster.

    Starts Ray in this process, with token authentication, or joins the cluster at ``cluster.address`` (inside a
    submitted job, the cluster it was submitted to). When Ray announces that a node will be removed, the group saves its
    state and restarts on the remaining nodes.

    Returns:
        True if the run is complete, False if it was stopped and can be resumed from its last checkpoint.

    Raises:
        ClusterError: if workers failed more often than allowed, or the guard or a bad block stopped the run.
        RunError: if the run folder holds another run, or a worker lacks what the configuration asks for.
    """
    folder = Path(config.run)
    (folder / rank.STOP_FILE).unlink(missing_ok=True)
    rank.forget_empty_stacks(folder)
    update_status(folder, state="starting", reason="")
    state, reason = "moved", ""
    try:
        try:
            _start_ray(config)
        except (KeyboardInterrupt, SystemExit):  # the latter is Ray's own answer to SIGTERM
            raise _StoppedError("stopped while Ray was starting") from None
        with _stop_on_signal(folder / rank.STOP_FILE) as asked:  # after Ray, which takes SIGTERM over at its start
            while state == "moved":
                state, reason = _fit(config, asked)
    except ClusterError as why:
        state, reason = "failed", str(why)
    except _StoppedError as why:
        state, reason = "stopped", str(why)
    except BaseException as why:
        update_status(folder, state="failed", reason=f"the driver ended: {one_line(why)}")
        raise
    finally:
        import ray

        if state == "stopped" and reason:
            # A thread is still waiting inside Ray: shutting Ray down now, or at exit, would abort the process.
            atexit.register(_leave)
        else:
            ray.shutdown()
    if reason:
        update_status(folder, state=state, reason=reason)
    if state in ("failed", "refused"):
        raise (ClusterError if state == "failed" else RunError)(reason)
    return state == "done"


def _fit(config: Config, asked: Callable[[], float]) -> rank.Outcome:
    """Run one worker group, including its restarts after failures.

    Args:
        config: of the run.
        asked: returns the seconds since a stop was requested, or 0 if none was.

    Raises:
        ClusterError: if workers failed more often than allowed.
        _StoppedError: if state is not saved within ``cluster.stop_within`` seconds of a stop request.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster, folder = config.cluster, Path(config.run)
    gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if gpu else {})
    trainer = TorchTrainer(
        rank.run,
        train_loop_config=config.model_dump(mode="json"),
        # Collectives must time out later than the watchdog, which reports more about a hang.
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(2 * cluster.hang_after + 60)),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            elastic_resize_monitor_interval_s=cluster.resize_every,
            use_gpu=gpu,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[_failures_told(folder)],
            # Ray leaves all GPUs of its machine visible to a worker that was given none.
            worker_runtime_env={} if gpu else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        ),
    )
    found: list[Any] = []

    def fit() -> None:
        try:
            found.append(trainer.fit().return_value)
        except Exception as why:  # Ray raises many types, and passes on those of workers
            found.append(why)

    # In a thread, so that Ray leaves Ctrl-C to us; a daemon, so that it cannot keep the process alive.
    thread = threading.Thread(target=fit, name="cdssl-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL)
        if asked() > cluster.stop_within:
            raise _StoppedError(f"state was not saved within {cluster.stop_within:.0f} s: the last checkpoint remains")
    (answer,) = found
    if isinstance(answer, Exception):
        failures = getattr(answer, "worker_failures", None)
        raise ClusterError(_told(failures, folder) if failures else _last_line(answer)) from None
    return answer


def _leave() -> None:
    """End this process without shutting Ray down; its child processes, workers included, end with it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(PREEMPTED)


def _failures_told(folder: Path) -> Any:
    """Return a callback for Ray's controller that records worker failures, whether or not the group restarts."""
    from ray.train import UserCallback

    class Failures(UserCallback):  # type: ignore[misc]  # Ray ships no types that mypy follows
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            what = _told(worker_exceptions, folder)
            append_event(folder, None, "workers failed", what=what)
            with open(folder / "train.log", "a") as log:
                log.write(f"{what}; unless the failure limit is reached, the group restarts from its last checkpoint\n")

    return Failures()


def _told(failures: Mapping[int, Exception], folder: Path) -> str:
    """Say in one line why workers failed: a hang if one was found, else the cause, not its effects on other ranks."""
    if hangs := rank.hung(folder, since=time.time() - 60.0):
        return "; ".join(hangs)
    lines = {number: _last_line(why) for number, why in failures.items()}
    consequences = ("Connection closed by peer", "Connection reset", "DistBackendError", "NCCL")
    causes = {n: line for n, line in lines.items() if not any(c in line for c in consequences)} or lines
    return "; ".join(f"worker {number}: {line}" for number, line in causes.items())


def _last_line(error: Exception) -> str:
    """Return the last line of a traceback or, for a worker that died, how it died."""
    text = str(error).strip()
    if "connection error code 2" in text:  # how Ray reports a process that ended silently
        return "was killed, by a user or because its machine ran out of memory"
    if "exit detail:" in text:
        text = text.partition("exit detail:")[2]
        return "died: " + " ".join(text.split())[:200]
    return text.splitlines()[-1] if text else type(error).__name__


def _start_ray(config: Config) -> None:
    """Join a cluster, or start one on this machine with room for the workers."""
    needed = int(config.cluster.max_workers * config.cluster.cpus_per_worker) + 1
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or LOCAL
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        start_ray(address, num_cpus=max(os.cpu_count() or 1, needed))
    except Exception as why:  # each part of Ray raises its own types
        raise ClusterError(f"no Ray cluster at {address} can be joined: {one_line(why, 500)}") from None


@contextlib.contextmanager
def _stop_on_signal(stop: Path) -> Iterator[Callable[[], float]]:
    """SIGTERM and Ctrl-C ask the workers to save and stop; a second one ends the driver at once.

    Yields:
        A function that returns the seconds since a stop was requested, by a signal or by the file itself.
    """
    since: list[float] = []

    def ask(number: int, _frame: Any) -> None:
        print("stop requested: saving a checkpoint first (repeat to exit at once)", file=sys.stderr, flush=True)
        stop.touch()
        since.append(time.monotonic())
        signal.signal(number, before[number])

    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    before = {int(number): signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, ask)

    def asked() -> float:
        if not since and stop.exists():  # created by someone else
            since.append(time.monotonic())
        return time.monotonic() - since[0] if since else 0.0

    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
