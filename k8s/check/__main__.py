"""``python -m k8s.check``: check the manifests; also ``… table`` and ``… pin NAME=IMAGE@sha256:…``.

The exit code is 1 if something is wrong, and with ``--deploy`` also if something is still UNSET.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import yaml

from k8s.check import commands, lint, network, references, schemas, security
from k8s.check.render import OVERLAYS, REPO, Overlay, build, load

IMAGES: Final = REPO / "k8s" / "components" / "images" / "kustomization.yaml"
CHECKS: Final[dict[str, Callable[[Overlay], Iterator[str]]]] = {
    "schemas": schemas.check,
    "references": references.check,
    "network": network.check,
    "restricted": security.restricted,
    "accounts": security.accounts,
    "images": security.images,
    "resources": security.resources,
    "secrets": security.secrets,
    "entrypoints": commands.entrypoints,
    "agreement": commands.agreement,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Check the manifests, show the table of connections, or pin images."""
    p = argparse.ArgumentParser("python -m k8s.check", description="Check the manifests, over every rendered overlay.")
    p.add_argument("--deploy", action="store_true", help="treat UNSET values as errors")
    p.add_argument("--fast", action="store_true", help="skip yamllint, hadolint and checkov")
    p.add_argument("--overlay", action="append", choices=OVERLAYS, help="only this overlay (repeatable)")
    p.add_argument("action", nargs="?", choices=("check", "table", "pin"), default="check")
    p.add_argument("images", nargs="*", metavar="NAME=IMAGE@sha256:…", help="for pin")
    args = p.parse_args(argv)
    names = args.overlay or OVERLAYS
    try:
        if args.action == "pin":
            return pin(IMAGES, args.images)
        if args.action == "table":
            print(
                *(line for name in names for line in [f"{name}:", *network.table(Overlay(name, load(build(name))))]),
                sep="\n",
            )
            return 0
        return check(names, args.fast, args.deploy)
    except (ValueError, RuntimeError) as why:
        print(f"error: {why}", file=sys.stderr)
        return 1


def check(names: Sequence[str], fast: bool, deploy: bool) -> int:
    """Run all checks over some overlays, and print what is wrong and what is unset."""
    wrong, open_ends, start = 0, 0, time.perf_counter()
    for name in names:
        text = build(name)
        overlay = Overlay(name, load(text))
        found = [] if build(name) == text else ["render: two builds differ"]
        for run in [*CHECKS.values(), *([] if fast else [lint.checkov])]:
            found += run(overlay)
        missing = security.unset(overlay)
        print(f"{name}: {len(overlay.documents)} documents, {len(found)} wrong, {len(missing)} UNSET")
        print(*(f"  wrong: {line}" for line in found), sep="\n", end="\n" if found else "")
        if deploy:
            print(*(f"  UNSET: {line}" for line in missing), sep="\n", end="\n" if missing else "")
        wrong, open_ends = wrong + len(found), open_ends + len(missing)
    for line in [] if fast else lint.sources():
        print(f"wrong: {line}")
        wrong += 1
    if open_ends:
        print(
            "UNSET images are set by: python -m k8s.check pin cdssl-train=REGISTRY/NAME@sha256:… (from the registry);"
            "\nother values in k8s/overlays; --deploy lists them all"
        )
    print(f"{'wrong' if wrong else 'all right'}, in {time.perf_counter() - start:.0f} s")
    return 1 if wrong or (deploy and open_ends) else 0


def pin(path: Path, pins: Sequence[str]) -> int:
    """Write images by digest into the component ``images``.

    Raises:
        ValueError: if a name is unknown, or a reference has no digest.
    """
    text = path.read_text()
    known = [image["name"] for image in yaml.safe_load(text)["images"]]
    for given in pins:
        match = re.fullmatch(r"([a-z-]+)=([^@\s]+)@(sha256:[0-9a-f]{64})", given)
        if not match:
            raise ValueError(f"{given!r}: must be NAME=REGISTRY/IMAGE@sha256:… with 64 hexadecimal digits")
        name, image, digest = match.groups()
        if name not in known:
            raise ValueError(f"{name!r} is no image of {path}; known are {', '.join(known)}")
        pattern = rf"(- name: {name}\b[^\n]*\n\s+newName: )\S+(\n\s+digest: )\S+"
        text = re.sub(pattern, rf"\g<1>{image}\g<2>{digest}", text)
    path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
