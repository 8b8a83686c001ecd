"""Hosts on a bridge, a Ray cluster across them, and a job that suffers all kinds of failures. See test_hosts.py.

Runs only in its own namespaces (``unshare --net --mount --pid …``), and all addresses, links, mounts and processes end
with them. Observations go into ``results.json``.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pods import USER, Pod, bridge, nodes

HEAD = "10.77.0.11"
ENV = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "eth0",  # all hosts have one name here, which says nothing of their addresses
    # A silent host is dead, and a drain is seen, within seconds: else the story would take minutes longer.
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}


class Story:
    """The cluster and the job, and what is seen of them."""

    def __init__(self, work: Path, config: Path) -> None:
        content = json.loads(config.read_text())
        self.work, self.config, self.run, self.begin = work, config, Path(content["run"]), time.monotonic()
        bridge(work / "pods", {})
        runs = self.run.parent
        runs.mkdir()
        os.chown(runs, int(USER), int(USER))
        read = (config.parent, Path(content["data"]["path"]))
        seen = {str(runs): (runs, "rw"), **{str(folder): (folder, "ro") for folder in read}}
        self.hosts = [Pod(f"host{n}", f"10.77.0.{10 + n}", work / "pods", ENV, seen) for n in (1, 2, 3, 4)]

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:5.0f} s  {text}", flush=True)

    def join(self, host: Pod, cpus: int) -> None:
        """Start Ray: the head of a cluster, or a node of it."""
        head = ["--head", "--port=6379", "--dashboard-host=0.0.0.0"]
        where = head if host.address == HEAD else [f"--address={HEAD}:6379"]
        options = [f"--node-ip-address={host.address}", f"--num-cpus={cpus}", "--disable-usage-stats", "--block"]
        log = self.work / f"{host.name}-{len(host.running)}.log"
        host.start("ray", "start", *where, *options, log=log)
        end = time.monotonic() + 300.0
        while "Ray runtime started" not in log.read_text():
            assert host.running[-1].poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)

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

    def drain(self, host: Pod) -> None:
        """As a cluster does whose spot machine will be taken away."""
        node = nodes(f"http://{HEAD}:8265", ENV["RAY_AUTH_TOKEN"])[host.address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        where = ["--address", f"{HEAD}:6379", "--node-id", node, "--deadline-remaining-seconds", "600"]
        code, said = self.hosts[0].run("ray", "drain-node", *where, *reason)
        assert code == 0, said

    def failures(self) -> list[str]:
        lines = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [line["what"] for line in lines if line["event"] == "workers failed"]

    def job(self, what: str, *more: str) -> str:
        """``ray job WHAT`` from a host that has no part in the cluster but its token."""
        which = [] if what == "submit" else [self.name]
        return self.hosts[3].run("ray", "job", what, "--address", f"http://{HEAD}:8265", *more, *which)[1]

    def submit(self, name: str) -> None:
        # The job's process is asked to stop with SIGTERM, and given this long to save.
        runtime = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
        self.name = name
        answer = self.job(
            *["submit", "--no-wait", "--submission-id", name, "--runtime-env-json", json.dumps(runtime), "--"],
            *["python", "-m", "cdssl_dist.pretrain", "--config", str(self.config)],
        )
        assert name in answer, answer


def main(work: Path, config: Path) -> None:
    """The story."""
    story = Story(work, config)
    head, first, second, third = story.hosts
    story.join(head, cpus=0)
    story.join(first, cpus=1)
    story.join(second, cpus=1)
    story.say("a head and two nodes")
    wrong = f"RAY_AUTH_TOKEN={'0' * 64}"
    results: dict[str, Any] = {
        "stranger": third.run("env", wrong, "ray", "job", "list", "--address", f"http://{HEAD}:8265")[0]
    }

    story.submit("one")
    story.until("trains on two hosts", lambda: story.trains(2, after=20))
    second.cut()
    before = story.status()["step"]
    story.until("the link of one was cut: trains on the other alone", lambda: story.trains(1, after=before - 10))
    story.join(third, cpus=1)
    story.until("a third host came: trains on two", lambda: story.trains(2))
    first.kill()
    before = story.status()["step"]
    story.until("a host was killed: trains on the third alone", lambda: story.trains(1, after=before - 10))
    second.kill()
    second.repair()
    story.join(second, cpus=1)
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
