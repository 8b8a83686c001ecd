"""Ablations of pretraining: variants of one run, compared by validation skill and by linear probes.

    cdssl ablate --config configs/ablation/mp.yaml --data FILE [section.key=value ...]

Each variant is a run of ``cdssl pretrain`` in its own folder; rerunning the command completes what is missing.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from pydantic import Field, PositiveInt, field_validator

from cdssl_dist.config import Config, Section, load, packaged, read
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.labeled import Labeled, load_labeled
from cdssl_dist.data.vectors import vectors_of
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.splits import k_folds
from cdssl_dist.finetune.targets import Array
from cdssl_dist.look.probe import features, probe
from cdssl_dist.pretrain import with_absolute_paths
from cdssl_dist.study.config import SplitColumn
from cdssl_dist.train.runlog import read_lines, read_status
from sharding.commands import DONE, Parser, command, run_child
from sharding.manifest import write_atomically

WITHOUT: Final = ("random encoder 1", "composition", "composition + volume")  # baselines probed for comparison


class Probes(Section):
    """Labels to probe the vectors with. Given a split, only its training part is used, never the test crystals."""

    column: str = "{target}"
    split: SplitColumn | None = None  # if omitted, all labeled crystals
    targets: tuple[str, ...]
    # name → Parquet file with key and embedding, also probed; see cdssl probe
    vectors: dict[str, str] = Field(default_factory=dict)
    crystals: PositiveInt = 4000  # per target, at most
    folds: int = Field(5, ge=2)


class Ablation(Section):
    """Variants of one run."""

    out: str = "runs/ablation"
    config: str = "pretrain/mp.yaml"  # a path, or the name of a packaged file
    overrides: tuple[str, ...] = ()  # applied to every variant
    variants: dict[str, tuple[str, ...]] = Field(min_length=1)  # name → its overrides
    probe: Probes

    @field_validator("variants")
    @classmethod
    def _no_paths(cls, variants: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in variants:
            if not name or Path(name).name != name:
                raise ValueError(f"{name!r}: a variant is a folder below out, and its name that of a folder")
        return variants


@dataclass(frozen=True)
class Judged:
    """Results of one variant."""

    name: str
    changes: str
    status: dict[str, Any]  # status.json of the run
    edges_per_second: float  # median over the lines of metrics
    r2: dict[str, float]  # target → cross-validated R² of a ridge on frozen vectors


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain the missing variants, probe all encoders and write a table."""
    p = Parser("cdssl ablate", "Pretrain variants of one run, and compare what their encoders know.")
    p.add_argument("--config", help="YAML file; if omitted, the packaged ablation/mp.yaml")
    p.add_argument("--data", required=True, help="labeled crystals to probe with: anything that cdssl shard reads")
    p.add_argument("override", nargs="*", metavar="key=value", help="changes to this file, as in variants={base: []}")
    args = p.parse_args(argv)
    torch.set_num_threads(1)  # the pieces are small: more threads mostly wait for each other
    ablation = read(Ablation, Path(args.config) if args.config else packaged("ablation/mp.yaml"), args.override)

    data = functools.cache(lambda cutoff: labeled(ablation.probe, args.data, cutoff))
    check(ablation, data)
    for name in ablation.variants:
        if code := pretrained(ablation, name):
            return code
    rows = [judge(ablation, name, data) for name in ablation.variants]
    first = CrystalEncoder.from_registry(str(Path(ablation.out) / next(iter(ablation.variants))))
    text = table(ablation, rows, probed(ablation.probe, first, data(first.cutoff), (*WITHOUT, *ablation.probe.vectors)))
    write_atomically(Path(ablation.out) / "table.md", text.encode())
    print(text)
    return DONE


def check(ablation: Ablation, data: Callable[[float], list[Labeled]]) -> None:
    """Check the inputs of the probes now rather than after hours of pretraining.

    Raises:
        DataSetError: if shards, labels or vectors are missing.
    """
    cutoffs = []
    for name in ablation.variants:
        with DataSet(wanted_of(ablation, name).data_path) as shards:
            cutoffs.append(shards.manifest.cutoff)
        data(cutoffs[-1])
    for path in ablation.probe.vectors.values():  # listed once in the table, with the data of the first variant
        vectors_of(path, [key for found in data(cutoffs[0]) for key in found.graphs.keys])


def pretrained(ablation: Ablation, name: str) -> int:
    """Train a variant unless its folder holds the finished run; return the exit code of ``cdssl pretrain``."""
    folder, wanted = Path(ablation.out) / name, wanted_of(ablation, name)
    if read_status(folder).get("state") == "done":
        there = load(folder / "config.yaml")
        if there.model_copy(update={"tracking": wanted.tracking}) == wanted:
            return DONE
    print(f"── {name}: {' '.join(ablation.variants[name]) or 'as it is'}", flush=True)
    path, overrides = said_of(ablation, name)
    command = [sys.executable, "-m", "cdssl_dist.cli", "pretrain", "--config", str(path), *overrides]
    return run_child(command)


def said_of(ablation: Ablation, name: str) -> tuple[Path, list[str]]:
    """Return the configuration file of a variant, and its overrides."""
    path = Path(ablation.config) if Path(ablation.config).exists() else packaged(ablation.config)
    run = f"run={Path(ablation.out) / name}"
    return path, [run, "registry.name=null", *ablation.overrides, *ablation.variants[name]]


def wanted_of(ablation: Ablation, name: str) -> Config:
    """The configuration of a variant."""
    return with_absolute_paths(load(*said_of(ablation, name)))


def judge(ablation: Ablation, name: str, data: Callable[[float], list[Labeled]]) -> Judged:
    """Read the metrics of a variant's run and probe its encoder."""
    folder = Path(ablation.out) / name
    encoder = CrystalEncoder.from_registry(str(folder))
    rates = [line["perf/edges_s"] for line in read_lines(folder / "metrics.jsonl") if "perf/edges_s" in line]
    found = probed(ablation.probe, encoder, data(encoder.cutoff), ("encoder",))["encoder"]
    changes = " ".join(ablation.variants[name])
    return Judged(name, changes, read_status(folder), float(np.median(rates)) if rates else np.nan, found)


def labeled(probes: Probes, path: str, cutoff: float) -> list[Labeled]:
    """Load the labeled crystals of each target."""
    columns = [probes.column.format(target=t) for t in probes.targets]
    splits = [probes.split.column.format(target=t) for t in probes.targets] if probes.split else []
    data = load_labeled(path, columns, cutoff, columns=list(dict.fromkeys(splits)))
    found = []
    for t in range(len(columns)):
        known = np.isfinite(data.targets[:, t])
        if probes.split:
            known &= np.array([str(part).strip() == probes.split.train for part in data.columns[splits[t]]])
        drawn = np.random.default_rng(0).permutation(np.flatnonzero(known))[: probes.crystals]
        graphs, groups = data.graphs.take(drawn), [data.groups[i] for i in drawn]
        found.append(
            Labeled(graphs, data.targets[drawn, t : t + 1], groups, (probes.targets[t],), (data.units[t],), {}, [])
        )
    return found


def probed(
    probes: Probes, encoder: CrystalEncoder, data: list[Labeled], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Cross-validated R² of linear probes: name of the vectors → target → R²."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for each in data:
        every: dict[str, Array]
        if names == ("encoder",):
            every = {"encoder": encoder.embed_graphs(each.graphs).astype(np.float64)}
        else:
            every = features(encoder, each.graphs, 0)
            every |= {name: vectors_of(path, each.graphs.keys) for name, path in probes.vectors.items()}
        folds = k_folds(each.groups, probes.folds, 0.0, 0)
        scores = probe({name: every[name] for name in names}, each.targets[:, 0], folds)
        for name in names:
            found[name][each.names[0]] = scores[name].r2
    return found


def table(ablation: Ablation, rows: Sequence[Judged], without: dict[str, dict[str, float]]) -> str:
    """Format the results as Markdown."""
    targets = ablation.probe.targets
    heads = ["variant", "what it changes", "steps", "M edges/s", "skill", "skill_edge", *(f"R² {t}" for t in targets)]
    lines = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for row in rows:
        skills = [f"{row.status.get(f'val/{name}', np.nan):.3f}" for name in ("skill", "skill_edge")]
        about = [row.name, f"`{row.changes}`" if row.changes else "", f"{row.status['step']:,}"]
        lines.append([*about, f"{row.edges_per_second / 1e6:.3f}", *skills, *(f"{row.r2[t]:.3f}" for t in targets)])
    for name, r2 in without.items():
        lines.append([name, *[""] * 5, *(f"{r2[t]:.3f}" for t in targets)])
    all_of_them = json.dumps(list(ablation.overrides))
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""{body}

Variants of `{ablation.config}`, all with {all_of_them}. R²: a ridge on frozen vectors, {ablation.probe.folds} folds by
whole groups, at most {ablation.probe.crystals:,} crystals of each target. Skills are comparable where σ, cutoff and
expansion are the same.
"""


if __name__ == "__main__":
    sys.exit(main())
