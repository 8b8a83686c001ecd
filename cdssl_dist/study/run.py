"""Compute one cell of a study, in any process, and write and read its file."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cdssl_dist.data.vectors import vectors_of
from cdssl_dist.finetune.baselines import baselines, simple_features, vector_ridge
from cdssl_dist.finetune.experiment import new_encoder, permuted, predict
from cdssl_dist.finetune.splits import Split
from cdssl_dist.finetune.targets import Array, Target, Task
from cdssl_dist.finetune.tuning import DivergedError, fit
from cdssl_dist.mlops.models import code_digest
from cdssl_dist.model.export import EncoderCard, read_encoder
from cdssl_dist.model.megnet import MEGNet
from cdssl_dist.study.cells import Cell, Job
from cdssl_dist.study.config import BASELINES, Probe
from cdssl_dist.study.data import open_crystals
from sharding.graph import Multigraphs

ABOUT: Final = b"cell"  # in the metadata of a cell's file
# Code whose changes may alter the last digits of a result: its digest is recorded, but finished cells stay valid.
COMPUTING: Final = ("cdssl_dist/model", "cdssl_dist/finetune", "cdssl_dist/study/run.py", "cdssl_dist/data/batch.py")


@dataclass(frozen=True)
class Result:
    """A finished cell."""

    cell: Cell
    keys: list[str]  # of the crystals that were evaluated
    true: Array  # in the target's unit, per atom where it is extensive; NaN where it is not known
    predicted: Array
    atoms: NDArray[np.int64]  # of each crystal
    about: dict[str, Any]  # mae, rmse, n, train, val, epochs, best, seconds

    @property
    def mae(self) -> float:
        """In the target's unit; infinite where the training diverged."""
        return float(self.about["mae"])

    def error_as_learned(self, target: Target) -> float:
        """The mean absolute error of what is learned: of the logarithm, if that is what the target learns."""
        one = np.ones(len(self.true))
        return errors(target.learned(self.true, one), target.learned(self.predicted, one))["mae"]


def run(job: Job) -> float:
    """Compute a cell and write its file; the result depends on the job alone.

    Returns:
        The mean absolute error.

    Raises:
        TuningError: if the training fails. In a sweep, divergence is no failure: its result is an infinite error.
    """
    torch.set_num_threads(job.how.threads)
    began = time.process_time()
    crystals = open_crystals(job.crystals)
    part = np.concatenate([job.split.train, job.split.val, job.split.test])  # only their graphs are copied
    graphs = crystals.graphs.take(part)
    ends = np.cumsum([len(job.split.train), len(job.split.val)])
    split = Split(*np.split(np.arange(len(part)), ends))
    true = crystals.labels[job.cell.target][part][:, None]
    task = Task((job.target,))
    about: dict[str, Any] = {"epochs": 0, "best": 0}
    if job.probe:
        predicted = _probed(job.probe, job.target, graphs, true[:, 0], split)[:, None]
    elif not job.start:
        predicted = baselines(task, graphs, true, split.merge_val())[BASELINES[job.cell.arm]][split.test]
    else:
        encoder, card = _encoder(job.encoder.folder)
        network = _start(job, encoder, card)
        try:
            member = fit(network, card.expansion, graphs, true, split, task, job.how)
        except DivergedError:
            if job.cell.kind != "sweep":
                raise
            predicted = np.full((len(split.test), 1), np.nan)
        else:
            predicted = predict(member, card, graphs.take(split.test), task)
            about = {"epochs": len(member.history), "best": member.best}
    keys = [crystals.graphs.keys[i] for i in job.split.test]
    seconds = time.process_time() - began
    about |= errors(true[split.test, 0], predicted[:, 0])
    about["program"] = code_digest(*COMPUTING)[:12]
    about |= {"train": len(split.train), "val": len(split.val), "seconds": seconds, "digest": job.digest}
    atoms = graphs.n_atoms[split.test].astype(np.int64)
    write_result(job.out, Result(job.cell, keys, true[split.test, 0], predicted[:, 0], atoms, about))
    return float(about["mae"])


def errors(true: Array, predicted: Array) -> dict[str, float]:
    """``mae``, ``rmse`` and ``n``, over the crystals with a label; infinite where a prediction is not finite."""
    off = (predicted - true)[np.isfinite(true)]
    if not np.isfinite(off).all():
        return {"mae": math.inf, "rmse": math.inf, "n": len(off)}
    return {"mae": float(np.abs(off).mean()), "rmse": float(np.sqrt((off**2).mean())), "n": len(off)}


def write_result(path: Path, result: Result) -> None:
    """Write a cell's file atomically."""
    about = {"cell": asdict(result.cell), **result.about}
    columns = {"key": result.keys, "true": result.true, "predicted": result.predicted, "atoms": result.atoms}
    table = pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(about).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_results(jobs: Iterable[Job]) -> dict[Cell, Result]:
    """Read the results that exist; a file that is damaged or has another digest is ignored."""
    found = {}
    for job in jobs:
        try:
            table = pq.read_table(job.out)
            about = json.loads(table.schema.metadata[ABOUT])
            if about.pop("digest") == job.digest:
                about.pop("cell")
                columns = {name: table[name].to_numpy() for name in ("true", "predicted", "atoms")}
                found[job.cell] = Result(job.cell, keys=table["key"].to_pylist(), **columns, about=about)
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            continue
    return found


def _probed(probe: Probe, target: Target, graphs: Multigraphs, true: Array, split: Split) -> Array:
    """Predict the test crystals by a ridge on vectors."""
    features = vectors_of(probe.vectors, graphs.keys)
    if probe.composition:
        features = np.column_stack([features, simple_features(graphs)])
    train, n_atoms = split.merge_val().train, graphs.n_atoms
    model = vector_ridge().fit(features[train], target.learned(true[train], n_atoms[train]))
    found: Array = target.restored(model.predict(features[split.test]), n_atoms[split.test])
    return found


def _start(job: Job, encoder: MEGNet, card: EncoderCard) -> MEGNet:
    if job.start == "permuted":
        return permuted(encoder, job.cell.seed)
    if job.start == "pretrained" and not job.parts:
        return encoder
    new = new_encoder(card, job.cell.seed)
    taken = {name: w for name, w in encoder.state_dict().items() if name.partition(".")[0] in job.parts}
    new.load_state_dict(taken, strict=False)
    return new


@functools.lru_cache(maxsize=4)
def _encoder(folder: Path) -> tuple[MEGNet, EncoderCard]:
    return read_encoder(folder)
