"""Three hosts on a bridge, a Ray cluster over them, and a job on it that everything befalls. See test_hosts.py.

Only inside namespaces of its own (``unshare --net --mount --pid …``): addresses, links, mounts and processes end with
those. What is seen goes into ``results.json``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
HEAD = "10.78.0.1"
ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TMPDIR": "/tmp",
    "GLOO_SOCKET_IFNAME": "eth0",  # all hosts have one name here, which says nothing of their addresses
    # A silent host is dead, and a drain is seen, within seconds: else the story would take minutes longer.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


def shell(text: str) -> None:
    subprocess.run(shlex.split(text), check=True)


class Host:
    """A network namespace with an address on the bridge."""

    def __init__(self, number: int) -> None:
        self.name, self.address, self.link = f"host{number}", f"10.78.0.{number}", f"veth{number}"
        shell(f"ip netns add {self.name}")
        shell(f"ip link add {self.link} type veth peer name eth0 netns {self.name}")
        shell(f"ip link set {self.link} master br0 up")
        shell(f"ip -n {self.name} addr add {self.address}/24 dev eth0")
        shell(f"ip -n {self.name} link set eth0 up")
        shell(f"ip -n {self.name} link set lo up")

    def run(self, *command: str, **more: Any) -> subprocess.CompletedProcess[str]:
        inside = ["ip", "netns", "exec", self.name, *command]
        return subprocess.run(inside, env=os.environ | ENV | more, capture_output=True, text=True, timeout=300)

    def join(self, cpus: int) -> None:
        """Start Ray: the head of a cluster, or a node of it."""
        where = ["--head", "--port=6379"] if self.address == HEAD else [f"--address={HEAD}:6379"]
        if self.address == HEAD:
            where += ["--dashboard-host=0.0.0.0"]
        options = [f"--node-ip-address={self.address}", f"--num-cpus={cpus}", "--disable-usage-stats"]
        answer = self.run(*RAY, "start", *where, *options)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def cut(self) -> None:
        """Unplug the cable: nobody is told."""
        shell(f"ip link set {self.link} down")

    def repair(self) -> None:
        """Plug it in again; what ran there is ended."""
        self.kill()
        shell(f"ip link set {self.link} up")

    def kill(self) -> None:
        """End all that runs there, at once."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in found.stdout.split():
            os.kill(int(pid), signal.SIGKILL)


class Story:
    """The cluster and the job, and what is seen of them."""

    def __init__(self, work: Path, config: Path) -> None:
        self.config, self.begin = config, time.monotonic()
        self.run = Path(json.loads(config.read_text())["run"])
        shell("mount -t tmpfs none /run")  # ip netns keeps names there
        Path("/tmp/ray").mkdir(exist_ok=True)
        shell("mount -t tmpfs none /tmp/ray")  # where other programs would find this cluster
        shell("ip link add br0 type bridge")
        shell("ip link set br0 up")
        shell("ip link set lo up")
        self.hosts = [Host(number) for number in (1, 2, 3, 4)]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:5.0f} s  {text}", flush=True)

    def until(self, what: str, true: Callable[[], Any], limit: float = 420.0) -> None:
        end = time.monotonic() + limit
        while not true():
            assert time.monotonic() < end, f"not seen in {limit:.0f} s: {what}\n{self.job('logs')[-3000:]}"
            time.sleep(0.5)
        self.say(what)

    def status(self) -> dict[str, Any]:
        path = self.run / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def trains(self, ranks: int, after: int = 0) -> bool:
        seen = self.status()
        return (seen.get("state"), seen.get("world_size")) == ("training", ranks) and seen["step"] > after

    def drain(self, host: Host) -> None:
        """As a cluster does whose spot machine will be taken away."""
        find = (
            "import ray; ray.init(address='auto', log_to_driver=False); print(*[n['NodeID'] for n in ray.nodes() "
            f"if n['Alive'] and n['NodeManagerAddress'] == '{host.address}'])"
        )
        node = self.hosts[0].run(sys.executable, "-c", find, RAY_ADDRESS=f"{HEAD}:6379").stdout.split()[-1]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        where = ["--address", f"{HEAD}:6379", "--node-id", node, "--deadline-remaining-seconds", "600"]
        answer = self.hosts[0].run(*RAY, "drain-node", *where, *reason)
        assert answer.returncode == 0, answer.stderr

    def failures(self) -> list[str]:
        lines = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [line["what"] for line in lines if line["event"] == "workers failed"]

    def job(self, what: str, *more: str, name: str | None = None) -> str:
        """``ray job WHAT`` from a host that has no part in the cluster but its token."""
        where = ["--address", f"http://{HEAD}:8265"]
        return (
            self.hosts[3]
            .run(*RAY, "job", what, *where, *more, *([name or self.name] if what != "submit" else []))
            .stdout
        )

    def submit(self, name: str) -> None:
        # The job's process is asked to stop with SIGTERM, and given this long to save.
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120", "PYTHONPATH": os.environ["PYTHONPATH"]}}
        self.name = name
        answer = self.job(
            *["submit", "--no-wait", "--submission-id", name, "--runtime-env-json", json.dumps(runtime), "--"],
            *[sys.executable, "-m", "cdssl_dist.pretrain", "--config", str(self.config)],
        )
        assert name in answer, answer


def main(work: Path, config: Path) -> None:
    """The story."""
    story = Story(work, config)
    head, first, second, third = story.hosts
    head.join(cpus=0)
    first.join(cpus=1)
    second.join(cpus=1)
    story.say("a head and two nodes")
    stranger = third.run(*RAY, "job", "list", "--address", f"http://{HEAD}:8265", RAY_AUTH_TOKEN="0" * 64)
    results: dict[str, Any] = {"stranger": stranger.returncode}

    story.submit("one")
    story.until("trains on two hosts", lambda: story.trains(2, after=20))
    second.cut()
    before = story.status()["step"]
    story.until("the link of one was cut: trains on the other alone", lambda: story.trains(1, after=before - 10))
    third.join(cpus=1)
    story.until("a third host came: trains on two", lambda: story.trains(2))
    first.kill()
    before = story.status()["step"]
    story.until("a host was killed: trains on the third alone", lambda: story.trains(1, after=before - 10))
    second.repair()
    second.join(cpus=1)
    story.until("the first to be cut off is back: trains on two", lambda: story.trains(2))
    failures = len(story.failures())
    story.drain(second)
    story.until("its host will be taken away: trains on the other alone", lambda: story.trains(1))
    results["failures"], results["failures of the drain"] = story.failures(), len(story.failures()) - failures
    story.job("stop")
    results["stopped"] = story.status()
    results["said"] = story.job("logs")
    story.say(f"stopped: {results['stopped'].get('state')} at step {results['stopped'].get('step')}")

    story.submit("two")
    story.until("the job has ended", lambda: re.search("succeeded|failed", story.job("status"), re.I), 600)
    results["status"], results["logs"] = story.job("status"), story.job("logs")
    (work / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
