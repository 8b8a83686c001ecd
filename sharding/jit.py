"""numba's ``njit``, or nothing: where only an exported encoder is used, the same functions run interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError:
    numba = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, free of the interpreter's lock, and cached on disk where a place can be written."""
    if numba is None:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no place for the cache: a container with a read-only root
        return numba.njit(nogil=True)(function)
