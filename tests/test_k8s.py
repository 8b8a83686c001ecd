"""The manifests: the overlays pass every check as they are, and each check fails on ones broken on purpose."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # k8s is no package that is installed

for needed in ("celpy", "jsonschema", "kubernetes_validate"):
    pytest.importorskip(needed, reason=f"needs {needed}: make setup")

from k8s.check import commands, lint, network, render, schemas, security  # noqa: E402
from k8s.check.__main__ import CHECKS, IMAGES, pin  # noqa: E402
from k8s.check.render import OVERLAYS, Overlay  # noqa: E402

if render.kubectl() is None:
    pytest.skip("needs kubectl: make setup", allow_module_level=True)

Json = dict[str, Any]


@pytest.fixture(scope="module")
def overlays() -> dict[str, Overlay]:
    return {name: render.render(name) for name in OVERLAYS}


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_wrong(overlays: dict[str, Overlay], name: str, check: str) -> None:
    assert list(CHECKS[check](overlays[name])) == []


def test_a_build_is_the_same_each_time() -> None:
    assert render.build("gpu-large") == render.build("gpu-large")


def at(document: Json, *path: str | int) -> Any:
    """What lies at a path."""
    for key in path:
        document = document[key]  # type: ignore[index]
    return document


CLUSTER = ("spec", "rayClusterSpec")
HEAD = (*CLUSTER, "headGroupSpec", "template", "spec")
WORKER = (*CLUSTER, "workerGroupSpecs", 0, "template", "spec")
BOX = (*HEAD, "containers", 0)
RAN = (*WORKER, "containers", 0)
SUBMITTER = ("spec", "submitterPodTemplate", "spec")
SERVER = ("spec", "template", "spec", "containers", 0)


def put(kind: str, name: str, path: tuple[str | int, ...], value: Any) -> Callable[[Overlay], None]:
    """A mutation: write a value, or remove what is there where it is None."""

    def change(overlay: Overlay) -> None:
        document = overlay.find(kind, name)
        assert document, f"{kind} {name}"
        target = at(document, *path[:-1])
        if value is None:
            del target[path[-1]]
        elif isinstance(target, list) and path[-1] == len(target):
            target.append(value)
        else:
            target[path[-1]] = value

    return change


def drop(kind: str, name: str) -> Callable[[Overlay], None]:
    """A mutation: the document is gone."""

    def change(overlay: Overlay) -> None:
        overlay.documents[:] = [d for d in overlay.documents if (d["kind"], d["metadata"]["name"]) != (kind, name)]

    return change


def add(document: Json) -> Callable[[Overlay], None]:
    """A mutation: one document more."""
    return lambda overlay: overlay.documents.append(document)


JOB = "RayJob"
WRONG: list[tuple[str, Callable[[Overlay], None], str]] = [
    ("schemas", put(JOB, "pretrain", ("spec", "submissionMode"), "SidecarMode"), "takes any word"),
    ("schemas", put(JOB, "pretrain", ("spec", "shutdownAfterJobFinishes"), False), "ttl needs shutdown"),
    ("schemas", put(JOB, "pretrain", ("metadata", "name"), "p" * 48), "47 characters"),
    ("schemas", put(JOB, "pretrain", ("spec", "entrypont"), "x"), "'entrypont' was unexpected"),
    ("schemas", put(JOB, "pretrain", (*CLUSTER, "authOptions", "mode"), "disabled"), "without a token runs code"),
    ("schemas", put(JOB, "pretrain", (*CLUSTER, "workerGroupSpecs", 0, "minReplicas"), 9), "minReplicas ≤"),
    ("schemas", put(JOB, "shard", (*WORKER, "restartPolicy"), None), "autoscaler v2 wants"),
    (
        "schemas",
        put(JOB, "shard", (*CLUSTER, "autoscalerOptions", "securityContext"), None),
        "'securityContext' is a req",
    ),
    ("schemas", put(JOB, "pretrain", (*BOX, "env", 0), {"name": "REDIS_PASSWORD", "value": "x"}), "no REDIS_PASSWORD"),
    ("schemas", put(JOB, "pretrain", (*BOX, "imagepullPolicy"), "Always"), "imagepullPolicy"),
    ("schemas", put(JOB, "pretrain", (*BOX, "env", 0), {"name": "HOME", "value": "/"}), "env: HOME is there twice"),
    ("schemas", put("Deployment", "mlflow", ("spec", "replica"), 1), "'replica' was unexpected"),
    ("schemas", put("Service", "mlflow", ("kind",), "Serivce"), "no kind Serivce"),
    (
        "schemas",
        put("ClusterQueue", "cdssl", ("spec", "resourceGroups", 0, "coveredResources", 0), "gpu"),
        "each flavor",
    ),
    ("references", put("Service", "mlflow", ("spec", "selector", "app.kubernetes.io/name"), "ml"), "selects no pod"),
    ("references", put("Service", "mlflow", ("spec", "ports", 0, "targetPort"), "web"), "no port web"),
    ("references", put("Service", "mlflow", ("spec", "ports", 0, "port"), 80), "no Service mlflow with port 5000"),
    ("references", put("Deployment", "mlflow", (*SERVER, "readinessProbe", "httpGet", "port"), "web"), "asks port web"),
    ("references", put(JOB, "pretrain", (*HEAD, "serviceAccountName"), "nobody"), "no ServiceAccount nobody"),
    ("references", put(JOB, "pretrain", (*BOX, "envFrom", 0, "secretRef", "name"), "nothing"), "no Secret nothing"),
    (
        "references",
        put("Deployment", "redis", (*SERVER, "env", 0, "valueFrom", "secretKeyRef", "key"), "P"),
        "has no key P",
    ),
    ("references", put(JOB, "pretrain", (*BOX, "volumeMounts", 0, "name"), "nothing"), "which is not a volume"),
    ("references", put(JOB, "pretrain", (*BOX, "volumeMounts", 0, "mountPath"), "/tmp"), "two things at /tmp"),
    ("references", drop("PersistentVolumeClaim", "checkpoints"), "no PersistentVolumeClaim checkpoints"),
    ("references", drop("Role", "ray-autoscaler"), "there is no Role"),
    ("references", drop("LocalQueue", "cdssl"), "no LocalQueue"),
    ("references", drop("ResourceFlavor", "cdssl"), "no ResourceFlavor"),
    (
        "references",
        put(JOB, "pretrain", (*CLUSTER, "gcsFaultToleranceOptions", "redisAddress"), "redi:6379"),
        "no Service redi",
    ),
    (
        "references",
        put("NetworkPolicy", "redis", ("spec", "podSelector", "matchLabels"), {"a": "b"}),
        "selects no pod by",
    ),
    ("references", put("PodMonitor", "ray", ("spec", "podMetricsEndpoints", 0, "port"), "web"), "has no port web"),
    ("network", drop("NetworkPolicy", "default-deny"), "stranger -> pretrain submitter all: allowed"),
    ("network", drop("NetworkPolicy", "dns"), "pretrain head -> dns 53: in network.yaml, and not allowed"),
    ("network", drop("NetworkPolicy", "operator-to-heads"), "operator -> pretrain head 8265: in"),
    (
        "network",
        put("NetworkPolicy", "mlflow", ("spec", "ingress", 0, "from"), None),
        "stranger -> mlflow 5000: allowed",
    ),
    (
        "network",
        put("NetworkPolicy", "pretrain", ("spec", "ingress", 1, "from"), None),
        "stranger -> pretrain head 8265",
    ),
    (
        "network",
        put("NetworkPolicy", "pretrain", ("spec", "egress", 0, "to"), None),
        "pretrain head -> internet all: all",
    ),
    (
        "network",
        put("NetworkPolicy", "object-store", ("spec", "egress", 0, "to", 1), {"ipBlock": {"cidr": "0.0.0.0/0"}}),
        "pretrain head -> cloud metadata 443: allowed",
    ),
    ("restricted", put(JOB, "pretrain", (*SUBMITTER, "containers", 0, "securityContext"), None), "pretrain submitter"),
    ("restricted", put(JOB, "shard", (*CLUSTER, "autoscalerOptions", "securityContext"), {}), "container autoscaler"),
    ("restricted", put(JOB, "pretrain", (*HEAD, "hostNetwork"), True), "hostNetwork is on"),
    (
        "restricted",
        put(JOB, "pretrain", (*WORKER, "volumes", 0), {"name": "x", "hostPath": {"path": "/"}}),
        "is a hostPath",
    ),
    (
        "restricted",
        put(JOB, "pretrain", (*RAN, "securityContext", "readOnlyRootFilesystem"), False),
        "root can be written",
    ),
    (
        "restricted",
        put(JOB, "pretrain", (*RAN, "securityContext", "capabilities"), {"add": ["IPC_LOCK"]}),
        "adds capabil",
    ),
    ("restricted", put(JOB, "pretrain", (*WORKER, "securityContext", "runAsUser"), 0), "runs as root"),
    ("restricted", put(JOB, "pretrain", (*WORKER, "securityContext", "seccompProfile"), None), "no seccomp profile"),
    ("accounts", put(JOB, "pretrain", (*HEAD, "automountServiceAccountToken"), True), "no rights to use it for"),
    ("accounts", put(JOB, "pretrain", (*HEAD, "serviceAccountName"), None), "service account default"),
    ("accounts", put("Role", "ray-autoscaler", ("rules", 0, "verbs", 0), "*"), "gives more"),
    (
        "images",
        put(JOB, "pretrain", (*BOX, "image"), "docker.io/library/cdssl:latest"),
        "has no registry, or no digest",
    ),
    ("resources", put(JOB, "pretrain", (*RAN, "resources", "requests", "nvidia.com/gpu"), 4), "must be the same"),
    ("resources", put(JOB, "pretrain", (*WORKER, "tolerations"), []), "no toleration"),
    ("resources", put(JOB, "pretrain", (*BOX, "resources", "limits"), {}), "lacks a request"),
    ("resources", put(JOB, "pretrain", (*CLUSTER, "workerGroupSpecs", 0, "maxReplicas"), 9), "the quota has"),
    ("resources", put("Deployment", "mlflow", (*SERVER, "livenessProbe"), None), "without a readiness or a liveness"),
    (
        "secrets",
        put(JOB, "pretrain", (*BOX, "env", 0), {"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}),
        "literal value",
    ),
    ("secrets", put("Deployment", "mlflow", (*SERVER, "args", 0), "--uri=postgresql://a:b@c/d"), "among the arguments"),
    (
        "secrets",
        add({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "data": {}}),
        "is part of the overlay",
    ),
    (
        "entrypoints",
        put(JOB, "pretrain", ("spec", "entrypoint"), "python -m cdssl_dist.pretrian"),
        "cannot be imported",
    ),
    ("entrypoints", put(JOB, "shard", ("spec", "entrypoint"), "python -m sharding a: --output b"), "sharding refuses"),
    ("entrypoints", put(JOB, "shard", ("spec", "entrypoint"), "python -m sharding $A --out b"), "two shells"),
    (
        "entrypoints",
        put(JOB, "pretrain", (*CLUSTER, "workerGroupSpecs", 0, "replicas"), 1),
        "= 16 GPUs, and its pods have 8",
    ),
    (
        "entrypoints",
        put(JOB, "pretrain", ("metadata", "annotations", "cdssl.dev/checkpoint-seconds"), "30"),
        "stop_within = 120 s, and its pods are killed after 30",
    ),
    ("agreement", put(JOB, "pretrain", (*CLUSTER, "rayVersion"), "2.59.0"), "not what constraints.txt pins"),
    ("agreement", put(JOB, "pretrain", (*WORKER, "terminationGracePeriodSeconds"), 30), "grace period"),
    ("agreement", put(JOB, "pretrain", (*RAN, "lifecycle"), {}), "preStop hook"),
    (
        "agreement",
        put(JOB, "shard", ("spec", "entrypoint"), "python -m sharding a: --out s3://b/c"),
        "different places",
    ),
    ("agreement", put(JOB, "pretrain", (*RAN, "resources", "requests", "cpu"), "8"), "Ray is told of 64 CPUs"),
    ("agreement", put(JOB, "pretrain", (*RAN, "resources", "limits", "memory"), "16Gi"), "shm may take all"),
]


@pytest.mark.parametrize(("check", "mutate", "said"), WRONG, ids=[f"{c}-{s}" for c, _, s in WRONG])
def test_each_check_can_fail(
    overlays: dict[str, Overlay], check: str, mutate: Callable[[Overlay], None], said: str
) -> None:
    broken = copy.deepcopy(overlays["gpu-large"])
    mutate(broken)
    found = list(CHECKS[check](broken))
    assert any(said in line for line in found), found


def test_a_configuration_that_is_wrong_is_found(overlays: dict[str, Overlay]) -> None:
    broken = copy.deepcopy(overlays["gpu-small"])
    config = next(d for d in broken.of("ConfigMap") if "gpu-small.yaml" in d["data"])
    config["data"]["gpu-small.yaml"] += "modell: {}\n"
    assert any("did you mean 'model'" in line for line in commands.entrypoints(broken))
    del config["data"]["gpu-small.yaml"]
    assert any("no ConfigMap" in line for line in commands.entrypoints(broken))


def test_the_configurations_are_those_of_the_command_line(overlays: dict[str, Overlay]) -> None:
    for overlay in overlays.values():
        data = next(d["data"] for d in overlay.of("ConfigMap") if "local.yaml" in d["data"])
        assert data == {p: (REPO / "configs" / "pretrain" / p).read_text() for p in data}


@pytest.mark.slow
def test_each_linter_can_fail(overlays: dict[str, Overlay], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking := [name for name in ("yamllint", "hadolint", "checkov") if not lint.tool(name)]:
        pytest.skip(f"needs {', '.join(lacking)} on the PATH: make k8s-check")
    assert list(lint.sources()) == []
    broken = copy.deepcopy(overlays["local"])
    put("Deployment", "mlflow", (*SERVER, "securityContext", "privileged"), True)(broken)
    assert any("CKV_K8S_16" in line for line in lint.checkov(broken))
    for folder in ("k8s", "configs", "docker"):
        shutil.copytree(REPO / folder, tmp_path / folder)
    monkeypatch.setattr(lint, "REPO", tmp_path)
    with open(tmp_path / "configs" / "pretrain" / "base.yaml", "a") as file:
        file.write("data: {path:  x}\n")
    with open(tmp_path / "docker" / "cpu.Dockerfile", "a") as file:
        file.write("USER root\n")
    found = "\n".join(lint.sources())
    assert "base.yaml" in found and "too many spaces" in found
    assert "DL3002" in found


def test_a_key_may_not_stand_twice() -> None:
    with pytest.raises(Exception, match="repeated keys"):
        render.load("a: 1\nb: 2\na: 3\n")


def test_the_schemas_agree_with_those_of_kuberay(overlays: dict[str, Overlay], shared: Path) -> None:
    """Their strict schema accepts what we render, and has all rules that touch a field that we use."""
    import jsonschema

    path = shared / "k8s" / "rayjob-v1.schema.json"
    if not path.exists():
        pytest.skip("needs ../shared/k8s")
    theirs = json.loads(path.read_text())
    for overlay in overlays.values():
        for job in overlay.of("RayJob"):
            jsonschema.Draft202012Validator(theirs).validate(job)
            assert list(schemas.rules(resolved(theirs, theirs["$defs"]), job)) == []


def resolved(schema: Any, defs: Json, depth: int = 12) -> Any:
    """A schema whose references are replaced by what they name."""
    if isinstance(schema, dict) and depth:
        if "$ref" in schema:
            return resolved(defs[schema["$ref"].rpartition("/")[2]], defs, depth - 1)
        return {k: resolved(v, defs, depth - 1) for k, v in schema.items()}
    return schema


def test_images_are_pinned_by_one_command(tmp_path: Path) -> None:
    path = tmp_path / "kustomization.yaml"
    shutil.copy(IMAGES, path)
    assert pin(path, [f"cdssl-train=registry.example/a/b@sha256:{'1' * 64}"]) == 0
    content = render.load(path.read_text())[0]["images"]
    assert content[0] == {"name": "cdssl-train", "newName": "registry.example/a/b", "digest": f"sha256:{'1' * 64}"}
    assert [image["digest"] for image in content[1:]] == ["UNSET"] * 3
    for bad in ("cdssl-train=a/b:latest", f"unknown=a/b@sha256:{'1' * 64}"):
        with pytest.raises(ValueError, match=r"must be NAME|is no image"):
            pin(path, [bad])


def test_what_is_unset_is_told(overlays: dict[str, Overlay]) -> None:
    told = "\n".join(security.unset(overlays["gpu-large"]))
    for word in ("cdssl-train@UNSET", "redis@UNSET", "s3://UNSET", "192.0.2.0/24", "storageClassName: UNSET"):
        assert word in told


def test_the_evaluator_against_known_answers() -> None:
    """The cases of the NetworkPolicy documentation: deny all, one peer, a peer in a namespace, ports, blocks."""
    spec = {"podSelector": {}, "policyTypes": ["Ingress"]}
    policy = {"metadata": {"namespace": "cdssl"}, "spec": spec}
    a, b = (network.Peer(n, "cdssl", {"app": n}) for n in "ab")
    far = network.Peer("far", "other", {"app": "a"})
    assert network.allowed([], far, b, 80)
    assert not network.allowed([policy], a, b, 80)
    assert network.allowed([policy], b, far, 80)  # replies and egress are not its business
    spec["ingress"] = [
        {"from": [{"podSelector": {"matchLabels": {"app": "a"}}}], "ports": [{"port": 80, "endPort": 90}]}
    ]
    assert network.allowed([policy], a, b, 85)
    assert not network.allowed([policy], a, b, 91)
    assert not network.allowed([policy], a, b, 85, "UDP")
    assert not network.allowed([policy], far, b, 85)
    spec["ingress"] = [{"from": [{"namespaceSelector": {}}]}]
    assert network.allowed([policy], far, b, 1)
    spec["ingress"] = [{}]
    assert network.allowed([policy], network.Peer("x", address="8.8.8.8"), b, 1)
    spec["ingress"] = [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]}]
    assert network.allowed([policy], network.Peer("x", address="10.2.0.1"), b, 1)
    assert not network.allowed([policy], network.Peer("x", address="10.1.0.1"), b, 1)
    assert not network.allowed([policy], far, b, 1)
