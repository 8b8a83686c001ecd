"""Start Ray, always with token authentication: it listens on all interfaces, and whoever gets in can run code."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from typing import Any, Final

LOCAL: Final = "local"  # a cluster of our own, never one that another user runs on this machine


def start_ray(address: str, **more: Any) -> bool:
    """Connect to a cluster, or start one on this machine that only holders of its token can use.

    The token of an existing cluster is taken from RAY_AUTH_TOKEN or from Ray's token file.

    Args:
        address: address of a cluster, or ``local`` to start one.
        more: arguments for ``ray.init``, used only if a cluster is started.

    Returns:
        False if this process was already connected.

    Raises:
        RuntimeError: if a cluster on this machine would let anyone in.
    """
    there: Any = sys.modules.get("ray")
    if there is not None and there.is_initialized():
        return False
    if there is not None and "RAY_AUTH_MODE" not in os.environ:
        raise RuntimeError("Ray was imported before RAY_AUTH_MODE=token was set, and reads it only then; set it first")
    if address == LOCAL and os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise RuntimeError("RAY_AUTH_MODE is not token: anyone who can reach the ports of this machine could run code")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        more["include_dashboard"] = False
    else:
        more = {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not report usage over the network
    import ray  # not earlier: Ray reads its authentication mode on import

    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's handler would kill us after three seconds, even in mid-write
    return True
