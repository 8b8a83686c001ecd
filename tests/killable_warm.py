"""Imported by the process that ``killable`` forks from: loads slow modules, opens no files, starts no threads."""

from __future__ import annotations

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  imported with the first engine: torch's compiler, 5 s
import numpy as np
import webdataset.writer  # noqa: F401  imports torch
from test_sharding_runs import SETTINGS

from cdssl_dist.train import loop  # noqa: F401  imports DeepSpeed
from sharding import __main__  # noqa: F401
from sharding.convert import converted
from sharding.crystal import Crystal
from sharding.decide import decided
from sharding.packing import pack
from sharding.settings import ShardSettings
from sharding.sources import from_crystals, numbered, optimade  # noqa: F401

cubic = Crystal("a", 3.0 * np.eye(3), np.zeros((1, 3)), np.array([26], np.uint8))
for settings in (SETTINGS, ShardSettings(duplicates="near")):
    found = converted(numbered([cubic]), from_crystals([]), 0, settings)
    decided(found, found, settings)
pack(np.array([1]), np.array([1]), settings.budget)
