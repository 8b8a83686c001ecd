"""Dead and saturated edges: problems inside a network that its loss may not reveal.

A message is the output of an edge update, a shifted softplus: y = softplus(x) − ln 2, whose slope 1 − exp(−(y + ln 2))
is between 0 and 1. Where the slopes of all its features are near 0, no gradient passes: the edge is dead. Where all
are near 1, the update has become linear: it is saturated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from cdssl_dist.model.megnet import LOG_2, EdgeUpdate

NEAR: Final = 0.01  # distance of a slope from 0 or 1


def slopes(message: Tensor) -> Tensor:
    """Slope of the softplus for each feature, from the shifted softplus itself: (E, W) → (E, W)."""
    return -torch.expm1(-(message.float() + LOG_2))


@contextlib.contextmanager
def watched_edges(model: nn.Module, sums: Tensor) -> Iterator[None]:
    """Count the messages of all edge updates while the block runs, padding and self images left out.

    Args:
        model: the model that holds the edge updates.
        sums: (3,) f64, to which edges, dead edges and saturated edges are added.
    """

    def count(_: nn.Module, inputs: tuple[Any, ...], message: Tensor) -> None:
        scored = inputs[3].scored
        slope = slopes(message.detach())
        dead = (slope < NEAR).all(dim=1) & scored
        saturated = (slope > 1.0 - NEAR).all(dim=1) & scored
        sums.add_(torch.stack([scored.sum(), dead.sum(), saturated.sum()]).double())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, EdgeUpdate)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
