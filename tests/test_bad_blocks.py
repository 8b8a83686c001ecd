"""A damaged block in a run on two ranks: a one-line error, or skipped and reported, depending on the configuration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import launch

from cdssl_dist.config import Config, parse
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.export import read_card
from cdssl_dist.pretrain import with_absolute_paths
from cdssl_dist.train.runlog import read_lines

STEPS = 5
HARMED = 3  # the step that meets the bad training block, on the second of two ranks


def content(run: Path, path: Path, bad_blocks: str) -> dict[str, Any]:
    return {
        "run": str(run),
        "data": {"path": str(path), "packs_per_step": 2, "bad_blocks": bad_blocks},
        "model": {"width": 8, "hidden": 16, "blocks": 1},
        "graph": {"centers": 20},
        "schedule": {"steps": STEPS, "warmup": 1},
        "tracking": {"every": 1, "validate_every": STEPS, "baseline_packs": 2},
        "engine": {"device": "cpu"},
    }


def run_trainings(*contents: dict[str, Any]) -> list[bool]:
    """On each rank, one after the other."""
    import torch.distributed as dist

    from cdssl_dist.train.loop import train

    complete = [train(Config.model_validate(content), echo=False) for content in contents]
    dist.destroy_process_group()
    return complete


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]


def harm(folder: Path, block: int) -> str:
    """Flip a bit of a block; returns the name of its shard."""
    data = DataSet(folder)
    name = str(data.manifest.shards[int(data.blocks["shard"][block])]["name"])
    shard = bytearray((folder / name).read_bytes())
    shard[int(data.blocks["offset"][block]) + 1_000] ^= 1
    (folder / name).write_bytes(shard)
    return name


@pytest.fixture(scope="module")
def harmed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, str]:
    """A data set, its bad training block, and the shard that this is in."""
    folder = tmp_path_factory.mktemp("harmed") / "data"
    shutil.copytree(data_folder, folder)
    plan = EpochPlan(DataSet(folder).table("train"), 0, 1, 2)
    block = int(plan.table.block[plan.pack(HARMED, 1)[0].index])
    return folder, block, harm(folder, block)


def test_a_bad_block_ends_the_run_with_a_line_that_names_it(harmed: tuple[Path, int, str], tmp_path: Path) -> None:
    folder, block, shard = harmed
    with pytest.raises(AssertionError) as error:
        launch(2, run_trainings, content(tmp_path, folder, "error"))
    last = str(error.value).strip().splitlines()[-1]
    assert last.startswith(f"cdssl_dist.data.dataset.BadBlockError: {folder}/{shard}: block {block} at byte ")
    assert len(losses(tmp_path)) == HARMED


def test_a_run_that_skips_bad_blocks(harmed: tuple[Path, int, str], data_folder: Path, tmp_path: Path) -> None:
    """It is the same run on one rank and on two, and up to the bad block that of the sound data."""
    folder, block, _ = harmed
    val = int(DataSet(folder).table("val").block[-1])
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    harm(both, val)
    harmed_and_sound = (content(tmp_path / "two", both, "skip"), content(tmp_path / "sound", data_folder, "skip"))
    assert launch(2, run_trainings, *harmed_and_sound) == [[True, True]] * 2
    assert launch(1, run_trainings, content(tmp_path / "one", both, "skip")) == [[True]]
    two, one, sound = (losses(tmp_path / name) for name in ("two", "one", "sound"))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert len(two) == STEPS
    assert two[:HARMED] == sound[:HARMED]
    assert two[HARMED:] != sound[HARMED:]
    for name in ("two", "one"):
        events = [line for line in read_lines(tmp_path / name / "events.jsonl") if line["event"] == "bad blocks"]
        assert [(e["step"], e["split"], e["blocks"]) for e in events] == [
            (HARMED, "train", [block]),
            (STEPS, "val", [val]),
        ]
    assert not any(line["event"] == "bad blocks" for line in read_lines(tmp_path / "sound" / "events.jsonl"))
    cards = {name: read_card(tmp_path / name) for name in ("two", "one", "sound")}
    assert cards["two"].validation_digest == cards["one"].validation_digest
    assert cards["two"].validation_digest != cards["sound"].validation_digest  # not to be compared
    assert cards["two"].config_digest == cards["sound"].config_digest


def test_what_is_read_how_is_no_other_run(data_folder: Path, tmp_path: Path) -> None:
    """A run may go on with another cache, and with another policy once a block has gone bad."""
    plain, other = (parse(content(tmp_path, data_folder, policy)) for policy in ("error", "skip"))
    assert plain.digest() == other.digest()
    for name, value in (("cache_gb", 1.0), ("prefetch", 9)):
        changed = plain.model_copy(update={"data": plain.data.model_copy(update={name: value})})
        assert changed.digest() == plain.digest()
    changed = plain.model_copy(update={"data": plain.data.model_copy(update={"blocks_per_pack": 2})})
    assert changed.digest() != plain.digest()


@pytest.mark.parametrize("path", ["https://host/data", "s3://bucket/data/mp"])
def test_a_url_stays_what_it_is(path: str, tmp_path: Path) -> None:
    assert with_absolute_paths(parse({"run": str(tmp_path / "run"), "data": {"path": path}})).data_path == path


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have folders of their own."""
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(parse({"run": "runs/a", "data": {"path": "data"}}))
    assert (config.data_path, config.run) == (str(tmp_path / "data"), str(tmp_path / "runs" / "a"))
