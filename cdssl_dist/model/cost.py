"""The cost of a model, computed from its sizes: parameters, FLOPs and memory; and the speed of a machine."""

from __future__ import annotations

import time
from typing import Final

import torch

from cdssl_dist.model.megnet import PretextModel

DEGREE: Final = 35.5  # directed edges per atom, Materials Project at 5 Å


def parameters(centers: int, width: int, hidden: int, blocks: int) -> int:
    """Number of parameters of the model with its head, counted without allocating it."""
    with torch.device("meta"):
        model = PretextModel(edge_features=centers, width=width, hidden=hidden, blocks=blocks)
    return sum(p.numel() for p in model.parameters())


def flops_per_edge(centers: int, width: int, hidden: int, blocks: int) -> float:
    """FLOPs of matrix products per edge, forward and backward (twice the forward), with the edge's share of its atom.

    The input layers process each half edge once.
    """
    m, w, h = centers, width, hidden
    update = w * h + h * h + h * w
    edge = (m * h + h * w) / 2 + (blocks - 1) * 2 * w * h + (blocks + 1) * update + w * m
    node = (blocks - 1) * 2 * w * h + (blocks + 1) * 2 * w * h + blocks * (3 * w * h + h * h + h * w)
    return 3 * 2 * (edge + node / DEGREE)


def saved_per_edge(centers: int, bf16: bool, width: int, hidden: int, blocks: int) -> float:
    """Bytes per edge that the eager model keeps for its backward pass: each layer's input, and the argument of its φ.

    Includes the edge's share of its atom.
    """
    m, w, h = centers, width, hidden
    dense = 2 * h + 2 * w
    numbers = (m + 2 * h + w) / 2 + (blocks - 1) * dense + (blocks + 1) * (4 * h + w) + (blocks + 2) * w
    numbers += blocks * w  # index_add keeps what it sums
    numbers_of_atom = blocks * (4 * h + 5 * w) + (blocks - 1) * dense
    return (numbers + numbers_of_atom / DEGREE) * (2 if bf16 else 4) + 4 * m  # and ê − e, always f32


def state_bytes(count: int, bf16: bool, stage: int, ranks: int) -> float:
    """Bytes per rank of weights, gradients, masters and Adam's two moments under ZeRO (Rajbhandari et al. 2020).

    Gradients are summed in f32 at either precision. DeepSpeed keeps f32 masters at every stage but 0, even if the
    weights are f32. A running mean of the weights (``optim.ema``) adds 4 bytes per parameter, sharded like the moments.
    """
    masters = bf16 or stage >= 1
    weights, gradients, optimizer = count * (2 if bf16 else 4), count * 4, count * (12 if masters else 8)
    return (
        weights / (ranks if stage == 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five: what ``perf/mfu`` is measured against."""
    size = 8192 if device.type == "cuda" else 1024  # so that launch and synchronization are negligible
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best
