"""Check pods against PodSecurity's level ``restricted``, and images, accounts, resources and secrets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from k8s.check.render import Overlay, Pod

VOLUMES: Final = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
}
HOST: Final = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
IMAGE: Final = re.compile(r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+@(sha256:[0-9a-f]{64}|UNSET)")
SECRET: Final = re.compile(r"(?i)password|secret|token|credential|access_key")
URI: Final = re.compile(r"\w://[^/\s@]*:[^/\s@]+@")


def restricted(overlay: Overlay) -> Iterator[str]:
    """Check level restricted of kubernetes.io/docs/concepts/security/pod-security-standards, and a read-only root."""
    for pod in overlay.pods():
        yield from (f"{pod.name}: {text}" for text in _restricted(pod))


def _restricted(pod: Pod) -> Iterator[str]:
    spec, shared = pod.spec, pod.spec.get("securityContext", {})
    yield from (f"{name} is on" for name in HOST if spec.get(name))
    for volume in spec.get("volumes", []):
        yield from (f"volume {volume['name']} is a {kind}" for kind in volume.keys() - {"name"} - VOLUMES)
    if shared.get("sysctls"):
        yield "sets sysctls"
    for container in pod.containers:
        own = container.get("securityContext", {})
        both = {**shared, **own}
        name, capabilities = container["name"], own.get("capabilities", {})
        wrong = {
            "privileged": own.get("privileged", False),
            "allowPrivilegeEscalation is not false": own.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot is not true": both.get("runAsNonRoot") is not True,
            "runs as root": both.get("runAsUser") == 0,
            "no seccomp profile": both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"),
            "capabilities are not dropped": "ALL" not in capabilities.get("drop", []),
            "adds capabilities": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "its root can be written": own.get("readOnlyRootFilesystem") is not True,
            "uses a port of the host": any("hostPort" in p for p in container.get("ports", [])),
            "mounts /proc unmasked": own.get("procMount", "Default") != "Default",
        }
        yield from (f"container {name}: {text}" for text, is_wrong in wrong.items() if is_wrong)


def accounts(overlay: Overlay) -> Iterator[str]:
    """Check that no pod has an API token that it does not need, and that none runs as ``default``."""
    needing = {(s["name"]) for b in overlay.of("RoleBinding", "ClusterRoleBinding") for s in b["subjects"]}
    for pod in overlay.pods():
        account = pod.spec.get("serviceAccountName", "default")
        if account == "default":
            yield f"{pod.name}: runs as the service account default"
        mounted = pod.spec.get("automountServiceAccountToken", True)
        if mounted and account not in needing:
            yield f"{pod.name}: has a token of {account}, which has no rights to use it for"
    for role in overlay.of("Role", "ClusterRole"):
        words = {word for rule in role["rules"] for words in rule.values() for word in words}
        if words & {"*", "secrets", "pods/exec", "escalate", "bind", "impersonate"}:
            yield f"{role['kind']}/{role['metadata']['name']}: gives more than any job needs"


def images(overlay: Overlay) -> Iterator[str]:
    """Check that images are given by digest. UNSET, which no cluster can pull, passes; ``unset`` reports it."""
    for pod in overlay.pods():
        for container in pod.containers:
            if not IMAGE.fullmatch(container["image"]):
                yield f"{pod.name}: image {container['image']} has no registry, or no digest"


def resources(overlay: Overlay) -> Iterator[str]:
    """Check probes, requests, limits, tolerations for GPUs, and that services plus any one job fit into the quota."""
    needed = {"services": dict.fromkeys(("cpu", "memory", "gpu", "pods"), 0.0)}
    for pod in overlay.pods():
        gpus = 0.0
        is_job = pod.owner.startswith("RayJob/")
        sums = needed.setdefault(pod.owner if is_job else "services", dict.fromkeys(needed["services"], 0.0))
        for container in pod.containers:
            wanted, limit = (container.get("resources", {}).get(k, {}) for k in ("requests", "limits"))
            if not {"cpu", "memory"} <= wanted.keys() or "memory" not in limit:
                yield f"{pod.name}: container {container['name']} lacks a request of cpu or memory, or a limit"
                continue
            for name in {*wanted, *limit} - {"cpu", "memory"}:
                if wanted.get(name) != limit.get(name):
                    yield f"{pod.name}: {name}: request {wanted.get(name)} and limit {limit.get(name)} must be the same"
            gpus += float(limit.get("nvidia.com/gpu", 0))
        for container in pod.spec["containers"]:
            if not is_job and not {"readinessProbe", "livenessProbe"} <= container.keys():
                yield f"{pod.name}: container {container['name']} is a server without a readiness or a liveness probe"
            wanted = container.get("resources", {}).get("requests", {})
            sums["cpu"] += pod.replicas * quantity(wanted.get("cpu", 0))
            sums["memory"] += pod.replicas * quantity(wanted.get("memory", 0))
        sums["gpu"] += pod.replicas * gpus
        sums["pods"] += pod.replicas
        tolerated = any(t.get("key") == "nvidia.com/gpu" for t in pod.spec.get("tolerations", []))
        if bool(gpus) != tolerated:
            yield f"{pod.name}: {gpus:g} GPUs, and {'a' if tolerated else 'no'} toleration of their taint"
    services = needed.pop("services")
    for quota in overlay.of("ResourceQuota"):
        hard = quota["spec"]["hard"]
        for owner, sums in needed.items():
            for name, total in sums.items():
                key = {"gpu": "requests.nvidia.com/gpu", "pods": "pods"}.get(name, f"requests.{name}")
                if total + services[name] > quantity(hard[key]):
                    yield f"{owner} and services need {total + services[name]:g} of {key}, the quota has {hard[key]}"


def secrets(overlay: Overlay) -> Iterator[str]:
    """Check that secrets are only referred to, never written out."""
    for document in overlay.of("Secret"):
        yield f"Secret/{document['metadata']['name']}: is part of the overlay"
    for document in overlay.of("ConfigMap"):
        for key, text in document.get("data", {}).items():
            if URI.search(text) or SECRET.search(key):
                yield f"ConfigMap/{document['metadata']['name']}: {key} looks like a secret"
    for pod in overlay.pods():
        for container in pod.containers:
            for variable in container.get("env", []):
                value = variable.get("value", "")
                if URI.search(value) or (value and SECRET.search(variable["name"])):
                    yield f"{pod.name}: {variable['name']} has a literal value; take it from a Secret"
            for text in [*container.get("command", []), *container.get("args", [])]:
                if URI.search(text):
                    yield f"{pod.name}: a password is among the arguments"


def unset(overlay: Overlay) -> list[str]:
    """What a site must still set before anything can run, as ``where: what``."""
    found = []
    reserved = ("192.0.2.", "198.51.100.", "203.0.113.")

    def walk(value: Any, where: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{where}.{key}" if where else key)
        elif isinstance(value, list):
            for i, inner in enumerate(value):
                walk(inner, f"{where}[{i}]")
        elif isinstance(value, str) and ("UNSET" in value or value.startswith(reserved)):
            found.append(f"{where}: {value}")

    for document in overlay.documents:
        walk(
            {k: v for k, v in document.items() if k != "metadata"}, f"{document['kind']}/{document['metadata']['name']}"
        )
    return found


def quantity(text: Any) -> float:
    """A Kubernetes quantity as a number: ``500m`` → 0.5, ``2Gi`` → 2³¹."""
    units = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match, f"no quantity: {text!r}"
    return float(match[1]) * units.get(match[2], 1)
