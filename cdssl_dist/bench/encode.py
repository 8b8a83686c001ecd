"""``cdssl bench encode``: typical uses of an encoder, on one core: embedding, latency of one crystal, fine-tuning.

The encoder has the paper's size and random weights, which are as fast as trained ones. Rates are per second of CPU
time; latency is wall time. matgl's MEGNet, if ``make bench`` has installed it, is timed for comparison, with
``predict_structure`` on the same CIFs.
"""

from __future__ import annotations

import csv
import functools
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from cdssl_dist.bench import data
from cdssl_dist.bench.common import BenchError, Figures, add_repeat, elsewhere, median
from cdssl_dist.data.labeled import density
from cdssl_dist.data.stream import stream
from cdssl_dist.finetune.splits import Split
from cdssl_dist.finetune.targets import Target, Task
from cdssl_dist.finetune.tuning import FineTuning, fit
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.embedding import embed_graphs, embed_structures
from cdssl_dist.model.export import PREFIX, EncoderCard, write_encoder
from cdssl_dist.model.megnet import MEGNet
from sharding.graph import Multigraphs, concatenate
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import open_source

CUTOFF: Final = 5.0  # Å
EXPANSION: Final = GaussianExpansion(100, CUTOFF + 1.0, 0.5)

# Prints its own peak memory, in kB: what the kernel reports to a parent includes the parent's own memory at the fork.
EMBED: Final = """
import sys
from cdssl_dist.look.embed import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--crystals", type=int, default=1000, help="crystals to embed; at least 100")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of fine-tuning on 500 crystals")
    parser.add_argument("--times", type=int, default=10, help="repeat with so many times the crystals, for memory")


def measure(args: Namespace) -> Figures:
    """All figures, on one thread."""
    if args.crystals < 100 or min(args.epochs, args.times) < 1:
        raise BenchError("--crystals must be at least 100, --epochs and --times at least 1")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = MEGNet(edge_features=100).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as folder:
        path = Path(folder) / "some.csv"
        data.write_csv(path, args.crystals)
        with open(path, newline="") as file:
            texts = [row["cif"] for row in csv.DictReader(file)]
        shard([open_source(str(path))], Path(folder) / "shards", ShardSettings(fingerprints=False, duplicates="keep"))
        shards = str(Path(folder) / "shards")
        graphs = concatenate([part for part, _ in stream(shards, CUTOFF)])
        return {
            "crystals": len(texts),
            "directed edges a crystal": float(2 * graphs.n_edges.mean()),
            "from CIF text, structures/s": median(args.repeat, functools.partial(_texts, encoder, texts)),
            "from shards, structures/s": median(args.repeat, functools.partial(_shards, encoder, shards)),
            "latency of one CIF, ms": median(args.repeat, functools.partial(_latency, encoder, texts[:20])),
            f"fine-tuning on 500 for {args.epochs} epochs, CPU s": _fine_tuning(encoder, graphs, args.epochs),
            **_memory(encoder, Path(folder), args.crystals, args.times),
            "matgl MEGNet from CIF text, structures/s": _matgl(path, min(args.crystals, 200), args.repeat),
        }


def table(figures: Figures) -> str:
    """For people."""
    return "\n".join(f"{name:44} {'–' if v is None else format(v, ',.1f'):>12}" for name, v in figures.items())


def _cpu(work: Callable[[], int]) -> float:
    begin = time.process_time()
    return work() / (time.process_time() - begin)


def _texts(encoder: MEGNet, texts: list[str]) -> float:
    return _cpu(lambda: len(embed_structures(encoder, EXPANSION, CUTOFF, texts)[0]))


def _shards(encoder: MEGNet, path: str) -> float:
    return _cpu(lambda: sum(len(embed_graphs(encoder, EXPANSION, part)) for part, _ in stream(path, CUTOFF)))


def _latency(encoder: MEGNet, texts: list[str]) -> float:
    times = []
    for text in texts:
        begin = time.perf_counter()
        embed_structures(encoder, EXPANSION, CUTOFF, [text])
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def _fine_tuning(encoder: MEGNet, graphs: Multigraphs, epochs: int) -> float:
    some = graphs.take(np.arange(500) % len(graphs))
    split = Split(np.arange(450), np.arange(450, 500), np.arange(0))
    task, how = Task((Target("density", "g/cm³"),)), FineTuning(epochs=epochs, patience=epochs)
    begin = time.process_time()
    fit(encoder, EXPANSION, some, density(some)[:, None], split, task, how)
    return time.process_time() - begin


def _memory(encoder: MEGNet, folder: Path, crystals: int, times: int) -> Figures:
    """Peak memory of ``cdssl embed``, for a number of crystals and for ``times`` as many."""
    card = EncoderCard(
        cutoff=CUTOFF,
        centers=EXPANSION.centers,
        end=CUTOFF + 1.0,
        gamma=0.5,
        model={"width": encoder.width, "hidden": 64, "blocks": 3},
        sigma=(0.3, 0.3),
        precision="fp32",
        data_digest="",
        validation_digest="",
        config_digest="",
        metrics={},
        sources=[],
        code_version="",
    )
    write_encoder(folder / "encoder", {PREFIX + name: w for name, w in encoder.state_dict().items()}, card)
    found = {}
    for count in sorted({crystals, times * crystals}):
        data.write_csv(folder / "more.csv", count)
        command = [sys.executable, "-c", EMBED, "--encoder", str(folder / "encoder")]
        command += ["--data", str(folder / "more.csv"), "--out", str(folder / "vectors.parquet")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"cdssl embed failed:\n{done.stderr.strip()[-2000:]}")
        found[f"memory of cdssl embed, {count:,} crystals, MB"] = int(done.stdout.splitlines()[-1]) / 1024
    return found


def _matgl(path: Path, limit: int, repeat: int) -> float | None:
    """Rate of matgl; None if it is not installed."""
    rates = elsewhere("matgl_encode.py", path, limit, repeat)
    return float(statistics.median(rates)) if rates else None
