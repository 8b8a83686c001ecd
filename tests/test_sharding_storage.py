"""Data sets and sources behind URLs: on a server that speaks S3, in memory, and as ``file://``."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from killable import Killable
from test_format import contents, optimade
from test_sharding_runs import COMMAND, line_of

from cdssl_dist.data.dataset import DataSet
from sharding.__main__ import main
from sharding.crystal import Crystal
from sharding.manifest import DataSetError
from sharding.pipeline import shard
from sharding.sources import from_crystals
from sharding.storage import Remote, TargetError

Environment = dict[str, str]


@pytest.fixture(scope="module")
def server() -> Iterator[Environment]:
    """A server that speaks S3, with a bucket; what a client must know of it."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install cdssl-dist[s3]")
    moto = pytest.importorskip("moto.server", reason="needs a server that speaks S3: pip install 'moto[s3]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield environment
        fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CDSSL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, aflow: list[Crystal]) -> Path:
    return optimade(tmp_path_factory.mktemp("source") / "some.parquet", aflow[:200], {}, group=32)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """The same data set in a folder."""
    folder = tmp_path_factory.mktemp("local") / "d"
    assert main(command(source, folder)) == 0
    return folder


def command(source: Any, out: Any) -> list[str]:
    return [str(source), "--out", str(out), "--workers", "1", *COMMAND]


def fetched(url: str, to: Path) -> dict[str, str]:
    """The contents of what is behind a URL."""
    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache()
    system.get(path, str(to), recursive=True)
    return contents(to)


@pytest.mark.server
def test_from_a_bucket_into_a_bucket(
    server: Environment, source: Path, local: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = fsspec.filesystem("s3")
    system.put_file(str(source), "bucket/in/some.parquet")
    assert main(command("s3://bucket/in/some.parquet", "s3://bucket/out/d")) == 0
    assert "upload: 12 files" in capsys.readouterr().err
    assert fetched("s3://bucket/out/d", tmp_path / "d") == contents(local)
    with DataSet("s3://bucket/out/d") as far, DataSet(local) as near:  # as training reads it, through the cache
        assert [far.read(block) for block in range(len(near.checksums))] == list(map(near.read, near.blocks["block"]))
    assert not list(cache.glob("unfinished/*"))
    before = system.find("bucket/out", detail=True)
    assert main(command(source, "s3://bucket/out/d")) == 2
    assert line_of(capsys) == "error: s3://bucket/out/d: holds a data set already; give another URL or remove it"
    system.invalidate_cache()
    assert system.find("bucket/out", detail=True) == before


def on_s3(environment: Environment, arguments: list[str]) -> int:
    os.environ.update(environment)
    return main(arguments)


@pytest.mark.server
def test_killed_on_the_way_to_a_bucket(
    server: Environment, source: Path, local: Path, tmp_path: Path, cache: Path
) -> None:
    """Whenever the manifest is there, all of the data set is."""
    chance = random.Random(0)
    system = fsspec.filesystem("s3")
    kills = 0
    for number in itertools.count():
        out, mine, longest = f"bucket/killed/{number}", server | {"CDSSL_CACHE": f"{cache}/{number}"}, 0.8
        done = False
        while not done:
            with Killable(tmp_path / "log", on_s3, mine, command(source, f"s3://{out}")) as run:
                deadline = time.monotonic() + chance.uniform(0, longest)
                while run.running() and time.monotonic() < deadline:
                    time.sleep(0.002)
                done = not run.running()
                run.kill()
            longest *= 1.2
            kills += not done
            system.invalidate_cache()
            done |= system.exists(f"{out}/manifest.json")
        assert fetched(f"s3://{out}", tmp_path / f"{number}") == contents(local), (tmp_path / "log").read_text()
        if kills >= 6:
            return


class PowerCut(Exception):
    pass


def test_what_was_uploaded_is_not_uploaded_again(
    source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uploaded: list[str] = []
    upload = Remote._upload

    def failing(self: Remote, name: str) -> None:
        if len(uploaded) == 7:
            raise PowerCut("no more")
        upload(self, name)
        uploaded.append(name)

    monkeypatch.setattr(Remote, "_upload", failing)
    monkeypatch.setattr("sharding.storage.UPLOADS", 1)
    url = "memory://again/d"
    assert main(command(source, url)) == 1
    assert line_of(capsys).endswith("cannot be written (no more); run the same command again to continue")
    assert not fsspec.filesystem("memory").exists("again/d/manifest.json")
    first = uploaded.copy()
    uploaded.clear()
    uploaded.append("")
    monkeypatch.setattr(Remote, "_upload", lambda self, name: (uploaded.append(name), upload(self, name)))
    assert main(command(source, url)) == 0
    assert "convert: 200 crystals" not in capsys.readouterr().err
    assert sorted([*first, *uploaded[1:]]) == sorted(contents(local).keys() - {"manifest.json"})
    assert fetched(url, tmp_path / "d") == contents(local)


def test_another_run_was_faster(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines, one place: the second to come to its end leaves the first one's manifest alone."""
    system = fsspec.filesystem("memory")
    upload = Remote._upload

    def publish(self: Remote, name: str) -> None:
        upload(self, name)
        system.pipe_file("/faster/d/manifest.json", b"{}")

    monkeypatch.setattr(Remote, "_upload", publish)
    assert main(command(source, "memory://faster/d")) == 2
    assert "holds a data set already" in line_of(capsys)
    assert system.cat_file("/faster/d/manifest.json") == b"{}"


def test_killed_while_it_clears_away(
    source: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(self: Remote) -> None:
        raise PowerCut

    url = "memory://clearing/d"
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Remote, "remove", cut)
        main(command(source, url))
    assert main(command(source, url)) == 2  # it is there, and what was left of the work is gone
    assert fetched(url, tmp_path / "d") == contents(local)


def test_a_file_url_is_a_folder(source: Path, local: Path, tmp_path: Path) -> None:
    assert main(command(f"file://{source}", f"file://{tmp_path}/a%20b/d")) == 0
    assert contents(tmp_path / "a b" / "d") == contents(local)


def test_work_is_for_urls(tmp_path: Path, aflow: list[Crystal]) -> None:
    with pytest.raises(DataSetError, match="--work is only for URLs"):
        shard([from_crystals(aflow[:9])], tmp_path / "d", work=tmp_path / "w")
    shard([from_crystals(aflow[:9])], "memory://bucket/d", work=tmp_path / "w")
    assert fsspec.filesystem("memory").exists("bucket/d/manifest.json")
    assert (tmp_path / "w" / "unfinished").is_dir()


def test_a_missing_package_is_named(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert main(command(source, "gs://bucket/d")) == 2
    assert "gcsfs" in line_of(capsys)


@pytest.mark.server
def test_no_server_is_one_line(server: Environment, aflow: list[Crystal], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(TargetError, match=r"^s3://bucket/d: cannot be reached \("):
        shard([from_crystals(aflow[:9])], "s3://bucket/d")
    fsspec.filesystem("s3").clear_instance_cache()
