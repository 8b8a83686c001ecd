"""Plot the curves of a run, as in figure 3 of the paper: python docs/curves_plot.py RUN OUT.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "loss per scored edge": ("train/loss", "val/loss"),
    "skill": ("val/skill", "val/skill_edge"),
    "gradient norm": ("guard/norm",),
    "learning rate": ("lr",),
}
run, out = sys.argv[1:]
lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
events = [json.loads(line) for line in (Path(run) / "events.jsonl").read_text().splitlines()]
judged = [e["step"] for e in events if e["event"] in ("clip", "skip", "rollback", "stop")]
figure, axes = plt.subplots(1, len(PANELS), figsize=(3.2 * len(PANELS), 2.8), layout="constrained")
for axis, (title, names) in zip(axes, PANELS.items(), strict=True):
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        few = {"marker": "o", "ms": 3} if name.startswith("val/") else {"lw": 0.8}
        axis.plot(*zip(*points, strict=True), label=name, **few)
    for step in judged:
        axis.axvline(step, color="tab:red", lw=0.5)
    if title in ("loss per scored edge", "gradient norm"):
        axis.set_yscale("log")
    axis.set(xlabel="step", title=title)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        axis.legend()
figure.savefig(out, dpi=80)
