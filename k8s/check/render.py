"""Render an overlay with kustomize, and derive the pods it leads to, including those that the operator creates."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

REPO: Final = Path(__file__).resolve().parent.parent.parent
OVERLAYS: Final = ("local", "gpu-small", "gpu-large")
NAMESPACE: Final = "cdssl"

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as the scheduler will see it."""

    name: str  # for people: "pretrain head"
    owner: str  # "RayJob/pretrain"
    labels: dict[str, str]
    spec: dict[str, Any]
    replicas: int = 1

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All containers, including init containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Overlay:
    """A rendered overlay."""

    name: str
    documents: list[Document]

    def of(self, *kinds: str) -> list[Document]:
        """The documents of some kinds."""
        return [d for d in self.documents if d["kind"] in kinds]

    def find(self, kind: str, name: str) -> Document | None:
        """A document by its name."""
        return next((d for d in self.of(kind) if d["metadata"]["name"] == name), None)

    def pods(self) -> list[Pod]:
        """All pods."""
        return [pod for document in self.documents for pod in _pods(document)]


class UniqueKeys(yaml.SafeLoader):
    """A loader that rejects repeated keys in a mapping; PyYAML itself lets the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, rejecting repeated keys."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := {k for k in keys if keys.count(k) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"repeated keys {sorted(repeated)}", node.start_mark)
        return super().construct_mapping(node, deep)


def kubectl() -> str | None:
    """The kubectl of this environment, else the one on the PATH; None if there is none."""
    beside = Path(sys.executable).parent / "kubectl"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("kubectl")


def build(name: str) -> str:
    """The manifests of an overlay as text.

    Raises:
        RuntimeError: if kustomize rejects it.
    """
    command = [kubectl() or "kubectl", "kustomize", str(REPO / "k8s" / "overlays" / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"overlay {name}: {done.stderr.strip()}")
    return done.stdout


def render(name: str) -> Overlay:
    """An overlay; see ``build``."""
    return Overlay(name, load(build(name)))


def load(text: str) -> list[Document]:
    """The documents of a YAML text, whose keys must be unique."""
    return [d for d in yaml.load_all(text, UniqueKeys) if d]


def _pods(document: Document) -> Iterator[Pod]:
    kind, name, spec = document["kind"], document["metadata"]["name"], document.get("spec", {})
    owner = f"{kind}/{name}"
    if kind in ("Deployment", "StatefulSet", "Job"):
        yield Pod(
            name, owner, spec["template"]["metadata"]["labels"], spec["template"]["spec"], spec.get("replicas", 1)
        )
    elif kind == "RayJob":
        cluster = spec["rayClusterSpec"]
        yield _ray_pod(name, "head", owner, cluster["headGroupSpec"]["template"], 1, cluster)
        for group in cluster.get("workerGroupSpecs", []):
            count = max(group.get("replicas", 0), group.get("maxReplicas", 0))
            yield _ray_pod(name, "worker", owner, group["template"], count, cluster)
        submitter = spec.get("submitterPodTemplate", {"spec": {"containers": []}})
        labels = {**submitter.get("metadata", {}).get("labels", {}), "ray.io/originated-from-crd": "RayJob"}
        yield Pod(f"{name} submitter", owner, labels, submitter["spec"])


def _ray_pod(job: str, role: str, owner: str, template: dict[str, Any], count: int, cluster: dict[str, Any]) -> Pod:
    """A pod of a RayCluster, with what the operator adds to it."""
    labels = {**template["metadata"]["labels"], "ray.io/node-type": role, "ray.io/is-ray-node": "yes"}
    spec = copy.deepcopy(template["spec"])
    if role == "head" and cluster.get("enableInTreeAutoscaling"):
        options = cluster.get("autoscalerOptions", {})
        image = spec["containers"][0]["image"]
        beside = {k: v for k, v in options.items() if k in ("securityContext", "resources", "env", "volumeMounts")}
        spec["containers"].append({"name": "autoscaler", "image": options.get("image", image), **beside})
    return Pod(f"{job} {role}", owner, labels, spec, count)
