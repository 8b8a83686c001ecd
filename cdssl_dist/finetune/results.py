"""Outputs of a fine-tuning: results, predictions, histories, a parity plot, and a short summary."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdssl_dist.data.labeled import Labeled
from cdssl_dist.finetune.experiment import PRETRAINED, Outcome
from cdssl_dist.finetune.parity import plot_parity
from cdssl_dist.finetune.predictor import PropertyCard
from cdssl_dist.finetune.splits import Split
from cdssl_dist.finetune.targets import Array, Task
from cdssl_dist.finetune.uncertainty import SHARE, Uncertainty


def write_results(
    out: Path, data: Labeled, task: Task, splits: Sequence[Split], outcome: Outcome, card: PropertyCard
) -> dict[str, Any]:
    """Write ``predictions.parquet``, ``history.jsonl``, ``results.json`` and ``parity.png``; return the results."""
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
        "encoder": card.encoder,
        "settings": card.settings,
        "sources": card.sources,
        "task": card.task,
        "data_digest": card.data_digest,
        "crystals": [split.sizes() for split in splits],
        "errors": outcome.errors,
        "fold_errors": outcome.fold_errors,
        "best_epochs": {arm: [m.best for m in members] for arm, members in outcome.members.items()},
    }
    if outcome.uncertainty:
        results["uncertainty"] = {name: asdict(u) for name, u in outcome.uncertainty.items()}
    (out / "results.json").write_text(json.dumps(_plain(results), indent=1))
    (out / "parity.png").unlink(missing_ok=True)  # may be left from an earlier regression
    if not task.classes:
        plot_parity(out / "parity.png", task, data.targets, outcome)
    return results


def figures(task: Task, outcome: Outcome, targets: Array) -> dict[str, float]:
    """Metrics of the model's card: errors of all arms, the skill to compare models by, coverage of the uncertainty."""
    found = {f"test/{arm}/{name}": value for arm, own in outcome.errors.items() for name, value in own.items()}
    for name, u in outcome.uncertainty.items():
        found[f"test/covered/{name}"] = u.covered
    return {k: v for k, v in (found | {"test/skill": skill(task, outcome, targets)}).items() if np.isfinite(v)}


def skill(task: Task, outcome: Outcome, targets: Array) -> float:
    """1 − error / error of a trivial predictor, mean over targets: compares models on the same test crystals.

    The trivial predictor gives the median of the test labels (in the unit of the target, however it is learned), or
    the frequencies of the classes.
    """
    ours = outcome.errors[PRETRAINED]
    if task.classes:
        trivial = {"log_loss": outcome.errors["frequencies"]["log_loss"]}
    else:
        tested = targets[outcome.fold >= 0]
        off = np.nanmean(np.abs(tested - np.nanmedian(tested, axis=0)), axis=0)
        trivial = {target.name: float(error) for target, error in zip(task.targets, off, strict=True)}
    return float(np.mean([1.0 - ours[name] / error if error > 0 else np.nan for name, error in trivial.items()]))


def told(results: dict[str, Any], outcome: Outcome, out: str) -> str:
    """Summarise the errors in a few lines."""
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
            about = f" ± {error:.2g}" if np.isfinite(error) else ""
            lines.append(f"  {arm:24} {value:9.4g}{about}{'   ← best' if value == best else ''}")
        if u := outcome.uncertainty.get(metric):
            lines.append(f"  {describe(u)}")
    lines.append(f"  {out}/: results.json, predictions.parquet, history.jsonl, report.html, model/")
    return "\n".join(lines)


def digest(data: Labeled, outcome: Outcome) -> str:
    """Digest of crystals, labels and test sets: errors are comparable where it is the same."""
    return hashlib.sha256(data.digest().encode() + outcome.fold.tobytes()).hexdigest()


def describe(u: Uncertainty) -> str:
    """Summarise the calibration of an ensemble's deviation in one line."""
    if not math.isfinite(u.factor):
        why = "too few validation labels, or members that agree where they are wrong"
        return f"uncertainty: the deviation cannot be scaled ({why}); unscaled, it covers {u.uncalibrated:.0%}"
    covered = f"cover {u.covered:.0%} of the test labels" if math.isfinite(u.covered) else "could not be checked"
    return (
        f"uncertainty: ±{u.factor:.3g} standard deviations of the ensemble, meant to cover {SHARE:.0%}, {covered} "
        f"(one deviation: {u.uncalibrated:.0%}); rank correlation with the error {u.rank:.2f}"
    )


def _plain(value: Any) -> Any:
    """Replace floats that JSON cannot hold (NaN and infinities) by null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
