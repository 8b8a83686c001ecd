"""What the pods run: modules that exist, arguments that they accept, and numbers that agree with one another."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from k8s.check.render import REPO, Overlay, Pod
from k8s.check.security import quantity


class _Accepted(BaseException):
    """Raised to stop a command once its parser has accepted the arguments."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.found = args


def entrypoints(overlay: Overlay) -> Iterator[str]:
    """Check that each can be imported and accepts its arguments, and that the configuration it reads is valid."""
    for job in overlay.of("RayJob"):
        name = job["metadata"]["name"]
        try:
            args = accepted(job["spec"]["entrypoint"])
            if "config" in args and args.config:
                yield from (f"RayJob {name}: {text}" for text in _config(overlay, job, args))
        except ValueError as why:
            yield f"RayJob {name}: {why}"


def accepted(entrypoint: str) -> argparse.Namespace:
    """The arguments of an entrypoint, as the program parses them.

    Raises:
        ValueError: if there is no such program, or it rejects them.
    """
    if re.search(r"[$`;&|<>]", entrypoint):
        raise ValueError(f"{entrypoint!r}: two shells read it, the submitter's and the head's; use no shell syntax")
    python, flag, module, *argv = shlex.split(entrypoint)
    if (python, flag) != ("python", "-m"):
        raise ValueError(f"{entrypoint!r}: must be python -m MODULE …")
    original = argparse.ArgumentParser.parse_args

    def parse(parser: Any, args: Any = None, namespace: Any = None) -> Any:
        raise _Accepted(original(parser, args, namespace))

    said = io.StringIO()
    argparse.ArgumentParser.parse_args = parse  # type: ignore[assignment, method-assign]
    try:
        with contextlib.redirect_stderr(said):
            found = importlib.import_module(module)
            if hasattr(found, "__path__"):  # a package
                found = importlib.import_module(f"{module}.__main__")
            found.main(argv)
    except _Accepted as accepted_as:
        return accepted_as.found
    except ImportError as why:
        raise ValueError(f"{module} cannot be imported: {why}") from None
    except SystemExit:
        raise ValueError(f"{module} refuses {argv}: {said.getvalue().strip().splitlines()[-1]}") from None
    finally:
        argparse.ArgumentParser.parse_args = original  # type: ignore[method-assign]
    raise ValueError(f"{module} has no parser")


def _config(overlay: Overlay, job: dict[str, Any], args: argparse.Namespace) -> Iterator[str]:
    """Check the configuration as it will be mounted, and that it fits the cluster that it gets."""
    from cdssl_dist.config import ConfigError, load

    cluster = job["spec"]["rayClusterSpec"]
    head, group = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]
    path = PurePosixPath(args.config)
    mounts = {m["mountPath"]: m["name"] for m in head["containers"][0]["volumeMounts"]}
    volume: dict[str, Any] = next((v for v in head["volumes"] if v["name"] == mounts.get(str(path.parent))), {})
    content = (overlay.find("ConfigMap", volume.get("configMap", {}).get("name", "")) or {}).get("data", {})
    if path.name not in content:
        yield f"{path}: no ConfigMap that is mounted there has such a key"
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        file.write_text(content[path.name])
        try:
            config = load(file, args.overrides)
        except ConfigError as why:
            yield str(why)
            return
    if config.run.rpartition("/")[0] not in mounts:
        yield f"run={config.run} lies on no volume"
    stated = float(job["metadata"]["annotations"]["cdssl.dev/checkpoint-seconds"])
    if config.cluster.stop_within > stated:
        yield f"cluster.stop_within = {config.cluster.stop_within:g} s, and its pods are killed after {stated:g}"
    workers, container = group["replicas"], group["template"]["spec"]["containers"][0]
    has = workers * float(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    wants = config.cluster.max_workers * config.cluster.gpus_per_worker
    if has != wants:
        yield f"cluster.workers × gpus_per_worker = {wants:g} GPUs, and its pods have {has:g}"
    slots = workers * float(group["rayStartParams"]["num-cpus"])
    if config.cluster.max_workers * config.cluster.cpus_per_worker > slots:
        each = config.cluster.cpus_per_worker
        yield f"{config.cluster.max_workers} workers × {each:g} CPUs, and Ray is told of {slots:g}"


def agreement(overlay: Overlay) -> Iterator[str]:
    """Check numbers and paths that must agree in several places."""
    for pod in overlay.pods():
        yield from _shared_memory(pod)
    jobs = {j["metadata"]["name"]: j for j in overlay.of("RayJob")}
    pins = (REPO / "constraints.txt").read_text()
    for name, job in jobs.items():
        version = job["spec"]["rayClusterSpec"]["rayVersion"]
        if f"\nray=={version}\n" not in pins:
            yield f"RayJob {name}: rayVersion {version} is not what constraints.txt pins"
        for group in [
            job["spec"]["rayClusterSpec"]["headGroupSpec"],
            *job["spec"]["rayClusterSpec"].get("workerGroupSpecs", []),
        ]:
            container = group["template"]["spec"]["containers"][0]
            told = float(group["rayStartParams"].get("num-cpus", 0))
            if told > quantity(container["resources"]["requests"]["cpu"]):
                yield f"RayJob {name}: Ray is told of {told:g} CPUs, and its pod asks for fewer"
    shard, train, tune = (accepted(jobs[n]["spec"]["entrypoint"]) for n in ("shard", "pretrain", "finetune"))
    overrides = dict(o.partition("=")[::2] for o in train.overrides)
    if len(places := {shard.out, overrides["data.path"], tune.data}) > 1:
        yield f"shards are written and read at different places: {sorted(places)}"
    stated = float(jobs["pretrain"]["metadata"]["annotations"]["cdssl.dev/checkpoint-seconds"])
    for pod in overlay.pods():
        if pod.name in ("pretrain head", "pretrain worker"):
            if pod.spec.get("terminationGracePeriodSeconds") != stated:
                yield f"{pod.name}: its grace period is not the {stated:g} s that a checkpoint may take"
            hook = (
                pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
            )
            if f"cd {overrides['run']} " not in hook[-1]:
                yield f"{pod.name}: its preStop hook does not save the run in {overrides['run']}"


def _shared_memory(pod: Pod) -> Iterator[str]:
    """Check volumes in memory: /dev/shm, which holds Ray's object store, counts towards the memory of the pod."""
    for volume in pod.spec.get("volumes", []):
        size = volume.get("emptyDir", {}).get("sizeLimit")
        if "emptyDir" in volume and not size:
            yield f"{pod.name}: {volume['name']} has no limit of its size"
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            limit = quantity(pod.spec["containers"][0]["resources"]["limits"]["memory"])
            if quantity(size or 0) >= limit:
                yield f"{pod.name}: {volume['name']} may take all of its memory"
