"""Check that every name a manifest refers to exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import urlsplit

from k8s.check.network import OUTSIDE, matches
from k8s.check.render import REPO, Overlay, Pod, load

EXAMPLE: Final = REPO / "k8s" / "secrets.example.yaml"


def check(overlay: Overlay) -> Iterator[str]:
    """Check all references."""
    secrets = {d["metadata"]["name"]: d["stringData"] for d in load(EXAMPLE.read_text())}
    pods = overlay.pods()
    for pod in pods:
        yield from (f"{pod.name}: {text}" for text in _pod(overlay, pod, secrets))
    yield from _selectors(overlay, pods)
    yield from _bindings(overlay)
    yield from _queues(overlay)


def _pod(overlay: Overlay, pod: Pod, secrets: dict[str, dict[str, str]]) -> Iterator[str]:
    def exists(kind: str, name: str, key: str | None = None) -> Iterator[str]:
        found = overlay.find(kind, name)
        content = secrets.get(name) if kind == "Secret" else found and found.get("data", {})
        if content is None:
            yield f"there is no {kind} {name}{' in ' + EXAMPLE.name if kind == 'Secret' else ''}"
        elif key and key not in content:
            yield f"{kind} {name} has no key {key}"

    account = pod.spec.get("serviceAccountName", "default")
    if account != "default" and not overlay.find("ServiceAccount", account):
        yield f"there is no ServiceAccount {account}"
    claims = _claim_templates(overlay, pod)
    for volume in pod.spec.get("volumes", []):
        if "configMap" in volume:
            yield from exists("ConfigMap", volume["configMap"]["name"])
        if "secret" in volume:
            yield from exists("Secret", volume["secret"]["secretName"])
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim and not overlay.find("PersistentVolumeClaim", claim):
            yield f"there is no PersistentVolumeClaim {claim}"
    volumes = {v["name"] for v in pod.spec.get("volumes", [])} | claims
    mounted: set[str] = set()
    for container in pod.containers:
        for source in container.get("envFrom", []):
            for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                if key in source:
                    yield from exists(kind, source[key]["name"])
        for variable in container.get("env", []):
            for kind, key in (("ConfigMap", "configMapKeyRef"), ("Secret", "secretKeyRef")):
                if reference := variable.get("valueFrom", {}).get(key):
                    yield from exists(kind, reference["name"], reference["key"])
            yield from _addresses(overlay, variable.get("value", ""))
        names = {m["name"] for m in container.get("volumeMounts", [])}
        mounted |= names
        yield from (f"container {container['name']} mounts {name}, which is not a volume" for name in names - volumes)
        paths = [m["mountPath"] for m in container.get("volumeMounts", [])]
        yield from (f"container {container['name']} mounts two things at {p}" for p in {*paths} if paths.count(p) > 1)
        ports = {p.get("name") for p in container.get("ports", [])}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            for action in container.get(probe, {}).values():
                port = action.get("port") if isinstance(action, dict) else None
                if isinstance(port, str) and port not in ports:
                    yield f"{probe} of {container['name']} asks port {port}, which it does not have"
    yield from (f"volume {name} is mounted nowhere" for name in volumes - mounted)


def _claim_templates(overlay: Overlay, pod: Pod) -> set[str]:
    owner = overlay.find(*pod.owner.split("/"))
    spec: dict[str, Any] = (owner or {}).get("spec", {})
    return {t["metadata"]["name"] for t in spec.get("volumeClaimTemplates", [])}


def _addresses(overlay: Overlay, text: str) -> Iterator[str]:
    """Check that a URL like ``http://mlflow:5000`` names a service of this namespace and one of its ports."""
    address = urlsplit(text)
    if re.match(r"\w+://[a-z-]+:\d+", text):
        service = overlay.find("Service", address.hostname or "")
        if not service or address.port not in [p["port"] for p in service["spec"]["ports"]]:
            yield f"there is no Service {address.hostname} with port {address.port}"


def _selectors(overlay: Overlay, pods: list[Pod]) -> Iterator[str]:
    for service in overlay.of("Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        behind = [p for p in pods if matches({"matchLabels": spec["selector"]}, p.labels)]
        if not behind:
            yield f"Service {name} selects no pod"
        for port in spec["ports"]:
            wanted = port.get("targetPort", port["port"])
            known = {v for p in behind for c in p.containers for q in c.get("ports", []) for v in q.values()}
            if behind and wanted not in known:
                yield f"Service {name}: its pods have no port {wanted}"
    for document in overlay.of("PodDisruptionBudget", "PodMonitor", "NetworkPolicy"):
        name, spec = f"{document['kind']} {document['metadata']['name']}", document["spec"]
        selectors = [spec.get("selector") or spec.get("podSelector", {})]
        for rule in [*(spec.get("ingress") or []), *(spec.get("egress") or [])]:
            peers = [*rule.get("from", []), *rule.get("to", [])]
            selectors += [p["podSelector"] for p in peers if "podSelector" in p and "namespaceSelector" not in p]
            foreign = [p for p in peers if "namespaceSelector" in p]
            for peer in foreign:
                if not any(matches(peer["namespaceSelector"], _namespace(p)) for p in OUTSIDE if p.namespace):
                    yield f"{name}: a namespace that no peer of the table is in"
        for selector in selectors:
            if not any(matches(selector, p.labels) for p in pods) and "redis-cleanup" not in str(selector):
                yield f"{name}: selects no pod by {selector}"
        for endpoint in spec.get("podMetricsEndpoints", []):
            for pod in pods:
                names = {q.get("name") for c in pod.containers for q in c.get("ports", [])}
                if matches(spec["selector"], pod.labels) and endpoint["port"] not in names:
                    yield f"{name}: {pod.name} has no port {endpoint['port']}"
    for job in overlay.of("RayJob"):
        options = job["spec"]["rayClusterSpec"].get("gcsFaultToleranceOptions")
        if options:
            yield from _addresses(overlay, f"redis://{options['redisAddress']}")


def _namespace(peer: Any) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": peer.namespace}


def _bindings(overlay: Overlay) -> Iterator[str]:
    for binding in overlay.of("RoleBinding", "ClusterRoleBinding"):
        name = binding["metadata"]["name"]
        if not overlay.find(binding["roleRef"]["kind"], binding["roleRef"]["name"]):
            yield f"RoleBinding {name}: there is no {binding['roleRef']['kind']} {binding['roleRef']['name']}"
        for subject in binding["subjects"]:
            if not overlay.find("ServiceAccount", subject["name"]):
                yield f"RoleBinding {name}: there is no ServiceAccount {subject['name']}"


def _queues(overlay: Overlay) -> Iterator[str]:
    for job in overlay.of("RayJob"):
        queue = job["metadata"].get("labels", {}).get("kueue.x-k8s.io/queue-name")
        if queue and not overlay.find("LocalQueue", queue):
            yield f"RayJob {job['metadata']['name']}: there is no LocalQueue {queue}"
    for queue in overlay.of("LocalQueue"):
        if not overlay.find("ClusterQueue", queue["spec"]["clusterQueue"]):
            yield f"LocalQueue {queue['metadata']['name']}: there is no ClusterQueue {queue['spec']['clusterQueue']}"
    for queue in overlay.of("ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for flavor in group["flavors"]:
                if not overlay.find("ResourceFlavor", flavor["name"]):
                    yield f"ClusterQueue {queue['metadata']['name']}: there is no ResourceFlavor {flavor['name']}"
