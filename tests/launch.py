"""A minimal launcher: run a function on several ranks, each in its own process, without Ray.

Ranks are forked from a process that has already imported torch and DeepSpeed, which saves each of them seconds.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from killable import CONTEXT, warm


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _enter(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    results: Any,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    os.environ.update(
        environment,
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def launch(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """What the function, which must be importable, returns on each rank."""
    warm()
    results = CONTEXT.Queue()
    port = free_port()
    ranks = [
        CONTEXT.Process(target=_enter, args=(r, world_size, port, dict(os.environ), results, function, args))
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        answers = {}
        for _ in ranks:
            rank, good, answer = results.get(timeout=timeout)
            assert good, f"rank {rank}:\n{answer}"
            answers[rank] = answer
        return [answers[r] for r in range(world_size)]
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
