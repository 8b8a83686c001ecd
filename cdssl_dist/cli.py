"""The ``cdssl`` command, which dispatches to its subcommands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Final

from cdssl_dist import __version__

# command → module with a ``main(argv) -> int``, and what it does
COMMANDS: Final = {
    "shard": ("sharding.__main__", "turn crystal databases into a data set of shards"),
    "verify": ("sharding.verify", "check a data set against its checksums and its format"),
    "inspect": ("sharding.summary", "show what is in a data set, as text, JSON or a page"),
    "pretrain": ("cdssl_dist.pretrain", "pretrain an encoder on a data set (also: python -m cdssl_dist.pretrain)"),
    "status": ("cdssl_dist.train.status", "show what a run is doing, from its folder: once, as JSON, or until it ends"),
    "finetune": ("cdssl_dist.finetune.__main__", "fine-tune a registered encoder on labeled crystals"),
    "study": (
        "cdssl_dist.study.__main__",
        "measure what an encoder is worth, across training sizes, seeds and controls",
    ),
    "ablate": ("cdssl_dist.ablate", "compare variants of a pretraining run by probing their encoders"),
    "predict": ("cdssl_dist.finetune.predict", "predict properties of crystals with a fine-tuned model"),
    "embed": ("cdssl_dist.look.embed", "embed crystals: a Parquet file of vectors"),
    "probe": ("cdssl_dist.look.probe", "fit linear probes to an encoder and to untrained baselines"),
    "map": ("cdssl_dist.look.map", "draw embedded crystals in two dimensions: a picture, and a page to explore"),
    "report": ("cdssl_dist.look.report", "write one page about a run"),
    "registry": (
        "cdssl_dist.mlops.registry_cli",
        "list, show, diff, pull, promote, roll back, delete registered models",
    ),
    "demo": ("cdssl_dist.demo", "run the whole pipeline on crystals that ship with pymatgen"),
    "bench": (
        "cdssl_dist.bench.__main__",
        "benchmark sharding, loading, training and encoders on this machine, and other libraries",
    ),
    "doctor": ("cdssl_dist.doctor", "check this machine and this installation"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"cdssl {__version__}: pretrain and use crystal encoders", "", "usage: cdssl COMMAND [--help] …", ""]
    return "\n".join(lines + [f"  {name:10} {what}" for name, (_, what) in COMMANDS.items()])


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch; a command's module is imported only when it is called."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return int(importlib.import_module(COMMANDS[name][0]).main(rest))


if __name__ == "__main__":
    sys.exit(main())
