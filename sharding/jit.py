"""numba's ``njit``, or nothing: where only an exported encoder is used, the same functions run interpreted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError:
    numba = None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with numba, cached on disk and free of the interpreter's lock."""
    return function if numba is None else numba.njit(cache=True, nogil=True)(function)
