"""Results and errors shared among ranks: a rank that raised alone would leave the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cdssl_dist.data.dataset import BadBlockError

T = TypeVar("T")


def on_rank_0(act: Callable[[], T]) -> T:
    """Call a function on rank 0, and return its result on all ranks; a collective.

    Raises:
        ValueError: on all ranks, if the function raises it on rank 0.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        found = _tried(act)
    dist.broadcast_object_list(found, src=0)
    return _answer([found], found[0])


def on_all_ranks(act: Callable[[], T]) -> T:
    """Call a function on every rank, and return each rank's own result if none failed; a collective.

    Raises:
        ValueError: on all ranks, the error of the first rank that failed.
    """
    own = _tried(act)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, [None, own[1]])
    return _answer(errors, own[0])


def raise_together(error: str) -> None:
    """Raise, on all ranks, the first error that any rank met while reading; a collective.

    Raises:
        BadBlockError: if ``error`` is not empty on at least one rank.
    """

    def act() -> None:
        if error:
            raise BadBlockError(error)

    on_all_ranks(act)


def _tried(act: Callable[[], T]) -> list[Any]:
    try:
        return [act(), None]
    except ValueError as why:  # our errors are all of this type; any other ends the rank, and the group with it
        return [None, why]


def _answer(found: list[Any], value: T) -> T:
    for _, why in found:
        if why is not None:
            raise why
    return value
