"""The benchmarks measure what they say: their data is readable, their figures are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cdssl_dist.bench import data, growth
from cdssl_dist.bench.__main__ import main
from cdssl_dist.bench.concatenating import concatenating
from cdssl_dist.bench.scaling import Job, Machine, lost, step_seconds
from cdssl_dist.data.batch import collate, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.cost import flops_per_edge, saved_per_edge
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising
from sharding.block import decode_arrays, encode
from sharding.crystal import Crystal
from sharding.graph import build
from sharding.sources import open_source


@pytest.mark.parametrize("write", [data.write_json, data.write_csv])
def test_what_is_made_where_nothing_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    """Texts say the same crystals as ``aflow:`` itself."""
    monkeypatch.setattr(data, "SHARED", tmp_path)
    path = tmp_path / ("some.json" if write is data.write_json else "some.csv")
    write(path, 40)  # type: ignore[operator]
    source = open_source(str(path))
    crystals = [item for record in source.records() for item in source.parse(record)]
    assert all(isinstance(item, Crystal) for item in crystals)
    expected, _ = build(data.made(40), 5.0)
    graphs, refused = build(crystals, 5.0)  # type: ignore[arg-type]
    assert not refused
    assert graphs.n_edges.tolist() == expected.n_edges.tolist()
    assert len(set(graphs.keys)) == 40


@pytest.mark.slow
def test_the_figures_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "--json", "--repeat", "1", "--crystals", "512"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"json", "csv"} <= figures["text to shard"].keys()
    for search in figures["neighbour search"].values():
        assert search["directed edges"] == search["pymatgen's directed edges"] > 0
    assert [row["crystals"] for row in figures["growth"]] == [256, 512, 1024, 2048]


ALONE = """
import sys

for name in ("ray deepspeed mlflow pymatgen numba ase gemmi webdataset torch_geometric fsspec pydantic yaml orjson "
             "sklearn matplotlib").split():
    sys.modules[name] = None  # as if it were not installed
from cdssl_dist.bench.__main__ import main
main(sys.argv[1:])
"""
LOADER = ["loader", "--json", "--repeat", "1", "--crystals", "40", "--data"]
STEP = ["step", "--json", "--repeat", "1", "--edges", "2000", "--eager", "--device", "cpu", "--data"]


def test_the_loader_is_measured_where_little_is_installed(data_folder: Path) -> None:
    """And what can be counted otherwise comes out alike."""
    run = subprocess.run(
        [sys.executable, "-c", ALONE, *LOADER, str(data_folder)], capture_output=True, text=True, check=True
    )
    figures = json.loads(run.stdout)
    data = DataSet(data_folder)
    plan, shape = EpochPlan(data.table("train"), 0, 1, 8), data.shape("train", 1)
    packs = [data.pack([e], plan.table, shape) for e in plan.pack(0, 0) + plan.pack(1, 3)]
    room = len(packs[0].edge_src)
    filled = data.blocks["edges"][plan.table.block] / (2 * room)
    assert figures["padding"]["edges"] == pytest.approx(1 - filled.mean())
    work = [[sum(filled[e.index] for e in pack) for pack in plan.step(s)] for s in range(plan.steps_before(1))]
    assert figures["imbalance"][0]["ranks"] == 8
    assert figures["imbalance"][0]["ours"]["worst"] == pytest.approx(max(max(s) / np.mean(s) for s in work))
    assert [row["ranks"] for row in figures["imbalance"]] == [n for n in (8, 16, 32, 64) if n <= len(plan.table)]
    assert figures["data"]["crystals"] >= 40
    assert all(figures["device"].values())
    for rate in figures["rates"].values():
        assert rate["directed edges"] / rate["crystals"] == pytest.approx(
            figures["data"]["directed edges"] / figures["data"]["crystals"]
        )
    assert figures["memory"]["largest"] >= figures["memory"]["at the end"] > figures["memory"]["16 packs read ahead"]


@pytest.mark.slow
def test_what_stands_beside_the_loader(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["loader", "--json", "--repeat", "1", "--crystals", "40", "--data", str(data_folder)]) == 0
    assert len(json.loads(capsys.readouterr().out)["rates"]) >= 5


def test_a_step_is_measured_where_little_is_installed(data_folder: Path, tmp_path: Path) -> None:
    """In a folder without matgl, so that the concatenating model stands beside ours."""
    command = [sys.executable, "-c", ALONE, *STEP, str(data_folder.absolute())]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    figures = json.loads(run.stdout)
    assert {"ours, eager, f32", "ours, eager, bf16", "concatenating, eager, f32"} <= figures["us per edge"].keys()
    assert all(value > 0 for value in figures["us per edge"].values())
    assert 1000 < figures["data"]["edges of a pack"] <= 2000


def test_growth_finds_the_terms_that_times_were_made_of() -> None:
    points = [replace(growth.Point(), **row) for rows in growth.SERIES.values() for row in rows]
    edges = {p: p.edges for p in points}
    made = {"FLOP": 2e-11, "saved byte": 5e-10, "step": 3e-3}
    cost = {
        p: (p.edges * flops_per_edge(**p.sizes), p.edges * saved_per_edge(bf16=False, **p.sizes), 1.0) for p in points
    }
    seconds = {p: sum(a * b for a, b in zip(made.values(), cost[p], strict=True)) for p in points}
    terms, fitted = growth.fit(seconds, edges)
    assert terms == pytest.approx(made, rel=1e-6) and fitted == pytest.approx(seconds)


def test_growth_takes_the_same_crystals_at_each_cutoff() -> None:
    crystals = data.made(60)
    near, far = (growth.pack(crystals, replace(growth.Point(edges=2_000), cutoff=r)) for r in (4.0, 6.0))
    plain = growth.pack(crystals, growth.Point(edges=2_000))
    assert near.graphs[0].keys == plain.graphs[0].keys == far.graphs[0].keys
    assert near.edges[0] < plain.edges[0] < far.edges[0] and plain.edges[0] <= 2_000


@pytest.mark.parametrize("size", [(32, 64, 3), (192, 192, 6)])
def test_a_plan_is_what_a_step_takes(size: tuple[int, int, int]) -> None:
    """Saved bytes as autograd has them, and FLOPs as they are counted; what is for atoms and graphs is the rest."""
    width, hidden, blocks = size
    graphs, _ = build(data.made(60), 5.0)
    batch = widen(collate([decode_arrays(encode(graphs, np.uint16))], [(0, 0)]))
    model = PretextModel(edge_features=100, width=width, hidden=hidden, blocks=blocks)
    task = Denoising(GaussianExpansion(100, 6.0, 0.5), (0.3, 0.3), 0)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), FlopCounterMode(display=False) as counter:
        loss, _ = task.loss(model, batch)
        loss.backward()
    edges = len(batch.receiver)
    sizes = {"width": width, "hidden": hidden, "blocks": blocks}
    assert sum(kept.values()) / edges == pytest.approx(saved_per_edge(100, False, **sizes), rel=0.03)
    assert counter.get_total_flops() / edges == pytest.approx(flops_per_edge(100, **sizes), rel=0.05)


def test_the_concatenating_model_is_the_same_function() -> None:
    """Of the same weights: what stands beside ours computes what ours does."""
    graphs, _ = build(data.made(20), 4.0)
    batch = widen(collate([decode_arrays(encode(graphs, np.uint16))], [(0, 0)]))
    expansion = GaussianExpansion(12, 5.0, 0.5)
    torch.manual_seed(0)
    model = PretextModel(edge_features=12, width=8, hidden=12, blocks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
        features = expansion(distances(batch, batch.positions))
        ours = model(features, batch)
        theirs = concatenating(model)(features, batch)
    assert ours.std(dim=0).min() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("ray", "deepspeed", "pymatgen", "pydantic", "mlflow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from cdssl_dist.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_plain_step_needs_torch_and_a_data_set_only(data_folder: Path) -> None:
    arguments = ["overhead", "--engine", "plain", "--data", str(data_folder), "--steps", "1", "--repeat", "1", "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ms per step"]["plain torch"] > 0


@pytest.mark.slow
def test_a_step_with_everything(data_folder: Path) -> None:
    arguments = ["overhead", "--data", str(data_folder), "--steps", "2", "--repeat", "1", "--json", "--dtype", "bf16"]
    command = [sys.executable, "-m", "cdssl_dist.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert set(figures["ms per step"]) == {"plain torch", "engine", "engine, guard, metrics"}
    assert 0 < figures["checkpoint"]["share"] < 1
    assert figures["kill to new step, s"] > 0


@pytest.mark.slow
def test_what_more_ranks_lose(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "--data", str(data_folder), "--packs", "2", "--steps", "2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == sum(p.numel() for p in PretextModel(edge_features=100).parameters())
    table = DataSet(data_folder).table("train")
    full = 2 * DataSet(data_folder).shape("train", 1).half_edges
    assert figures["edges of a pack"] == full
    assert figures["fill"] == pytest.approx(table.edges.mean() / full, rel=0.05)  # all but what an epoch leaves over
    for of in figures["measured"]["2"].values():
        assert of["efficiency"] == pytest.approx(of["one rank"] / 2 / of["together"])
        assert of["efficiency"] + of["not divided"] + of["one machine"] + of["reducing and waiting"] == pytest.approx(1)


def test_the_terms_of_many_gpus() -> None:
    """By hand, for 16 GPUs on two nodes, and against a ring that passes its pieces around."""
    machine = Machine(rate=1e8, inside=1e11, between=1e10, latency=1e-5, storage=1e9)
    job = Job(edges=50_000, packs=2, parameters=1_000_000, gradient=4, checkpoint_every=100)

    def sent(
        ranks: int, size: float
    ) -> float:  # each of so many steps passes one piece on, first to sum, then to share
        return sum(size / ranks for _ in ("sum", "share") for _ in range(ranks - 1))

    terms = step_seconds(16, machine, job)
    assert terms["compute"] == pytest.approx(1e-3)
    assert terms["all-reduce"] == pytest.approx(sent(8, 4e6) / 1e11 + sent(2, 4e6 / 8) / 1e10)
    assert terms["latency"] == pytest.approx(2 * (2 * 7 + 2 * 1) * 1e-5)  # there and back, for gradient and question
    assert terms["checkpoint"] == pytest.approx(12e6 / 1e9 / 100)
    alone = step_seconds(1, machine, job)
    assert (alone["all-reduce"], alone["latency"]) == (0.0, 0.0)
    # 10 s on one rank are 6 s on two: of these 5 were divided, 0.4 could not be, 0.3 and 0.3 are lost.
    assert lost(10.0, 5.4, 5.7, 6.0, 2) == pytest.approx(
        {"efficiency": 5 / 6, "not divided": 0.4 / 6, "one machine": 0.05, "reducing and waiting": 0.05}
    )


@pytest.mark.slow
def test_what_people_do_with_an_encoder_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "--json", "--repeat", "1", "--crystals", "100", "--epochs", "1", "--times", "1"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["crystals"] == 100
    assert all(value is None or value > 0 for name, value in figures.items() if name != "machine")


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["graph", "--repeat", "0"])
    assert "--repeat must be at least 1" in capsys.readouterr().err.splitlines()[-1]
    assert main(["scaling", "--packs", "2", "--ranks", "4"]) != 0
    assert "not a multiple of 4 ranks" in capsys.readouterr().err
