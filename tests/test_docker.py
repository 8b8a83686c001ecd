"""The steps of docker/cpu.Dockerfile, executed in a plain chroot: what a container engine would do, without one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SUITE = "bookworm"


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(name, arguments) of each instruction, comments and line breaks gone."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


class Builder:
    """Executes instructions; each stage is a folder."""

    def __init__(self, base: Path, work: Path) -> None:
        self.base, self.work = base, work
        self.roots: dict[str, Path] = {}
        self.root = work
        self.user, self.env, self.healthcheck, self.entrypoint = "0", dict[str, str](), list[str](), list[str]()

    def execute(self, name: str, rest: str) -> None:
        """One instruction; an unknown one is an error, so that nothing is skipped unseen."""
        if name == "FROM":
            image, _, stage = rest.partition(" AS ")
            self.root = self.work / (stage or "final")
            self.roots[stage] = self.root
            if image == "scratch":
                self.root.mkdir()
            else:
                subprocess.run(["cp", "-a", self.base, self.root], check=True)
            self.user, self.env = "0", {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
        elif name == "RUN":
            self.run("bash", "-euo", "pipefail", "-c", rest)
        elif name == "COPY":
            words = shlex.split(rest)
            source = REPO
            if words[0].startswith("--from="):
                source = self.roots[words.pop(0).removeprefix("--from=")]
            *what, where = words
            target = self.root / where.lstrip("/")
            (target if where.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
            for item in what:
                subprocess.run(["cp", "-a", source / item.lstrip("/"), target], check=True)
        elif name == "ENV":
            self.env |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif name == "USER":
            self.user = rest.partition(":")[0]
        elif name == "HEALTHCHECK":
            self.healthcheck = json.loads(rest.partition("CMD ")[2])
        elif name == "ENTRYPOINT":
            self.entrypoint = json.loads(rest)
        else:
            assert name in ("ARG", "SHELL", "LABEL", "WORKDIR", "CMD"), name

    def run(self, *command: str) -> str:
        """A command in the stage, as its user; what reaches package indexes here is passed on."""
        outside = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
        for key in ("PIP_CERT", "PIP_FIND_LINKS"):
            outside.pop(key, None)
        certificates = Path("/etc/ssl/certs/ca-certificates.crt")
        if certificates.exists():
            shutil.copy(certificates, self.root / "outside.crt")
            outside["PIP_CERT"] = "/outside.crt"
        shutil.copy("/etc/resolv.conf", self.root / "etc" / "resolv.conf")
        shutil.copy("/etc/hosts", self.root / "etc" / "hosts")
        user = ["setpriv", "--reuid", self.user, "--regid", self.user, "--clear-groups"] if self.user != "0" else []
        enter = 'mount -t proc proc "$0/proc"; mount --bind /dev "$0/dev"; exec chroot "$0" "$@"'
        env = ["env", "-i", *(f"{k}={v}" for k, v in (outside | self.env).items())]
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-c", enter, self.root, *user, *env, *command],
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.mark.parametrize("name", ["build", "cpu", "train"])
def test_the_locks_are_those_of_the_constraints(name: str) -> None:
    def names(text: str) -> dict[str, str]:
        found = re.findall(r"^([\w.-]+)(?:\[[^]]*\])?==([^ ;\\\s]+)", text, re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}

    lock = (REPO / "docker" / f"{name}.lock").read_text()
    locked, pinned = names(lock), names((REPO / "constraints.txt").read_text())
    assert locked
    assert {n: v for n, v in locked.items() if pinned.get(n) != v} == {}, "run docker/lock.sh"
    entries = re.split(r"\n(?=[a-z])", lock[lock.index("\n", lock.index("docker/lock.sh")) + 1 :])
    assert all("--hash=sha256:" in entry for entry in entries)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_of_the_cpu_image(tmp_path: Path) -> None:
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("needs root and debootstrap")
    base = tmp_path / "base"
    made = subprocess.run(["debootstrap", "--variant=minbase", SUITE, base], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no mirror of Debian can be reached: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    builder = Builder(base, tmp_path)
    for name, rest in instructions(REPO / "docker" / "cpu.Dockerfile"):
        builder.execute(name, rest)

    assert builder.run("id", "-u").strip() == "10001"
    builder.run(*builder.entrypoint, *builder.healthcheck)
    assert "3.17" in builder.run("mlflow", "--version")
    out = builder.run("python", "-m", "sharding", "aflow:60", "--out", "/tmp/shards", "--workers", "1")
    assert "60 crystals" in out
    builder.run("wget", "--version")
    with pytest.raises(AssertionError):
        builder.run("touch", "/opt/venv/x")  # what runs cannot change what it runs

    bom = json.loads((tmp_path / "sbom" / "sbom.cdx.json").read_text())
    listed = {(c["name"], c["version"]) for c in bom["components"]}
    lock = (REPO / "docker" / "cpu.lock").read_text()
    locked = {(n.partition("[")[0], v) for n, v in re.findall(r"^(\S+?)==([^ ;\\]+)", lock, re.MULTILINE)}
    assert locked <= listed
    assert {name for name, _ in listed - locked} <= {"cdssl-dist", "pip", "setuptools"}
