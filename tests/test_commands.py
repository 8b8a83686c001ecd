"""The commands as a user sees them: help, one-line errors, and a real run on its own Ray cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdssl_dist.cli import COMMANDS, main
from cdssl_dist.mlops.mlflow_server import connect
from cdssl_dist.model.export import read_card
from cdssl_dist.train.runlog import read_lines

PYTHON = sys.executable


def cdssl(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as from a shell."""
    env = {k: v for k, v in os.environ.items() if k not in ("CDSSL_DATA", "MLFLOW_TRACKING_URI")} | more
    command = [PYTHON, "-m", "cdssl_dist.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: cdssl {name}")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "all"])
@pytest.mark.parametrize(
    "begun", ["shard aflow:9 --out d --limit", "embed --data d --out e --threads", "map e --sample"]
)
def test_what_counts_is_one_at_least(begun: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*begun.split(), value])
    assert end.value.code == 2
    assert f"must be a whole number from 1 up, not '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["runs/demo", "file://{}/runs/demo/a.cif", "runs/demo/../demo/a.cif"])
def test_the_demo_does_not_remove_its_data(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/a.cif").write_text("data_a\n")
    assert main(["demo", "--data", place.format(tmp_path)]) == 2
    assert "which the demo deletes at the start" in capsys.readouterr().err and Path("runs/demo/a.cif").exists()


def test_the_list_of_commands() -> None:
    answer = cdssl("--help")
    assert answer.returncode == 0
    assert all(name in answer.stdout for name in COMMANDS)
    assert cdssl("pretrian").returncode == 2


def test_what_a_list_of_models_needs_not_is_not_imported() -> None:
    """Start-up is what people wait for most often."""
    code = "import sys, cdssl_dist.mlops.registry_cli; print(*sys.modules)"
    loaded = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"ray", "deepspeed", "mlflow", "torch_geometric", "sklearn", "pymatgen"} & set(loaded)


STUBBORN = """
import sys, time
from sharding.commands import command
from sharding.ray_start import start_ray
@command
def main():
    start_ray("local", num_cpus=1) if sys.argv[1:] else None
    try:
        print("up", flush=True)
        time.sleep(60)
    finally:
        time.sleep(4)
        print("tables are written", flush=True)
sys.exit(main())
"""


@pytest.mark.parametrize("more", [[], ["on Ray"]])
def test_sigterm_ends_a_command_and_not_what_it_writes_then(more: list[str]) -> None:
    """Ray's own handler would end it after three seconds."""
    process = subprocess.Popen(
        [PYTHON, "-c", STUBBORN, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "tables are written\n", "interrupted")


@pytest.mark.parametrize("to_all", [True, False], ids=["Ctrl-C", "SIGTERM"])
def test_a_command_waits_for_the_one_that_it_runs(to_all: bool, tmp_path: Path) -> None:
    """Which may save what it has done: a terminal's signal reaches both, that of a scheduler is passed on."""
    child = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): time.sleep(1.0); pathlib.Path('saved').touch(); sys.exit(75)\n"
        "signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from sharding.commands import command, run_child\n"
        f"@command\ndef main(): return run_child([sys.executable, '-c', {child!r}])\n"
        "sys.exit(main())"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        assert process.wait(30) == 75
    assert (tmp_path / "saved").exists()


def wrong(answer: subprocess.CompletedProcess[str], *words: str) -> None:
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    line = answer.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_missing_data_path_is_one_clear_line() -> None:
    answer = subprocess.run(
        [PYTHON, "-m", "cdssl_dist.pretrain"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "CDSSL_DATA"},
    )
    wrong(answer, "data.path", "CDSSL_DATA")
    assert len(answer.stderr.strip().splitlines()) == 1


def test_errors_name_what_is_wrong(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CDSSL_DATA", raising=False)

    def refused(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    wrong(refused("pretrain", "optim.lrr=1"), "optim.lrr", "did you mean 'lr'")
    wrong(refused("pretrain", "optim.lr=fast"), "optim.lr")
    wrong(refused("pretrain", f"data.path={tmp_path}"), "manifest.json is missing")
    wrong(refused("pretrain", "--config", str(tmp_path / "none.yaml")), "none.yaml", "there is no such file")
    wrong(refused("pretrain", "cluster.workers=9", f"data.path={data_folder}"), "packs_per_step")
    wrong(refused("shard", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "out")), "none.parquet")
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 not really")
    wrong(refused("shard", str(damaged), "--out", str(tmp_path / "out")), "damaged.parquet")
    lacking = tmp_path / "lacking"
    shutil.copytree(data_folder, lacking)
    next(lacking.glob("train-*.tar")).unlink()
    answer = refused("finetune", "--encoder", str(tmp_path), "--data", str(lacking), "--target", "computed:density")
    wrong(answer, "encoder.json")
    wrong(refused("pretrain", f"data.path={lacking}", f"run={tmp_path}/run"), "the shard is missing")


def alone() -> list[str]:
    """The start of a command line that runs in a network namespace with nothing but loopback in it."""
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    probe = [*unshare, "sh", "-c", "ip link set lo up"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")
    return [*unshare, "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]


@pytest.mark.netns
@pytest.mark.server
def test_a_run_on_ray_is_stopped_resumed_registered_and_finetuned(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "CDSSL_CACHE": str(tmp_path / "cache")}
    env = os.environ | registry | {"CDSSL_DATA": str(data_folder), "RAY_TMPDIR": "/tmp"}
    run = tmp_path / "run"
    settings = f"run={run} cluster.workers=2 data.packs_per_step=2 model.width=8 model.hidden=16 graph.centers=20"
    settings += " schedule.steps=300 tracking.every=5 tracking.validate_every=300 checkpoint.every=300"
    command = [*alone(), PYTHON, "-m", "cdssl_dist.pretrain", *settings.split()]

    first = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while len(read_lines(run / "metrics.jsonl")) < 3 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=240)
    assert first.returncode == 75, said
    assert "stopped with its state saved; run the same command again" in said

    config = (run / "config.yaml").read_text()
    other = main(["pretrain", *settings.split(), f"data.path={data_folder}", "optim.lr=0.5"])  # needs no cluster
    assert other == 2 and "optim.lr: 0.002 → 0.5" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == config

    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert "resumed from step" in second.stderr
    steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "train/loss" in line]
    assert steps == list(range(5, 301, 5))  # each once, over both lives
    assert read_card(run).metrics["val/skill_edge"] < 1

    spool = json.loads((run / "mlflow-run.json").read_text())
    pages = connect(registry["MLFLOW_TRACKING_URI"]).list_artifacts(spool["run_id"])
    assert "report.html" in {f.path for f in pages} and "<canvas" in (run / "report.html").read_text()

    for name, value in registry.items():
        monkeypatch.setenv(name, value)
    tune = ["finetune", "--data", str(data_folder), "--target", "computed:density", "--epochs", "2", "--members", "2"]
    assert main([*tune, "--out", str(tmp_path / "tuned")]) == 0
    made = {"history.jsonl", "model", "parity.png", "predictions.parquet", "report.html", "results.json"}
    assert {p.name for p in (tmp_path / "tuned").iterdir()} == made
    on_ray = [*alone(), PYTHON, "-m", "cdssl_dist.cli", *tune, "--ray", "--out", str(tmp_path / "ray")]
    answer = subprocess.run(on_ray, env=env, capture_output=True, text=True, timeout=240)
    assert answer.returncode == 0, answer.stderr
    weights = [(tmp_path / where / "model" / "property.safetensors").read_bytes() for where in ("tuned", "ray")]
    assert weights[0] == weights[1]  # the same function, wherever it is called
