"""``cdssl bench plan``: what a configuration costs, from the configuration alone: parameters, memory, arithmetic.

The time is a bound, all matrix products at the speed of a large one on this machine; nothing is trained.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Final

import torch

from cdssl_dist.bench.common import Figures
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.train.perf import matmul_flops

DEGREE: Final = 35.5  # directed edges of an atom, Materials Project at 5 Å


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    parser.add_argument("configs", nargs="*", default=["small", "base", "large", "xl"], help="of configs/pretrain")
    parser.add_argument("--edges", type=int, default=65_536, help="directed edges of a pack")
    parser.add_argument("--ranks", type=int, default=8, help="that share the optimizer's state (ZeRO-1 and up)")


def measure(args: Namespace) -> Figures:
    """For each configuration: counts, bytes and seconds."""
    from cdssl_dist.config import load, packaged  # pydantic

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures: Figures = {}
    for name in args.configs:
        config = load(name if name.endswith(".yaml") else packaged(f"pretrain/{name}.yaml"))
        bf16 = config.engine.precision == "bf16"
        size = {"width": config.model.width, "hidden": config.model.hidden, "blocks": config.model.blocks}
        count = parameters(config.graph.centers, **size)
        flops = args.edges * flops_per_edge(config.graph.centers, **size)
        figures[name] = {
            "parameters": count,
            "GiB of state": state_bytes(count, bf16, config.engine.stage, args.ranks) / 2**30,
            "GiB saved for backward": args.edges * saved_per_edge(config.graph.centers, bf16, **size) / 2**30,
            "TFLOP a pack": flops / 1e12,
            "seconds a pack, at least": flops / matmul_flops(device, torch.bfloat16 if bf16 else torch.float32),
        }
    return figures


def parameters(centers: int, width: int, hidden: int, blocks: int) -> int:
    """Of the model with its head, counted without making it."""
    with torch.device("meta"):
        model = PretextModel(edge_features=centers, width=width, hidden=hidden, blocks=blocks)
    return sum(p.numel() for p in model.parameters())


def flops_per_edge(centers: int, width: int, hidden: int, blocks: int) -> float:
    """Of matrix products, forward and backward (twice the forward), with an edge's share of its atom.

    The input layers see each half edge once.
    """
    m, w, h = centers, width, hidden
    update = w * h + h * h + h * w
    edge = (m * h + h * w) / 2 + (blocks - 1) * 2 * w * h + (blocks + 1) * update + w * m
    node = (blocks - 1) * 2 * w * h + (blocks + 1) * 2 * w * h + blocks * (3 * w * h + h * h + h * w)
    return 3 * 2 * (edge + node / DEGREE)


def saved_per_edge(centers: int, bf16: bool, width: int, hidden: int, blocks: int) -> float:
    """Bytes that the eager model keeps for its backward pass: of each layer what comes in and what φ is taken of.

    With an edge's share of its atom.
    """
    m, w, h = centers, width, hidden
    dense = 2 * h + 2 * w
    numbers = (m + 2 * h + w) / 2 + (blocks - 1) * dense + (blocks + 1) * (4 * h + w) + (blocks + 2) * w
    numbers += blocks * w  # index_add keeps what it sums
    numbers_of_atom = blocks * (4 * h + 5 * w) + (blocks - 1) * dense
    return (numbers + numbers_of_atom / DEGREE) * (2 if bf16 else 4) + 4 * m  # and ê − e, always f32


def state_bytes(count: int, bf16: bool, stage: int, ranks: int) -> float:
    """Weights, gradients, masters and Adam's two moments of a rank under ZeRO (Rajbhandari et al. 2020)."""
    width = 2 if bf16 else 4
    weights, gradients, optimizer = count * width, count * width, count * (12 if bf16 else 8)
    return (
        weights / (ranks if stage == 3 else 1)
        + gradients / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = []
    for name, row in figures.items():
        shown = (f"{value:,} {key}" if isinstance(value, int) else f"{value:.3g} {key}" for key, value in row.items())
        lines.append(f"{name:8} " + ", ".join(shown))
    return "\n".join(lines)
