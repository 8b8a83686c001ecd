"""Run the real platform without Kubernetes: what the manifests define, in hand-made pods. See test_platform.py.

Postgres, an S3 server, MLflow behind passwords, and for each RayJob a cluster with a token of its own: shard; pretrain,
which is stopped, resumed and registers; fine-tune by name.
"""

from __future__ import annotations

import json
import os
import secrets as random
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import boto3
from pods import REPO, USER, Pod, bridge, nodes

from k8s.check.render import Overlay, load, render

NAMES = {"postgres": "10.77.0.2", "mlflow": "10.77.0.3", "s3": "10.77.0.4"}
# All that differs from the overlay gpu-large: the site, its size, and that there is no GPU.
CHANGED = {
    "s3://UNSET/": "s3://cdssl/",
    "https://s3.UNSET.invalid": "http://s3:9000",
    "gpu-large.yaml": "local.yaml",
    "aflow:3000": "aflow:300",
    "--workers 32": "--workers 2 --block-edges 2048",
}
MORE = {
    "shard": "",
    "pretrain": " schedule.steps=400 checkpoint.every=50 tracking.every=10 tracking.validate_every=200",
    "finetune": " --epochs 2",
}
Json = dict[str, Any]


def changed(text: str) -> str:
    """The text of the overlay as it is here."""
    for old, new in CHANGED.items():
        text = text.replace(old, new)
    return text


class Platform:
    """The pods, and what is said of them."""

    def __init__(self, work: Path) -> None:
        self.work, self.start = work, time.monotonic()
        self.overlay: Overlay = render("gpu-large")
        self.secrets = {
            d["metadata"]["name"]: d["stringData"] for d in load((REPO / "k8s/secrets.example.yaml").read_text())
        }
        database = random.token_hex(8)
        for content in self.secrets.values():
            own = random.token_hex(16)
            for key, value in content.items():
                content[key] = value.replace("CHANGE-ME", database if "@postgres" in value else own)
        self.secrets["postgres"]["POSTGRES_PASSWORD"] = database
        bridge(work / "pods", NAMES)
        self.volumes = {}
        for name in ("shards", "checkpoints", "results", "configs", "run"):
            self.volumes[name] = work / "volumes" / name
            self.volumes[name].mkdir(parents=True)
            os.chown(self.volumes[name], int(USER), int(USER))
        for config in (d for d in self.overlay.of("ConfigMap") if d["metadata"]["name"].startswith("pretrain-configs")):
            for key, text in config["data"].items():
                (self.volumes["configs"] / key).write_text(text)

    def say(self, text: str) -> None:
        """A line of the log."""
        print(f"{time.monotonic() - self.start:5.0f} s  {text}", flush=True)

    def env(self, container: Json) -> dict[str, str]:
        """The environment of a container, from ConfigMaps and Secrets."""
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                found |= self.secrets[source["secretRef"]["name"]]
            else:
                found |= (self.overlay.find("ConfigMap", source["configMapRef"]["name"]) or {})["data"]
        for variable in container["env"]:
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                found[variable["name"]] = self.secrets[reference["name"]][reference["key"]]
            else:
                found[variable["name"]] = variable["value"]
        return {k: changed(v) for k, v in found.items()}

    def pod(self, name: str, address: str, spec: Json, container: Json) -> Pod:
        """A pod of a manifest: its environment and its volumes."""
        mounts = {}
        for mount in container["volumeMounts"]:
            if mount["mountPath"] not in ("/tmp", "/dev/shm"):
                source = self.volumes.get(mount["name"], self.work / "volumes" / f"{name}-{mount['name']}")
                source.mkdir(exist_ok=True)
                os.chown(source, int(USER), int(USER))
                mounts[mount["mountPath"]] = (source, "ro" if mount.get("readOnly") else "rw")
        return Pod(name, address, self.work / "pods", self.env(container), mounts)

    def services(self) -> None:
        """PostgreSQL, S3 and MLflow."""
        data = self.work / "volumes" / "data"
        data.mkdir()
        os.chown(data, int(USER), int(USER))
        postgres = Pod("postgres", NAMES["postgres"], self.work / "pods", mounts={"/data": (data, "rw")})
        bin_ = f"{next(Path('/usr/lib/postgresql').glob('*/bin'))}"
        postgres.env["PATH"] = f"{bin_}:/usr/bin:/bin"
        code, said = postgres.run(
            "bash",
            "-c",
            "cat > /tmp/pw; initdb -D /data/pg -U mlflow --encoding=UTF8 --auth=scram-sha-256 --pwfile=/tmp/pw; "
            "echo 'host all all 10.77.0.0/24 scram-sha-256' >> /data/pg/pg_hba.conf",
            stdin=self.secrets["postgres"]["POSTGRES_PASSWORD"],
        )
        assert code == 0, said
        postgres.start(
            "postgres", "-D", "/data/pg", "-k", "/tmp", "-c", "listen_addresses=*", log=self.work / "postgres.log"
        )
        password = self.secrets["postgres"]["POSTGRES_PASSWORD"]
        wait(
            lambda: (
                postgres.run("env", f"PGPASSWORD={password}", "createdb", "-h", "localhost", "-U", "mlflow", "mlflow")[
                    0
                ]
                == 0
            )
        )

        s3 = Pod("s3", NAMES["s3"], self.work / "pods")
        s3.start("python", "-m", "moto.server", "-H", "0.0.0.0", "-p", "9000", log=self.work / "s3.log")
        wait(lambda: answers("http://10.77.0.4:9000/"))
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url="http://10.77.0.4:9000", **keys).create_bucket(Bucket="cdssl")
        self.say("postgres and an S3 server are up")

        spec = (self.overlay.find("Deployment", "mlflow") or {})["spec"]["template"]["spec"]
        migrate, server = spec["initContainers"][0], spec["containers"][0]
        mlflow = self.pod("mlflow", NAMES["mlflow"], spec, server)
        mlflow.mounts["/opt/cdssl"] = (REPO / "docker", "ro")
        mlflow.mounts["/run/mlflow"] = (self.volumes["run"], "rw")
        for _ in range(2):  # the second time there is nothing to migrate
            code, said = mlflow.run(*migrate["command"])
            assert code == 0, said
        mlflow.mounts["/run/mlflow"] = (self.volumes["run"], "ro")
        mlflow.start(*server["command"], *map(changed, server["args"]), log=self.work / "mlflow.log")
        wait(lambda: answers("http://10.77.0.3:5000/health"))
        for user in ("pretrain", "finetune"):
            secret = self.secrets[f"mlflow-{user}"]
            code, said = mlflow.run(
                "python",
                "/opt/cdssl/mlflow_users.py",
                secret["MLFLOW_TRACKING_USERNAME"],
                stdin=secret["MLFLOW_TRACKING_PASSWORD"],
            )
            assert code == 0, said
            self.say(f"mlflow: {said.strip().splitlines()[-1]}")

    def cluster(self, job: str, first: int) -> list[Pod]:
        """A RayCluster as the operator starts it: a head, and a worker where the job has workers."""
        spec = (self.overlay.find("RayJob", job) or {})["spec"]["rayClusterSpec"]
        token = {"RAY_AUTH_MODE": spec["authOptions"]["mode"], "RAY_AUTH_TOKEN": random.token_hex(32)}
        pods: list[Pod] = []
        for i, group in enumerate([spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])]):
            template = group["template"]["spec"]
            role = "worker" if i else "head"
            pod = self.pod(f"{job}-{role}-{first}", f"10.77.0.{first + i}", template, template["containers"][0])
            pod.env |= token
            parameters = dict(group["rayStartParams"])
            if int(parameters.get("num-cpus", 1)) or i:
                parameters["num-cpus"] = "2"
            place = [f"--address=10.77.0.{first}:6379"] if i else ["--head", "--port=6379", "--dashboard-host=0.0.0.0"]
            options = [f"--{k}={v}" for k, v in parameters.items()]
            options += [f"--node-ip-address={pod.address}", "--metrics-export-port=8080", "--block"]
            pod.start("ray", "start", *place, *options, log=self.work / f"{pod.name}.log")
            if not i:
                wait(lambda: answers(f"http://10.77.0.{first}:8265/api/version", 401))
            pods.append(pod)
        wait(lambda: alive(f"http://10.77.0.{first}:8265", pods[0].env["RAY_AUTH_TOKEN"]) == len(pods))
        return pods

    def submit(self, job: str, first: int, token: str, name: str = "") -> Any:
        """Start the submitter's pod; its output is the job's."""
        name = name or job
        spec = (self.overlay.find("RayJob", job) or {})["spec"]
        template = spec["submitterPodTemplate"]["spec"]
        pod = self.pod(
            f"{name}-submitter-{first}",
            f"10.77.0.{first + (5 if name == job else 6)}",
            template,
            template["containers"][0],
        )
        pod.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ADDRESS": f"http://10.77.0.{first}:8265"}
        entrypoint = changed(spec["entrypoint"]) + MORE[job]
        self.say(f"{job}: {entrypoint}")
        # As the operator writes it: the entrypoint is read by this shell, and by the one that runs it on the head.
        return pod.start(
            "bash",
            "-c",
            f"ray job submit --no-wait -- {entrypoint} && "
            'ray job logs --follow $(ray job list | grep -o "raysubmit_[A-Za-z0-9]*" | head -1); '
            "ray job list | grep -o \"status=<JobStatus.[A-Z]*: '[A-Z]*'>\" | head -1",
            log=self.work / f"{name}-{first}.job.log",
        )

    def done(self, job: str, first: int, process: Any, timeout: float = 900) -> str:
        """The output of a job that has ended."""
        process.wait(timeout)
        text = (self.work / f"{job}-{first}.job.log").read_text()
        for line in dict.fromkeys(text.splitlines()):  # Ray repeats the end of a log that failed
            if any(
                word in line
                for word in (
                    "crystals, cutoff",
                    "validation",
                    "encoder",
                    "stopped with",
                    "resum",
                    "error: ",
                    "JobStatus",
                )
            ):
                self.say(f"  {line.strip()[:170]}")
        return text


def wait(true: Any, limit: float = 300) -> None:
    """Until something is true."""
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end, f"not true after {limit} s"
        time.sleep(0.5)


def answers(url: str, *codes: int) -> bool:
    """Whether a server answers, with one of these codes."""
    try:
        return urllib.request.urlopen(url, timeout=3).status < 300
    except urllib.error.HTTPError as why:
        return why.code in codes or not codes
    except OSError:
        return False


def alive(url: str, token: str) -> int:
    """Nodes of a Ray cluster that answers."""
    try:
        return len(nodes(url, token))
    except OSError:
        return 0


def main(work: Path) -> None:
    """The story."""
    platform = Platform(work)
    say, results = platform.say, {}
    platform.services()

    pods = platform.cluster("shard", 20)
    refused = platform.submit("shard", 20, "0" * 64, "stranger")
    results["wrong token"] = platform.done("stranger", 20, refused)
    say("shard: a submitter with another token was refused")
    results["shard"] = platform.done("shard", 20, platform.submit("shard", 20, pods[0].env["RAY_AUTH_TOKEN"]))
    stop(pods)

    status = platform.volumes["checkpoints"] / "main" / "status.json"
    pods = platform.cluster("pretrain", 40)
    job = platform.submit("pretrain", 40, pods[0].env["RAY_AUTH_TOKEN"])
    wait(lambda: status.exists() and json.loads(status.read_text())["state"] == "training")
    spec = (platform.overlay.find("RayJob", "pretrain") or {})["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    hook = spec["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    say("pretrain: the worker's pod must go: its preStop hook")
    begin = time.monotonic()
    code, said = pods[1].run(*hook)
    results["hook"] = [code, said, time.monotonic() - begin, json.loads(status.read_text())]
    say(f"  {results['hook'][3]['state']!r} at step {results['hook'][3]['step']}, {results['hook'][2]:.1f} s after")
    results["stopped"] = platform.done("pretrain", 40, job)
    stop(pods)
    say("pretrain: the next attempt, on a new cluster")
    pods = platform.cluster("pretrain", 50)
    results["pretrain"] = platform.done("pretrain", 50, platform.submit("pretrain", 50, pods[0].env["RAY_AUTH_TOKEN"]))
    results["status"] = json.loads(status.read_text())
    stop(pods)

    pods = platform.cluster("finetune", 60)
    results["finetune"] = platform.done("finetune", 60, platform.submit("finetune", 60, pods[0].env["RAY_AUTH_TOKEN"]))
    results["list"] = pods[0].run("python", "-m", "cdssl_dist.mlops.registry_cli", "list")[1]
    say(f"registry: {results['list'].strip().splitlines()[-1]}")
    results["promote"] = pods[0].run(
        "python", "-m", "cdssl_dist.mlops.registry_cli", "promote", "models:/cdssl-encoder/1"
    )
    say(f"fine-tuning's user may not promote: {results['promote'][1].strip().splitlines()[-1][:150]}")
    stop(pods)
    (work / "results.json").write_text(json.dumps(results))


def stop(pods: list[Pod]) -> None:
    """End the pods of a cluster."""
    for pod in pods:
        pod.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
