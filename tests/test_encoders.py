"""What people do with an encoder: in Python, as a scikit-learn estimator, and by the commands."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from encoders import write_encoder_to
from pymatgen.core import Structure
from sklearn.base import clone
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GridSearchCV, cross_val_score

from cdssl_dist import CrystalClassifier, CrystalEncoder, CrystalRegressor
from cdssl_dist.cli import main as cdssl
from cdssl_dist.data import stream
from cdssl_dist.data.labeled import class_names, load_labeled, volume_per_atom
from cdssl_dist.data.structures import RefusedStructuresError
from cdssl_dist.data.tables import read_columns
from cdssl_dist.finetune.predictor import read_property, unseen_elements
from cdssl_dist.finetune.splits import k_folds
from cdssl_dist.look import report
from cdssl_dist.look.probe import probe
from cdssl_dist.mlops import record, registry
from cdssl_dist.mlops.mlflow_server import connect
from cdssl_dist.model.embedding import embed_graphs
from cdssl_dist.model.export import read_encoder
from sharding.crystal import SYMBOLS, Crystal, RefusedError
from sharding.graph import Multigraphs, build
from sharding.manifest import DataSetError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    seen = [z for z in range(1, 100) if z != 14]  # silicon was never seen
    return write_encoder_to(tmp_path_factory.mktemp("encoder"), elements=seen)


@pytest.fixture(scope="module")
def small(aflow: list[Crystal]) -> list[Crystal]:
    some = [c for c in aflow if len(c.atomic_numbers) <= 8][:60]
    return [c for i, c in enumerate(some) if i not in build(some, 4.0)[1]]


@pytest.fixture(scope="module")
def volumes(small: list[Crystal]) -> np.ndarray:
    return volume_per_atom(build(small, 4.0)[0])


@pytest.fixture(scope="module")
def table(small: list[Crystal], volumes: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crystals with labels: with gaps, of text, and one broken row."""
    path = tmp_path_factory.mktemp("data") / "labels.parquet"
    n = len(small)
    columns = {
        "id": [f"c-{i}" for i in range(n)],
        "lattice_vectors": [c.lattice.tolist() for c in small],
        "cartesian_site_positions": [c.positions.tolist() for c in small],
        "species_at_sites": [[SYMBOLS[z] for z in c.atomic_numbers] for c in small],
        "volume": volumes.tolist(),
        "total": [
            v * len(c.atomic_numbers) if i % 5 else None for i, (v, c) in enumerate(zip(volumes, small, strict=True))
        ],
        "kind": ["dense" if v < np.median(volumes) else "open <b>" for v in volumes],
        "part": [("train", "train", "val", "test")[i % 4] for i in range(n)],
        "fold": [i % 3 for i in range(n)],
        "constant": [1.5] * n,
        "sparse": [1.0 if i == 1 else None for i in range(n)],
        "signed": [-2.0 if i in (1, 2, 3, 8, 9) else 1.0 for i in range(n)],
    }
    columns["id"][5] = "c-4"  # twice
    columns["species_at_sites"][7] = ["Xx"] * len(small[7].atomic_numbers)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def registered(folder: Path, mlflow_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry that holds the encoder as ``crystals``. Not to be changed: ``uri`` gives a copy."""
    home = tmp_path_factory.mktemp("registry")
    shutil.copy(mlflow_store, home / "mlflow.db")
    registry.register(folder, "crystals", f"sqlite:///{home}/mlflow.db")
    return home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def uri(home: Path, registered: Path) -> str:
    shutil.copy(registered / "mlflow.db", home / "mlflow.db")  # what is new lies with it, what was there stays
    return f"sqlite:///{home}/mlflow.db"


# -- in Python ---------------------------------------------------------------------------------------------------------


def test_three_lines(home: Path, uri: str, folder: Path, small: list[Crystal]) -> None:
    encoder = CrystalEncoder.from_registry("models:/crystals@champion", uri)

    structures = [Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True) for c in small[:6]]
    atoms = [Atoms(c.atomic_numbers, c.positions, cell=c.lattice, pbc=True) for c in small[:6]]
    network, card = read_encoder(folder)
    expected = embed_graphs(network, card.expansion, build(small[:6], 4.0)[0])
    assert encoder.dim == expected.shape[1] == 24
    for given in (structures, atoms, small[:6], [s.to(fmt="json") for s in structures]):
        np.testing.assert_allclose(encoder.embed(given), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.embed([s.to(fmt="cif") for s in structures]), expected, atol=1e-3)
    np.testing.assert_allclose(encoder.embed(structures[0]), expected[:1], atol=1e-5)
    with pytest.raises(RefusedStructuresError, match=r"1 of 2 structures .*row 1: ") as error:
        encoder.embed([structures[0], "no crystal"])
    assert list(error.value.refused) == [1]
    assert np.isnan(encoder.embed(["no crystal"], refused="nan")).all()
    assert encoder.embed([]).shape == (0, 24)

    (home / "mlflow.db").unlink()  # what was pulled works offline
    again = CrystalEncoder.from_registry("models:/crystals@champion", uri)
    np.testing.assert_array_equal(again.embed(structures), encoder.embed(structures))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, cdssl_dist; dir(cdssl_dist); assert not {'torch', 'numpy', 'mlflow', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_large_and_tiny_cells(folder: Path) -> None:
    """A cell repeated a thousand times is the same crystal: means over atoms and edges do not change."""
    encoder = CrystalEncoder.from_folder(folder)
    copper = Atoms("Cu", cell=[[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]], pbc=True)
    large = copper.repeat((10, 10, 20))
    assert len(large) == 2000
    np.testing.assert_allclose(encoder.embed(large), encoder.embed(copper), atol=1e-4)
    model = CrystalRegressor(encoder, epochs=1).fit(
        [copper, large, copper.repeat(2)], [1.0, 2000.0, 8.0], per_atom=True
    )
    per_atom = model.predict([copper, large]) / [1, 2000]
    assert per_atom[0] == pytest.approx(per_atom[1], rel=1e-3)


def test_elements_never_seen(folder: Path, small: list[Crystal]) -> None:
    _, card = read_encoder(folder)
    graphs = build(small, 4.0)[0]
    for crystal, found in zip(small, unseen_elements(card.elements, graphs), strict=True):
        assert found == ([14] if 14 in crystal.atomic_numbers else [])
    assert unseen_elements([], graphs) == [[]] * len(small)  # not known what was seen


# -- scikit-learn ------------------------------------------------------------------------------------------------------


def test_the_estimators_are_scikit_learns(folder: Path, small: list[Crystal], volumes: np.ndarray) -> None:
    from sklearn.utils import estimator_checks as checks

    for kind in (CrystalRegressor, CrystalClassifier):
        model = kind(str(folder), epochs=2)
        for check in (  # those that do not feed it tables of numbers
            checks.check_no_attributes_set_in_init,
            checks.check_get_params_invariance,
            checks.check_set_params,
            checks.check_estimator_repr,
            checks.check_estimator_tags_renamed,
            checks.check_valid_tag_types,
            checks.check_estimator_cloneable,
            checks.check_do_not_raise_errors_in_init_or_set_params,
            checks.check_mixin_order,
        ):
            check(kind.__name__, clone(model))
        checks.check_parameters_default_constructible(kind.__name__, kind())
        with pytest.raises(ValueError, match="not fitted"):
            model.predict(small)
    search = GridSearchCV(CrystalRegressor(str(folder), epochs=1), {"freeze": [0, 3]}, cv=2)
    search.fit(small, volumes)
    assert search.predict(small).shape == (len(small),)
    assert np.isfinite(cross_val_score(CrystalRegressor(str(folder), epochs=1), small, volumes, cv=2)).all()


def test_regression(folder: Path, small: list[Crystal], volumes: np.ndarray, tmp_path: Path) -> None:
    y = np.stack([volumes, volumes * [len(c.atomic_numbers) for c in small]], axis=1)
    y[::4, 1] = np.nan
    model = CrystalRegressor(str(folder), epochs=3, members=2).fit(small, y, per_atom=[False, True])
    mean, std = model.predict(small, return_std=True)
    assert mean.shape == std.shape == (len(small), 2) and (std > 0).any()
    again = clone(model).fit(small, y, per_atom=[False, True])
    np.testing.assert_array_equal(again.predict(small), mean)

    saved = read_property(model.save(tmp_path / "saved"))
    assert {p.suffix for p in (tmp_path / "saved").iterdir()} == {".safetensors", ".json", ".md"}
    np.testing.assert_array_equal(saved.predict(build(small, 4.0)[0]).mean, mean)
    with pytest.raises(RefusedStructuresError, match="row 1"):
        model.fit([small[0], "broken"], y[:2])
    with pytest.raises(ValueError, match="2 structures and 3 targets"):
        model.fit(small[:2], y[:3])
    three = CrystalRegressor(str(folder), epochs=2).fit(small[:3], [1.0, 2.0, 3.0])
    assert np.isfinite(three.predict(small[:3])).all()


def test_classification(folder: Path, small: list[Crystal], volumes: np.ndarray) -> None:
    y = np.where(volumes < np.median(volumes), "dense", "open")
    model = CrystalClassifier(str(folder), epochs=3).fit(small, y)
    chance = model.predict_proba(small)
    assert model.classes_.tolist() == ["dense", "open"] and chance.shape == (len(small), 2)
    assert model.predict(small).tolist() == [model.classes_[i] for i in chance.argmax(axis=1)]
    with pytest.raises(ValueError, match="1 class"):
        model.fit(small, ["a"] * len(small))
    gaps: list[Any] = [*y[:-2].tolist(), math.nan, None]
    assert model.fit(small, gaps).classes_.tolist() == ["dense", "open"]


# -- commands ----------------------------------------------------------------------------------------------------------


def test_finetune_register_predict(
    home: Path, uri: str, folder: Path, table: Path, small: list[Crystal], capsys: pytest.CaptureFixture[str]
) -> None:
    tune = ["finetune", "--encoder", "models:/crystals@champion", "--data", str(table), "--epochs", "2"]
    tune += ["--target", "volume", "total", "--per-atom", "total", "--members", "2", "--split-column", "part"]
    assert cdssl([*tune, "--register", "volumes", "--out", "tuned"]) == 0
    said = capsys.readouterr()
    assert (
        "models:/volumes/1" in said.out
        and "1 inputs cannot be used: 'Xx' is not a chemical element (1)\n" in said.err
        and "1 crystals have the id" in said.err
    )
    results = json.loads((home / "tuned" / "results.json").read_text())
    assert results["encoder"]["ref"] == "models:/crystals/1"
    assert "uncertainty" in results
    tested = pq.read_table("tuned/predictions.parquet").to_pydict()
    assert {int(k[2:]) % 4 for k in tested["key"]} == {3}
    off = [abs(a - b) for a, b in zip(tested["pretrained:volume"], tested["true:volume"], strict=True)]
    assert results["errors"]["pretrained"]["volume"] == pytest.approx(np.mean(off))
    assert set(results["errors"]) == {
        *("pretrained", "from scratch", "linear on frozen vectors", "median", "ridge on composition")
    }

    version = registry.show("models:/volumes@champion", uri)
    client = connect(uri)
    run = client.get_run(version.run_id or "")  # the record of the work, with its page
    assert run.info.status == "FINISHED" and run.data.params["members"] == "2"
    assert run.data.metrics["test/pretrained/volume"] == pytest.approx(results["errors"]["pretrained"]["volume"])
    assert {f.path for f in client.list_artifacts(version.run_id or "")} == {
        *["history.jsonl", "parity.png", "predictions.parquet", "report.html", "results.json"]
    }
    assert version.tags["encoder"] == "models:/crystals/1"
    assert version.tags["encoder_weights_sha256"] == registry.show("models:/crystals/1", uri).tags["weights_sha256"]
    pulled = registry.pull("models:/volumes@champion", uri)
    assert sorted(p.name for p in pulled.iterdir()) == ["property.json", "property.safetensors"]

    assert cdssl(["predict", "--model", "models:/volumes@champion", "--data", str(table), "--out", "p.parquet"]) == 0
    assert "1 could not be used" in capsys.readouterr().out
    rows = pq.read_table("p.parquet").to_pylist()
    assert sorted(r["key"] for r in rows) == sorted(pq.read_table(table)["id"].to_pylist())
    (bad,) = [r for r in rows if r["refused"]]
    assert bad["key"] == "c-7" and bad["volume"] is None and "species" in bad["refused"]
    by_key = {r["key"]: r for r in rows}
    for key, ours, deviation in zip(
        tested["key"], tested["pretrained:total"], tested["pretrained std:total"], strict=True
    ):
        if key != "c-7":
            assert by_key[key]["total"] == pytest.approx(ours) and by_key[key]["std:total"] == pytest.approx(deviation)
            factor = results["uncertainty"]["total"]["factor"]
            assert by_key[key]["within68:total"] == pytest.approx(factor * deviation)
    card = json.loads((home / "tuned" / "model" / "property.json").read_text())
    seen = {int(z) for i, c in enumerate(small) if i % 4 != 3 for z in c.atomic_numbers}
    assert set(card["elements"]) == seen | set(read_encoder(folder)[1].elements)  # not those of the test alone
    assert {r["unseen_elements"] for r in rows} == {None}

    assert cdssl(["predict", "--model", "models:/crystals@champion", "--data", str(table), "--out", "q.parquet"]) == 2
    assert "is an encoder" in capsys.readouterr().err and not Path("q.parquet").exists()
    assert cdssl(["finetune", "--encoder", "models:/volumes@champion", "--data", str(table), "--target", "volume"]) == 2
    assert "a fine-tuned model, but an encoder is needed" in capsys.readouterr().err
    assert cdssl(["embed", "--encoder", "tuned/model", "--data", str(table), "--out", "q.parquet"]) == 2
    assert "tuned/model: a fine-tuned model, but an encoder is needed" in capsys.readouterr().err
    again = ["finetune", "--encoder", str(folder), "--data", str(table), "--target", "volume", "--register", "crystals"]
    assert cdssl(again) == 2  # before it trains
    assert "'crystals' holds cdssl-encoder" in capsys.readouterr().err


def test_finetune_to_classes_with_labels_that_lie_elsewhere(home: Path, folder: Path, table: Path) -> None:
    rows = pq.read_table(table).to_pylist()
    with open("labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "kind", "fold"])
        writer.writerows([r["id"], r["kind"] if i % 6 else "", r["fold"]] for i, r in enumerate(rows) if i != 5)
    tune = ["finetune", "--encoder", str(folder), "--data", str(table), "--labels", "labels.csv", "--target", "kind"]
    assert cdssl([*tune, "--classify", "--fold-column", "fold", "--epochs", "1", "--no-scratch", "--out", "tuned"]) == 0
    results = json.loads(Path("tuned/results.json").read_text())
    assert results["task"]["classes"] == ["dense", "open <b>"] and len(results["crystals"]) == 3
    tested = pq.read_table("tuned/predictions.parquet").to_pylist()
    assert {r["fold"] for r in tested} == {0, 1, 2}
    assert not {r["id"] for i, r in enumerate(rows) if i % 6 == 0} & {r["key"] for r in tested}
    assert cdssl(["predict", "--model", "tuned", "--data", str(table), "--out", "p.parquet"]) == 0
    first = pq.read_table("p.parquet").to_pylist()[0]
    assert first["class"] in ("dense", "open <b>") and first["dense"] + first["open <b>"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--target volme", "no column volme"),
        ("--target kind", "label 'kind' is 'dense', which is not a number"),
        ("--target volume kind", "label 'kind' is 'dense', which is not a number"),
        ("--target kind volume --classify", "one target"),
        ("--target volume --classify", "not usable as classes"),
        ("--target volume --per-atom total", "--per-atom total: not among the targets, volume"),
        ("--target volume --log total", "--log total: not among the targets, volume"),
        ("--target volume signed --log signed", "5 of 58 labels are not above 0 (the smallest is -2)"),
        ("--target volume --register a/b", "'a/b' is not a valid name for a model"),
        ("--target volume --members 0", "at least one is needed"),
        ("--target volume --members 3 --readout linear", "all of them would be the same"),
        ("--target volume --folds 3 --val 1", "validation share 1:"),
        ("--target volume sparse --folds 5 --no-scratch", ": no training crystal has a label of sparse"),
        ("--target volume --folds 0", "0 folds"),
        ("--target computed:density --classify", "not a class label"),
        ("--target kind --classify --log kind", "--classify does not go with --log"),
        ("--target volume --split-column part --test-value train", "training crystals cannot be test crystals"),
        ("--target volume --fold-column flod", "did you mean 'fold'?"),
        ("--target volume --split-column part --test-value nowhere", "'train' and 'nowhere' are needed"),
        ("--target volume --folds 3 --fold-column fold", "mutually exclusive"),
        ("--target volume --keys absent.txt", "absent.txt"),
        ("--target volume --freeze 9", "3 stages"),
        ("--target volume --unit A eV", "2 units for 1 targets"),
        ("--target kind", "label 'kind' is 'dense', which is not a number"),
        ("--target volume --where n_atoms<3", "not a data set of shards"),
        ("--target volume --encoder models:/nobody@champion", "does not exist"),
        ("--target volume --encoder nowhere", "nowhere: holds no encoder.safetensors"),
        ("--target volume --out taken", "--out taken: cannot be written (File exists)"),
        ("--target volume --labels units.csv", "1 values of 'volume' are text, such as '>35', and 2 are numbers"),
        ("--target volume --labels twice.csv", "two rows have the id 'c-1' and differ: volume is '1' and '2'"),
        ("--target volume --labels semicolons.csv", "its columns are separated by ';'"),
    ],
)
def test_wrong_use_is_said_in_a_line(
    arguments: str, said: str, home: Path, folder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").touch()
    Path("units.csv").write_text("id,volume\nc-1,12.5\nc-2,>35\nc-3,-\nc-6,11\n")
    Path("twice.csv").write_text("id,volume\nc-1,1\nc-2,1\nc-2,1\nc-1,2\n")
    Path("semicolons.csv").write_text("id;volume\nc-1;1\n")
    encoder = [] if "--encoder" in arguments else ["--encoder", str(folder)]
    assert cdssl(["finetune", *encoder, "--data", str(table), "--epochs", "1", *arguments.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error


def test_a_list_of_targets_is_not_empty(capsys: pytest.CaptureFixture[str]) -> None:
    """``--log`` alone would learn the target as it is."""
    with pytest.raises(SystemExit):
        cdssl(["finetune", "--data", "x.csv", "--target", "volume", "--log"])
    assert "--log: expected at least one argument" in capsys.readouterr().err


def test_constant_labels(home: Path, folder: Path, table: Path) -> None:
    tune = ["finetune", "--encoder", str(folder), "--data", str(table), "--target", "constant", "--epochs", "2"]
    assert cdssl([*tune, "--no-scratch", "--out", "tuned"]) == 0
    assert json.loads(Path("tuned/results.json").read_text())["errors"]["median"]["constant"] == 0
    assert Path("tuned/report.html").exists()


def test_a_server_that_takes_no_record_costs_a_line(
    home: Path, uri: str, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def down(uri: str) -> None:
        raise ConnectionError("nobody is there")

    monkeypatch.setattr(record, "connect", down)
    monkeypatch.setattr(report, "of_tuning", lambda *_: 1 / 0)  # nor can a page be made
    tune = ["finetune", "--encoder", "models:/crystals@champion", "--data", str(table), "--target", "volume"]
    assert cdssl([*tune, "--epochs", "1", "--no-scratch", "--out", "tuned"]) == 0
    said = capsys.readouterr().err
    assert "mlflow: this work could not be recorded at " in said and "(nobody is there)" in said
    assert "report.html: not written (ZeroDivisionError" in said
    assert (home / "tuned" / "results.json").exists() and not (home / "tuned" / "report.html").exists()


def test_names_of_classes() -> None:
    column = [1000001, 1000002, "1000002", 1.0, True, "True", 0.1234567, "0.1234568", "x "]
    column += [" ", "nan", float("nan"), None]
    assert class_names(column) == ("0.1234567", "0.1234568", "1", "1000001", "1000002", "True", "x")


def test_rows_without_ids_are_nobodys(tmp_path: Path) -> None:
    (tmp_path / "folds.csv").write_text("cif,fold\ndata_a,1\n")
    pq.write_table(pa.table({"fold": [1, 2]}), tmp_path / "folds.parquet")
    for name in ("folds.csv", "folds.parquet"):
        with pytest.raises(DataSetError, match="no column of ids"):
            read_columns(str(tmp_path / name), ["fold"], ["folds#1"])


def test_a_number_is_the_id_of_one_crystal(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("id,y\n1,5\nb#2,7\n")
    path = str(tmp_path / "labels.csv")
    assert read_columns(path, ["y"], ["a#1", "b#2", "a#2", "c"]) == {"y": ["5", "7", None, None]}
    with pytest.raises(DataSetError, match=r"the id '1' fits both 'a#1' and 'b#1'; write the full ids"):
        read_columns(path, ["y"], ["a#1", "b#1"])


def test_what_would_be_lost_is_not_written(
    home: Path, folder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embed = ["embed", "--encoder", str(folder), "--data", "own.parquet", "--out"]
    pq.write_table(pq.read_table(table), "own.parquet")
    before = Path("own.parquet").read_bytes()
    Path("folder.parquet").mkdir()
    for out, said in (
        ("own.parquet", "the data would be replaced"),
        ("../" + home.name + "/own.parquet", "the data would be replaced"),
        ("folder.parquet", "must be a Parquet file"),
        ("vectors.csv", "must be a Parquet file"),
    ):
        assert cdssl([*embed, out]) == 2
        assert said in capsys.readouterr().err
    assert Path("own.parquet").read_bytes() == before
    Path("empty.csv").write_text("id,cif\n")
    assert cdssl(["embed", "--encoder", str(folder), "--data", "empty.csv", "--out", "v.parquet"]) == 2
    assert "there is no crystal in the data" in capsys.readouterr().err and not Path("v.parquet").exists()


def test_a_folder_of_cifs_is_labeled_too(tmp_path: Path, small: list[Crystal]) -> None:
    folder = tmp_path / "cifs"
    folder.mkdir()
    for name, crystal in zip("ab", small, strict=False):
        Structure(crystal.lattice, crystal.atomic_numbers, crystal.positions, coords_are_cartesian=True).to(
            filename=str(folder / f"{name}.cif")
        )
    data = load_labeled(str(folder), "computed:density", 4.0)
    assert [key.partition("#")[0] for key in data.graphs.keys] == ["a", "b"]
    assert sum(len(graphs) for graphs, _ in stream.stream(str(folder), 4.0)) == 2
    (tmp_path / "half" / ".work").mkdir(parents=True)
    with pytest.raises(DataSetError, match="the sharding was not finished"):
        load_labeled(str(tmp_path / "half"), "computed:density", 4.0)


def test_three_crystals(home: Path, folder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pq.read_table(table).slice(0, 3), "three.parquet")
    tune = ["finetune", "--encoder", str(folder), "--data", "three.parquet", "--target", "volume", "--epochs", "1"]
    assert cdssl(tune) == 2
    assert "3 crystals in 3 groups split into" in capsys.readouterr().err
    assert cdssl([*tune, "--folds", "3", "--members", "2", "--out", "tuned"]) == 0  # each tests once
    assert "too few validation labels" in capsys.readouterr().out


def test_embed(home: Path, folder: Path, table: Path, data_folder: Path, small: list[Crystal]) -> None:
    assert cdssl(["embed", "--encoder", str(folder), "--data", str(table), "--out", "e.parquet"]) == 0
    rows = {r["key"]: r for r in pq.read_table("e.parquet").to_pylist()}
    encoder = CrystalEncoder.from_folder(folder)
    np.testing.assert_allclose(rows["c-3"]["embedding"], encoder.embed(small[3])[0], atol=1e-5)
    assert rows["c-7"]["embedding"] is None and rows["c-7"]["refused"].startswith("species")
    for i in (3, 10, 20):
        assert rows[f"c-{i}"]["unseen_elements"] == ("Si" if 14 in small[i].atomic_numbers else None)
    assert cdssl(["embed", "--encoder", str(folder), "--data", str(table), "--out", "2.parquet", "--workers", "2"]) == 0
    assert pq.read_table("2.parquet").equals(pq.read_table("e.parquet"), check_metadata=True)
    # Shards hold graphs of another cutoff.
    assert cdssl(["embed", "--encoder", str(folder), "--data", str(data_folder), "--out", "f.parquet"]) == 2
    assert not Path("f.parquet").exists() and not list(home.glob(".f*"))


def test_memory_does_not_grow_with_the_rows(
    home: Path, folder: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all crystals and graphs that a file becomes, few are alive at a time; rows go to the disk meanwhile."""
    monkeypatch.setattr(stream, "AT_ONCE", 4)
    monkeypatch.setattr(stream, "ROWS_PER_GROUP", 8)
    made: list[tuple[int, weakref.ref[np.ndarray]]] = []
    most: list[int] = []
    real = stream.build

    def watched(crystals: list[Crystal], cutoff: float) -> tuple[Multigraphs, dict[int, RefusedError]]:
        graphs, refused = real(crystals, cutoff)
        made.append((len(graphs), weakref.ref(graphs.positions)))
        most.append(sum(n for n, positions in made if positions() is not None))
        return graphs, refused

    monkeypatch.setattr(stream, "build", watched)
    rows = len(pq.read_table(table))
    assert cdssl(["embed", "--encoder", str(folder), "--data", str(table), "--out", "e.parquet"]) == 0
    assert len(most) > 10 and max(most) <= 8 < rows / 4  # the graphs at hand, and those before them
    written = pq.ParquetFile("e.parquet").metadata
    assert written.num_rows == rows and written.num_row_groups >= rows // 12


def test_embedding_shards_by_condition(home: Path, data_folder: Path) -> None:
    other = write_encoder_to(home / "five", cutoff=5.0)
    out = []
    for more in ([], ["--split", "val"], ["--where", "n_atoms <= 4", "--workers", "2"]):
        assert cdssl(["embed", "--encoder", str(other), "--data", str(data_folder), "--out", "e.parquet", *more]) == 0
        out.append({r["key"]: r for r in pq.read_table("e.parquet").to_pylist()})
    every, val, few = out
    graphs = pq.read_table(data_folder / "graphs.parquet").to_pylist()
    assert set(every) == {r["key"] for r in graphs}
    assert set(val) == {r["key"] for r in graphs if r["split"] == "val"}
    assert set(few) == {r["key"] for r in graphs if r["n_atoms"] <= 4}
    for key, row in few.items():
        np.testing.assert_allclose(row["embedding"], every[key]["embedding"], atol=1e-5)
    assert {k: r["formula"] for k, r in every.items()} == {r["key"]: r["formula"] for r in graphs}


def test_probes(home: Path, folder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["probe", "--encoder", str(folder), "--data", str(table), "--target", "volume", "total", "--folds", "3"]
    assert cdssl([*command, "--out", "probe.json"]) == 0
    assert "composition + volume" in capsys.readouterr().out
    found = json.loads(Path("probe.json").read_text())["volume"]
    assert found["composition + volume"]["r2"] > 0.99  # it is one of the features
    assert len({tuple(found[f"random encoder {i}"]["mae"]) for i in (1, 2, 3)}) == 3

    data = load_labeled(str(table), "volume", 4.0)
    x = embed_graphs(*(lambda n, c: (n, c.expansion))(*read_encoder(folder)), data.graphs).astype(float)
    folds = k_folds(data.groups, 3, 0.0, 0)
    maes = []
    for fold in folds:  # the same by hand
        mean, std = x[fold.train].mean(axis=0), x[fold.train].std(axis=0)
        std[std == 0] = 1
        ridge = RidgeCV(alphas=np.logspace(-3, 5, 17)).fit((x[fold.train] - mean) / std, data.targets[fold.train, 0])
        maes.append(np.abs(ridge.predict((x[fold.test] - mean) / std) - data.targets[fold.test, 0]).mean())
    assert probe({"x": x}, data.targets[:, 0], folds)["x"].mae == pytest.approx(maes, rel=1e-4)
    assert found["encoder"]["mae"] == pytest.approx(maes, rel=1e-3)


def test_vectors_of_others_are_probed(
    home: Path, folder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cdssl(["embed", "--encoder", str(folder), "--data", str(table), "--out", "own.parquet"]) == 0
    command = ["probe", "--encoder", str(folder), "--data", str(table), "--target", "volume", "--folds", "3"]
    assert cdssl([*command, "--vectors", "same=own.parquet", "--out", "probe.json"]) == 0
    found = json.loads(Path("probe.json").read_text())["volume"]
    assert found["same"]["mae"] == pytest.approx(found["encoder"]["mae"], rel=1e-3)

    embed = ["embed", "--encoder", str(folder), "--data", str(table), "--out", "random.parquet", "--random", "1"]
    assert cdssl(embed) == 0  # which is the second of the random encoders that a probe makes with seed 0
    assert cdssl([*command, "--vectors", "same=random.parquet", "--out", "probe.json"]) == 0
    found = json.loads(Path("probe.json").read_text())["volume"]
    assert found["same"]["mae"] == pytest.approx(found["random encoder 2"]["mae"], rel=1e-3)

    own = pq.read_table("own.parquet")
    pq.write_table(own.slice(2), "few.parquet")
    pq.write_table(own.drop_columns(["embedding"]), "none.parquet")
    for said, why in (
        ("few=few.parquet", "no vector for 2 of "),
        ("none=none.parquet", "not a Parquet file with key and embedding"),
        ("gone=gone.parquet", "not a Parquet file with key and embedding"),
        ("encoder=own.parquet", "where NAME is not one of encoder"),
        ("own.parquet", "must be NAME=FILE"),
    ):
        assert cdssl([*command, "--vectors", said]) == 2
        assert why in capsys.readouterr().err
