"""Training as a whole, on a bare launcher: ranks, resume, the guard's gate at every ZeRO stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import launch
from safetensors.torch import load_file

from cdssl_dist.config import Config, parse
from cdssl_dist.runlog import Ledger, Rollback, read_lines

STEPS = 8
SPOILED = 4  # the step that is made bad


def config(run: Path, path: Path, **changes: Any) -> dict[str, Any]:
    content: dict[str, Any] = {
        "run": str(run),
        "data": {"path": str(path), "packs_per_step": 2},
        "model": {"width": 8, "hidden": 16, "blocks": 2},
        "graph": {"centers": 20},
        "optim": {"lr": 0.01},
        "schedule": {"steps": STEPS, "warmup": 2},
        "checkpoint": {"every": 4},
        "tracking": {"every": 1, "validate_every": 4, "baseline_packs": 4},
        "engine": {"device": "cpu"},
    }
    for section, values in changes.items():
        content[section] = {**content.get(section, {}), **values}
    parse(content)
    return content


def run_training(content: dict[str, Any], stop_after: int | None = None) -> bool:
    """On each rank: train; with ``stop_after``, be asked to stop at that step."""
    import torch.distributed as dist

    from cdssl_dist.train_loop import train

    asked = iter(range(10**9))
    complete = train(
        Config.model_validate(content),
        stop_requested=lambda: stop_after is not None and next(asked) + 1 >= stop_after,
        echo=False,
    )
    dist.destroy_process_group()
    return complete


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "encoder.safetensors")


def metrics(run: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_lines(run / "metrics.jsonl") if name in line]


@pytest.fixture(scope="module")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "two-ranks"
    assert launch(2, run_training, config(run, data_folder)) == [True, True]
    return run


def test_training_learns_and_leaves_what_the_design_names(undisturbed: Path) -> None:
    losses = [v for _, v in metrics(undisturbed, "train/loss")]
    assert losses[-1] < losses[0]
    lines = read_lines(undisturbed / "metrics.jsonl")
    names = {name for line in lines for name in line}
    for split in ("train", "val"):
        assert {f"{split}/{m}" for m in ("loss", "mae", "r2", "skill", "skill_edge")} <= names
    assert {"guard/norm", "guard/z", "guard/verdict", "lr"} <= names
    assert {"perf/graphs_s", "perf/edges_s", "perf/mfu", "perf/data_wait"} <= names
    assert json.loads((undisturbed / "status.json").read_text())["state"] == "done"


def test_one_rank_with_accumulation_equals_two_ranks(undisturbed: Path, data_folder: Path, tmp_path: Path) -> None:
    launch(1, run_training, config(tmp_path / "one", data_folder))
    one, two = metrics(tmp_path / "one", "train/loss"), metrics(undisturbed, "train/loss")
    np.testing.assert_allclose([v for _, v in one], [v for _, v in two], rtol=1e-5)
    a, b = weights(tmp_path / "one"), weights(undisturbed)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    undisturbed: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    assert launch(2, run_training, config(run, data_folder), 3) == [False, False]  # between two checkpoints
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    assert not (run / "encoder.safetensors").exists()
    assert launch(2, run_training, config(run, data_folder)) == [True, True]
    for name in ("train/loss", "val/loss", "guard/norm", "lr"):
        assert metrics(run, name) == metrics(undisturbed, name)
    a, b = weights(run), weights(undisturbed)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_run_equals_an_eager_one(precision: str, data_folder: Path, tmp_path: Path) -> None:
    for name in ("eager", "compiled"):
        engine = {"precision": precision, "compile": name == "compiled"}
        launch(1, run_training, config(tmp_path / name, data_folder, engine=engine), timeout=1200)
    eager, compiled = (metrics(tmp_path / name, "train/loss") for name in ("eager", "compiled"))
    tolerance = 1e-4 if precision == "fp32" else 1e-2
    np.testing.assert_allclose([v for _, v in compiled], [v for _, v in eager], rtol=tolerance)
    assert all(mfu > 0 for _, mfu in metrics(tmp_path / "compiled", "perf/mfu"))


def test_another_configuration_or_data_set_is_refused(undisturbed: Path, data_folder: Path) -> None:
    changed = config(undisturbed, data_folder, optim={"lr": 0.02})
    with pytest.raises(AssertionError, match=r"optim\.lr: 0\.01 → 0\.02"):
        launch(2, run_training, changed)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_goes_on_at_another_number_of_ranks_and_another_stage(
    stage: int, undisturbed: Path, data_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "moved"
    launch(2, run_training, config(run, data_folder, engine={"stage": stage}), 3)
    launch(1, run_training, config(run, data_folder, engine={"stage": stage}), 2)
    assert launch(2, run_training, config(run, data_folder, engine={"stage": (stage + 1) % 4})) == [True, True]
    np.testing.assert_allclose(
        [v for _, v in metrics(run, "train/loss")], [v for _, v in metrics(undisturbed, "train/loss")], rtol=1e-5
    )
    a, b = weights(run), weights(undisturbed)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def spoil(contents: dict[str, dict[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    """On each rank: train with one bad step, in each of several ways; returns what the guard decided, step by step.

    ``decree`` is the run to compare with: nothing is wrong with the step, it is left out.
    """
    import torch.distributed as dist

    from cdssl_dist.engine import init_distributed
    from cdssl_dist.guard import Judgement
    from cdssl_dist.pretext import Denoising
    from cdssl_dist.train_loop import Trainer

    class Bad(Denoising):
        factor = 1.0

        def loss(self, *args: Any) -> Any:
            squared, figures = super().loss(*args)
            return squared * self.factor, figures

    class Spoiled(Trainer):
        how = "decree"
        seen: list[tuple[int, str]]

        def _step(self, step: Any) -> Any:
            here = step.number == SPOILED and dist.get_rank() == 1
            Bad.factor = {"nan": math.nan, "spike": 1000.0, "decree": 1.0}[self.how] if here else 1.0
            return super()._step(step)

        def _decide(self, norm: float) -> float | None:
            if self.how == "decree" and self.cursor == SPOILED:
                self.guard.last = Judgement("skip", 0.0)
                return None
            answer = super()._decide(norm)
            self.seen.append((self.cursor, self.guard.last.verdict))
            return answer

    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"))
    verdicts = {}
    for how, content in contents.items():
        trainer = Spoiled(Config.model_validate(content), torch.device("cpu"), lambda: False, echo=False)
        trainer.how, trainer.seen = how, []
        trainer.task = Bad(trainer.task.expansion, trainer.task.sigma, trainer.task.seed)
        trainer.resume()
        trainer.run()
        trainer.finish()
        verdicts[how] = trainer.seen
    dist.destroy_process_group()
    return verdicts


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_on_one_rank_leaves_no_trace(stage: int, precision: str, data_folder: Path, tmp_path: Path) -> None:
    contents = {
        how: config(
            tmp_path / how,
            data_folder,
            data={"packs_per_step": 4},  # two micro-steps on each rank
            engine={"stage": stage, "precision": precision},
            guard={"warmup": 2, "z_spike": 4.0, "min_deviation": 0.3},
            tracking={"validate_every": STEPS},
        )
        for how in ("decree", "nan", "spike")
    }
    one, two = launch(2, spoil, contents)
    assert one == two
    wanted = weights(tmp_path / "decree")
    for how in ("nan", "spike"):
        assert dict(one[how]) == {step: "skip" if step == SPOILED else "apply" for step in range(STEPS)}
        found = weights(tmp_path / how)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), how


def test_the_ledger_sends_checkpoints_past_what_was_rolled_back() -> None:
    ledger = Ledger().with_rollback(Rollback(to=100, resumed_at=160, reason="")).with_rollback(Rollback(180, 250, ""))
    assert ledger.resume_point(50) == 50
    assert ledger.resume_point(100) == 160
    assert ledger.resume_point(120) is None
    assert ledger.resume_point(160) == 160
    assert ledger.resume_point(180) == 250
    assert ledger.resume_point(200) is None
    assert ledger.resume_point(250) == 250
