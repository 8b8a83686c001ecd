"""Fine-tune a pretrained encoder on labeled crystals, beside the same network from scratch on the same split.

    cdssl finetune --encoder models:/cdssl-encoder@champion --data FILE --target COLUMN

A plain torch loop: neither Ray nor DeepSpeed is started.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from cdssl_dist import registry
from cdssl_dist.commands import RUNS, Parser, command
from cdssl_dist.export import EncoderCard, read_encoder
from cdssl_dist.heads import PropertyModel
from cdssl_dist.labeled import COMPUTED, Labeled, load_labeled
from cdssl_dist.megnet import N_ELEMENTS, MEGNet
from cdssl_dist.mlflow_server import tracking_uri
from sharding.graph import offsets
from sharding.progress import Progress


@dataclass(frozen=True)
class FineTuning:
    """How one network is trained."""

    lr: float = 1e-3
    scratch_lr: float = 3e-3  # from scratch a higher rate does better; each arm gets its own
    epochs: int = 60
    batch_size: int = 32
    patience: int = 20  # epochs without a better validation error
    seed: int = 0
    threads: int = 1  # batches are small: more threads mostly wait for each other


@dataclass(frozen=True)
class Split:
    """Indices of crystals."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def split_by_group(groups: Sequence[str], train: float, val: float, seed: int) -> Split:
    """Shuffle groups, then fill train, validation and test by numbers of crystals; no group is in two of them."""
    names, member = np.unique(np.array(groups), return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    rank = np.empty(len(names), np.int64)
    rank[order] = np.arange(len(names))
    by_rank = np.bincount(rank[member], minlength=len(names))
    before = np.concatenate([[0], np.cumsum(by_rank)[:-1]]) / len(member)  # share of crystals in earlier groups
    part = np.where(before < train, 0, np.where(before < train + val, 1, 2))[rank[member]]
    split = Split(*(np.flatnonzero(part == p) for p in range(3)))
    sizes = [len(i) for i in (split.train, split.val, split.test)]
    if min(sizes) == 0:
        raise ValueError(
            f"{len(member)} crystals in {len(names)} groups split into {sizes[0]} train, {sizes[1]} validation and "
            f"{sizes[2]} test crystals; none may be empty: give more data or other shares"
        )
    return split


def fit(
    encoder: MEGNet, card: EncoderCard, data: Labeled, split: Split, how: FineTuning, lr: float, name: str
) -> tuple[PropertyModel, NDArray[np.float64]]:
    """Train one network; the weights with the best validation error are kept.

    Args:
        encoder: pretrained or new; not changed.
        card: its expansion.
        data, split: crystals.
        how, lr: training.
        name: of the arm, for the progress line.

    Returns:
        The network, and its predictions for all crystals in the target's unit, (n,).
    """
    torch.manual_seed(how.seed)
    torch.set_num_threads(how.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = PropertyModel(copy.deepcopy(encoder), card.expansion).to(device)
    known = data.target[split.train]
    center, scale = float(known.mean()), float(known.std()) or 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs)
    shuffle = np.random.default_rng(how.seed)
    best, best_weights, since = float("inf"), model.state_dict(), 0

    with Progress(name, "epochs", how.epochs) as progress:
        for _ in range(how.epochs):
            model.train()
            order = shuffle.permutation(split.train)
            for at in range(0, len(order), how.batch_size):
                batch, target = data.batch(order[at : at + how.batch_size], device)
                predicted = model(batch)[: len(target), 0]
                loss = torch.nn.functional.l1_loss(predicted, (target - center) / scale)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            schedule.step()
            progress.add()
            error = float(np.abs(predict(model, data, split.val) * scale + center - data.target[split.val]).mean())
            since += 1
            if error < best:
                best, best_weights, since = error, copy.deepcopy(model.state_dict()), 0
            if since >= how.patience:
                break
    model.load_state_dict(best_weights)
    return model, predict(model, data, np.arange(len(data))) * scale + center


def predict(model: PropertyModel, data: Labeled, index: NDArray[np.int64], size: int = 64) -> NDArray[np.float64]:
    """Standardised predictions for some crystals: (len(index),)."""
    device = next(model.parameters()).device
    model.eval()
    parts = []
    with torch.no_grad():
        for at in range(0, len(index), size):
            batch, target = data.batch(index[at : at + size], device)
            parts.append(model(batch)[: len(target), 0].double().cpu().numpy())
    return np.concatenate(parts)


def element_fractions(data: Labeled) -> NDArray[np.float64]:
    """Share of each element in each crystal: (n, 119)."""
    start = offsets(data.graphs.n_atoms)
    counts = [
        np.bincount(data.graphs.atomic_numbers[a:b], minlength=N_ELEMENTS)
        for a, b in zip(start[:-1], start[1:], strict=True)
    ]
    return np.array(counts) / data.graphs.n_atoms[:, None]


def baselines(data: Labeled, split: Split) -> dict[str, NDArray[np.float64]]:
    """What needs no network: the median, and a ridge on element fractions; predictions for all crystals."""
    fractions = element_fractions(data)
    ridge = RidgeCV(alphas=np.logspace(-4, 2, 13)).fit(fractions[split.train], data.target[split.train])
    return {
        "median": np.full(len(data), np.median(data.target[split.train])),
        "ridge on composition": ridge.predict(fractions),
    }


def finetune(
    encoder: MEGNet, card: EncoderCard, data: Labeled, split: Split, how: FineTuning
) -> dict[str, NDArray[np.float64]]:
    """Predictions of all crystals by every arm: pretrained, from scratch, and the baselines."""
    torch.manual_seed(how.seed)
    fresh = MEGNet(edge_features=card.centers, **card.model)
    _, pretrained = fit(encoder, card, data, split, how, how.lr, "fine-tune, pretrained")
    _, scratch = fit(fresh, card, data, split, how, how.scratch_lr, "fine-tune, from scratch")
    return {"pretrained": pretrained, "from scratch": scratch, **baselines(data, split)}


def write_results(
    out: Path, data: Labeled, split: Split, predictions: dict[str, NDArray[np.float64]], about: dict[str, Any]
) -> dict[str, Any]:
    """``predictions.parquet``, ``results.json`` and ``parity.png``; returns the results."""
    out.mkdir(parents=True, exist_ok=True)
    part = np.empty(len(data), object)
    for name in ("train", "val", "test"):
        part[getattr(split, name)] = name
    columns = {"key": data.graphs.keys, "split": part.tolist(), "target": data.target}
    pq.write_table(pa.table(columns | predictions), out / "predictions.parquet")
    error = {n: float(np.abs(p - data.target)[split.test].mean()) for n, p in predictions.items()}
    sizes = {name: len(getattr(split, name)) for name in ("train", "val", "test")}
    results = {**about, "target": data.name, "unit": data.unit, "crystals": sizes, "test_mae": error}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    _plot_parity(out / "parity.png", data, split, predictions)
    return results


def _plot_parity(path: Path, data: Labeled, split: Split, predictions: dict[str, NDArray[np.float64]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, all_axes = plt.subplots(1, 2, figsize=(9, 4.4), sharex=True, sharey=True, constrained_layout=True)
    true = data.target[split.test]
    low, high = float(true.min()), float(true.max())
    for axes, arm in zip(all_axes, ("pretrained", "from scratch"), strict=True):
        axes.plot([low, high], [low, high], color="0.6", linewidth=1)
        axes.scatter(true, predictions[arm][split.test], s=10, alpha=0.6, linewidths=0)
        error = np.abs(predictions[arm][split.test] - true).mean()
        axes.set(title=f"{arm}: MAE {error:.3g} {data.unit}", xlabel=f"{data.name}, {data.unit}")
    all_axes[0].set_ylabel("predicted")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull an encoder, fine-tune it, compare, write what came out."""
    default = FineTuning()
    p = Parser(
        "cdssl finetune", "Fine-tune a pretrained encoder on labeled crystals, beside the same network from scratch."
    )
    p.add_argument("--encoder", default="models:/cdssl-encoder@champion", help="models:/NAME@ALIAS, or a folder")
    p.add_argument("--registry", help="MLflow URI; MLFLOW_TRACKING_URI, else runs/mlflow.db, where left out")
    p.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    p.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    p.add_argument("--target", required=True, help=f"a label or column, or one of {', '.join(COMPUTED)}")
    p.add_argument("--train", type=float, default=0.5, help="share of the crystals to train on, by whole groups")
    p.add_argument("--val", type=float, default=0.1, help="share for early stopping")
    p.add_argument("--epochs", type=int, default=default.epochs, help="at most")
    p.add_argument("--patience", type=int, default=default.patience, help="epochs without a better validation error")
    p.add_argument("--batch-size", type=int, default=default.batch_size, help="crystals")
    p.add_argument("--lr", type=float, default=default.lr, help="of the pretrained network")
    p.add_argument("--scratch-lr", type=float, default=default.scratch_lr, help="of the network from scratch")
    p.add_argument("--seed", type=int, default=default.seed, help="of the split, the readout and the order")
    p.add_argument("--threads", type=int, default=default.threads, help="of torch, on CPU")
    p.add_argument("--out", default="runs/finetune", help="folder for results")
    args = p.parse_args(argv)

    folder = registry.pull(args.encoder, tracking_uri(args.registry, RUNS))
    encoder, card = read_encoder(folder)
    data = load_labeled(args.data, args.target, card.cutoff, args.split)
    split = split_by_group(data.groups, args.train, args.val, args.seed)
    how = FineTuning(args.lr, args.scratch_lr, args.epochs, args.batch_size, args.patience, args.seed, args.threads)
    predictions = finetune(encoder, card, data, split, how)
    about = {"encoder": args.encoder, "weights": card.weights_sha256, "settings": asdict(how), "data": args.data}
    results = write_results(Path(args.out), data, split, predictions, about)
    print(report(results, args.out))
    return 0


def report(results: dict[str, Any], out: str) -> str:
    """The errors as a few lines."""
    sizes, unit = results["crystals"], results["unit"]
    lines = [
        f"{results['target']} ({unit}), {sizes['train']} training, {sizes['val']} validation and "
        f"{sizes['test']} test crystals; mean absolute error on the test crystals:"
    ]
    best = min(results["test_mae"].values())
    for name, error in results["test_mae"].items():
        lines.append(f"  {name:22} {error:9.4f} {unit}{'   ← best' if error == best else ''}")
    lines.append(f"  {out}/predictions.parquet, results.json, parity.png")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
