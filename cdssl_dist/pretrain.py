"""Pretrain an encoder, from configuration to registration.

python -m cdssl_dist.pretrain --config configs/pretrain/small.yaml data.path=FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from cdssl_dist.config import Config, load
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.look import report
from cdssl_dist.look.encoder_map import map_of_validation
from cdssl_dist.mlops import registry, tracking
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.models import ENCODER
from cdssl_dist.mlops.registry_store import UnreachableError
from cdssl_dist.train import checkpoint, cluster, live
from cdssl_dist.train.replay import parse_place, replay, table
from cdssl_dist.train.runlog import locked_run_folder, read_status
from sharding.commands import FAILED, Parser, UseError, command
from sharding.manifest import Manifest
from sharding.sources.streams import is_remote, local_path


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train and register the encoder, or replay a step."""
    parser = Parser(
        "cdssl pretrain", "Pretrain a crystal encoder on a data set of shards, on the workers of a Ray cluster."
    )
    parser.add_argument("--config", help="YAML file; if omitted, the packaged configs/pretrain/small.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the file's"
    )
    parser.add_argument(
        "--allow-changed",
        metavar="KEY[,KEY]",
        help="settings that may differ from those the run began with, e.g. optim.lr; data for the data set",
    )
    parser.add_argument(
        "--replay-step",
        metavar="RUN:STEP",
        help="train nothing: recompute a step of a run, and report its packs and crystals",
    )
    args = parser.parse_args(argv)
    if args.replay_step:
        if args.config or args.overrides or args.allow_changed:
            raise UseError("--replay-step takes all settings from the run: leave out --config and other settings")
        print(table(replay(*parse_place(args.replay_step))))
        return 0
    config = load(args.config, args.overrides)
    if args.allow_changed:
        allowed = {"allow_changed": tuple(args.allow_changed.split(","))}
        config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=allowed)})
    return pretrain(config)


def pretrain(config: Config) -> int:
    """Start or resume a pretraining run; return the exit code."""
    config = with_absolute_paths(config)
    data = DataSet(config.data_path)  # opened here first, to fail before a cluster is started
    data.table("train"), data.table("val")
    folder = Path(config.run)
    check_name(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked_run_folder(folder):
        check_and_write_config(config, data)
        return train_and_register(config, data, folder)


def train_and_register(config: Config, data: DataSet, folder: Path) -> int:
    """Train on the workers of a cluster and register the encoder; return the exit code."""
    tags = {"data_digest": data.manifest.digest}
    with (
        tracking.follow_pretraining(folder, config, params=about(data.manifest), tags=tags) as tracked,
        live.watching(folder),
    ):
        complete = False
        try:
            complete = cluster.launch(config)
        finally:  # failed runs get a report, too
            leave_report(config, complete)
    if not complete:
        how = read_status(folder).get("reason") or "stopped with its state saved"
        print(f"{how}; run the same command again to continue ({folder})", file=sys.stderr)
        return cluster.PREEMPTED

    print(f"encoder: {folder / 'encoder.safetensors'}")
    if config.registry.name:
        uri = tracking_uri(config.tracking.uri, folder.parent)
        try:
            print(registry.register(folder, config.registry.name, uri, tracked.run_id))
        except registry.RegistryError as why:
            text = f"error: not registered: {why}\nthe encoder is complete; run the same command again to register it"
            print(text, file=sys.stderr)
            return FAILED
    return 0


def check_name(config: Config, folder: Path) -> None:
    """Check, before training, that the encoder can be registered under the configured name.

    A registry that does not answer causes only a warning, since it may answer once there is something to register.

    Raises:
        RegistryError: if the name is invalid, or holds another kind of model.
    """
    if config.registry.name:
        try:
            registry.check_free(config.registry.name, ENCODER, tracking_uri(config.tracking.uri, folder.parent))
        except UnreachableError as why:
            print(f"warning: {why}", file=sys.stderr)


def leave_report(config: Config, complete: bool) -> None:
    """Write the report of a run that has ended or stopped, with a map of validation crystals if it is complete."""
    folder = Path(config.run)
    if (folder / "metrics.jsonl").exists():
        draw = (lambda: map_of_validation(folder, config.data_path)) if complete else (lambda: None)
        report.write_safely(folder, lambda drawn: report.of_run(folder, drawn=drawn), draw)


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with absolute paths, since each worker has its own working directory."""
    path = config.data_path if is_remote(config.data_path) else str(local_path(config.data_path).resolve())
    run = str(Path(config.run).resolve())
    return config.model_copy(update={"run": run, "data": config.data.model_copy(update={"path": path})})


def check_and_write_config(config: Config, data: DataSet) -> None:
    """Write the configuration into the run folder, unless it holds another run.

    Raises:
        CheckpointError: if it holds another run; the ranks check this, too, but only once a cluster is running.
    """
    folder = Path(config.run)
    for last in checkpoint.committed(folder / "checkpoints")[-1:]:
        found = checkpoint.Checkpoint(last, checkpoint.read_progress(last))
        checkpoint.check_fits(found, config, data.manifest.digest, data.counts)
    if config.engine.device == "auto" and not config.cluster.gpus_per_worker and torch.cuda.is_available():
        print("this machine has a GPU, but no worker is given one: cluster.gpus_per_worker=1 uses it", file=sys.stderr)
    if config.schedule.warmup >= config.schedule.steps:
        steps = f"schedule.warmup={config.schedule.warmup} of schedule.steps={config.schedule.steps}"
        print(f"the learning rate never reaches its peak: {steps}; lower the first", file=sys.stderr)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def about(manifest: Manifest) -> dict[str, str]:
    """Describe the data for the tracking record of a run."""
    counts = {f"data.{split}.{name}": str(n) for split, c in manifest.splits.items() for name, n in c.items()}
    return counts | {"data.digest": manifest.digest, "data.cutoff": str(manifest.cutoff)}


if __name__ == "__main__":
    sys.exit(main())
