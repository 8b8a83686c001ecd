"""Pods without Kubernetes: network namespaces on a bridge, read-only root, unprivileged user. Needs root on Linux.

Runs only in its own namespaces (``in_namespaces``), and all addresses, links and mounts end with them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
USER = "10001"
# As root, in mount and process namespaces of its own: a new root of read-only binds, and then the command as a user.
ENTER = r"""
set -e
mount --make-rprivate /
mkdir -p "$POD/root" "$POD/tmp" "$POD/shm"
mount -t tmpfs none "$POD/root"
cd "$POD/root"
for d in bin lib lib64 sbin usr; do
    if [ -L "/$d" ]; then cp -P "/$d" .; else mkdir "$d"; mount --bind "/$d" "$d"; mount -o remount,bind,ro "$d"; fi
done
cp -a /etc etc; cp "$HOSTS" etc/hosts; echo "cdssl:x:USER:USER::/tmp:/usr/sbin/nologin" >> etc/passwd
mkdir -p dev proc tmp run var/tmp
mount --rbind /dev dev; mount --bind "$POD/shm" dev/shm; mount -t proc proc proc
mount --bind "$POD/tmp" tmp
while IFS=: read -r source target mode; do
    mkdir -p ".$target"; mount --bind "$source" ".$target"; mount -o "remount,bind,$mode" ".$target"
done <<< "$MOUNTS"
mount -o remount,ro .
exec chroot . setpriv --reuid USER --regid USER --clear-groups --no-new-privs --bounding-set=-all \
    env -i --chdir=/tmp bash -c "$COMMAND"
""".replace("USER", USER)


@dataclass
class Pod:
    """A network namespace with an address, in which commands run."""

    name: str
    address: str
    home: Path  # a folder for all pods
    env: dict[str, str] = field(default_factory=dict)
    mounts: dict[str, tuple[Path, str]] = field(default_factory=dict)  # path in the pod → (source, "ro" or "rw")

    def __post_init__(self) -> None:
        """Make the namespace and its link to the bridge."""
        self.link = f"v-{self.address.rpartition('.')[2]}"
        for command in (
            f"ip netns add {self.name}",
            f"ip link add {self.link} type veth peer name eth0 netns {self.name}",
            f"ip link set {self.link} master br0 up",
            f"ip -n {self.name} addr add {self.address}/24 dev eth0",
            f"ip -n {self.name} link set eth0 up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(shlex.split(command), check=True)
        self.folder = self.home / self.name
        self.running: list[subprocess.Popen[str]] = []  # all that was ever started
        for part in ("tmp", "shm"):
            (self.folder / part).mkdir(parents=True)
            (self.folder / part).chmod(0o1777)
        subprocess.run(["mount", "-t", "tmpfs", "none", str(self.folder / "shm")], check=True)
        (self.folder / "shm").chmod(0o1777)

    def start(self, *command: str, log: Path, stdin: str | None = None) -> subprocess.Popen[str]:
        """Run a command in the pod; its output goes into a file."""
        python = {Path(sys.prefix), Path(sys.base_prefix), REPO, *map(Path, sys.path)}
        needed = {str(p): (p, "ro") for p in sorted(python) if p.is_dir() and not p.is_relative_to("/usr")}
        mounts = "\n".join(f"{source}:{target}:{mode}" for target, (source, mode) in (needed | self.mounts).items())
        env = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PYTHONPATH": str(REPO), "HOME": "/tmp", **self.env}
        exports = " ".join(f"export {k}={shlex.quote(v)};" for k, v in env.items())
        inner = f"{exports} {shlex.join(command)} <&0 & wait $!"  # the shell stays, and reaps what others leave behind
        outer = {"POD": str(self.folder), "HOSTS": str(self.home / "hosts"), "MOUNTS": mounts, "COMMAND": inner}
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", ENTER]
        with open(log, "a") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *namespaces],
                env=os.environ | outer,
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
        if stdin is not None and process.stdin:
            process.stdin.write(stdin)
            process.stdin.close()
        self.running.append(process)
        return process

    def run(self, *command: str, stdin: str | None = None, timeout: float = 300) -> tuple[int, str]:
        """Exit code and output of a command."""
        log = self.folder / "last.log"
        log.unlink(missing_ok=True)
        code = self.start(*command, log=log, stdin=stdin).wait(timeout)
        return code, log.read_text()

    def kill(self) -> None:
        """End all that runs there, at once."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):  # with another that it was a child of
                os.kill(int(pid), signal.SIGKILL)
        for process in self.running:
            process.wait(30)

    def cut(self) -> None:
        """Unplug the cable: nobody is told."""
        subprocess.run(["ip", "link", "set", self.link, "down"], check=True)

    def repair(self) -> None:
        """Plug it in again."""
        subprocess.run(["ip", "link", "set", self.link, "up"], check=True)


def bridge(home: Path, names: dict[str, str]) -> None:
    """What links the pods, and the names that they know each other by."""
    home.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)  # ip netns keeps names there
    for command in (
        "ip link add br0 type bridge",
        "ip addr add 10.77.0.1/24 dev br0",
        "ip link set br0 up",
        "ip link set lo up",
    ):
        subprocess.run(shlex.split(command), check=True)
    hosts = {"localhost": "127.0.0.1", **names}
    (home / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))


def nodes(url: str, token: str) -> dict[str, str]:
    """Address → id of the living nodes of a Ray cluster, as the dashboard of its head says."""
    request = urllib.request.Request(f"{url}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"})
    found = [
        node["raylet"] for node in json.loads(urllib.request.urlopen(request, timeout=5).read())["data"]["summary"]
    ]
    return {node["nodeManagerAddress"]: node["nodeId"] for node in found if node.get("state") == "ALIVE"}


def in_namespaces(script: str, *arguments: Path) -> str:
    """What a script of this folder prints, run in namespaces of its own; skips the test where none can be made."""
    alone = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    probe = [*alone, "sh", "-c", "ip link add br0 type bridge && mount -t tmpfs none /run"]
    if os.geteuid() or not shutil.which("ip") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("needs root, iproute2, and namespaces")
    path = os.pathsep.join([str(REPO), str(TESTS), os.environ.get("PYTHONPATH", "")])
    command = [*alone, sys.executable, str(TESTS / script), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout
