"""``cdssl registry``: list, pull and register models, and choose the champion."""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.model_card import write_model_card
from cdssl_dist.mlops.models import CHAMPION, KINDS, kind_of
from cdssl_dist.mlops.registry import Version
from sharding.commands import RUNS, Parser, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run one action on the registry."""
    p = Parser("cdssl registry", "Look at registered models, pull them, and choose the champion.")
    p.add_argument("--registry", help="MLflow URI; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db")
    actions = p.add_subparsers(dest="action", required=True, metavar="ACTION")
    ref: dict[str, Any] = {"nargs": "?", "default": CHAMPION, "help": "models:/NAME@ALIAS or models:/NAME/VERSION"}
    listed = actions.add_parser("list", help="all versions, newest first")
    listed.add_argument("name", nargs="?", help="only this model")
    actions.add_parser("show", help="show everything known about a version").add_argument("ref", **ref)
    pull = actions.add_parser("pull", help="download and verify a model, and print where it is")
    pull.add_argument("ref", **ref)
    pull.add_argument("--out", metavar="FOLDER", help="copy it there, with its MODEL_CARD.md")
    register = actions.add_parser("register", help="register a model from a folder")
    register.add_argument("folder", help="folder with encoder.json or property.json, and the weights")
    register.add_argument("name", help="name to register it under")
    promote = actions.add_parser("promote", help="make a version the champion")
    promote.add_argument("ref", help=ref["help"])
    rollback = actions.add_parser("rollback", help="make the previous champion the champion again")
    rollback.add_argument("name", nargs="?", default="cdssl-encoder")
    diff = actions.add_parser("diff", help="show how two versions differ")
    diff.add_argument("first", help="models:/NAME@ALIAS or models:/NAME/VERSION")
    diff.add_argument("second")
    delete = actions.add_parser("delete", help="delete a version that is neither champion nor previous")
    delete.add_argument("ref", help=ref["help"])
    args = p.parse_args(argv)
    ACTIONS[args.action](args, tracking_uri(args.registry, RUNS))
    return 0


def _list(args: argparse.Namespace, uri: str) -> None:
    for version in registry.list_versions(args.name, uri):
        print(line(version))


def _show(args: argparse.Namespace, uri: str) -> None:
    version = registry.show(args.ref, uri)
    print(line(version), *(f"  {key:24} {value}" for key, value in sorted(version.tags.items())), sep="\n")
    if version.run_id:
        print(f"  {'run':24} {version.run_id}")


def _pull(args: argparse.Namespace, uri: str) -> None:
    folder = registry.pull(args.ref, uri)
    if args.out:
        there = [kind for kind in KINDS if (Path(args.out) / kind.files[1]).exists()]
        if there and there != [kind_of(folder)]:
            raise registry.RegistryError(f"{args.out} holds a model of another kind; give another folder")
        folder = Path(shutil.copytree(folder, args.out, dirs_exist_ok=True))
        write_model_card(folder)
    print(folder)


def _register(args: argparse.Namespace, uri: str) -> None:
    print(registry.register(Path(args.folder), args.name, uri))


def _promote(args: argparse.Namespace, uri: str) -> None:
    print(line(registry.promote(args.ref, uri)))


def _rollback(args: argparse.Namespace, uri: str) -> None:
    print(line(registry.rollback(args.name, uri)))


def _diff(args: argparse.Namespace, uri: str) -> None:
    found = registry.diff(args.first, args.second, uri)
    for key, (first, second) in found.items():
        print(f"{key}\n  - {first or '(none)'}\n  + {second or '(none)'}")
    if not found:
        print("they do not differ")


def _delete(args: argparse.Namespace, uri: str) -> None:
    print(f"deleted {registry.delete(args.ref, uri).uri}; copies that were already pulled remain")


ACTIONS: Final = {
    "list": _list,
    "show": _show,
    "pull": _pull,
    "register": _register,
    "promote": _promote,
    "rollback": _rollback,
    "diff": _diff,
    "delete": _delete,
}


def line(version: Version) -> str:
    """Describe a version in one line."""
    made = datetime.datetime.fromtimestamp(version.created / 1000).isoformat(" ", "minutes")
    aliases = ", ".join(version.aliases)
    scores = [f"{k.score} {_rounded(version.tags[k.score])}" for k in KINDS if k.score in version.tags]
    return f"{version.uri:28} {made}  {' '.join(scores) or 'not made by cdssl'}  {aliases}".rstrip()


def _rounded(score: str) -> str:
    """Round to four places; a tag that is no number is returned as it is."""
    try:
        return f"{float(score):.4f}"
    except ValueError:
        return score


if __name__ == "__main__":
    sys.exit(main())
