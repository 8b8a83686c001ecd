"""``cdssl bench WHAT``, also ``python -m cdssl_dist.bench WHAT``."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from typing import Final

from cdssl_dist.bench.common import machine
from sharding.commands import Parser, command

# name → module and title; imported only when asked for, as a GPU machine may have neither Ray nor pymatgen
BENCHMARKS: Final = {
    "graph": ("cdssl_dist.bench.graph", "databases → shards: structures per second, growth of time and memory"),
    "loader": ("cdssl_dist.bench.loader", "shards → tensors: crystals and edges per second, padding, balance, memory"),
    "step": ("cdssl_dist.bench.step", "one training step, eager and compiled, compared with matgl: edges per second"),
    "growth": ("cdssl_dist.bench.growth", "how a step's cost grows with pack, width, depth, Gaussians and cutoff"),
    "gpu": ("cdssl_dist.bench.gpu", "what only a GPU can show: kernels checked, timed, and compared with their bounds"),
    "kernels": ("cdssl_dist.bench.kernels", "kernels compiled for an absent GPU: registers, shared memory, spills"),
    "overhead": ("cdssl_dist.bench.overhead", "what engine, guard, metrics and checkpoints add to a plain torch loop"),
    "scaling": (
        "cdssl_dist.bench.scaling",
        "training on 1 and 2 ranks of this machine, and a model of up to 4,096 GPUs",
    ),
    "encode": ("cdssl_dist.bench.encode", "embedding, latency and fine-tuning on one core"),
    "plan": ("cdssl_dist.bench.plan", "what a configuration costs: parameters, memory, arithmetic"),
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table or one JSON object."""
    what, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if what not in BENCHMARKS:
        parser = Parser("cdssl bench", "Benchmark this machine, which should be otherwise idle.")
        choices = parser.add_subparsers(metavar="WHAT", required=True)
        for name, (_, title) in BENCHMARKS.items():
            choices.add_parser(name, help=title)
        parser.parse_args([what])  # prints the choices and exits
    module, title = BENCHMARKS[what]
    benchmark = importlib.import_module(module)
    parser = Parser(f"cdssl bench {what}", title)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    benchmark.add_arguments(parser)
    args = parser.parse_args(rest)
    if getattr(args, "repeat", 1) < 1:
        parser.error("--repeat must be at least 1")
    before = machine()
    figures = benchmark.measure(args)
    if args.json:
        print(json.dumps({"machine": before} | figures, indent=1))
    else:
        print(", ".join(f"{name}: {value}" for name, value in before.items()) + "\n\n" + benchmark.table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
