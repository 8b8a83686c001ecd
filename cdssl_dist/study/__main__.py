"""Does pretraining pay? Data sets × train sizes × seeds × {pretrained, from scratch, controls}, as Ray tasks.

    cdssl study --config configs/study/paper.yaml --data jarvis=FILE [section.key=value ...]

Every training is a cell that writes one file; the same command, run again, computes the missing ones.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from cdssl_dist import __version__
from cdssl_dist.config import ConfigError, packaged, read
from cdssl_dist.data.vectors import vectors_of
from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import say, tracking_uri
from cdssl_dist.mlops.tracking import follow
from cdssl_dist.model.export import read_card
from cdssl_dist.study.cells import Cell, Job, Plan, Pulled, StudyError, choose_rates
from cdssl_dist.study.config import StudyConfig
from cdssl_dist.study.data import open_crystals, prepare, pretraining_formulas
from cdssl_dist.study.run import Result, read_results, run
from cdssl_dist.study.tables import Findings, write_all
from cdssl_dist.train.runlog import append_metrics
from sharding.commands import DONE, FAILED, RUNS, Parser, command
from sharding.executor import Executor, Failed
from sharding.manifest import write_atomically
from sharding.progress import Progress
from sharding.ray_start import LOCAL

ARTIFACTS: Final = ("study.yaml", "table.md", "changes.png", "results.parquet", "metrics.jsonl")
EDGES_PER_SECOND: Final = 60_000.0  # directed, of one core in training: the first guess of an estimate


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Compute the missing cells, then write the tables."""
    p = Parser("cdssl study", "Data sets × train sizes × seeds × arms: what an encoder is worth.")
    p.add_argument("--config", help="YAML file; if omitted, the packaged study/paper.yaml")
    p.add_argument("--data", action="append", default=[], metavar="NAME=PATH", help="path of a data set of the config")
    p.add_argument("--encoder", metavar="REF", help="models:/NAME@ALIAS or a folder, in place of the config's")
    p.add_argument("--out", help="folder of the study, in place of the config's; all workers must share it")
    p.add_argument("--pretraining-shards", metavar="DIR", help="pretraining data: report seen formulas separately")
    p.add_argument("--registry", help="MLflow URI; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db")
    p.add_argument(
        "--workers",
        type=int,
        help="cells at a time; if omitted, one per CPU; 0: in this process, without Ray",
    )
    p.add_argument("--address", help="Ray cluster; if omitted, RAY_ADDRESS, else one started on this machine")
    p.add_argument("--dry-run", action="store_true", help="only print the number of cells and their estimated cost")
    p.add_argument("--ids", metavar="FILE", help="only write the ids of all crystals that probes need vectors of")
    p.add_argument("--sweeps-only", action="store_true", help="stop after the sweeps, which use no reported crystals")
    p.add_argument("override", nargs="*", metavar="section.key=value", help="changes to the config")
    args = p.parse_args(argv)

    overrides = list(args.override)
    overrides += [f"{key}={value}" for key, value in (("encoder", args.encoder), ("out", args.out)) if value]
    config = read(StudyConfig, Path(args.config) if args.config else packaged("study/paper.yaml"), overrides)
    seen = pretraining_formulas(args.pretraining_shards) if args.pretraining_shards else None
    if config.unseen_only and seen is None:
        raise ConfigError("unseen_only needs --pretraining-shards DIR, the data set that the encoder was trained on")
    left_out = seen if seen and config.unseen_only else ()
    plan = plan_of(config, args.data, tracking_uri(args.registry, RUNS), left_out)
    if args.dry_run:
        print(estimate(plan, max(os.cpu_count() or 1 if args.workers is None else args.workers, 1)))
        return DONE
    if args.ids:
        write_atomically(Path(args.ids), "".join(f"{key}\n" for key in plan.taking_part()).encode())
        return DONE
    for probe in config.probes.values():  # fail now rather than in every cell
        vectors_of(probe.vectors, plan.taking_part())

    folder, about, failures = plan.folder, about_of(plan), dict[str, str]()
    write_atomically(folder / "study.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())
    uri, params = tracking_uri(config.tracking.uri, folder.parent), config.model_dump(mode="json")
    with follow(folder, uri, config.tracking.experiment, params, about, ARTIFACTS):
        try:
            with executor_of(args.workers, args.address) as executor:
                work(plan, executor, failures, args.sweeps_only)
        finally:  # also if the study is interrupted
            findings = gather(plan, about, failures, seen)
            written = write_all(folder, findings)
            append_metrics(folder, len(findings.results), summary(findings))
    print(said(findings, written))
    return FAILED if failures else DONE


def executor_of(workers: int | None, address: str | None) -> Executor:
    """Create the executor of the cells; see the command line."""
    if workers == 0:
        return Executor()
    return Executor(workers or 0, address or os.environ.get("RAY_ADDRESS") or LOCAL)


def plan_of(config: StudyConfig, named: Sequence[str], registry_uri: str, seen: Collection[str]) -> Plan:
    """Pull the encoders, build graphs that are not cached yet, and lay out the cells.

    Raises:
        StudyError: if a data set has no path, or the encoders have different cutoffs.
    """
    folder = Path(config.out).absolute()  # workers may have another working directory
    refs = {name: arm.encoder or config.encoder for name, arm in config.arms.items()} or {"": config.encoder}
    encoders = {name: _pulled(ref, registry_uri, folder) for name, ref in refs.items()}
    cutoffs = {pulled.card.cutoff for pulled in encoders.values()}
    if len(cutoffs) > 1:
        raise StudyError(
            f"encoders with different cutoffs, {sorted(cutoffs)} Å, need different graphs; study them separately"
        )
    paths = _paths(named, config)
    cutoff = cutoffs.pop()
    crystals = {name: prepare(config, name, paths[name], cutoff, folder / "graphs") for name in config.data}
    return Plan(config, encoders, crystals, folder, seen)


def work(plan: Plan, executor: Executor, failures: dict[str, str], sweeps_only: bool = False) -> None:
    """Compute the missing cells: the sweeps, then the reported cells with the rates that the sweeps chose."""
    _finish(plan, "sweep", [plan.job(cell) for cell in plan.sweeps()], executor, failures)
    _finish(plan, "sweep", [plan.job(cell) for cell in plan.sweeps(_errors(plan, _swept(plan)))], executor, failures)
    if sweeps_only:
        return
    jobs = [plan.job(cell) for cell in plan.with_rates(choose_rates(_errors(plan, _swept(plan))))]
    for cell in {c.name(): c for c in plan.cells()}.keys() - {job.cell.name() for job in jobs}:
        failures[cell] = "no learning rate: every rate of its sweep failed or diverged"
    _finish(plan, "study", jobs, executor, failures)


def gather(plan: Plan, about: dict[str, str], failures: dict[str, str], seen: Collection[str] | None) -> Findings:
    """Collect the results that are on disk."""
    sweeps = _swept(plan)
    rates = choose_rates(_errors(plan, sweeps))
    results = read_results(plan.job(cell) for cell in plan.with_rates(rates))
    keys = None
    if seen is not None:
        keys = {
            target: frozenset(
                key for key, formula in zip(s.crystals.graphs.keys, s.crystals.formulas, strict=True) if formula in seen
            )
            for target, s in plan.samples.items()
        }
    planned = len(plan.cells())
    return Findings(
        plan.config, about, list(sweeps.values()), list(results.values()), planned, failures, rates, without(plan), keys
    )


def without(plan: Plan) -> dict[str, dict[str, float]]:
    """What to predict for crystals without a graph, if anything: the median label of the crystals that may train."""
    predict = plan.config.predict
    found: dict[str, dict[str, float]] = {}
    if predict is None or predict.without_graph == "omit":
        return found
    for target in predict.targets:
        crystals, pool = plan.samples[target].crystals, plan.samples[target].pool(predict.seeds[0])
        factor = crystals.graphs.n_atoms[pool] if plan.config.targets[target].extensive else 1
        median = float(np.median(crystals.labels[target][pool] * factor))
        found[target] = dict.fromkeys(crystals.without[target], median)
    return found


def summary(findings: Findings) -> dict[str, float]:
    """The figures of all cases, for MLflow."""
    found: dict[str, float] = {"cells/done": len(findings.results), "cells/failed": len(findings.failures)}
    for part, cases in findings.comparisons.items():
        for case in cases:
            name = f"{case.target}/{case.size}/{case.arm}"
            found |= {f"{name}/change_{part}": case.change, f"{name}/p_crystals_{part}": case.p_crystals}
    for arm in findings.arms():
        wins = findings.wins(arm)
        found |= {f"{arm}/won": wins.won, f"{arm}/lost": wins.lost, f"{arm}/median_change": wins.median_change}
    return found


def estimate(plan: Plan, workers: int) -> str:
    """Say how many cells there are and are missing, and estimate their cost, if possible from finished ones."""
    done = _swept(plan)
    alike = dict.fromkeys(plan.sweeps(), 0.0)  # whichever unfinished rates go on, the cost is the same
    sweeps = [plan.job(cell) for cell in plan.sweeps(alike | _errors(plan, done))]
    rates = choose_rates(_errors(plan, done))
    first = {name: arm.rates[0] for name, arm in plan.config.arms.items()}
    known = {cell.name(): cell for cell in plan.with_rates(rates)}
    jobs = [plan.job(known.get(c.name()) or replace(c, lr=first.get(c.arm, 0.0))) for c in plan.cells()]
    done |= read_results(jobs)
    cost = {job.cell: _work(job) for job in sweeps + jobs}
    seconds = sum(result.about["seconds"] for cell, result in done.items() if cost[cell])
    speed = sum(cost[cell] for cell in done) / seconds if seconds else EDGES_PER_SECOND
    left = sum(cost[job.cell] for job in sweeps + jobs if job.cell not in done) / speed
    how = f"{len(done)} finished cells" if seconds else f"a guess of {EDGES_PER_SECOND:,.0f} edges/s"
    count = f"{len(sweeps)} cells of sweeps and {len(jobs)} reported cells"
    stops = "; less with early stopping" if plan.config.training.hold else ""
    return (
        f"{count}; {len(sweeps) + len(jobs) - len(done)} are missing\n{left / 3600:.2f} h of CPU, from {how}; "
        f"{left / 3600 / workers:.2f} h with {workers} workers{stops}"
    )


def about_of(plan: Plan) -> dict[str, str]:
    """Describe where the results come from: seeds, code, arms, probes and data."""
    config = plan.config
    found = {"seeds": f"{list(config.seeds)}; in sweeps {list(config.sweep.seeds)}", "code": __version__}
    for name, arm in config.arms.items():
        ref = "" if arm.start == "random" else f" {arm.encoder or config.encoder}, weights"
        digest = "" if arm.start == "random" else f" {plan.encoders[name].card.weights_sha256[:16]}"
        found[f"arm {name}"] = f"{arm.start}{ref}{digest}{', frozen' if arm.frozen else ''}"
    for name, probe in config.probes.items():
        beside = ", with the composition" if probe.composition else ""
        found[f"probe {name}"] = f"a ridge on {Path(probe.vectors).name}, digest {plan.vectors[name][:16]}{beside}"
    for name, place in plan.crystals.items():
        found[f"data {name}"] = f"digest {open_crystals(place).source[:16]}"
    return found


def said(findings: Findings, written: Sequence[Path]) -> str:
    """Summarise the results in a few lines."""
    lines = [f"{len(findings.results)} of {findings.planned} cells"]
    for arm in findings.arms():
        wins = findings.wins(arm)
        if wins.won + wins.lost:
            text = f"{arm}: better than {findings.config.reference} in {wins.won} of {wins.won + wins.lost} cases"
            lines.append(f"{text} (p = {wins.p:.2g}), median change {wins.median_change:+.1%}")
    lines += [f"failed: {name}: {why}" for name, why in findings.failures.items()]
    return "\n".join([*lines, *map(str, written)])


def _swept(plan: Plan) -> dict[Cell, Result]:
    """Finished cells of the sweeps: on the first seed, and on the others for the rates that it selects."""
    first = read_results(plan.job(cell) for cell in plan.sweeps())
    return read_results(plan.job(cell) for cell in plan.sweeps(_errors(plan, first)))


def _errors(plan: Plan, sweeps: dict[Cell, Result]) -> dict[Cell, float]:
    """Errors of the sweeps, as learned: a few crystals do not dominate the mean error of a logarithm."""
    targets = {name: about.learned(name) for name, about in plan.config.targets.items()}
    return {cell: result.error_as_learned(targets[cell.target]) for cell, result in sweeps.items()}


def _finish(plan: Plan, what: str, jobs: Sequence[Job], executor: Executor, failures: dict[str, str]) -> None:
    """Compute the jobs that have no result yet; note failures and report progress."""
    there = read_results(jobs)
    missing = [job for job in jobs if job.cell not in there]
    if not missing:
        return
    with Progress(what, "thousand edges", round(sum(map(_work, missing)) / 1000)) as progress:
        for number, (job, end) in enumerate(zip(missing, executor.attempt(run, missing), strict=True)):
            progress.what = f"{what} ({len(there) + number + 1} of {len(jobs)} cells)"
            progress.add(round(_work(job) / 1000))
            if isinstance(end, Failed):
                failures[job.cell.name()] = end.why
                say(f"{job.cell.name()} failed: {end.why}")
            elif job.cell.kind != "sweep":
                cell = job.cell
                append_metrics(plan.folder, cell.seed, {f"{cell.target}/{cell.size}/{cell.arm}/mae": end})


def _work(job: Job) -> float:
    return job.work(open_crystals(job.crystals).graphs.n_edges)


def _pulled(ref: str, registry_uri: str, folder: Path) -> Pulled:
    """Pull an encoder and copy it into the study's folder, where every worker finds it."""
    found = registry.pull(ref, registry_uri)
    card = read_card(found)
    place = folder / "encoders" / card.weights_sha256[:16]
    if not (place / "encoder.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        for name in ("encoder.safetensors", "encoder.json"):
            write_atomically(place / name, (found / name).read_bytes())
    return Pulled(place, card)


def _paths(named: Sequence[str], config: StudyConfig) -> dict[str, str]:
    """Paths of the data sets, from the command line or the environment."""
    found = {
        name: os.environ[variable] for name in config.data if (variable := f"CDSSL_DATA_{name.upper()}") in os.environ
    }
    for text in named:
        name, equals, path = text.partition("=")
        if not equals or name not in config.data:
            raise StudyError(f"--data {text}: must be NAME=PATH, with NAME one of {', '.join(config.data)}")
        found[name] = path
    if missing := config.data.keys() - found.keys():
        name = min(missing)
        raise StudyError(f"data set {name!r} has no path: give --data {name}=PATH, or set CDSSL_DATA_{name.upper()}")
    return found


if __name__ == "__main__":
    sys.exit(main())
