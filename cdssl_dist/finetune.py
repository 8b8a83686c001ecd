"""Fine-tune a pretrained encoder on labeled crystals, beside the same network from scratch on the same split.

    cdssl finetune --encoder models:/cdssl-encoder@champion --data FILE --target COLUMN

A plain torch loop: neither Ray nor DeepSpeed is started.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdssl_dist import __version__, registry
from cdssl_dist.commands import RUNS, Parser, command
from cdssl_dist.experiment import PRETRAINED, Outcome, compare
from cdssl_dist.export import EncoderCard, read_encoder
from cdssl_dist.labeled import COMPUTED, Labeled, class_names, load_labeled
from cdssl_dist.mlflow_server import tracking_uri
from cdssl_dist.model_card import write_model_card
from cdssl_dist.parity import plot_parity
from cdssl_dist.predictor import PropertyCard, scalers_of, write_property
from cdssl_dist.splits import Split, folds_of_column, k_folds, split_by_group, split_of_column
from cdssl_dist.targets import Target, Task
from cdssl_dist.tuning import FineTuning, TuningError
from sharding.progress import Progress


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull an encoder, fine-tune it, compare, write what came out, register it where asked."""
    args = parser().parse_args(argv)
    uri = tracking_uri(args.registry, RUNS)
    pulled = registry.pull_version(args.encoder, uri)
    encoder, card = read_encoder(pulled.folder)
    data = read_data(args, card)
    task = task_of(args, data)
    splits = splits_of(args, data)
    how = FineTuning(**{name: getattr(args, name) for name in asdict(FineTuning())})
    scratch = None if args.no_scratch else replace(how, lr=args.scratch_lr, freeze=0, warmup=0, layer_decay=1.0)
    arms = 1 if scratch is None else 2
    with Progress("fine-tune", "epochs", how.epochs * args.members * len(splits) * arms) as progress:
        outcome = compare(
            encoder, card, data.graphs, data.targets, task, splits, how, scratch, args.members, lambda _: progress.add()
        )

    out = Path(args.out)
    results = write_results(out, data, task, splits, outcome, about(args, card, pulled, how))
    write_property(out / "model", outcome.members[PRETRAINED], property_card(results, data, card, task, outcome))
    write_model_card(out / "model")
    print(report(results, outcome, args.out))
    if args.register:
        print(registry.register(out / "model", args.register, uri))
    return 0


def parser() -> Parser:
    """What can be said on the command line."""
    default = FineTuning()
    p = Parser(
        "cdssl finetune", "Fine-tune a pretrained encoder on labeled crystals, beside the same network from scratch."
    )
    p.add_argument("--encoder", default="models:/cdssl-encoder@champion", help="models:/NAME@ALIAS, or a folder")
    p.add_argument("--registry", help="MLflow URI; MLFLOW_TRACKING_URI, else runs/mlflow.db, where left out")
    p.add_argument("--register", metavar="NAME", help="register the fine-tuned model under this name")
    p.add_argument("--out", default="runs/finetune", help="folder for results")

    g = p.add_argument_group("data")
    g.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    g.add_argument("--labels", metavar="FILE", help="CSV or Parquet with ids; targets and columns are read of it")
    computed = ", ".join(COMPUTED)
    g.add_argument("--target", required=True, nargs="+", help=f"labels or columns, or of {computed}; may have gaps")
    g.add_argument("--per-atom", nargs="*", default=[], metavar="TARGET", help="those that grow with the cell")
    g.add_argument("--classify", action="store_true", help="the target names classes: numbers or text")
    g.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    g.add_argument("--where", metavar="CONDITION", help="of a data set of shards, as in 'n_atoms <= 20'")
    g.add_argument("--keys", metavar="FILE", help="use the crystals with these ids only, one a line")

    g = p.add_argument_group("who tests")
    g.add_argument("--train", type=float, default=0.5, help="share of the crystals to train on, by whole groups")
    g.add_argument("--val", type=float, default=0.1, help="share for early stopping; with folds, of the training ones")
    g.add_argument("--folds", type=int, metavar="K", help="each crystal tests once, in one of K folds")
    g.add_argument("--fold-column", metavar="COLUMN", help="a fold for each value of a column")
    g.add_argument("--split-column", metavar="COLUMN", help="a column that says train, val and test")
    g.add_argument("--test-value", default="test", help="the value of --split-column that tests")

    g = p.add_argument_group("training")
    g.add_argument("--members", type=int, default=1, help="networks with seeds of their own, which answer together")
    g.add_argument("--epochs", type=int, default=default.epochs, help="at most")
    g.add_argument("--patience", type=int, default=default.patience, help="epochs without a better validation error")
    g.add_argument("--batch-size", type=int, default=default.batch_size, help="crystals")
    g.add_argument("--lr", type=float, default=default.lr, help="of the pretrained network")
    g.add_argument(
        "--scratch-lr", type=float, default=3e-3, help="of the network from scratch, which wants a higher one"
    )
    g.add_argument("--no-scratch", action="store_true", help="leave out the network from scratch")
    g.add_argument("--warmup", type=int, default=default.warmup, help="epochs in which the readout alone learns")
    g.add_argument("--freeze", type=int, default=default.freeze, help="stages kept: 1 input layers, 2 first block, …")
    g.add_argument("--layer-decay", type=float, default=default.layer_decay, help="rate of a stage by that of the next")
    g.add_argument("--weight-decay", type=float, default=default.weight_decay, help="of AdamW")
    g.add_argument("--seed", type=int, default=default.seed, help="of the split, the readout and the order")
    g.add_argument("--threads", type=int, default=default.threads, help="of torch, on CPU")
    return p


def read_data(args: argparse.Namespace, card: EncoderCard) -> Labeled:
    """The labeled crystals that the arguments name."""
    if args.classify and len(args.target) > 1:
        raise TuningError("--classify takes one target")
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
    """What is learned."""
    if strange := set(args.per_atom) - set(args.target):
        raise TuningError(f"--per-atom {' '.join(sorted(strange))}: no target; those are {' '.join(args.target)}")
    names = zip(data.names, data.units, strict=True)
    if not args.classify:
        return Task(tuple(Target(name, unit, name in args.per_atom) for name, unit in names))
    classes = class_names(data.columns[args.target[0]])
    if len(classes) < 2 or len(classes) > len(data) / 2:
        raise TuningError(
            f"{args.target[0]!r} names {len(classes)} classes in {len(data)} crystals: nothing to classify"
        )
    return Task((Target(args.target[0]),), classes)


def splits_of(args: argparse.Namespace, data: Labeled) -> list[Split]:
    """Who trains and who tests."""
    if sum(map(bool, (args.folds, args.fold_column, args.split_column))) > 1:
        raise TuningError("--folds, --fold-column and --split-column exclude one another")
    if args.folds:
        return k_folds(data.groups, args.folds, args.val, args.seed)
    if args.fold_column:
        return folds_of_column(data.columns[args.fold_column], data.groups, args.val, args.seed)
    if args.split_column:
        values = data.columns[args.split_column]
        return [split_of_column(values, data.groups, args.val, args.seed, args.test_value)]
    return [split_by_group(data.groups, args.train, args.val, args.seed)]


def about(args: argparse.Namespace, card: EncoderCard, pulled: registry.Pulled, how: FineTuning) -> dict[str, Any]:
    """Where the results come from."""
    encoder = {"ref": pulled.uri, "weights_sha256": card.weights_sha256, "data_digest": card.data_digest}
    more = {"scratch_lr": args.scratch_lr, "members": args.members, "folds": args.folds}
    return {"encoder": encoder, "settings": asdict(how) | more, "data": Path(args.data).name}


def write_results(
    out: Path, data: Labeled, task: Task, splits: Sequence[Split], outcome: Outcome, about: dict[str, Any]
) -> dict[str, Any]:
    """``predictions.parquet``, ``history.jsonl``, ``results.json`` and ``parity.png``; returns the results."""
    out.mkdir(parents=True, exist_ok=True)
    tested = np.flatnonzero(outcome.fold >= 0)
    table: dict[str, Any] = {"key": [data.graphs.keys[i] for i in tested], "fold": outcome.fold[tested]}
    for t, name in enumerate(data.names):
        table[f"true:{name}"] = data.targets[tested, t]
    for kind, arms in (("", outcome.predictions), (" std", outcome.deviations)):
        for arm, values in arms.items():
            table |= {f"{arm}{kind}:{name}": values[tested, c] for c, name in enumerate(task.columns)}
    pq.write_table(pa.table(table), out / "predictions.parquet")
    with open(out / "history.jsonl", "w") as file:
        for arm, members in outcome.members.items():
            for number, member in enumerate(members):
                file.writelines(json.dumps({"arm": arm, "member": number} | line) + "\n" for line in member.history)
    results = {
        **about,
        "task": asdict(task),
        "data_digest": _digest(data, outcome),
        "crystals": [split.sizes() for split in splits],
        "errors": outcome.errors,
        "fold_errors": outcome.fold_errors,
        "best_epochs": {arm: [m.best for m in members] for arm, members in outcome.members.items()},
    }
    if PRETRAINED in outcome.deviations and not task.classes:
        results["within_one_std"] = _coverage(data, outcome)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    if not task.classes:
        plot_parity(out / "parity.png", task, data.targets, outcome)
    return results


def property_card(
    results: dict[str, Any], data: Labeled, card: EncoderCard, task: Task, outcome: Outcome
) -> PropertyCard:
    """What is known of the fine-tuned model."""
    errors = outcome.errors
    metrics = {f"test/{arm}/{name}": value for arm, own in errors.items() for name, value in own.items()}
    metrics["test/skill"] = skill(task, outcome)
    seen = sorted({*card.elements, *np.unique(data.graphs.atomic_numbers).tolist()}) if card.elements else []
    return PropertyCard(
        task=asdict(task),
        scalers=scalers_of(outcome.members[PRETRAINED]),
        cutoff=card.cutoff,
        centers=card.centers,
        end=card.end,
        gamma=card.gamma,
        model=card.model,
        elements=seen,
        encoder=results["encoder"],
        data_digest=results["data_digest"],
        settings=results["settings"],
        metrics=metrics,
        sources=data.sources,
        code_version=__version__,
    )


def skill(task: Task, outcome: Outcome) -> float:
    """1 − error / error of the baseline that knows nothing, mean over the targets: what models are compared by."""
    dull = outcome.errors["frequencies" if task.classes else "median"]
    ours = outcome.errors[PRETRAINED]
    names = ["log_loss"] if task.classes else [t.name for t in task.targets]
    return float(np.mean([1.0 - ours[n] / dull[n] if dull[n] > 0 else np.nan for n in names]))


def report(results: dict[str, Any], outcome: Outcome, out: str) -> str:
    """The errors as a few lines."""
    sizes, task = results["crystals"], Task.read(results["task"])
    parts = ", ".join(f"{sum(s[n] for s in sizes) // len(sizes)} {n}" for n in ("train", "val", "test"))
    each = f"; {len(sizes)} folds of " if len(sizes) > 1 else "; "
    lines: list[str] = []
    for metric in outcome.errors[PRETRAINED]:
        unit = next((t.unit for t in task.targets if t.name == metric), "")
        what = f"mean absolute error of {metric}, {unit or 'no unit given'}" if not task.classes else metric
        lines.append(f"{what}{each}{parts} crystals")
        values = {arm: errors[metric] for arm, errors in outcome.errors.items()}
        best = (max if metric == "accuracy" else min)(values.values())
        for arm, value in values.items():
            error = outcome.spread(arm, metric)
            about = f" ± {error:.4f}" if np.isfinite(error) else ""
            lines.append(f"  {arm:24} {value:9.4f}{about}{'   ← best' if value == best else ''}")
    if "within_one_std" in results:
        lines.append(f"  within one deviation of the ensemble: {results['within_one_std']:.0%} of the test labels")
    lines.append(f"  {out}/: results.json, predictions.parquet, history.jsonl, model/")
    return "\n".join(lines)


def _coverage(data: Labeled, outcome: Outcome) -> float:
    off = np.abs(outcome.predictions[PRETRAINED] - data.targets)
    known = np.isfinite(off)
    return float((off[known] <= outcome.deviations[PRETRAINED][known]).mean())


def _digest(data: Labeled, outcome: Outcome) -> str:
    """What makes errors comparable: the same crystals, labels and test sets."""
    return hashlib.sha256(data.digest().encode() + outcome.fold.tobytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
