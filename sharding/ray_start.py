"""Ray, with token authentication always: it listens on all interfaces, and whoever reaches it without may run code."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from typing import Any, Final

LOCAL: Final = "local"  # not whatever cluster of another user's runs on this machine


def start_ray(address: str, **more: Any) -> bool:
    """Connect to a cluster, or start one of this machine's that only holders of its token can use.

    The token of another's cluster is taken from RAY_AUTH_TOKEN or the file that Ray looks for.

    Args:
        address: of a cluster, or ``local``.
        more: for ``ray.init``, where the cluster is started.

    Returns:
        False where this process is connected already.

    Raises:
        RuntimeError: where a cluster of this machine's would let anyone in.
    """
    there: Any = sys.modules.get("ray")
    if there is not None and there.is_initialized():
        return False
    if there is not None and "RAY_AUTH_MODE" not in os.environ:
        raise RuntimeError("Ray was imported without RAY_AUTH_MODE=token, and reads it only then; set it beforehand")
    if address == LOCAL and os.environ.get("RAY_AUTH_MODE", "token") != "token":
        raise RuntimeError("RAY_AUTH_MODE is not token: whoever reaches the ports of this machine could run code")
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        more["include_dashboard"] = False
    else:
        more = {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent over the network
    import ray  # not before: its mode of authentication is decided while it is imported

    before = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **more)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)  # Ray's handler kills three seconds later, whatever is being written then
    return True
