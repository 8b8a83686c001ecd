"""Studies: which crystals train and which are evaluated, what is recomputed, the results, and the cost of a failure."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from encoders import write_encoder_to
from killable import Killable
from pymatgen.core import Structure
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold
from test_commands import alone
from test_format import optimade

from cdssl_dist.config import ConfigError, packaged, read
from cdssl_dist.finetune.experiment import permuted
from cdssl_dist.finetune.targets import Target
from cdssl_dist.finetune.tuning import TuningError
from cdssl_dist.mlops.mlflow_server import connect
from cdssl_dist.model.export import read_encoder
from cdssl_dist.study import __main__ as study
from cdssl_dist.study import run as study_run
from cdssl_dist.study import tables
from cdssl_dist.study.cells import Cell, Plan, Pulled, StudyError, choose_rates
from cdssl_dist.study.config import StudyConfig
from cdssl_dist.study.data import open_crystals, prepare, pretraining_formulas
from cdssl_dist.study.run import Result
from cdssl_dist.study.statistics import compare, wins_of
from sharding.crystal import Crystal
from sharding.manifest import DataSetError

CONFIG: dict[str, Any] = {
    "data": {"toy": {"column": "_y_{target}", "split": {"column": "_split_{target}"}}},
    "targets": {"volume": {"data": "toy", "unit": "Å³"}, "mass": {"data": "toy", "unit": "u", "extensive": True}},
    "sizes": [20, 40],
    "seeds": [0, 1],
    "arms": {
        "pretrained": {"start": "pretrained", "rates": [1e-3, 1e-2]},
        "scratch": {"start": "random", "rates": [1e-3, 1e-2]},
        "frozen": {"start": "random", "frozen": True, "sizes": [20], "rates": [1e-3, 1e-2]},
        "permuted": {"start": "permuted", "rates": [1e-3, 1e-2]},
    },
    "evaluate_at_most": 25,
    "training": {"epochs": [1, 1], "hold": 0.1},
    "sweep": {"sizes": [20], "evaluate": 25},
    "predict": {"targets": ["mass"], "seeds": [0, 1], "training": {"epochs": [1, 1]}, "without_graph": "median"},
}
LABELS = ("volume", "mass", "signed")
SMALL = {
    "targets": {"volume": CONFIG["targets"]["volume"] | {"log": True}},
    "arms": {name: CONFIG["arms"][name] for name in ("pretrained", "scratch")},
    "predict": None,
}


@pytest.fixture(scope="module", autouse=True)
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One MLflow for all, as to make its tables takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


@pytest.fixture(scope="module")
def toy(aflow: list[Crystal], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 small crystals, of which 100 train, 40 are evaluated and 20 are secret, otherwise for each target."""
    chosen = [c for c in aflow if len(c.atomic_numbers) <= 10][:160]
    order = np.random.default_rng(0).permutation(160)
    rows = {}
    for i, crystal in enumerate(chosen):
        parts = ["train" if k < 100 else "val" if k < 140 else "test" for k in (order[i], order[-i - 1], order[i])]
        volume = abs(np.linalg.det(crystal.lattice)) / len(crystal.atomic_numbers)
        labels = (volume, float(crystal.atomic_numbers.sum()), -1.0 if i % 20 == 0 else 1.0)
        rows[i] = {f"_y_{name}": value for name, value in zip(LABELS, labels, strict=True)}
        rows[i] |= {f"_split_{name}": part for name, part in zip(LABELS, parts, strict=True)}
        if i % 17 == 0:
            rows[i]["_y_volume"] = None
    first = chosen[0]  # of which one is made without neighbours
    chosen.append(replace(first, key="alone", lattice=20 * first.lattice, positions=20 * first.positions))
    rows[160] = {"_y_volume": None, "_y_mass": None, "_split_volume": "", "_split_mass": "test"}
    return optimade(tmp_path_factory.mktemp("toy") / "toy.parquet", chosen, rows)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder_to(tmp_path_factory.mktemp("encoder"))


def arguments(toy: Path, encoder: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    """A command line that computes in this process."""
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**CONFIG, **changes}))
    said = ["--config", str(config), "--data", f"toy={toy}", "--encoder", str(encoder), "--out", str(out)]
    return [*said, "--workers", "0", *more]


def table(out: Path) -> list[dict[str, Any]]:
    """The rows of the results, less the time they took."""
    return [
        {k: v for k, v in row.items() if k != "seconds"} for row in pq.read_table(out / "results.parquet").to_pylist()
    ]


def plan_of(toy: Path, encoder: Path, folder: Path, seen: set[str] | None = None, **changes: Any) -> Plan:
    config = StudyConfig.model_validate({**CONFIG, **changes})
    pulled = Pulled(encoder, read_encoder(encoder)[1])
    place = prepare(config, "toy", str(toy), pulled.card.cutoff, folder)
    return Plan(config, dict.fromkeys(config.arms, pulled), {"toy": place}, folder, seen or set())


def test_who_learns_and_who_is_evaluated(toy: Path, encoder: Path, tmp_path: Path) -> None:
    rows = {row["id"]: row for row in pq.read_table(toy).to_pylist()}
    plan = plan_of(toy, encoder, tmp_path)
    keys = np.array(plan.samples["mass"].crystals.graphs.keys)
    evaluated: dict[str, set[str]] = {}
    sampled: dict[tuple[str, str, int, int], set[str]] = {}
    jobs = [plan.job(cell) for cell in [*plan.sweeps(), *(replace(c, lr=1e-3) for c in plan.cells())]]
    assert len({job.digest for job in jobs}) == len({job.out for job in jobs}) == len(jobs)
    for job in jobs:
        cell, (train, val, test) = job.cell, (set(keys[p]) for p in (job.split.train, job.split.val, job.split.test))
        parts = {
            name: {rows[key][f"_split_{cell.target}"] for key in p}
            for name, p in (("learn", train | val), ("test", test))
        }
        assert parts["learn"] == {"train"}
        assert parts["test"] == {"sweep": {"train"}, "study": {"val"}, "predict": {"val", "test"}}[cell.kind]
        assert len(train | val) == cell.size and not (train | val) & test
        sample = sampled.setdefault((cell.kind, cell.target, cell.seed, cell.size), train | val)
        assert sample == train | val  # all arms get the same
        if cell.kind == "study":
            assert evaluated.setdefault(cell.target, test) == test and len(test) == 25
    for (kind, target, seed, _), sample in sampled.items():
        assert kind != "study" or sampled[kind, target, seed, 20] <= sample
    assert sampled["study", "mass", 0, 20] != sampled["study", "mass", 1, 20]
    secret = {key for key, row in rows.items() if row["_split_mass"] == "test"}
    predicted = next(job for job in jobs if job.cell.kind == "predict")
    assert set(keys[predicted.split.test]) == evaluated["mass"] | secret - {"alone"}  # which is no graph

    # Neither the order of the rows nor the labels that are secret change anything.
    changed = pq.read_table(toy).to_pylist()
    for row in changed:
        row["_y_mass"] = 1e9 if row["_split_mass"] == "test" else row["_y_mass"]
    pq.write_table(pa.Table.from_pylist(changed[::-1]), tmp_path / "other.parquet")
    other = plan_of(tmp_path / "other.parquet", encoder, tmp_path)
    theirs = np.array(other.samples["mass"].crystals.graphs.keys)
    for cell in (jobs[0].cell, jobs[-1].cell):
        for mine, its in zip(vars(plan.job(cell).split).values(), vars(other.job(cell).split).values(), strict=True):
            assert sorted(keys[mine]) == sorted(theirs[its])
    crystals = other.samples["mass"].crystals
    assert np.isnan(crystals.labels["mass"][crystals.parts["mass"] == 2]).all()

    unseen = plan_of(toy, encoder, tmp_path, seen := set(plan.samples["mass"].crystals.formulas[::3]), sizes=[20])
    for cell in unseen.cells():
        for part in vars(unseen.job(replace(cell, lr=1e-3)).split).values():
            assert not {plan.samples["mass"].crystals.formulas[i] for i in part} & seen


def test_a_study_from_end_to_end(
    toy: Path, encoder: Path, tmp_path: Path, tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "study"
    assert study.main(arguments(toy, encoder, out, "--dry-run")) == 0
    assert "16 cells of sweeps and 46 reported cells; 62 are missing" in capsys.readouterr().out
    assert study.main(arguments(toy, encoder, out)) == 0
    rows = [row for row in table(out) if row["kind"] != "sweep"]
    assert len(rows) == 2 * 2 * 2 * 6 + 2 - 4
    frames = {path: pq.read_table(path).to_pandas() for path in (out / "cells").glob("study-*")}
    cells = {path.name.rpartition("-")[0]: frame for path, frame in frames.items()}
    for row in [row for row in rows if row["kind"] == "study"][:8]:
        frame = cells[f"study-{row['target']}-{row['size']}-{row['seed']}-{row['arm']}"]
        off = (frame.predicted - frame.true).abs()
        assert row["mae"] == pytest.approx(off.mean()) and row["n"] == len(frame) == 25
    # An extensive target is reported per atom; the median is that of the sample.
    source = pq.read_table(toy).to_pandas().set_index("id")
    frame = cells["study-mass-40-1-median"].set_index("key")
    per_atom = source["_y_mass"] / source["species_at_sites"].map(len)
    np.testing.assert_allclose(frame.true, per_atom[frame.index], rtol=1e-6)
    plan = plan_of(toy, encoder, out / "graphs")
    split = plan.job(Cell("study", "mass", 40, 1, "median")).split
    sample = np.array(plan.samples["mass"].crystals.graphs.keys)[np.concatenate([split.train, split.val])]
    np.testing.assert_allclose(frame.predicted, np.median(per_atom[sample]), rtol=1e-6)
    # Predictions hold the label itself, mean over seeds.
    each = [pq.read_table(path).to_pandas().set_index("key") for path in (out / "cells").glob("predict-*")]
    written = list(csv.DictReader((out / "preds-mass.csv").open()))
    assert {row["id"] for row in written} == set(source.index[source["_split_mass"] == "test"])
    labels = source[source["_split_mass"] == "train"]["_y_mass"].to_numpy(float)
    assert next(float(r["prediction"]) for r in written if r["id"] == "alone") == pytest.approx(np.nanmedian(labels))
    for row in written[:5]:
        mean = np.mean([e.loc[row["id"], "predicted"] for e in each])
        assert float(row["prediction"]) == pytest.approx(
            mean * len(source.loc[row["id"], "species_at_sites"]), rel=1e-5
        )
    assert (out / "changes.png").stat().st_size > 10_000
    text = (out / "table.md").read_text()
    assert "Not complete" not in text and "| 40 |" in text and "## All data" in text

    client = connect(tracking)
    run = client.get_run(json.loads((out / "mlflow-run.json").read_text())["run_id"])
    case = {
        arm: [r["mae"] for r in rows if (r["kind"], r["target"], r["size"], r["arm"]) == ("study", "mass", 40, arm)]
        for arm in ("pretrained", "scratch")
    }
    change = np.mean(case["pretrained"]) / np.mean(case["scratch"]) - 1
    assert run.data.metrics["mass/40/pretrained/change_all"] == pytest.approx(change)
    assert run.data.metrics["mass/40/scratch/mae"] == case["scratch"][1]
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert artifacts >= {"table.md", "changes.png", "results.parquet", "study.yaml"}

    # Again: nothing is computed. With another encoder: what does not depend on it is kept.
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert study.main(arguments(toy, encoder, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    assert [row for row in table(out) if row["kind"] != "sweep"] == rows
    other = write_encoder_to(tmp_path / "other", seed=1)
    assert study.main(arguments(toy, other, out)) == 0
    new = {path.name.split("-")[4] for path in (out / "cells").iterdir() if path not in before}
    assert new == {"pretrained", "permuted"}
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    stays = ("scratch", "frozen", "median", "ridge")
    now = [row for row in table(out) if row["kind"] != "sweep" and row["arm"] in stays]
    assert now == [row for row in rows if row["arm"] in stays]


def test_the_best_rates_run_on_further_seeds(
    toy: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rates = tmp_path / "study", [1e-4, 1e-3, 1e-2, 1e12]
    changes = SMALL | {"targets": {"volume": CONFIG["targets"]["volume"]}, "sizes": [20], "seeds": [0]}
    changes["arms"] = {arm: about | {"rates": rates} for arm, about in SMALL["arms"].items()}
    changes["sweep"] = {"seeds": [7, 8, 9], "sizes": [20], "evaluate": 25}
    assert study.main(arguments(toy, encoder, out, "--dry-run", **changes)) == 0
    assert f"{2 * (4 + 2 * 2)} cells of sweeps and 4 reported cells; 20 are" in capsys.readouterr().out
    assert study.main(arguments(toy, encoder, out, **changes)) == 0
    rows = table(out)
    for arm in changes["arms"]:
        errors = {
            seed: {r["lr"]: r["mae"] for r in rows if (r["kind"], r["arm"], r["seed"]) == ("sweep", arm, seed)}
            for seed in (7, 8, 9)
        }
        best = sorted(errors[7], key=lambda rate: errors[7][rate])[:2]
        assert set(errors[7]) == set(rates) and set(errors[8]) == set(errors[9]) == set(best)
        mean = {rate: np.mean([errors[seed][rate] for seed in errors]) for rate in best}
        reported = [r["lr"] for r in rows if (r["kind"], r["arm"]) == ("study", arm)]
        assert reported == [min(mean, key=lambda rate: mean[rate])]


def studied(argv: list[str]) -> int:
    """In a process that can be killed."""
    return study.main(argv)


def test_a_killed_study_goes_on(toy: Path, encoder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert study.main(arguments(toy, encoder, whole, **SMALL)) == 0
    out = tmp_path / "killed"
    with Killable(tmp_path / "log", studied, arguments(toy, encoder, out, **SMALL)) as run:
        while run.running() and len(list((out / "cells").glob("*.parquet"))) < 7:
            time.sleep(0.02)
        run.kill()
    done = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.parquet")}
    assert 7 <= len(done) < len(list((whole / "cells").iterdir()))
    next(iter(done)).write_bytes(b"PAR1 torn")  # as after the machine's own death
    done.pop(next(iter(done)))
    assert study.main(arguments(toy, encoder, out, **SMALL)) == 0
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())
    assert table(out) == table(whole)


ON_RAY = """
import json, os, sys
from cdssl_dist.study import __main__ as study
from sharding.executor import Executor
def task(i):
    if i == 1:
        os._exit(1)
    return i / (i - 3)
with Executor(2, "local") as executor:
    ends = [getattr(end, "why", end) for end in executor.attempt(task, range(5))]
print("ended as", json.dumps(ends), flush=True)
sys.exit(study.main(sys.argv[1:]))
"""


@pytest.mark.netns
@pytest.mark.server
def test_a_study_on_ray(toy: Path, encoder: Path, tmp_path: Path) -> None:
    """The same figures; a task that fails, or takes its process with it, stops no other."""
    changes = SMALL | {"sizes": [20], "seeds": [0]}
    assert study.main(arguments(toy, encoder, tmp_path / "here", **changes)) == 0
    argv = arguments(toy, encoder, tmp_path / "ray", "--workers", "2", **changes)
    command = [*alone(), sys.executable, "-c", ON_RAY, *argv]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # as a user has it
    env = plain | {"RAY_TMPDIR": "/tmp", "PYTHONPATH": str(Path(study.__file__).parents[2])}
    answer = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    said = re.search(r"ended as (\[.*\])", answer.stdout)  # wherever in a line: Ray speaks, too
    assert said, answer.stdout
    first, died, second, failed, last = json.loads(said[1])
    assert (first, second, last) == (0.0, -2.0, 4.0)
    assert "its process died" in died and failed == "ZeroDivisionError: division by zero"
    assert table(tmp_path / "ray") == table(tmp_path / "here")


def test_a_failing_cell_stops_no_other(
    toy: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = study_run.fit

    def sometimes(*args: Any, **more: Any) -> Any:
        if args[6].seed == 1:
            raise TuningError("as the test wants it")
        return fit(*args, **more)

    monkeypatch.setattr(study_run, "fit", sometimes)
    out = tmp_path / "study"
    hot = {"arms": SMALL["arms"] | {"hot": {"start": "random", "rates": [1e30, 1e31]}}}
    assert study.main(arguments(toy, encoder, out, **SMALL | hot)) == 1
    said = capsys.readouterr().out
    assert "study-volume-40-1-scratch: TuningError: as the test wants it" in said
    assert "sweep-volume-20-1000-hot" not in said  # a rate that is too high is a result
    assert "study-volume-40-0-hot: no learning rate" in said
    assert {(row["seed"], row["arm"]) for row in table(out) if row["kind"] == "study"} == {
        *((0, arm) for arm in ("pretrained", "scratch")),
        *((seed, arm) for seed in (0, 1) for arm in ("median", "ridge")),
    }
    text = (out / "table.md").read_text()
    assert "Not complete: 12 of 20 cells" in text and "as the test wants it" in text

    def never(*_: Any, **__: Any) -> Any:
        raise TuningError("no label is above 0")

    monkeypatch.setattr(study_run, "fit", never)  # which is no matter of rates
    assert study.main(arguments(toy, encoder, tmp_path / "other", **SMALL)) == 1
    assert "sweep-volume-20-1000-scratch-0.001: TuningError: no label is above 0" in capsys.readouterr().out

    monkeypatch.undo()
    assert study.main(arguments(toy, encoder, out, **SMALL)) == 0
    assert len([row for row in table(out) if row["kind"] == "study"]) == 16


def test_arms_begin_as_they_say(toy: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = read_encoder(encoder)
    shuffled = permuted(network, 3)
    for mine, its in zip(network.parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(mine.flatten().sort().values, its.flatten().sort().values)
    assert not torch.equal(network.element.weight, shuffled.element.weight)
    assert torch.equal(permuted(network, 3).element.weight, shuffled.element.weight)

    seen: dict[str, Any] = {}
    fit = study_run.fit

    def watched(start: Any, *args: Any) -> Any:
        seen["start"], seen["member"] = start, fit(start, *args)
        return seen["member"]

    monkeypatch.setattr(study_run, "fit", watched)
    plan = plan_of(toy, encoder, tmp_path)
    for arm, stays in (("pretrained", False), ("scratch", False), ("permuted", False), ("frozen", True)):
        study_run.run(plan.job(Cell("study", "volume", 20, 5, arm, 1e-2)))
        start = seen["start"].state_dict()
        same = all(torch.equal(seen["member"].weights[f"encoder.{name}"], w) for name, w in start.items())
        assert same == stays
        assert torch.equal(start["element.weight"], network.element.weight) == (arm == "pretrained")
        values = torch.equal(
            start["element.weight"].flatten().sort().values, network.element.weight.flatten().sort().values
        )
        assert values == (arm in ("pretrained", "permuted"))

    arms = SMALL["arms"] | {"part": {"start": "pretrained", "parts": ["element", "blocks"], "rates": [1e-3, 1e-2]}}
    plan = plan_of(toy, encoder, tmp_path, **SMALL | {"arms": arms})
    part, scratch = Cell("study", "volume", 20, 5, "part", 1e-2), Cell("study", "volume", 20, 5, "scratch", 1e-2)
    study_run.run(plan.job(scratch))
    new = seen["start"].state_dict()
    study_run.run(plan.job(part))
    for name, weight in seen["start"].state_dict().items():
        source = network.state_dict() if name.startswith(("element.", "blocks.")) else new
        assert torch.equal(weight, source[name])
    assert plan.job(part).digest != plan.job(replace(part, arm="pretrained")).digest


def test_probes_learn_from_the_same_labels(
    toy: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"arms": {}, "reference": "ridge", "predict": None, "sizes": [40], "evaluate_at_most": 1000}
    targets = {"volume": {"data": "toy", "log": True}, "mass": {"data": "toy", "extensive": True}}
    plain = arguments(toy, encoder, tmp_path / "study", targets=targets, **changes)
    assert study.main([*plain, "--ids", str(tmp_path / "ids.txt")]) == 0
    ids = (tmp_path / "ids.txt").read_text().split()

    rng = np.random.default_rng(0)
    vectors = dict(zip(ids, rng.normal(size=(len(ids), 5)).astype(np.float32), strict=True))
    columns = {"key": ids[::-1], "embedding": [vectors[key].tolist() for key in ids[::-1]]}
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")
    probes = {name: {"vectors": str(tmp_path / "all.parquet")} for name in ("alone", "beside")}
    probes["beside"]["composition"] = True
    said = arguments(toy, encoder, tmp_path / "study", targets=targets, probes=probes, **changes)
    assert study.main(said) == 0
    found = {(r["target"], r["seed"], r["arm"]): r["mae"] for r in table(tmp_path / "study")}
    assert found.keys() == {(t, s, a) for t in targets for s in (0, 1) for a in ("alone", "beside", "ridge", "median")}

    plan = plan_of(toy, encoder, tmp_path / "graphs", targets=targets, **changes)
    used: set[str] = set()
    for (target, seed, arm), mae in found.items():
        crystals = plan.samples[target].crystals
        split = plan.samples[target].split(Cell("study", target, 40, seed, arm))
        train, test = np.concatenate([split.train, split.val]), split.test
        keys = crystals.graphs.keys
        used |= {keys[i] for i in (*train, *test)}
        x = np.array([vectors.get(key, np.zeros(5)) for key in keys], np.float64)
        if arm == "beside":
            z = [crystals.graphs.take(np.array([i])) for i in range(len(keys))]
            fractions = [np.bincount(one.atomic_numbers, minlength=119) / one.n_atoms[0] for one in z]
            volumes = [abs(np.linalg.det(one.lattice[0])) / one.n_atoms[0] for one in z]
            x = np.column_stack([x, fractions, volumes])
        elif arm != "alone":
            continue
        y = np.log(crystals.labels[target]) if target == "volume" else crystals.labels[target]
        mean, std = x[train].mean(axis=0), x[train].std(axis=0)
        x = (x - mean) / np.where(std > 0, std, 1)
        ridge = RidgeCV(alphas=np.logspace(-3, 5, 17)).fit(x[train], y[train])
        predicted = np.exp(ridge.predict(x[test])) if target == "volume" else ridge.predict(x[test])
        assert mae == pytest.approx(np.abs(predicted - crystals.labels[target][test]).mean(), rel=1e-6)
    assert set(ids) == used

    text = (tmp_path / "study" / "table.md").read_text()
    assert "## Compared with ridge" in text and "a ridge on all.parquet" in text and "with the composition" in text
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").iterdir()}
    columns["embedding"] = [[2.0 * x + 1 for x in row[:4]] for row in columns["embedding"]]
    pq.write_table(pa.table(columns), tmp_path / "all.parquet")  # other vectors: the probes are computed again
    assert study.main(said) == 0
    new = {path: path.stat().st_mtime_ns for path in (tmp_path / "study" / "cells").iterdir()}
    assert new.items() > cells.items() and len(new) == len(cells) + 8
    pq.write_table(pa.table(columns).slice(3), tmp_path / "all.parquet")
    assert study.main(said) == 2
    assert f"no vector for 3 of {len(ids)} crystals" in capsys.readouterr().err


def made(arm: str, seed: int, off: list[float], size: int = 10) -> Result:
    """A result with these errors."""
    n = len(off)
    true = np.arange(n, dtype=float)
    about = {"mae": float(np.mean(np.abs(off))), "n": n}
    keys = [f"c{i}" for i in range(n)]
    return Result(Cell("study", "t", size, seed, arm), keys, true, true + np.array(off), np.ones(n, np.int64), about)


def test_the_figures() -> None:
    a = [made("a", 0, [1, -2, 3, 1]), made("a", 1, [2, 2, 1, 1]), made("a", 2, [9, 9, 9, 9])]
    b = [made("b", 1, [3, 3, 3, -3]), made("b", 0, [2, 2, 2, 2])]
    found = compare(a, b)
    assert found is not None  # seed 2 has no partner
    assert (found.own.value, found.reference.value, found.own.seeds) == (1.625, 2.5, 2)
    assert found.own.error == pytest.approx(np.std([1.75, 1.5], ddof=1) / math.sqrt(2))
    assert found.change == pytest.approx(1.625 / 2.5 - 1) and found.won
    assert found.change_error == pytest.approx(np.std([1.75 / 2, 1.5 / 3], ddof=1) / math.sqrt(2))
    assert found.p_seeds == pytest.approx(stats.ttest_rel(np.log([1.75, 1.5]), np.log([2, 3])).pvalue)
    off = np.array([[1 - 2, 0, 1, -1], [2 - 3, -1, -2, -2]]).mean(axis=0)
    assert found.p_crystals == pytest.approx(stats.wilcoxon(off).pvalue)
    part = compare(a, b, frozenset({"c0", "c3"}))
    assert part is not None and part.crystals == 2
    assert part.change == pytest.approx(np.mean([1, 1.5]) / np.mean([2, 3]) - 1)
    assert compare(a, b, frozenset()) is None and compare(a[2:], b) is None

    cases = [
        replace(found, change=x, p_crystals=p)
        for x, p in ((-0.5, 0.01), (-0.1, 0.2), (-0.2, 0.04), (0.1, 0.01), (0, 1))
    ]
    wins = wins_of(cases)
    assert (wins.won, wins.lost, wins.clear, wins.clearly_lost) == (3, 1, 2, 1)
    assert wins.p == pytest.approx(10 / 16)  # P(≤ 1 or ≥ 3 of 4 coins)
    assert wins.median_change == pytest.approx(-0.15)

    def swept(lr: float, seed: int) -> Cell:
        return Cell("sweep", "t", 100, seed, "a", lr)

    errors = {
        swept(1e-3, 7): 2.0,
        swept(1e-3, 8): 2.0,
        swept(1e-2, 7): 1.0,
        swept(1e-2, 8): 4.0,
        swept(1e-1, 7): math.inf,
    }
    assert choose_rates(errors) == {("t", 100, "a"): 1e-3}
    assert choose_rates({swept(1e-1, 7): math.inf}) == {}
    errors[swept(1e-3, 8)] = math.inf  # of two finalists one diverged on another seed
    assert choose_rates(errors) == {("t", 100, "a"): 1e-2}
    errors[swept(1e-2, 8)] = math.inf  # both
    assert choose_rates(errors) == {}
    assert choose_rates(errors | {swept(1e-4, 7): 9.0}) == {("t", 100, "a"): 1e-4}


def test_predictions_of_what_grows_with_the_cell_are_of_the_cell(tmp_path: Path) -> None:
    true, atoms = np.array([1.0, np.nan, np.nan]), np.array([1, 2, 8])
    result = Result(Cell("predict", "t", 9, 0, "a"), list("abc"), true, np.array([1.0, 3.0, -1.5]), atoms, {})
    for extensive, wanted in ((False, [3.0, -1.5]), (True, [6.0, -12.0])):
        tables._write_predictions(tmp_path / "preds.csv", [result], extensive, {"z": 0.5})
        rows = list(csv.DictReader((tmp_path / "preds.csv").open()))
        assert [(r["id"], float(r["prediction"])) for r in rows] == [*zip("bc", wanted, strict=True), ("z", 0.5)]


def test_of_a_long_tail_the_error_is_of_the_logarithm() -> None:
    true = np.array([1.0, 2.0, 4.0, 1000.0, np.nan])

    def found(predicted: list[float]) -> Result:
        off = float(np.abs(np.array(predicted) - true)[:4].mean())
        cell = Cell("sweep", "t", 100, 7, "a", 1e-3)
        return Result(cell, list("abcde"), true, np.array(predicted), np.ones(5, np.int64), {"mae": off})

    everywhere, tail = found([1.1, 2.2, 4.4, 1100.0, 7.0]), found([3.0, 6.0, 12.0, 1000.0, 7.0])
    assert everywhere.mae > tail.mae  # one crystal decides
    assert everywhere.error_as_learned(Target("t", log=True)) == pytest.approx(math.log(1.1))
    assert tail.error_as_learned(Target("t", log=True)) == pytest.approx(0.75 * math.log(3))
    assert tail.error_as_learned(Target("t")) == pytest.approx(tail.mae)
    assert found([math.nan, 2.2, 4.4, 1100.0, 7.0]).error_as_learned(Target("t", log=True)) == math.inf


def test_formulas_seen_in_pretraining(toy: Path, encoder: Path, tmp_path: Path, data_folder: Path) -> None:
    formulas = pretraining_formulas(str(data_folder))
    out = tmp_path / "study"
    changes = SMALL | {"sizes": [20], "seeds": [0]}
    assert study.main(arguments(toy, encoder, out, "--pretraining-shards", str(data_folder), **changes)) == 0
    crystals = open_crystals(next((out / "graphs").iterdir()))
    known = dict(zip(crystals.graphs.keys, crystals.formulas, strict=True))
    frames = {
        arm: pq.read_table(next((out / "cells").glob(f"study-*-{arm}-*"))).to_pandas().set_index("key")
        for arm in ("pretrained", "scratch")
    }
    for part in ("seen", "unseen"):
        keys = [k for k in frames["scratch"].index if (known[k] in formulas) == (part == "seen")]
        assert keys
        a, b = (float((f.predicted - f.true).abs()[keys].mean()) for f in frames.values())
        assert f"{a / b - 1:+.1%} ({len(keys)})" in (out / "table.md").read_text()


def test_matbench_folds(toy: Path, aflow: list[Crystal], tmp_path: Path, encoder: Path) -> None:
    """A file as matminer has it, in which two rows are no crystals."""
    some = [c for c in aflow if len(c.atomic_numbers) <= 10][:50]
    structures = [Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True) for c in some]
    data = [[s.as_dict() if i not in (3, 20) else {}, 1.0 + i] for i, s in enumerate(structures)]
    content = {"index": list(range(50)), "columns": ["structure", "_y_volume"], "data": data}
    path = tmp_path / "matbench_toy.json.gz"
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    changes = SMALL | {"data": {"toy": {"column": "_y_{target}", "split": {"rows": 50}}}, "sizes": [20]}
    changes |= {"sweep": {"sizes": [8]}}
    plan = plan_of(path, encoder, tmp_path, **changes)
    official = list(KFold(5, shuffle=True, random_state=18012019).split(np.arange(50)))
    for seed in (0, 1, 6):
        split = plan.samples["volume"].split(Cell("study", "volume", 20, seed, "scratch"))
        train, test = official[seed % 5]
        keys = np.array(plan.samples["volume"].crystals.graphs.keys)
        number = {key: int(key.rpartition("#")[2]) for key in keys}
        assert {number[k] for k in keys[split.test]} <= set(test) and len(split.test) == len({*test} - {3, 20})
        assert {number[k] for k in keys[np.concatenate([split.train, split.val])]} <= set(train)
        labels = dict(zip(keys, plan.samples["volume"].crystals.labels["volume"], strict=True))
        assert len(labels) == 48 and all(labels[k] == 1 + number[k] for k in keys)
    reported = {key for seed in (0, 1) for key in keys[plan.samples["volume"].evaluated(seed)]}
    for cell in plan.sweeps():  # no rate is chosen by a crystal of the report
        split = plan.samples["volume"].split(cell)
        assert not reported & set(keys[np.concatenate([split.train, split.val, split.test])])

    every = changes | {"seeds": range(5)}
    with pytest.raises(StudyError, match="seeds on all folds leave none"):
        plan_of(path, encoder, tmp_path, **every)
    arms = {name: arm | {"rates": [0.01]} for name, arm in SMALL["arms"].items()}
    plan = plan_of(path, encoder, tmp_path, **every | {"arms": arms})
    assert plan.sweeps() == [] and {c.lr for c in plan.with_rates({}) if c.arm in arms} == {0.01}

    with pytest.raises(DataSetError, match="row numbers below 30"):
        plan_of(
            path, encoder, tmp_path, **changes | {"data": {"toy": {"column": "_y_{target}", "split": {"rows": 30}}}}
        )


def test_a_share_is_evaluated(toy: Path, encoder: Path, tmp_path: Path) -> None:
    """Where no column says who: by whole groups, and for all targets alike."""
    changes = {k: v for k, v in CONFIG.items() if k != "predict"} | {"predict": None}
    mine: dict[str, Any] = {"column": "_y_{target}", "split": {"evaluate": 0.3}}
    plan = plan_of(toy, encoder, tmp_path, **changes | {"data": {"toy": mine}})
    crystals = plan.samples["volume"].crystals
    part = crystals.parts["volume"]
    assert (part == crystals.parts["mass"]).all()
    train, evaluated = (set(np.array(crystals.groups)[part == p]) for p in (0, 1))
    assert not train & evaluated and 0.2 < (part == 1).mean() < 0.4
    other = plan_of(
        toy, encoder, tmp_path, **changes | {"data": {"toy": mine | {"split": {"evaluate": 0.3, "seed": 1}}}}
    )
    assert (other.samples["volume"].crystals.parts["volume"] != part).any()


def test_where_cells_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert study.executor_of(0, "auto").address is None
    assert (study.executor_of(None, None).workers, study.executor_of(None, None).address) == (0, "local")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert (study.executor_of(3, None).workers, study.executor_of(3, None).address) == (3, "auto")
    assert study.executor_of(None, "ray://head:10001").address == "ray://head:10001"


def test_cells_of_several_versions_are_told(toy: Path, encoder: Path, tmp_path: Path) -> None:
    plan = plan_of(toy, encoder, tmp_path, **SMALL)

    def text(*programs: str) -> str:
        found = [made("scratch", seed, [0.1]) for seed, _ in enumerate(programs)]
        found = [replace(r, about=r.about | {"program": p}) for r, p in zip(found, programs, strict=True)]
        return tables.markdown(tables.Findings(plan.config, {}, [], found, 9, {}, {}, {}))

    assert "computed by abc (2 cells)" in text("abc", "abc") and "several versions" not in text("abc", "abc")
    assert "computed by abc (1 cells), def (1 cells)" in text("abc", "def") and "several versions" in text("abc", "def")


def test_packaged_configurations_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("study/own.yaml", "configs/study/own.yaml"):
        assert read(StudyConfig, Path(name), ["seeds=[5]"]).seeds == (5,)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "own.yaml").write_text("seeds: [-1]\n")
    with pytest.raises(ConfigError, match=r"study/own\.yaml: seeds"):  # one's own goes first
        read(StudyConfig, Path("study/own.yaml"))
    with pytest.raises(ConfigError, match=r"there is no such file; these are packaged: .*, study/own\.yaml, "):
        read(StudyConfig, Path("study/mine.yaml"))


def test_what_cannot_be_is_said(toy: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probes = read(StudyConfig, packaged("study/probes.yaml"))
    assert probes.reference in probes.probes and not probes.arms
    for name in ("paper", "quick", "full", "matbench", "own"):
        config = read(StudyConfig, packaged(f"study/{name}.yaml"))
        assert config.arms["scratch"].start == "random"
    paper = read(StudyConfig, packaged("study/paper.yaml"))
    assert len([1 for t in paper.targets for _ in paper.sizes_of(t)]) * len(paper.seeds) == 147

    signed = ("targets.signed.data=toy",)

    def wrong(text: str, *more: str, **changes: Any) -> None:
        assert study.main(arguments(toy, encoder, tmp_path / "study", *more, **changes)) == 2
        assert text in capsys.readouterr().err

    wrong("arms.scratch.rate: unknown key; did you mean 'rates'", "arms.scratch.rate=1")
    wrong("sweep.sise: unknown key; did you mean 'sizes'", "sweep.sise=1")
    wrong("predict.target: unknown key; did you mean 'targets'", "predict.target=1")
    wrong("rates must be chosen on others", "sweep.seeds=[1]")
    wrong("an arm with more rates to choose from has an advantage", "arms.scratch.rates=[0.1]")
    wrong("no arm 'nobody'", "reference=nobody")
    wrong("linear is solved and has no rates", "arms.scratch.readout=linear")
    wrong("probes.scratch: an arm has the same name", "probes.scratch.vectors=x.parquet")
    wrong("ridge: this name is reserved for a baseline", "probes.ridge.vectors=x.parquet")
    wrong("x.parquet: not a Parquet file with key and embedding", "probes.mine.vectors=x.parquet")
    wrong("a size of 200 labels is asked for, but only", "targets.mass.sizes=[200]")
    wrong("no rate can be chosen", "sweep.sizes=[90]")
    wrong(
        "targets.signed: its logarithm is to be learned, but 6 labels are not above 0",
        *signed,
        "targets.signed.log=true",
    )
    wrong("label '_split_mass' is 'train', which is not a number", "targets.mass.column=_split_mass")
    wrong("must be NAME=PATH", "--data", "other=x")
    wrong("unseen_only needs --pretraining-shards", "unseen_only=true")
    wrong("no column _z_mass, _z_volume", "data.toy.column=_z_{target}")
    wrong("must contain both 'training' and 'val'", "data.toy.split.train=training")
    wrong("must be three different values, not 'train', 'test' and 'test'", "data.toy.split.evaluate=test")
    other = write_encoder_to(tmp_path / "other", cutoff=5.0)
    wrong("encoders with different cutoffs, [4.0, 5.0]", f"arms.scratch.encoder={other}")
    nameless = [a for a in arguments(toy, encoder, tmp_path / "study") if a != "--data" and not a.startswith("toy=")]
    assert study.main(nameless) == 2
    assert "data set 'toy' has no path: give --data toy=PATH, or set CDSSL_DATA_TOY" in capsys.readouterr().err
