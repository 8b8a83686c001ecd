"""Strict schemas for all kinds, CEL rules for the custom ones, and unique keys in lists that are merged by key."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import celpy
import jsonschema
import kubernetes_validate
import yaml
from celpy.adapter import json_to_cel

from k8s.check.render import Overlay

KUBERNETES: Final = "1.33"  # the oldest supported version
CUSTOM: Final = yaml.safe_load((Path(__file__).parent / "custom.yaml").read_text())
MERGED_BY: Final = {  # list → the keys that may not repeat in it
    **dict.fromkeys(("containers", "initContainers", "env", "volumes"), ("name",)),
    "volumeMounts": ("mountPath",),
    "ports": ("name", "port", "containerPort", "protocol"),
    "workerGroupSpecs": ("groupName",),
}


def check(overlay: Overlay) -> Iterator[str]:
    """Check that every document is of a known kind, has no unknown field, and breaks no rule."""
    names = [(d["kind"], d["metadata"]["name"]) for d in overlay.documents]
    yield from (f"{kind}/{name}: defined twice" for kind, name in {*names} if names.count((kind, name)) > 1)
    for document in overlay.documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        if document["kind"] in CUSTOM:
            yield from (f"{where}: {text}" for text in _custom(document))
        else:
            yield from (f"{where}: {text}" for text in _core(document))
        yield from (f"{where}: {text}" for text in repeated(document))
    for pod in overlay.pods():
        if pod.owner.startswith("RayJob/"):
            yield from (f"{pod.name}: {text}" for text in _core(as_pod(pod.name, pod.labels, pod.spec)))


def as_pod(name: str, labels: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    """A pod template as a Pod, a kind that validators know."""
    about = {"name": name.replace(" ", "-"), "namespace": "cdssl", "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec}


def _core(document: dict[str, Any]) -> tuple[str, ...]:
    return _validated(json.dumps(document))


@functools.cache  # the validator reloads its schemas on every call
def _validated(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as why:
        return (f"{'.'.join(map(str, why.path))}: {why.message}",)
    except kubernetes_validate.SchemaNotFoundError:
        return (f"no kind {document['kind']} in {document['apiVersion']}",)
    return ()


def _custom(document: dict[str, Any]) -> Iterator[str]:
    schema = {**CUSTOM[document["kind"]], "$defs": CUSTOM["$defs"]}
    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(document))
    yield from (f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in errors)
    if not errors:
        yield from rules(schema, document)


def rules(schema: dict[str, Any], value: Any, where: str = "") -> Iterator[str]:
    """The CEL rules that a value breaks, at any level of its schema."""
    for rule in schema.get("x-kubernetes-validations", []):
        if not _program(rule["rule"]).evaluate({"self": json_to_cel(value)}):
            yield f"{where or 'it'}: {rule['message']}"
    for key, inner in schema.get("properties", {}).items():
        if key in value:
            yield from rules(inner, value[key], f"{where}.{key}".lstrip("."))
    if "items" in schema:
        for i, item in enumerate(value):
            yield from rules(schema["items"], item, f"{where}[{i}]")


@functools.cache
def _program(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def repeated(value: Any) -> Iterator[str]:
    """Find repeated keys in lists that Kubernetes merges by key: the API server would let the last one win."""
    if isinstance(value, list):
        for item in value:
            yield from repeated(item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in MERGED_BY and isinstance(inner, list):
                seen = [tuple(item.get(k) for k in MERGED_BY[key]) for item in inner if isinstance(item, dict)]
                yield from (f"{key}: {k[0]} is there twice" for k in {*seen} if seen.count(k) > 1)
            yield from repeated(inner)
