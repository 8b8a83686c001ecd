"""Who may reach whom: evaluate the NetworkPolicies and compare the result with a table."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from k8s.check.render import NAMESPACE, Overlay

TABLE: Final = Path(__file__).parent / "network.yaml"
PORTS: Final = (
    53,
    443,
    5000,
    5432,
    6379,
    6443,
    8080,
    8265,
    10001,
    29500,
    41234,
)  # services, and what Ray and NCCL may choose


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod with its namespace, or an address outside."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = ""


OUTSIDE: Final = (
    Peer("dns", "kube-system", {"k8s-app": "kube-dns"}),
    Peer("operator", "kuberay-system", {"app.kubernetes.io/name": "kuberay-operator"}),
    Peer("prometheus", "monitoring", {"app.kubernetes.io/name": "prometheus"}),
    Peer("stranger", "default", {"cdssl.dev/cluster": "pretrain", "cdssl.dev/submitter": "pretrain"}),
    Peer("internet", address="93.184.216.34"),
    Peer("cloud metadata", address="169.254.169.254"),
)

SITES: Final = ("object-store", "api-server", "database")  # policies whose ipBlock is the address of that service


def check(overlay: Overlay) -> Iterator[str]:
    """Check that the policies allow exactly what the table lists."""
    tables = yaml.safe_load(TABLE.read_text())
    wanted = {*tables["everywhere"], *tables.get(overlay.name, [])}
    found = set(table(overlay))
    yield from (f"network: {line}: allowed, and not in {TABLE.name}" for line in sorted(found - wanted))
    yield from (f"network: {line}: in {TABLE.name}, and not allowed" for line in sorted(wanted - found))


def table(overlay: Overlay) -> list[str]:
    """``source -> target ports`` for every pair of peers that may talk; ``all`` for all of ``PORTS``."""
    pods = [Peer(pod.name, NAMESPACE, pod.labels) for pod in overlay.pods()]
    policies = overlay.of("NetworkPolicy")
    peers = (*pods, *OUTSIDE, *_sites(policies))
    lines = []
    for source in peers:
        for target in peers:
            if NAMESPACE not in (source.namespace, target.namespace):
                continue
            ports = [p for p in PORTS if allowed(policies, source, target, p)]
            if ports:
                text = "all" if len(ports) == len(PORTS) else " ".join(map(str, ports))
                lines.append(f"{source.name} -> {target.name} {text}")
    return lines


def _sites(policies: list[dict[str, Any]]) -> Iterator[Peer]:
    """The services of a site, at the addresses that the overlay gives."""
    for policy in policies:
        if policy["metadata"]["name"] in SITES:
            for rule in policy["spec"]["egress"]:
                network = ipaddress.ip_network(rule["to"][0]["ipBlock"]["cidr"])
                yield Peer(policy["metadata"]["name"], address=str(network[0]))


def allowed(policies: list[dict[str, Any]], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let out of its source and into its target."""
    return _passes(policies, "Egress", source, target, port, protocol) and _passes(
        policies, "Ingress", target, source, port, protocol
    )


def _passes(policies: list[dict[str, Any]], direction: str, mine: Peer, other: Peer, port: int, protocol: str) -> bool:
    """Whether the policies of one end allow the other; if none selects it, everything is allowed."""
    if mine.address:
        return True
    selecting = [
        p["spec"]
        for p in policies
        if p["metadata"].get("namespace") == mine.namespace
        and direction in p["spec"]["policyTypes"]
        and matches(p["spec"]["podSelector"], mine.labels)
    ]
    rules, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    return not selecting or any(
        _any_peer(rule.get(peers), mine, other) and _any_port(rule.get("ports"), port, protocol)
        for spec in selecting
        for rule in spec.get(rules) or []
    )


def _any_peer(peers: list[dict[str, Any]] | None, mine: Peer, other: Peer) -> bool:
    """An empty list of peers means everyone."""
    return not peers or any(_is_peer(peer, mine, other) for peer in peers)


def _is_peer(peer: dict[str, Any], mine: Peer, other: Peer) -> bool:
    if "ipBlock" in peer:
        address = ipaddress.ip_address(other.address) if other.address else None
        inside = address is not None and address in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return inside and not any(address in ipaddress.ip_network(n) for n in peer["ipBlock"].get("except", []))
    if other.address:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != mine.namespace:
        return False
    return matches(peer.get("podSelector", {}), other.labels)


def _any_port(ports: list[dict[str, Any]] | None, port: int, protocol: str) -> bool:
    return not ports or any(
        p.get("protocol", "TCP") == protocol and p.get("port", port) <= port <= p.get("endPort", p.get("port", port))
        for p in ports
    )


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Whether a label selector matches these labels; the empty selector matches everything."""
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        _expression(e["operator"], e["key"], e.get("values", []), labels) for e in selector.get("matchExpressions", [])
    )


def _expression(operator: str, key: str, values: list[str], labels: dict[str, str]) -> bool:
    if operator in ("In", "NotIn"):
        return (labels.get(key) in values) == (operator == "In")
    assert operator in ("Exists", "DoesNotExist"), operator
    return (key in labels) == (operator == "Exists")
