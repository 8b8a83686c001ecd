"""External linters: yamllint for the sources, checkov for the pods, hadolint for the Dockerfiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import yaml

from k8s.check.render import NAMESPACE, REPO, Overlay
from k8s.check.schemas import as_pod

HERE: Final = Path(__file__).parent


def tool(name: str) -> str | None:
    """Find a program in this environment, else on the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(name)


def sources() -> Iterator[str]:
    """Run yamllint and hadolint over the source files."""
    yield from _run("yamllint", "--strict", "--format", "parsable", "-c", str(HERE / "yamllint.yaml"), "k8s", "configs")
    files = sorted(str(p.relative_to(REPO)) for p in (REPO / "docker").glob("*.Dockerfile"))
    yield from _run("hadolint", "--no-color", "-c", str(HERE / "hadolint.yaml"), *files)


def _run(name: str, *arguments: str) -> Iterator[str]:
    if not (program := tool(name)):
        yield f"{name} is not installed: make k8s-check installs it"
        return
    done = subprocess.run([program, *arguments], cwd=REPO, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        yield from said or [f"{name} ended with exit code {done.returncode}"]


def checkov(overlay: Overlay) -> Iterator[str]:
    """Run checkov. It does not know RayJobs, so it gets their pods as Pods."""
    if not (program := tool("checkov")):
        yield "checkov is not installed: make k8s-check installs it"
        return
    pods = [as_pod(p.name, p.labels, p.spec) for p in overlay.pods() if p.owner.startswith("RayJob/")]
    skipped = yaml.safe_load((HERE / "checkov.yaml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        plain = [d for d in overlay.documents if d["kind"] != "RayJob"]
        (Path(folder) / "all.yaml").write_text(yaml.safe_dump_all([*plain, *pods]))
        options = ["--framework", "kubernetes", "--output", "json", "--quiet", "--skip-download", "--compact"]
        command = [program, "-d", folder, *options, "--skip-check", ",".join(skipped)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LOG_LEVEL": "ERROR"})
    report = json.loads(done.stdout)
    if report.get("parsing_errors") or not report["summary"]["passed"]:
        yield f"checkov checked nothing, or could not read its input: {report['summary']}"
    for failed in report["results"]["failed_checks"]:
        yield f"checkov: {failed['check_id']} {failed['check_name']}: {failed['resource'].replace(NAMESPACE + '.', '')}"
