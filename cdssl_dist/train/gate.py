"""The gated optimizer that DeepSpeed is given, and calls once per step; see ``engine.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

EMA: Final = "ema"  # key of the running mean of a weight, besides Adam's moments


class GatedAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates."""

    gate: Callable[[], float | None] | None = None
    ema: float = 0.0
    changes: Tensor | None = None  # if set, (2,): Σ Δw² and Σ w² of this rank's updates are added to it

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update with the learning rate that the gate returns; change nothing if it returns None."""
        if self.gate is not None:
            lr = self.gate()
            if lr is None:
                return None
            for group in self.param_groups:
                group["lr"] = lr
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in params] if self.changes is not None else []
        super().step(closure)
        for p, old in zip(params, before):  # noqa: B905  ``before`` is empty unless changes are measured
            assert self.changes is not None
            self.changes += torch.stack([(p - old).square().sum(), old.square().sum()])
        for p in params if self.ema else []:
            state = self.state[p]
            # 1 − min(decay, (1 + n) / (10 + n)): the first weights, which are noise, are soon forgotten.
            rate = (9.0 / (10.0 + state["step"])).clamp(min=1.0 - self.ema)
            state[EMA].lerp_(p, rate.to(p.device))
        return None
