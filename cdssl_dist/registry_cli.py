"""``cdssl registry``: what is registered, and which version is the champion."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cdssl_dist import registry
from cdssl_dist.commands import Parser, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """One action on the registry."""
    p = Parser("cdssl registry", "Look at registered encoders and choose the champion.")
    p.add_argument("--registry", help="MLflow URI; MLFLOW_TRACKING_URI where left out")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, what in (("list", "versions, newest first"), ("show", "one version, whole")):
        actions.add_parser(action, help=what).add_argument("name", nargs="?", default="cdssl-encoder")
    actions.choices["show"].add_argument("version", nargs="?", default="champion", help="a number or an alias")
    pull = actions.add_parser("pull", help="download an encoder, verified, and print where it is")
    pull.add_argument("ref", nargs="?", default="models:/cdssl-encoder@champion")
    promote = actions.add_parser("promote", help="make a version the champion")
    promote.add_argument("name")
    promote.add_argument("version", type=int)
    rollback = actions.add_parser("rollback", help="make the previous champion the champion again")
    rollback.add_argument("name")
    args = p.parse_args(argv)

    uri = registry.registry_uri(args.registry)
    if args.action == "list":
        for line in registry.list_versions(args.name, uri):
            print(line)
    elif args.action == "show":
        print(registry.show(args.name, args.version, uri))
    elif args.action == "pull":
        print(registry.pull(args.ref, uri))
    elif args.action == "promote":
        print(registry.promote(args.name, args.version, uri))
    else:
        print(registry.rollback(args.name, uri))
    return 0


if __name__ == "__main__":
    sys.exit(main())
