"""``cdssl bench plan``: what a configuration costs, from the configuration alone: parameters, memory, arithmetic.

The time is a lower bound: all matrix products at the speed of a large one on this machine. Nothing is trained.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch

from cdssl_dist.bench.common import Figures
from cdssl_dist.model.cost import flops_per_edge, matmul_flops, parameters, saved_per_edge, state_bytes


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    parser.add_argument(
        "configs", nargs="*", default=["small", "base", "large", "xl"], help="YAML files, or names in configs/pretrain"
    )
    parser.add_argument("--edges", type=int, default=65_536, help="directed edges of a pack")
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share the optimizer's state (ZeRO-1 and up)")


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


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = []
    for name, row in figures.items():
        shown = (f"{value:,} {key}" if isinstance(value, int) else f"{value:.3g} {key}" for key, value in row.items())
        lines.append(f"{name:8} " + ", ".join(shown))
    return "\n".join(lines)
