"""Fine-tune a pretrained encoder on labeled crystals, and train the same network from scratch on the same split.

    cdssl finetune --encoder models:/cdssl-encoder@champion --data FILE --target COLUMN

The training loop is plain torch and starts neither Ray nor DeepSpeed; with ``--ray``, each training is a Ray task.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cdssl_dist.data.labeled import COMPUTED, Labeled, class_names, load_labeled
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.experiment import PRETRAINED, Map, compare
from cdssl_dist.finetune.predictor import PropertyCard, property_card, write_property
from cdssl_dist.finetune.results import digest, figures, told, write_results
from cdssl_dist.finetune.splits import Split, folds_of_column, k_folds, split_by_group, split_of_column
from cdssl_dist.finetune.targets import Scaler, Target, Task
from cdssl_dist.finetune.tuning import FineTuning, TuningError, check_members
from cdssl_dist.look import report
from cdssl_dist.look.encoder_map import map_of
from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.model_card import write_model_card
from cdssl_dist.mlops.models import CHAMPION, PROPERTY
from cdssl_dist.mlops.record import record
from cdssl_dist.model.export import EncoderCard, read_encoder
from cdssl_dist.model.heads import READOUTS
from sharding.commands import DONE, FAILED, RUNS, Parser, UseError, command, natural
from sharding.executor import Executor
from sharding.progress import Progress


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull an encoder, fine-tune it, compare it with the baselines, write the results, and register it if asked."""
    args = parser().parse_args(argv)
    began = time.time()
    uri = tracking_uri(args.registry, RUNS)
    if args.register:
        registry.check_free(args.register, PROPERTY, uri)
    pulled = registry.pull_version(args.encoder, uri)
    encoder, card = read_encoder(pulled.folder)
    data = read_data(args, card)
    task = task_of(args, data)
    splits = splits_of(args, data)
    check_labels(task, data, splits)
    how = FineTuning(**{name: getattr(args, name) for name in asdict(FineTuning())})
    scratch = None if args.no_scratch else replace(how, lr=args.scratch_lr, freeze=0, warmup=0, layer_decay=1.0)
    out = Path(args.out)
    try:  # better now than after the training
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as why:
        raise UseError(f"--out {out}: cannot be written ({why.strerror})") from None
    trainings = args.members * len(splits) * (1 if scratch is None else 2)
    with Progress("fine-tune", "epochs", how.epochs * trainings) as progress, on_ray(args, trainings) as elsewhere:
        outcome = compare(
            encoder,
            card,
            data.graphs,
            data.targets,
            task,
            splits,
            how,
            scratch,
            args.members,
            tick=progress.add,
            elsewhere=elsewhere,
        )

    members, settings = outcome.members[PRETRAINED], asdict(how) | about(args)
    own = property_card(
        card,
        pulled.uri,
        members,
        task,
        data.graphs.take(np.unique(np.concatenate([part for s in splits for part in (s.train, s.val)]))),
        settings,
        data_digest=digest(data, outcome),
        metrics=figures(task, outcome, data.targets),
        sources=data.sources,
        uncertainty={name: u.factor for name, u in outcome.uncertainty.items() if np.isfinite(u.factor)},
    )
    write_property(out / "model", members, own)
    write_model_card(out / "model")
    results = write_results(out, data, task, splits, outcome, own)
    colors = {name: data.targets[:, t] for t, name in enumerate(data.names)}
    report.write_safely(
        out,
        lambda drawn: report.of_tuning(out, drawn),
        lambda: map_of(CrystalEncoder(encoder, card), data.graphs, "its crystals, by the pretrained encoder", colors),
    )
    print(told(results, outcome, args.out))
    run_id = None
    if args.register or pulled.uri.startswith("models:"):
        run_id = record_tuning(uri, args.experiment, out, own, began)
    if args.register:
        try:
            print(registry.register(out / "model", args.register, uri, run_id))
        except registry.RegistryError as why:
            again = f"cdssl registry register {out / 'model'} {args.register}"
            print(f"error: not registered: {why}\nthe model is complete; to register it: {again}", file=sys.stderr)
            return FAILED
    return DONE


@contextlib.contextmanager
def on_ray(args: argparse.Namespace, trainings: int) -> Iterator[Map | None]:
    """Yield a map that runs the trainings as Ray tasks, or None if Ray was not asked for."""
    if not (args.ray or args.address):
        yield None
        return
    address = args.address or os.environ.get("RAY_ADDRESS") or "local"
    with Executor(trainings, address, {"num_cpus": args.threads, "num_gpus": args.gpus}) as executor:
        yield executor.map


def parser() -> Parser:
    """Build the command-line parser."""
    default = FineTuning()
    p = Parser(
        "cdssl finetune", "Fine-tune a pretrained encoder and compare it with the same network trained from scratch."
    )
    p.add_argument("--encoder", default=CHAMPION, help="models:/NAME@ALIAS, or a folder")
    p.add_argument("--registry", help="MLflow URI; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db")
    p.add_argument("--register", metavar="NAME", help="register the fine-tuned model under this name")
    p.add_argument("--experiment", default="cdssl-finetune", help="MLflow experiment that records the fine-tuning")
    p.add_argument("--out", default="runs/finetune", help="folder for results")

    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    g.add_argument("--labels", metavar="FILE", help="CSV or Parquet with ids, to read targets and columns from")
    computed = ", ".join(COMPUTED)
    g.add_argument("--target", required=True, nargs="+", help=f"labels or columns, or any of {computed}; gaps allowed")
    g.add_argument("--unit", nargs="+", help="unit of each target, if the data do not state it")
    g.add_argument("--per-atom", nargs="+", default=[], metavar="TARGET", help="extensive targets, learned per atom")
    g.add_argument("--log", nargs="+", default=[], metavar="TARGET", help="long-tailed targets, learned as logarithms")
    g.add_argument("--classify", action="store_true", help="treat the values of the target as classes, not numbers")
    g.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    g.add_argument("--where", metavar="CONDITION", help="filter a data set of shards, as in 'n_atoms <= 20'")
    g.add_argument("--keys", metavar="FILE", help="use only the crystals with these ids, one per line")

    g = p.add_argument_group("split")
    g.add_argument("--train", type=float, default=0.8, help="share of the crystals to train on, by whole groups")
    g.add_argument("--val", type=float, default=0.1, help="share for early stopping; with folds, of the training part")
    g.add_argument("--folds", type=int, metavar="K", help="K-fold cross-validation: each crystal is tested once")
    g.add_argument("--fold-column", metavar="COLUMN", help="use each value of this column as a fold")
    g.add_argument("--split-column", metavar="COLUMN", help="a column with the values train, val and test")
    g.add_argument("--test-value", default="test", help="the value of --split-column that marks test crystals")

    g = p.add_argument_group("training")
    g.add_argument("--members", type=int, default=1, help="networks in an ensemble, each with its own seed")
    g.add_argument("--epochs", type=int, default=default.epochs, help="maximum number of epochs")
    g.add_argument("--patience", type=int, default=default.patience, help="epochs without improvement before stopping")
    g.add_argument("--batch-size", type=int, default=default.batch_size, help="crystals per batch")
    g.add_argument("--lr", type=float, default=default.lr, help="learning rate of the pretrained network")
    g.add_argument(
        "--scratch-lr", type=float, default=3e-3, help="learning rate of the network from scratch, which needs more"
    )
    g.add_argument("--no-scratch", action="store_true", help="do not train a network from scratch")
    g.add_argument("--warmup", type=int, default=default.warmup, help="first epochs, which train only the readout")
    g.add_argument("--freeze", type=int, default=default.freeze, help="frozen stages: 1 input layers, 2 first block, …")
    g.add_argument("--layer-decay", type=float, default=default.layer_decay, help="rate relative to the next stage")
    g.add_argument(
        "--readout",
        choices=READOUTS,
        default=default.readout,
        help="Set2Set over the crystal, a mean over atoms, or a ridge on vectors",
    )
    g.add_argument("--weight-decay", type=float, default=default.weight_decay, help="weight decay of AdamW")
    g.add_argument("--seed", type=natural, default=default.seed, help="seed of the split, the readout and the batches")
    g.add_argument("--threads", type=int, default=default.threads, help="CPU threads used by torch")
    g.add_argument("--compile", action="store_true", help="use torch.compile: takes a minute, then steps are faster")

    g = p.add_argument_group(
        "on Ray", "Each training (of one fold, member and arm) is a task; the results are the same."
    )
    g.add_argument("--ray", action="store_true", help="train on a Ray cluster, or if there is none, on all cores here")
    g.add_argument("--address", help="Ray cluster, e.g. ray://HEAD:10001 or auto; if omitted, RAY_ADDRESS")
    g.add_argument("--gpus", type=float, default=0.0, help="GPUs per task; may be a fraction")
    return p


def read_data(args: argparse.Namespace, card: EncoderCard) -> Labeled:
    """Load the labeled crystals that the arguments select."""
    check_members(args.members, args.readout)
    if args.classify:
        if len(args.target) > 1:
            raise TuningError("--classify takes one target")
        if args.target[0] in COMPUTED:
            raise TuningError(f"--classify: {args.target[0]} is a computed number, not a class label")
        if unfit := [option for option in ("per_atom", "log", "unit") if getattr(args, option)]:
            raise TuningError(f"--classify does not go with --{unfit[0].replace('_', '-')}")
    keys = None
    if args.keys:
        try:
            keys = [line.strip() for line in Path(args.keys).read_text().splitlines() if line.strip()]
        except OSError as why:
            raise TuningError(f"--keys: {why}") from None
    return load_labeled(
        args.data,
        args.target,
        card.cutoff,
        args.split,
        keys=keys,
        where=args.where,
        columns=[c for c in (args.fold_column, args.split_column) if c],
        table=args.labels,
        classes=args.classify,
    )


def task_of(args: argparse.Namespace, data: Labeled) -> Task:
    """Build the task from the arguments and the labels."""
    for option, named in (("--per-atom", args.per_atom), ("--log", args.log)):
        if strange := set(named) - set(args.target):
            raise TuningError(f"{option} {' '.join(sorted(strange))}: not among the targets, {' '.join(args.target)}")
    if args.unit and len(args.unit) != len(data.names):
        raise TuningError(f"--unit gives {len(args.unit)} units for {len(data.names)} targets")
    names = zip(data.names, args.unit or data.units, strict=True)
    if not args.classify:
        return Task(tuple(Target(name, unit, name in args.per_atom, name in args.log) for name, unit in names))
    classes = class_names(data.columns[args.target[0]])
    if len(classes) < 2 or len(classes) > len(data) / 2:
        raise TuningError(
            f"{args.target[0]!r} has {len(classes)} different values in {len(data)} crystals: not usable as classes"
        )
    return Task((Target(args.target[0]),), classes)


def check_labels(task: Task, data: Labeled, splits: Sequence[Split]) -> None:
    """Fail before the first training if the labels of any fold cannot be learned."""
    parts = [("", np.arange(len(data)))] + [(f"fold {i + 1}: ", split.train) for i, split in enumerate(splits)]
    for where, part in parts:
        try:
            Scaler.fit(task, data.targets[part], data.graphs.n_atoms[part])
        except ValueError as why:
            raise TuningError(f"{where if len(splits) > 1 else ''}{why}") from None


def splits_of(args: argparse.Namespace, data: Labeled) -> list[Split]:
    """Build the splits that the arguments ask for."""
    if sum(map(bool, (args.folds, args.fold_column, args.split_column))) > 1:
        raise TuningError("--folds, --fold-column and --split-column are mutually exclusive")
    if args.folds is not None:
        return k_folds(data.groups, args.folds, args.val, args.seed)
    if args.fold_column:
        return folds_of_column(data.columns[args.fold_column], data.groups, args.val, args.seed)
    if args.split_column:
        values = data.columns[args.split_column]
        return [split_of_column(values, data.groups, args.val, args.seed, args.test_value)]
    return [split_by_group(data.groups, args.train, args.val, args.seed)]


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Settings to record in addition to those of the training."""
    return {name: getattr(args, name) for name in ("scratch_lr", "members", "folds")} | {"data": Path(args.data).name}


def record_tuning(uri: str, experiment: str, out: Path, card: PropertyCard, began: float) -> str | None:
    """Record a finished fine-tuning in MLflow; return the run's id, or None if it could not be created."""
    params = card.settings | {"encoder": card.encoder["ref"], "targets": [t["name"] for t in card.task["targets"]]}
    tags = {"encoder": card.encoder["ref"], "data_digest": card.data_digest, "code_version": card.code_version}
    files = [p for p in out.iterdir() if p.is_file()]
    return record(uri, experiment, out.resolve().name, params, card.metrics, tags, files, began)


if __name__ == "__main__":
    sys.exit(main())
