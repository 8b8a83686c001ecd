"""Shared fixtures: the repository's root, a small data set, and skipping tests that cannot run here."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests share their cores

from pathlib import Path

import hypothesis
import pytest
import torch

from cdssl_dist.mlops.mlflow_server import connect
from sharding.block import Budget
from sharding.crystal import Crystal
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import open_source

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repeatable")

REPO = Path(__file__).resolve().parent.parent

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported anywhere


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need the shared data or a GPU if it is missing."""
    absent = {}
    if not (REPO.parent / "shared" / "data").is_dir():
        absent["shared"] = "needs ../shared/data"
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            absent["gpu"] = "needs a GPU"
    for item in items:
        for marker, reason in absent.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared(repo: Path) -> Path:
    """The shared data; tests that use it are marked ``shared``."""
    return repo.parent / "shared"


@pytest.fixture(scope="session")
def aflow() -> list[Crystal]:
    """The 288 real compounds of ``aflow:`` and 12 compounds derived from them."""
    return [record.payload for record in open_source("aflow:300").records()]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set: 120 crystals in some 20 blocks and 8 shards, two too large for a block. Do not modify it."""
    folder = tmp_path_factory.mktemp("data") / "aflow"
    settings = ShardSettings(budget=Budget(edges=2_048, atoms=256, graphs=16), blocks_per_shard=3, val=0.2)
    shard([open_source("aflow:120")], folder, settings)
    return folder


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow SQLite file with empty tables, which takes seconds to create. Copy it; do not modify it."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file
