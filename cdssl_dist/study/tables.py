"""Reports of a study: tables in Parquet and Markdown, a chart of the changes, and files of predictions."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdssl_dist.study.config import StudyConfig
from cdssl_dist.study.run import Result, errors
from cdssl_dist.study.statistics import Comparison, Mean, Wins, compare, ensemble, mean_of, wins_of
from sharding.manifest import write_atomically

SMALL: Final = 500  # labels, at most: where pretraining should help most


@dataclass(frozen=True)
class Findings:
    """All results of a study so far."""

    config: StudyConfig
    about: Mapping[str, str]  # where the results come from, by name
    sweeps: Sequence[Result]
    results: Sequence[Result]  # of the reported cells
    planned: int  # how many of them there are
    failures: Mapping[str, str]  # name of a cell → why
    rates: Mapping[tuple[str, int, str], float]  # target, sweep size, arm
    without: Mapping[str, Mapping[str, float]]  # target → id without a graph → value in place of a prediction
    seen: Mapping[str, frozenset[str]] | None = None  # target → keys whose formula was seen in pretraining
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)  # "all", "seen", "unseen" → cases

    def __post_init__(self) -> None:
        """Compare every arm with the reference, once."""
        for name in ("all", "seen", "unseen") if self.seen is not None else ("all",):
            self.comparisons[name] = list(self._compare(name))

    def of(self, target: str, size: int, arm: str) -> list[Result]:
        """Results of a case, one for each seed."""
        wanted = ("study", target, size, arm)
        return [r for r in self.results if (r.cell.kind, r.cell.target, r.cell.size, r.cell.arm) == wanted]

    def wins(self, arm: str, part: str = "all", most: float = math.inf) -> Wins:
        """Wins and losses of an arm, over cases with at most this many labels."""
        return wins_of(c for c in self.comparisons[part] if c.arm == arm and c.size <= most)

    def arms(self) -> list[str]:
        """What is compared with the reference: networks first, then probes and baselines."""
        return [arm for arm in (*self.config.arms, *self.config.others) if arm != self.config.reference]

    def _compare(self, part: str) -> Any:
        for target in self.config.targets:
            for size in self.config.sizes_of(target):
                reference = self.of(target, size, self.config.reference)
                keys = frozenset(key for r in reference for key in r.keys)
                if self.seen is not None and part != "all":
                    keys = keys & self.seen[target] if part == "seen" else keys - self.seen[target]
                for arm in self.arms():
                    if found := compare(self.of(target, size, arm), reference, keys):
                        yield found


def write_all(folder: Path, findings: Findings) -> list[Path]:
    """Rewrite every table and figure; return their paths."""
    config, written = findings.config, [folder / "results.parquet", folder / "table.md"]
    _write_rows(written[0], [*findings.sweeps, *findings.results])
    write_atomically(written[1], markdown(findings).encode())
    if any(c.arm == findings.arms()[0] for c in findings.comparisons["all"]):
        written.append(folder / "changes.png")
        plot_changes(written[-1], findings, findings.arms()[0])
    for target in config.predict.targets if config.predict else ():
        for arm in config.predict.arms if config.predict else ():
            done = [r for r in findings.results if (r.cell.kind, r.cell.target, r.cell.arm) == ("predict", target, arm)]
            if config.predict and len(done) == len(config.predict.seeds):
                suffix = f"-{arm}" if len(config.predict.arms) > 1 else ""
                written.append(folder / f"preds-{target}{suffix}.csv")
                _write_predictions(
                    written[-1], done, config.targets[target].extensive, findings.without.get(target, {})
                )
    return written


def markdown(findings: Findings) -> str:
    """The tables as Markdown."""
    config, reference = findings.config, findings.config.reference
    done = len(findings.results)
    lines = ["# Study", ""]
    if done < findings.planned:
        lines += [f"**Not complete: {done} of {findings.planned} cells.** The figures below cover only these.", ""]
    lines += [f"- {name}: {value}" for name, value in findings.about.items()]
    programs = Counter(str(r.about["program"]) for r in [*findings.sweeps, *findings.results] if "program" in r.about)
    lines += ["- computed by " + ", ".join(f"{name} ({n} cells)" for name, n in sorted(programs.items()))] * bool(
        programs
    )
    if len(programs) > 1:
        lines += [
            "",
            "**Cells were computed by several versions of this program.** Differences in rounding alone can change "
            "the error of one training by some percent.",
        ]
    if any(findings.comparisons.values()):
        lines += ["", f"## Compared with {reference}", "", *_wins(findings)]
    for target, about in config.targets.items():
        sizes = [s for s in config.sizes_of(target) if findings.of(target, s, reference)]
        if sizes:
            unit = (about.unit or "1") + (" per atom" if about.extensive else "")
            count = max(r.about["n"] for s in sizes for r in findings.of(target, s, reference))
            lines += [
                "",
                f"## {target}",
                "",
                f"Mean absolute error, {unit}, of {count} crystals; ± standard error over seeds.",
            ]
            lines += ["", *_errors_of(findings, target, sizes), "", *_changes_of(findings, target)]
            if about.log:
                lines += [
                    "",
                    "Mean absolute error of the natural logarithm, which was learned.",
                ]
                lines += ["", *_errors_of(findings, target, sizes, as_learned=True)]
    lines += _rates(findings)
    lines += _predicted(findings)
    if findings.failures:
        lines += ["", "## Failed cells", ""]
        lines += [f"- `{name}`: {why}" for name, why in findings.failures.items()]
    return "\n".join(lines) + "\n"


def plot_changes(path: Path, findings: Findings, arm: str) -> None:
    """Plot changes in mean absolute error relative to the reference, bars by target (as in the paper's figure 4)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [c for c in findings.comparisons["all"] if c.arm == arm]
    targets = [t for t in findings.config.targets if any(c.target == t for c in cases)]
    figure, axes = plt.subplots(figsize=(1.2 + 1.9 * len(targets), 4.2), constrained_layout=True)
    ticks: list[float] = []
    for i, target in enumerate(targets):
        own = sorted((c for c in cases if c.target == target), key=lambda c: c.size)
        width = 0.85 / len(own)
        at = [i + (j - (len(own) - 1) / 2) * width for j in range(len(own))]
        ticks.append(i)
        bars = [100 * c.change for c in own]
        colours = ["tab:green" if c.won else "tab:red" for c in own]
        spread = [100 * c.change_error for c in own]  # NaN (one seed) draws nothing
        axes.bar(
            at, bars, width * 0.92, color=colours, yerr=spread, ecolor="0.3", capsize=2, error_kw={"linewidth": 0.8}
        )
        for x, height, case in zip(at, bars, own, strict=True):
            away, side = (3, "bottom") if height < 0 else (-3, "top")
            axes.annotate(
                _short(case.size), (x, 0), (0, away), textcoords="offset points", ha="center", va=side, fontsize=6
            )
    axes.use_sticky_edges = False  # else the chart may end at 0, where the sizes are written
    axes.margins(y=0.1)
    wins = findings.wins(arm)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(ticks, [t.replace("_", " ") for t in targets], fontsize=7, wrap=True)
    axes.set_ylabel(f"change in MAE relative to {findings.config.reference}, %")
    better = f"better in {wins.won} of {wins.won + wins.lost} cases"
    axes.set_title(f"{arm}: {better}; at each bar, the number of training labels", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short(size: int) -> str:
    return f"{size // 1000}k" if size >= 1000 and size % 1000 == 0 else str(size)


def _write_rows(path: Path, results: Sequence[Result]) -> None:
    rows = [
        {
            "kind": r.cell.kind,
            "target": r.cell.target,
            "size": r.cell.size,
            "seed": r.cell.seed,
            "arm": r.cell.arm,
            "lr": r.cell.lr or None,
            **r.about,
        }
        for r in sorted(results, key=lambda r: r.cell)
    ]
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.Table.from_pylist(rows) if rows else pa.table({"kind": pa.array([], pa.string())}), temporary)
    temporary.replace(path)


def _write_predictions(path: Path, results: Sequence[Result], extensive: bool, without: Mapping[str, float]) -> None:
    """Write ``id,prediction`` for the crystals with secret labels: means over seeds, in the unit of the label."""
    keys, true, predicted = ensemble(results)
    factors = results[0].atoms if extensive else np.ones(len(keys))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "prediction"])
    for key, label, value, factor in zip(keys, true, predicted, factors, strict=True):
        if not math.isfinite(label):
            writer.writerow([key, f"{value * factor:.6g}"])
    writer.writerows([key, f"{value:.6g}"] for key, value in without.items())
    write_atomically(path, text.getvalue().encode())


def _wins(findings: Findings) -> list[str]:
    lines = [
        "| arm | crystals | better | p, sign test | better, p < 0.05 | worse, p < 0.05 | median change | "
        f"median change, ≤ {SMALL} labels |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in findings.arms():
        for part in findings.comparisons:
            w, few = findings.wins(arm, part), findings.wins(arm, part, SMALL)
            if w.won + w.lost:
                lines.append(
                    f"| {arm} | {part} | {w.won} of {w.won + w.lost} | {w.p:.2g} | {w.clear} | {w.clearly_lost} | "
                    f"{w.median_change:+.1%} | {few.median_change:+.1%} |"
                )
    return [
        *lines,
        "",
        "`seen` and `unseen`: evaluated crystals whose formula is, or is not, among those of pretraining."
        if findings.seen is not None
        else "Not split by formulas seen in pretraining: give its data set with `--pretraining-shards`.",
        "Cases of one target share crystals and samples, so the sign test is overconfident; p < 0.05 refers to "
        "Wilcoxon's test over crystals.",
    ]


def _errors_of(findings: Findings, target: str, sizes: Sequence[int], as_learned: bool = False) -> list[str]:
    config = findings.config
    learned = config.targets[target].learned(target)
    arms = [*config.arms, *config.others]
    lines = [f"| labels | {' | '.join(arms)} |", "| ---: " * (len(arms) + 1) + "|"]
    for size in sizes:
        means = {
            arm: mean_of([r.error_as_learned(learned) if as_learned else r.mae for r in findings.of(target, size, arm)])
            for arm in arms
        }
        best = min((m.value for m in means.values() if m.seeds), default=math.nan)
        lines.append(f"| {size} | {' | '.join(_mean(m, m.value == best) for m in means.values())} |")
    return lines


def _changes_of(findings: Findings, target: str) -> list[str]:
    parts = list(findings.comparisons)
    names = " | ".join("change" if p == "all" else f"{p} formulas (crystals)" for p in parts)
    lines = [
        f"| labels | arm | {names} | p, crystals | p, seeds |",
        "| ---: | --- " + "| ---: " * (len(parts) + 2) + "|",
    ]
    networks = [arm for arm in findings.arms() if arm in findings.config.arms]
    for size in findings.config.sizes_of(target):
        for arm in networks:
            found = {
                p: next((c for c in findings.comparisons[p] if (c.target, c.size, c.arm) == (target, size, arm)), None)
                for p in parts
            }
            whole = found["all"]
            if whole is None:
                continue
            cells = [_change(c, p != "all") for p, c in found.items()]
            lines.append(f"| {size} | {arm} | {' | '.join(cells)} | {_p(whole.p_crystals)} | {_p(whole.p_seeds)} |")
    return lines if len(lines) > 2 else []


def _rates(findings: Findings) -> list[str]:
    if not findings.rates:
        return []
    arms, reached = list(findings.config.arms), sorted({(t, s) for t, s, _ in findings.rates})
    lines = [
        "",
        "## Learning rates",
        "",
        "In parentheses, the errors they were chosen by: of what is learned (e.g. the logarithm), on seeds and "
        "crystals that are not reported. * marks an end of the grid.",
    ]
    lines += ["", f"| target | labels | {' | '.join(arms)} |", "| --- | ---: " + "| ---: " * len(arms) + "|"]
    for target, size in reached:
        shown = []
        for arm in arms:
            rate, grid = findings.rates.get((target, size, arm)), findings.config.arms[arm].rates
            end = "*" if len(grid) > 1 and rate in (min(grid), max(grid)) else ""
            learned = findings.config.targets[target].learned(target)
            error = mean_of([
                r.error_as_learned(learned) for r in findings.sweeps
                if (r.cell.target, r.cell.size, r.cell.arm, r.cell.lr) == (target, size, arm, rate)
            ])  # fmt: skip
            shown.append("" if rate is None else f"{rate:g}{end} ({_mean(error)})")
        lines.append(f"| {target} | {size} | {' | '.join(shown)} |")
    return lines


def _predicted(findings: Findings) -> list[str]:
    done = [r for r in findings.results if r.cell.kind == "predict"]
    if not done:
        return []
    head = "| target | arm | labels | seeds | MAE of each seed | MAE of their mean prediction |"
    lines = ["", "## All data", "", head, "| --- " * 6 + "|"]
    for target, arm in dict.fromkeys((r.cell.target, r.cell.arm) for r in done):
        own = [r for r in done if (r.cell.target, r.cell.arm) == (target, arm)]
        _, true, predicted = ensemble(own)
        mean, together = mean_of([r.mae for r in own]), errors(true, predicted)["mae"]
        lines.append(f"| {target} | {arm} | {own[0].cell.size:,} | {len(own)} | {_mean(mean)} | {together:.4g} |")
    return lines


def _mean(mean: Mean, bold: bool = False) -> str:
    if not mean.seeds:
        return ""
    text = f"{mean.value:.4g}" + (f" ± {mean.error:.2g}" if math.isfinite(mean.error) else "")
    return f"**{text}**" if bold else text


def _change(case: Comparison | None, counted: bool) -> str:
    if case is None:
        return ""
    error = f" ± {case.change_error:.1%}" if math.isfinite(case.change_error) else ""
    return f"{case.change:+.1%}{error}" + (f" ({case.crystals})" if counted else "")


def _p(value: float) -> str:
    return f"{value:.2g}" if math.isfinite(value) else ""
