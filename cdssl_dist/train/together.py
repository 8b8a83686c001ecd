"""What ranks find out together: a rank that raised alone would leave the others waiting for it in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from cdssl_dist.data.dataset import BadBlockError

T = TypeVar("T")


def on_rank_0(act: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; a collective.

    Raises:
        ValueError: that of rank 0, on all ranks.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        found = _tried(act)
    dist.broadcast_object_list(found, src=0)
    return _answer([found], found[0])


def on_all_ranks(act: Callable[[], T]) -> T:
    """What each rank finds for itself, where none fails; a collective.

    Raises:
        ValueError: that of the first rank that has one, on all ranks.
    """
    own = _tried(act)
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, [None, own[1]])
    return _answer(errors, own[0])


def raise_together(error: str) -> None:
    """Raise what some rank has met while it read, on all ranks; a collective.

    Raises:
        BadBlockError: where it is not empty on every rank.
    """

    def act() -> None:
        if error:
            raise BadBlockError(error)

    on_all_ranks(act)


def _tried(act: Callable[[], T]) -> list[Any]:
    try:
        return [act(), None]
    except ValueError as why:  # ours are all of this kind; another one ends the rank, and the group with it
        return [None, why]


def _answer(found: list[Any], value: T) -> T:
    for _, why in found:
        if why is not None:
            raise why
    return value
