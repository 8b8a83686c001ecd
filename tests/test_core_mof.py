"""Messy real-world data: the CIFs of CoRE MOF, with cells of hundreds to thousands of atoms.

Everything is read, or refused for a reason that pymatgen confirms.
"""

from __future__ import annotations

import importlib.util
import random
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Structure
from pymatgen.io.cif import CifParser
from test_format import refusals_of

from sharding.executor import Executor
from sharding.manifest import read_manifest
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import open_source

if importlib.util.find_spec("CoRE_MOF") is None:
    pytest.skip("needs the package core-mof: pip install core-mof", allow_module_level=True)

ARCHIVES = ("2014", "2019-ASR", "2019-FSR")
SETTINGS = ShardSettings(fingerprints=False, duplicates="keep")


def archive(name: str) -> Path:
    found = importlib.util.find_spec("CoRE_MOF")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "data" / f"{name}.tar.xz"


def cifs(name: str) -> Iterator[tuple[str, str]]:
    """Stem and text of every file in an archive."""
    with tarfile.open(archive(name)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".cif") else None
            if file is not None:
                yield PurePosixPath(member.name).stem, file.read().decode()


def pymatgen(cif: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parser = CifParser.from_str(cif, occupancy_tolerance=100, site_tolerance=1e-4)
        return parser.parse_structures(primitive=False, check_occu=False)[0]


def confirmed(code: str, cif: str) -> bool:
    """Whether pymatgen sees what a refusal says."""
    structure = pymatgen(cif)
    if code == "too_close":
        distances = structure.distance_matrix
        np.fill_diagonal(distances, np.inf)
        return bool(distances.min() < 0.5)
    centers = structure.get_neighbor_list(SETTINGS.cutoff)[0]
    if code == "isolated_atom":
        return len(np.unique(centers)) < len(structure)
    if code == "oversized":
        return len(centers) > SETTINGS.budget.edges or len(structure) > SETTINGS.budget.atoms
    if code == "partial_occupancy":
        return not structure.is_ordered
    return False


def accounted(folder: Path) -> Counter[tuple[str, str]]:
    """Source and key of all that is in a data set or in its quarantine."""
    rows = pq.read_table(folder / "graphs.parquet", columns=["source", "key"]).to_pylist()
    return Counter((row["source"], row["key"]) for row in [*rows, *refusals_of(folder)])


def test_a_sample_is_read_or_refused_for_a_true_reason(tmp_path: Path) -> None:
    """200 of them, spread over two archives, as files in a folder."""
    texts = dict([*list(cifs("2014"))[::48], *list(cifs("2019-FSR"))[::70]])
    assert len(texts) >= 200
    (tmp_path / "cifs").mkdir()
    for name, text in texts.items():
        (tmp_path / "cifs" / f"{name}.cif").write_text(text)
    shard([open_source(str(tmp_path / "cifs"))], tmp_path / "d", SETTINGS)
    assert accounted(tmp_path / "d") == Counter(("cifs", name) for name in texts)
    refused = refusals_of(tmp_path / "d")
    assert 1 <= len(refused) < 20
    for refusal in refused:
        assert confirmed(refusal["code"], texts[refusal["key"]]), refusal
    rows = pq.read_table(tmp_path / "d" / "graphs.parquet").to_pylist()
    for row in [row for row in rows if row["n_atoms"] < 200][::12]:
        structure = pymatgen(texts[row["key"]])
        assert (row["n_atoms"], row["volume"]) == (len(structure), pytest.approx(structure.volume, rel=1e-5))
        assert row["n_edges"] == len(structure.get_neighbor_list(SETTINGS.cutoff)[0])


@pytest.mark.slow
def test_all_of_it_is_read_or_refused_for_a_true_reason(tmp_path: Path) -> None:
    names = [(f"{name}.tar.xz", stem) for name in ARCHIVES for stem, _ in cifs(name)]
    assert len(names) > 23_000
    shard([open_source(str(archive(name))) for name in ARCHIVES], tmp_path / "d", SETTINGS, Executor(2))
    assert accounted(tmp_path / "d") == Counter(names)
    refused = refusals_of(tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    assert manifest.quarantined.keys() <= {"too_close", "oversized", "isolated_atom", "duplicate_key"}
    wrong = sum(manifest.quarantined[code] for code in ("too_close", "isolated_atom"))
    assert manifest.quarantined["oversized"] < 0.01 * (len(names) - wrong)  # of what can be read, so much fits a block
    chance = random.Random(0)
    for code in manifest.quarantined.keys() - {"duplicate_key"}:
        mine = [refusal for refusal in refused if refusal["code"] == code]
        wanted = {(r["source"], r["key"]) for r in chance.sample(mine, min(len(mine), 25))}
        for name in ARCHIVES:
            for stem, text in cifs(name):
                if (f"{name}.tar.xz", stem) in wanted:
                    assert confirmed(code, text), (name, stem, code)
