"""Encoders by name: which one is the champion, what is pulled, what is refused, and the accompanying pyfunc."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from encoders import write_encoder_to
from pymatgen.core import Lattice, Structure
from safetensors.numpy import load_file, save_file

from cdssl_dist.data.batch import collate, widen
from cdssl_dist.data.structures import graphs_of
from cdssl_dist.finetune.predictor import read_property
from cdssl_dist.mlops import registry, registry_store
from cdssl_dist.mlops.mlflow_server import connect, experiment, tracking_uri
from cdssl_dist.mlops.model_card import write_model_card
from cdssl_dist.mlops.registry import RegistryError, list_versions, promote, pull, register, rollback, show
from cdssl_dist.mlops.registry_cli import main
from cdssl_dist.mlops.registry_store import UnreachableError
from cdssl_dist.model.edges import distances
from cdssl_dist.model.export import EncoderCard, read_encoder
from cdssl_dist.model.megnet import pooled
from sharding.crystal import Crystal
from sharding.graph import build

FILES = ("encoder.safetensors", "encoder.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mlflow_store: Path) -> tuple[Path, registry.Registered]:
    """A registry with one encoder. Not to be changed: ``uri`` gives a copy."""
    home = tmp_path_factory.mktemp("registry")
    shutil.copy(mlflow_store, home / "mlflow.db")
    (home / "empty").mkdir()
    before = os.environ.get("MLFLOW_TRACKING_URI")
    done = register(write_encoder_to(home / "encoder"), "crystals", f"sqlite:///{home}/mlflow.db")
    assert os.environ.get("MLFLOW_TRACKING_URI") == before
    return home, done


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "a home").mkdir()  # MLflow takes paths as URIs, and URIs as paths
    return tmp_path / "a home"


@pytest.fixture
def home(root: Path, made: tuple[Path, registry.Registered], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the registry: artifacts of the first version are the original's, new ones are its own."""
    shutil.copy(made[0] / "mlflow.db", root / "mlflow.db")
    with contextlib.closing(sqlite3.connect(root / "mlflow.db")) as database, database:
        database.execute("UPDATE experiments SET artifact_location = ?", ((root / "mlartifacts").as_uri(),))
    monkeypatch.setenv("CDSSL_CACHE", str(root / "cache"))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def uri(home: Path) -> str:
    return f"sqlite:///{home}/mlflow.db"


def model_folder(home: Path) -> Path:
    (file,) = home.glob("mlartifacts/models/*/artifacts/MLmodel")
    return file.parent


def test_register_once(made: tuple[Path, registry.Registered], home: Path, uri: str) -> None:
    done = made[1]
    assert (done.version, done.aliases, done.uri, done.created) == (
        1,
        ("champion", "latest"),
        "models:/crystals/1",
        True,
    )
    again = register(made[0] / "encoder", "crystals", uri)
    assert (again.version, again.aliases, again.created) == (1, ("champion", "latest"), False)
    (version,) = list_versions("crystals", uri)
    card = json.loads((made[0] / "encoder" / "encoder.json").read_text())
    for tag in ("data_digest", "config_digest", "validation_digest", "code_version", "weights_sha256"):
        assert version.tags[tag] == card[tag]
    home_of_code = Path(registry.__file__).parents[2]
    listed = (
        "find cdssl_dist sharding -name '*.py' | LC_ALL=C sort | xargs sha256sum | awk '{print $2, $1}' | sha256sum"
    )
    summed = subprocess.run(["sh", "-c", listed], cwd=home_of_code, capture_output=True, text=True, check=True).stdout
    assert version.tags["code_digest"] == summed.split()[0]
    assert json.loads(version.tags["metrics"]) == card["metrics"]
    assert version.tags["skill_edge"] == "0.3" and version.tags["format"] == "cdssl-encoder 2"
    assert not (home / "mlruns").exists() and not (home / "mlflow-run.json").exists()


def test_the_champion_is_the_best_comparable_one(home: Path, uri: str) -> None:
    def registered(number: int, **about: object) -> registry.Registered:
        return register(write_encoder_to(home / str(number), number, **about), "crystals", uri)  # type: ignore[arg-type]

    worse = registered(2, skill=0.2)
    assert "champion" not in worse.aliases and "0.2000 is not above the 0.3000" in worse.reason
    assert "validation_digest" in registered(3, skill=0.9, validation_digest="other").reason
    assert "sigma" in registered(4, skill=0.9, sigma=(0.1, 0.1)).reason
    assert "no skill_edge" in registered(5, skill=None).reason
    assert show("models:/crystals@champion", uri).version == 1

    better = registered(6, skill=0.4)
    assert better.aliases == ("champion", "latest") and "version 1" in better.reason
    assert show("models:/crystals@previous", uri).version == 1

    assert promote("models:/crystals/3", uri).aliases == ("champion",)
    assert show("models:/crystals@previous", uri).version == 6
    assert rollback("crystals", uri).version == 6
    assert show("models:/crystals@previous", uri).version == 3
    assert rollback("crystals", uri).version == 3
    # What somebody decided by hand is not undone by registering the same weights again.
    again = register(home / "6", "crystals", uri)
    assert again.version == 6 and again.aliases == ("latest", "previous")
    assert [v.version for v in list_versions("crystals", uri)] == [6, 5, 4, 3, 2, 1]


def test_lineage(home: Path, uri: str) -> None:
    client = connect(uri)
    run = client.create_run(experiment(client, uri, "pretraining")).info.run_id
    done = register(write_encoder_to(home / "e", 7), "crystals", uri, run)
    assert show(done.uri, uri).run_id == run
    (output,) = client.get_run(run).outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.source_run_id == run and model.status == "READY"
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "crystals", "version": 2}]
    with pytest.raises(RegistryError, match="not found"):
        register(write_encoder_to(home / "f", 8), "crystals", uri, "0" * 32)


def test_pull(made: tuple[Path, registry.Registered], home: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pull("models:/crystals@champion", uri)
    assert folder.parent == home / "cache" / "encoders"
    assert sorted(p.name for p in folder.iterdir()) == ["encoder.json", "encoder.safetensors"]
    encoder, card = read_encoder(folder)
    expected, _ = read_encoder(made[0] / "encoder")
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), expected.parameters(), strict=True))
    assert pull(str(folder), uri) == folder

    (folder / "encoder.safetensors").write_bytes(b"damaged")  # a cache is repaired
    assert pull("models:/crystals/1", uri) == folder and read_encoder(folder)[1] == card

    (home / "mlflow.db").unlink()
    assert pull("models:/crystals@champion", uri) == folder
    assert "version 1" in capsys.readouterr().err
    assert not (home / "mlflow.db").exists()
    with pytest.raises(RegistryError, match="no intact copy"):
        pull("models:/crystals@previous", uri)
    (folder / "encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(RegistryError, match="no intact copy"):
        pull("models:/crystals@champion", uri)


def test_what_is_not_right_is_refused(home: Path, uri: str) -> None:
    done = register(write_encoder_to(home / "e", 9), "crystals", uri)
    stored = model_folder(home) / "artifacts"
    sound = {name: (stored / name).read_bytes() for name in FILES}
    weights = load_file(str(stored / "encoder.safetensors"))
    weights["element.weight"] += 1
    save_file(weights, str(stored / "encoder.safetensors"))
    with pytest.raises(RegistryError, match="SHA-256"):
        pull(done.uri, uri)
    # Both files changed so that they agree: the version's tags tell.
    write_encoder_to(stored, 10)
    with pytest.raises(RegistryError, match="tags"):
        pull(done.uri, uri)
    (stored / "encoder.safetensors").write_bytes(sound["encoder.safetensors"])
    (stored / "encoder.json").write_bytes(sound["encoder.json"].replace(b'"cutoff": 4.0', b'"cutoff": 5.0'))
    with pytest.raises(RegistryError, match="tags"):
        pull(done.uri, uri)
    (stored / "encoder.safetensors").unlink()
    (stored / "encoder.pkl").write_bytes(pickle.dumps(weights))
    with pytest.raises(RegistryError, match=r"encoder.safetensors cannot be downloaded .*pickled"):
        pull(done.uri, uri)
    assert not list((home / "cache").rglob("*.json")) and not list((home / "cache" / "encoders").iterdir())

    # A pickle under another name, with a card that says so.
    fake = write_encoder_to(home / "fake")
    (fake / "encoder.safetensors").write_bytes(pickle.dumps(weights))
    card = json.loads((fake / "encoder.json").read_text())
    card["weights_sha256"] = registry.sha256(fake / "encoder.safetensors")
    (fake / "encoder.json").write_text(json.dumps(card))
    for use in (lambda: pull(str(fake), uri), lambda: register(fake, "crystals", uri)):
        with pytest.raises(RegistryError, match="holds no encoder"):
            use()

    client = connect(uri)  # a version that somebody else registered
    client.create_model_version("crystals", str(stored))
    with pytest.raises(RegistryError, match="not a model that cdssl registered"):
        pull("models:/crystals@latest", uri)
    client.set_model_version_tag("crystals", "3", "weights_sha256", "../../../etc")
    with pytest.raises(RegistryError, match="not a model that cdssl registered"):
        pull("models:/crystals@latest", uri)


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("models:/crystal@champion", "has no model 'crystal'; it has: crystals"),
        ("models:/crystals@best", "no such version of 'crystals'; there are: 1 champion latest"),
        ("models:/crystals/7", "there are: 1 champion latest"),
        ("models:/crystals", "models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("nowhere", "nowhere: holds no encoder.safetensors"),
    ],
)
def test_wrong_names(uri: str, ref: str, said: str) -> None:
    with pytest.raises(RegistryError, match=said) as error:
        pull(ref, uri)
    assert "\n" not in str(error.value)


def test_no_registry(home: Path) -> None:
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_URI"):
        list_versions("crystals", f"sqlite:///{home}/nowhere.db")
    with pytest.raises(RegistryError, match="does not answer") as error:
        pull("models:/crystals@champion", "http://me:password@127.0.0.1:9/")
    assert "password" not in str(error.value)
    with pytest.raises(RegistryError, match="not a valid name"):
        register(home / "any", "a/b", f"sqlite:///{home}/mlflow.db")


def test_what_is_remembered_of_a_file_is_of_that_file(
    home: Path, uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two projects may call their registries alike, by a path from where they stand."""
    monkeypatch.chdir(home)
    relative = "sqlite:///" + str(Path(uri.removeprefix("sqlite:///")).relative_to(home))
    assert tracking_uri(relative, home) == uri
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert tracking_uri(relative, home) == f"sqlite:///{tmp_path}/other/mlflow.db"
    assert tracking_uri("https://mlflow.example.org", home) == "https://mlflow.example.org"


def test_not_allowed(home: Path) -> None:
    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(RegistryError, match="MLFLOW_TRACKING_USERNAME"):
            pull("models:/crystals@champion", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def reference(folder: Path, crystals: list[Crystal]) -> np.ndarray:
    """The embedding by the parts, one crystal at a time."""
    encoder, card = read_encoder(folder)
    rows = []
    for crystal in crystals:
        graphs, refused = build([crystal], card.cutoff)
        assert not refused
        names = ("n_atoms", "n_edges", "lattice", "atomic_numbers", "positions", "edge_src", "edge_dst", "edge_shift")
        batch = widen(collate([{n: getattr(graphs, n) for n in names}], [(0, 0)]))
        with torch.inference_mode():
            states = encoder(card.expansion(distances(batch, batch.positions)), batch)
            rows.append(pooled(*states, batch)[0].numpy())
    return np.array(rows)


def as_json(crystal: Crystal) -> dict[str, object]:
    from sharding.crystal import SYMBOLS

    species = [[{"element": SYMBOLS[z], "occu": 1}] for z in crystal.atomic_numbers]
    sites = [{"species": s, "xyz": x} for s, x in zip(species, crystal.positions.tolist(), strict=True)]
    return {"lattice": {"matrix": crystal.lattice.tolist()}, "sites": sites}


CLEAN = """
import json, sys

FORBIDDEN = {"numba", "deepspeed", "ray", "torch_geometric", "webdataset", "pymatgen", "ase"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not installed here")

repo, model, data, out = sys.argv[1:]
sys.path[:] = [p for p in sys.path if not p.startswith(repo + "/") or "site-packages" in p]
sys.meta_path[:] = [Blocker(), *(f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", ""))]
import importlib.util
assert importlib.util.find_spec("cdssl_dist") is None and importlib.util.find_spec("sharding") is None
import mlflow, numpy, pandas
loaded = mlflow.pyfunc.load_model(model)
numpy.save(out, loaded.predict(pandas.DataFrame({"structure": json.load(open(data))})))
ours = [m for n, m in sys.modules.items() if n.partition(".")[0] in ("cdssl_dist", "sharding")]
assert ours and all(m.__file__.startswith(model) for m in ours), ours
assert not FORBIDDEN & set(sys.modules)
"""


def test_the_pyfunc_needs_no_package_of_ours(
    made: tuple[Path, registry.Registered], tmp_path: Path, aflow: list[Crystal], repo: Path
) -> None:
    from pymatgen.core import Lattice, Structure
    from pymatgen.io.cif import CifWriter

    model = tmp_path / "model"
    shutil.copytree(model_folder(made[0]), model)
    files = [p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert {Path(f).suffix for f in files} <= {"", ".py", ".json", ".yaml", ".txt", ".md", ".safetensors"}, files
    assert not any(b"\x80\x04\x95" in (model / f).read_bytes() for f in files)  # how a pickle begins
    code = {f for f in files if f.startswith("code/")}
    assert "code/cdssl_dist/model/megnet.py" in code and "code/sharding/graph.py" in code
    assert not {"code/cdssl_dist/config.py", "code/cdssl_dist/model/heads.py", "code/sharding/manifest.py"} & code
    assert all("pydantic" not in (model / f).read_text() for f in code)  # which MLflow itself imports

    crystals = sorted(aflow, key=lambda c: len(c.atomic_numbers))[:: len(aflow) // 12]
    spinel = Structure.from_spacegroup(
        "Fd-3m", Lattice.cubic(8.08), ["Mg", "Al", "O"], [[0] * 3, [5 / 8] * 3, [0.3874] * 3]
    )
    texts = [json.dumps(as_json(c)) for c in crystals] + [str(CifWriter(spinel, symprec=1e-3))]
    crystals.append(Crystal("spinel", spinel.lattice.matrix, spinel.cart_coords, np.array(spinel.atomic_numbers)))
    (tmp_path / "data.json").write_text(json.dumps(texts))
    (tmp_path / "clean.py").write_text(CLEAN)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    arguments = [str(repo), str(model), str(tmp_path / "data.json"), str(tmp_path / "out.npy")]
    command = [sys.executable, str(tmp_path / "clean.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning: \x1b" not in done.stderr, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), reference(made[0] / "encoder", crystals), atol=1e-5)


def test_a_loaded_pyfunc_hides_nothing_of_what_is_installed(made: tuple[Path, registry.Registered], repo: Path) -> None:
    code = model_folder(made[0]) / "code"  # where MLflow lets imports begin
    script = f"""
import sys
sys.dont_write_bytecode = True
sys.path[:0] = [{str(code)!r}, {str(repo)!r}]
import cdssl_dist, sharding.sources
assert cdssl_dist.__file__.startswith({str(code)!r}) and sharding.sources.__file__.startswith({str(code)!r})
import cdssl_dist.config, sharding.manifest, sharding.sources.aflow
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_pyfunc_takes_objects_and_names_what_it_refuses(
    made: tuple[Path, registry.Registered], aflow: list[Crystal], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ase import Atoms
    from pymatgen.core import Structure

    from cdssl_dist.mlops import pyfunc
    from cdssl_dist.model import embedding

    monkeypatch.setattr(embedding, "HALF_EDGES", 500)  # several forward passes
    folder = made[0] / "encoder"
    model = pyfunc.CdsslEncoder()
    model.load_context(
        SimpleNamespace(artifacts={"weights": folder / "encoder.safetensors", "card": folder / "encoder.json"})
    )
    some = [c for c in aflow[:80] if not build([c], 4.0)[1]]
    expected = reference(folder, some)
    assert expected.shape == (len(some), 24)
    atoms = [Atoms(c.atomic_numbers, c.positions, cell=c.lattice, pbc=True) for c in some]
    structures = [Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True) for c in some]
    for given in (atoms, structures, [as_json(c) for c in some]):
        np.testing.assert_allclose(model.predict(None, given), expected, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(model.predict(None, atoms[0]), expected[:1], atol=1e-5)  # type: ignore[arg-type]

    half = as_json(some[0])
    half["sites"][0]["species"][0]["occu"] = 0.5  # type: ignore[index]
    far = Atoms("He", cell=[7, 7, 7], pbc=True)
    bad = [half, "no cif", 5, far, "{}", Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]])]
    with pytest.raises(ValueError, match=r"6 of 7 structures .*row 0: .*row 1: .*row 2: .*row 3: .*row 5: ") as error:
        model.predict(None, [*bad[:4], atoms[0], *bad[4:]])  # type: ignore[arg-type]
    assert "no neighbour within 4.0" in str(error.value)
    rows = model.predict(None, [*bad, atoms[0]], {"refused": "nan"})  # type: ignore[arg-type]
    assert np.isnan(rows[:-1]).all() and np.isfinite(rows[-1]).all()
    assert np.isnan(model.predict(None, bad, {"refused": "nan"})).all()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="column 'structure' is missing"):
        import pandas as pd

        model.predict(None, pd.DataFrame({"cif": ["x"]}))


def test_older_formats_are_read_and_newer_ones_refused(home: Path, uri: str, repo: Path) -> None:
    old = repo / "tests" / "data" / "encoder-v1"  # as version 1 wrote it
    encoder, card = read_encoder(old)
    assert (card.version, card.elements) == (2, []) and encoder.width == 2
    done = register(old, "old", uri)
    assert show(done.uri, uri).tags["format"] == "cdssl-encoder 1"
    assert (pull(done.uri, uri) / "encoder.json").read_bytes() == (old / "encoder.json").read_bytes()

    connect(uri).set_model_version_tag("crystals", "1", "format", "cdssl-encoder 99")
    with pytest.raises(RegistryError, match="reads up to 2: update"):
        pull("models:/crystals/1", uri)
    new = write_encoder_to(home / "new", 3)
    content = json.loads((new / "encoder.json").read_text()) | {"version": 99}
    (new / "encoder.json").write_text(json.dumps(content))
    with pytest.raises(RegistryError, match="format version 99"):
        pull(str(new), uri)


def test_a_property_of_the_older_format_predicts_and_registers(uri: str, repo: Path) -> None:
    old = repo / "tests" / "data" / "property-v1"
    model = read_property(old)
    assert not model.task.targets[0].log
    assert (model.card.version, model.card.uncertainty, model.card.readout) == (4, {}, "set2set") and len(
        model.networks
    ) == 2
    aluminium = Structure(Lattice.cubic(4.05), ["Al"] * 4, [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    said = model.predict(next(graphs_of([aluminium], model.card.cutoff, {})))
    assert said.mean.shape == said.std.shape == (1, 1) and 0 < said.mean.item() < 40  # Å³/atom; its scaler: 18.6 ± 5.6
    done = register(old, "old-property", uri)
    assert show(done.uri, uri).tags["format"] == "cdssl-property 1"
    assert (pull(done.uri, uri) / "property.json").read_bytes() == (old / "property.json").read_bytes()


def test_the_fields_of_a_card_do_not_change_without_a_version() -> None:
    """Whoever changes these adds a version and an upgrade, and keeps a file of the old one."""
    assert [f.name for f in dataclasses.fields(EncoderCard)] == [
        *["cutoff", "centers", "end", "gamma", "model", "sigma", "precision", "data_digest", "validation_digest"],
        *["config_digest", "metrics", "sources", "code_version", "elements", "weights_sha256", "tie", "format"],
        *["version", "extra"],
    ]


def test_diff_delete_and_what_a_name_holds(home: Path, uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    register(write_encoder_to(home / "e", 2, skill=0.2, sigma=(0.1, 0.1)), "crystals", uri)

    def cdssl(*arguments: str) -> str:
        assert main(["--registry", uri, *arguments]) == 0
        return capsys.readouterr().out

    assert "sigma\n  - [0.3, 0.3]\n  + [0.1, 0.1]" in cdssl("diff", "models:/crystals/1", "models:/crystals/2")
    assert "do not differ" in cdssl("diff", "models:/crystals/1", "models:/crystals@champion")
    assert main(["--registry", uri, "delete", "models:/crystals/1"]) == 2
    assert "is the champion: promote another" in capsys.readouterr().err
    assert "models:/crystals/2" in cdssl("list", "crystals")
    register(write_encoder_to(home / "other", 5), "others", uri)
    assert [each.split()[0] for each in cdssl("list").splitlines()] == [
        *["models:/crystals/2", "models:/crystals/1", "models:/others/1"]
    ]
    assert "deleted models:/crystals/2" in cdssl("delete", "models:/crystals/2")
    assert "models:/crystals/2" not in cdssl("list", "crystals")

    assert "models:/again/1" in cdssl("register", str(home / "other"), "again")
    assert main(["--registry", uri, "register", str(home), "nothing"]) == 2
    assert "holds no encoder.safetensors" in capsys.readouterr().err

    out = home / "mine"
    assert cdssl("pull", "models:/crystals/1", "--out", str(out)).strip() == str(out)
    (home / "tuned").mkdir()
    (home / "tuned" / "property.json").write_text("{}")
    assert main(["--registry", uri, "pull", "models:/crystals/1", "--out", str(home / "tuned")]) == 2
    assert "holds a model of another kind" in capsys.readouterr().err
    card = (out / "MODEL_CARD.md").read_text()
    assert "| AFLOW | CC-BY-4.0 |" in card and "code, for registries you trust" in card


def test_a_card_shows_no_markup_of_others(home: Path) -> None:
    folder = write_encoder_to(home / "e", 2, sources=[{"name": "<script>|x|\n# y", "licence": "[a](b)"}])
    text = write_model_card(folder).read_text()
    assert "\\<script\\>\\|x\\| # y" in text and "\\[a\\](b)" in text
    assert "Beyond the paper" not in text


def test_a_card_tells_the_options_of_pretraining(home: Path) -> None:
    folder = write_encoder_to(home / "e", 2, extra={"pretext": {"masked": 0.15, "<b>": 1}})
    text = write_model_card(folder).read_text()
    assert "Beyond the paper: the elements of some atoms are hidden, and recovered. Input: a periodic" in text
    assert "<b>" not in text


def test_a_registry_that_comes_back(home: Path, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registration that was cut off is repeated, and nothing is there twice."""
    calls: list[int] = []
    real = registry_store.create_version

    def answers_are_lost(*arguments: object) -> int:
        calls.append(real(*arguments))  # type: ignore[arg-type]
        if len(calls) == 1:
            raise UnreachableError("the answer was lost")
        return calls[-1]

    monkeypatch.setattr(registry, "create_version", answers_are_lost)
    monkeypatch.setattr(registry.time, "sleep", lambda _: None)
    done = register(write_encoder_to(home / "e", 5, skill=0.9), "crystals", uri)
    assert len(calls) == 1 and done.version == calls[0] and done.aliases == ("champion", "latest")
    assert [v.version for v in list_versions("crystals", uri)] == [2, 1]
