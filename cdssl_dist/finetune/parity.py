"""Parity plots: predicted against true values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cdssl_dist.finetune.experiment import Outcome
from cdssl_dist.finetune.targets import Array, Task


def plot_parity(path: Path, task: Task, targets: Array, outcome: Outcome) -> None:
    """Plot the test crystals, one panel per target and arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arms, names = list(outcome.members), task.targets
    size = (4.5 * len(arms), 4.4 * len(names))
    figure, panels = plt.subplots(len(names), len(arms), figsize=size, squeeze=False, constrained_layout=True)
    for t, target in enumerate(names):
        tested = (outcome.fold >= 0) & np.isfinite(targets[:, t])
        true = targets[tested, t]
        for axes, arm in zip(panels[t], arms, strict=True):
            if len(true):
                ends = [float(true.min()), float(true.max())]
                axes.plot(ends, ends, color="0.6", linewidth=1)
            axes.scatter(true, outcome.predictions[arm][tested, t], s=10, alpha=0.6, linewidths=0)
            error = outcome.errors[arm][target.name]
            unit = f", {target.unit}" if target.unit else ""
            axes.set(title=f"{arm}: MAE {error:.3g} {target.unit}", xlabel=f"{target.name}{unit}", ylabel="predicted")
    figure.savefig(path, dpi=150)
    plt.close(figure)
