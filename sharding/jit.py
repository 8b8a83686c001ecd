"""numba's ``njit`` where numba is installed; to use an exported encoder it is not needed, only slower without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError:
    numba = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, releasing the GIL, and cache the result on disk if a cache folder is writable."""
    if numba is None:
        return function
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no writable cache folder: a container with a read-only root
        return numba.njit(nogil=True)(function)
