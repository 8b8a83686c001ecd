"""bf16 training: bf16 weights, their f32 masters, and gradients summed in f32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def bf16_twin(model: nn.Module) -> nn.Module:
    """A bf16 copy that computes in the model's place and adds its gradients to those of the model, in f32."""
    twin = copy.deepcopy(model).to(torch.bfloat16)

    def add_to(master: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            gradient = p.grad.to(torch.float32)
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)
            p.grad = None

        return hook

    for p, master in zip(twin.parameters(), model.parameters(), strict=True):
        master.data.copy_(p)  # as DeepSpeed initializes masters at the other stages
        p.register_post_accumulate_grad_hook(add_to(master))  # type: ignore[no-untyped-call]
    model.forward = twin.forward
    return twin


@torch.no_grad()
def round_into(twin: nn.Module, model: nn.Module) -> None:
    """Round the f32 weights into the bf16 twin, after an update."""
    for p, master in zip(twin.parameters(), model.parameters(), strict=True):
        p.copy_(master)
