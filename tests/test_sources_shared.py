"""Real files, against pandas and pymatgen."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from pymatgen.core import Structure
from test_sources_cif import pymatgen
from test_sources_support import assert_same, read

pytestmark = pytest.mark.shared


def test_csv(shared: Path) -> None:
    path = shared / "data/raw/carbon_24-val.csv"
    expected = pd.read_csv(path)
    crystals, refusals = read(path, labels={"e": "energy_per_atom"})
    assert not refusals
    assert [c.key for c in crystals] == expected.material_id.tolist()
    assert [c.labels["e"] for c in crystals] == pytest.approx(expected.energy_per_atom.tolist())
    for i in range(0, len(crystals), 100):
        assert_same(crystals[i], pymatgen(expected.cif[i]))


@pytest.mark.parametrize(
    ("name", "key"),
    [("alexandria-binary-pbe-phonon-2025.1", "mp_id"), ("wbm-random-pbe52-equilibrium-2025.1", "material_id")],
)
def test_json(shared: Path, name: str, key: str) -> None:
    path = shared / f"data/raw/{name}.json.gz"
    expected = json.loads(gzip.decompress(path.read_bytes()))
    crystals, refusals = read(path, labels={"c": "heat_capacity", "m": "missing"})
    assert not refusals
    assert [c.key for c in crystals] == [record[key] for record in expected]
    for crystal, record in zip(crystals[::25], expected[::25], strict=True):
        assert_same(crystal, Structure.from_dict(record["structure"]))
        assert crystal.labels == ({"c": record["heat_capacity"]} if "heat_capacity" in record else {})


def test_parquet(shared: Path) -> None:
    crystals, refusals = read(
        shared / "data/jarvis_dft3d_2021.parquet", limit=3000, labels={"ef": "_jarvis_formation_energy_peratom"}
    )
    assert not refusals
    assert len(crystals) == len({c.key for c in crystals}) == 3000
    assert 0 < sum(bool(c.labels) for c in crystals) < 3000
