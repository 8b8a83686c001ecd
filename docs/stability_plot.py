"""The figure of stability.md, from the metrics of two runs: python docs/stability_plot.py UNGUARDED GUARDED OUT.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

*runs, out = sys.argv[1:]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for run, label, color in zip(runs, ("without the guard", "with the guard"), ("tab:red", "tab:blue"), strict=True):
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    for axis, name in zip(axes, ("guard/norm", "val/mae"), strict=True):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        axis.semilogy(
            *zip(*points, strict=True), label=label, color=color, marker="o" if name == "val/mae" else None, ms=3
        )
for axis, title in zip(axes, ("gradient norm", "validation mean absolute error of ê"), strict=True):
    axis.set(xlabel="step", title=title)
    axis.grid(alpha=0.3)
axes[0].legend()
figure.savefig(out, dpi=80)
