"""``cdssl registry``: what is registered, and which version is the champion."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from typing import Any

from cdssl_dist import registry
from cdssl_dist.commands import RUNS, Parser, command
from cdssl_dist.mlflow_server import tracking_uri
from cdssl_dist.registry import Version


@command
def main(argv: Sequence[str] | None = None) -> int:
    """One action on the registry."""
    p = Parser("cdssl registry", "Look at registered encoders and choose the champion.")
    p.add_argument("--registry", help="MLflow URI; MLFLOW_TRACKING_URI, else runs/mlflow.db, where left out")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    name: dict[str, Any] = {"nargs": "?", "default": "cdssl-encoder"}
    ref: dict[str, Any] = {"nargs": "?", "default": "models:/cdssl-encoder@champion"}
    actions.add_parser("list", help="all versions, newest first").add_argument("name", **name)
    actions.add_parser("show", help="everything that is known of a version").add_argument("ref", **ref)
    actions.add_parser("pull", help="download an encoder, verified, and print where it is").add_argument("ref", **ref)
    promote = actions.add_parser("promote", help="make a version the champion")
    promote.add_argument("version", type=int)
    promote.add_argument("name", **name)
    actions.add_parser("rollback", help="make the previous champion the champion again").add_argument("name", **name)
    args = p.parse_args(argv)

    uri = tracking_uri(args.registry, RUNS)
    if args.action == "list":
        for version in registry.list_versions(args.name, uri):
            print(line(version))
    elif args.action == "show":
        version = registry.show(args.ref, uri)
        print(line(version), *(f"  {key:20} {value}" for key, value in sorted(version.tags.items())), sep="\n")
    elif args.action == "pull":
        print(registry.pull(args.ref, uri))
    elif args.action == "promote":
        print(line(registry.promote(args.name, args.version, uri)))
    else:
        print(line(registry.rollback(args.name, uri)))
    return 0


def line(version: Version) -> str:
    """One version in a line."""
    made = datetime.datetime.fromtimestamp(version.created / 1000).isoformat(" ", "minutes")
    aliases = ", ".join(version.aliases)
    return f"{version.uri:28} {made}  skill_edge {version.tags.get('skill_edge', '?')}  {aliases}"


if __name__ == "__main__":
    sys.exit(main())
