"""Data sets behind a URL: the same blocks whatever network, disk and other processes do, or an error in time."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import fsspec
import pytest
import torch
from faulty_server import Fault, Server, always, busy, corrupt, cut, forbidden, hang_up, short, stall

from cdssl_dist.data import cache, remote
from cdssl_dist.data.cache import ShardCache
from cdssl_dist.data.dataset import BadBlockError, DataSet, is_data_set
from cdssl_dist.data.loader import Loader, Step
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.data.remote import Remote
from cdssl_dist.data.waiting import Patience
from sharding.manifest import DataSetError

QUICK = Patience(request=1.0, give_up=10.0, first_pause=0.01, longest_pause=0.05)


@pytest.fixture
def server(data_folder: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(data_folder, tmp_path / "served")
    found = Server(tmp_path / "served")
    thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield found
    found.released.set()
    found.shutdown()
    found.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of each test; requests are small, so that a shard takes several."""
    monkeypatch.setenv("CDSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PIECE", 10_000)
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("cdssl")] == []
    assert list(folder.glob("*.part")) == []


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def patience(self, **more: float) -> Patience:
        return Patience(clock=lambda: self.now, sleep=self.sleep, uniform=lambda low, high: high, **more)


def all_blocks(data: DataSet) -> list[bytes]:
    return [data.read(block) for block in range(len(data.checksums))]


def shard_of(data: DataSet, block: int) -> str:
    return str(data.manifest.shards[int(data.blocks["shard"][block])]["name"])


def loader(data: DataSet, last: int = 6) -> Loader:
    plan = EpochPlan(data.table("train"), 3, 1, 4)
    return Loader(data, plan, data.shape("train", 1), rank=0, world_size=1, first=0, end=last)


def assert_same_steps(a: list[Step], b: list[Step]) -> None:
    for s, t in zip(a, b, strict=True):
        assert (s.number, s.edges) == (t.number, t.edges)
        for x, y in zip(s.packs, t.packs, strict=True):
            assert all(torch.equal(getattr(x, f.name), getattr(y, f.name)) for f in fields(x))


def steps(data: DataSet) -> list[Step]:
    with loader(data) as found:
        return list(found)


# -- the same data -----------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_a_data_set_on_a_server_is_the_local_one(server: Server, data_folder: Path, folder: Path) -> None:
    local, far = DataSet(data_folder), DataSet(server.url + "/", patience=QUICK)
    assert far.manifest == local.manifest
    assert_same_steps(steps(far), steps(local))
    assert all_blocks(far) == all_blocks(local)
    assert {path.stem for path in folder.glob("*.tar")} == {shard["sha256"] for shard in local.manifest.shards}
    asked = server.asked.copy()
    again = DataSet(server.url, patience=QUICK)
    assert all_blocks(again) == all_blocks(local)
    assert {name for name, count in (server.asked - asked).items() if count} == {"manifest.json", "blocks.parquet"}
    assert server.encodings == {"identity"}  # in a compressed answer, a range is another one


def test_a_data_set_in_memory(data_folder: Path) -> None:
    """Any file system of fsspec, those that are not asynchronous too."""
    system = fsspec.filesystem("memory")
    system.put(str(data_folder), "/somewhere/data", recursive=True)
    assert all_blocks(DataSet("memory://somewhere/data")) == all_blocks(DataSet(data_folder))
    assert is_data_set("memory://somewhere/data")
    assert not is_data_set("memory://somewhere")
    system.rm("/somewhere", recursive=True)


def test_a_file_url_is_a_folder(data_folder: Path, folder: Path) -> None:
    assert DataSet(f"file://{data_folder}").folder == data_folder
    assert not folder.exists()


@pytest.mark.server
def test_without_a_cache_blocks_are_read_one_by_one(server: Server, data_folder: Path, folder: Path) -> None:
    assert all_blocks(DataSet(server.url, cache_gb=0, patience=QUICK)) == all_blocks(DataSet(data_folder))
    assert not folder.exists()


@pytest.mark.server
def test_a_server_that_knows_no_ranges(server: Server, data_folder: Path) -> None:
    server.ranges = False
    assert all_blocks(DataSet(server.url, patience=QUICK)) == all_blocks(DataSet(data_folder))


# -- a bad network -----------------------------------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.parametrize("fault", [busy, cut, short, corrupt, hang_up, stall])
def test_what_passes_is_not_noticed(server: Server, data_folder: Path, fault: Fault) -> None:
    local = DataSet(data_folder)
    server.faults = {shard["name"]: [fault] for shard in local.manifest.shards[:3]}
    if fault is not corrupt:  # a table is small, and what is wrong in it is said at once
        server.faults |= {"manifest.json": [fault], "blocks.parquet": [fault]}
    far = DataSet(server.url, patience=replace(QUICK, request=0.2))
    assert all_blocks(far) == all_blocks(local)
    assert not any(server.faults.values())


@pytest.mark.server
def test_a_dead_endpoint_is_an_error_after_the_stated_time(server: Server) -> None:
    clock = Clock()
    far = DataSet(server.url, patience=clock.patience())
    server.faults = {"*": [always(busy)]}
    with pytest.raises(DataSetError, match=rf"{shard_of(far, 4)}: not available after 120 s and \d+ tries.*503"):
        far.read(4)
    assert 110 <= clock.now <= 120
    server.faults, now = {}, clock.now
    far.read(4)  # and it is not held against it
    assert clock.now == now


@pytest.mark.server
def test_pauses_grow_and_are_spread(server: Server) -> None:
    drawn = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    patience = replace(Clock().patience(first_pause=1.0, longest_pause=5.0, give_up=20.0), uniform=uniform)
    server.faults = {"manifest.json": [always(busy)]}
    with pytest.raises(DataSetError):
        Remote(server.url, patience).read("manifest.json")
    assert drawn[:5] == [(0.5, 1.0), (1.0, 2.0), (2.0, 4.0), (2.5, 5.0), (2.5, 5.0)]


@pytest.mark.server
def test_a_long_wait_is_told_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = {"manifest.json": [always(busy)]}
    with pytest.raises(DataSetError):
        DataSet(server.url, patience=Clock().patience())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "503" in lines[0]
    assert "120 s" in lines[0]


def test_nobody_listens() -> None:
    clock = Clock()
    with pytest.raises(DataSetError, match=r"manifest.json: not available after 120 s"):
        DataSet("http://127.0.0.1:9", patience=clock.patience())
    assert clock.now <= 120


@pytest.mark.server
def test_an_endpoint_that_always_stalls_mid_body(server: Server) -> None:
    far = DataSet(server.url, patience=Patience(request=0.2, give_up=1.0, first_pause=0.01))
    server.faults = {"*": [always(stall)]}
    begin = time.monotonic()
    with pytest.raises(DataSetError, match="not available after 1 s"):
        far.read(0)
    assert time.monotonic() - begin < 2.0


@pytest.mark.server
@pytest.mark.parametrize(("fault", "message"), [(forbidden, "access denied .*403"), (None, "no such file")])
def test_what_does_not_pass_is_said_at_once(server: Server, fault: Fault | None, message: str) -> None:
    clock = Clock()
    far = DataSet(server.url, patience=clock.patience())
    name = shard_of(far, 0)
    if fault:
        server.faults = {name: [fault]}
    else:
        (server.folder / name).unlink()
    with pytest.raises(DataSetError, match=f"{name}: .*{message}"):
        far.read(0)
    assert server.asked[name] == 1
    assert clock.now == 0


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


class S3Error(Exception):
    """As botocore's: it has no status of its own."""


class NoCredentialsError(Exception):
    """By the name of botocore's."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (raised(FileNotFoundError("x"), S3Error()), "there is no such file"),
        (raised(FileNotFoundError("x"), ConnectionResetError()), "not available after 120 s .* ConnectionResetError"),
        (PermissionError("Forbidden"), "access denied .*Forbidden"),
        (NoCredentialsError("Unable to locate credentials"), "access denied .*Unable to locate credentials"),
        (OSError(5, "Input/output error"), "not available after 120 s"),
    ],
)
def test_errors_of_all_kinds_of_storage(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*rest: object) -> None:
        raise error

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "info", fail)
    with pytest.raises(DataSetError, match=message):
        Remote("memory://somewhere", Clock().patience()).size("a")


@pytest.mark.server
def test_what_is_no_data_set(server: Server) -> None:
    assert is_data_set(server.url)
    assert not is_data_set(server.url + "/nowhere")
    with pytest.raises(DataSetError, match=r"127.0.0.1:\d+/nowhere: not a data set"):
        DataSet(server.url.replace("//", "//user:secret@") + "/nowhere", patience=QUICK)
    (server.folder / "blocks.parquet").write_bytes(b"another")
    with pytest.raises(DataSetError, match=r"^http://127.0.0.1:\d+/blocks.parquet: its SHA-256 is not the one"):
        DataSet(server.url, patience=QUICK)


def test_a_file_system_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataSetError, match=r"s3://bucket/data: .*s3fs"):
        DataSet("s3://bucket/data")


@pytest.mark.server
def test_errors_do_not_tell_secrets(server: Server) -> None:
    server.faults = {"*": [forbidden]}
    with pytest.raises(DataSetError) as error:
        Remote(server.url.replace("//", "//user:secret@"), QUICK).read("manifest.json")
    assert "secret" not in str(error.value)


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.server
@pytest.mark.parametrize("how", ["flipped", "emptied", "replaced"])
def test_a_poisoned_cache_is_noticed_and_fetched_again_once(server: Server, folder: Path, how: str) -> None:
    far = DataSet(server.url, patience=QUICK)
    good, entry = far.read(5), far.manifest.shards[int(far.blocks["shard"][5])]
    path = folder / f"{entry['sha256']}.tar"
    if how == "flipped":
        flip(path, int(far.blocks["offset"][5]))
    elif how == "emptied":  # as a crash of the machine may do
        path.write_bytes(b"")
    else:
        shutil.copy(next(p for p in folder.parent.glob("served/*.tar") if p.name != entry["name"]), path)
    requests = -(-entry["size"] // remote.PIECE)
    before = server.asked[entry["name"]]
    for reader in (far, DataSet(server.url, patience=QUICK)):  # the one has it open, the other finds it
        assert reader.read(5) == good
    assert server.asked[entry["name"]] == before + requests
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.server
def test_a_shard_that_is_damaged_at_its_source(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Its SHA-256 is wrong, but most of its blocks are good."""
    far = DataSet(server.url, patience=QUICK)
    name, offset = shard_of(far, 4), int(far.blocks["offset"][4])
    flip(server.folder / name, offset)
    for block in (b for b in range(len(far.checksums)) if b != 4):
        far.read(block)
    with pytest.raises(BadBlockError, match=rf"{name}: block 4 at byte {offset}"):
        far.read(4)
    assert len(capsys.readouterr().err.splitlines()) == 1
    asked = server.asked[name]
    far.read(5)
    assert server.asked[name] - asked <= 2  # that block alone: the shard is not loaded for each of its blocks


@pytest.mark.server
def test_a_full_disk_means_reading_over_the_network(
    server: Server, data_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    clock = Clock()
    far = DataSet(server.url, patience=clock.patience())
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        assert_same_steps(steps(far), steps(DataSet(data_folder)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    name = shard_of(far, 0)
    asked = server.asked[name]
    far.read(0), far.read(0)
    assert server.asked[name] == asked + 2  # a request for each block: the disk is not tried again yet
    clock.now += cache.RETRY_AFTER
    far.read(0)
    asked = server.asked[name]
    far.read(0)
    assert server.asked[name] == asked


@pytest.mark.server
def test_a_disk_that_fills_up_during_the_download(
    server: Server, data_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where space cannot be taken in advance."""
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: len(data) // 2)
    assert all_blocks(DataSet(server.url, patience=QUICK)) == all_blocks(DataSet(data_folder))
    assert list(folder.glob("*.tar")) == []


@pytest.mark.server
def test_a_cache_that_cannot_be_written(server: Server, data_folder: Path, folder: Path) -> None:
    folder.write_text("not a folder")
    assert all_blocks(DataSet(server.url, patience=QUICK)) == all_blocks(DataSet(data_folder))


# -- bounds ------------------------------------------------------------------------------------------------------------


def fill(content: bytes) -> Callable[[int], None]:
    def download(descriptor: int) -> None:
        os.pwrite(descriptor, content, 0)

    return download


def contents(n: int) -> dict[str, bytes]:
    """n shards of 100 bytes: SHA-256 → bytes."""
    texts = [bytes([i]) * 100 for i in range(n)]
    return {hashlib.sha256(text).hexdigest(): text for text in texts}


def test_the_least_recently_used_shard_leaves_first(folder: Path) -> None:
    found, shards = ShardCache(folder, 300), contents(5)
    names = list(shards)
    for tick, name in enumerate([*names[:3], names[0], names[3], names[4]]):
        known = (folder / f"{name}.tar").exists()
        file = found.open(name, 100, fill(shards[name]))
        assert file is not None
        assert os.pread(file, 100, 0) == shards[name]
        os.close(file)
        if not known:  # long ago; what is used again is marked with the time of today
            os.utime(folder / f"{name}.tar", (tick, tick))
    assert {path.stem for path in folder.glob("*.tar")} == {names[0], names[3], names[4]}


def test_a_shard_that_leaves_can_still_be_read(folder: Path) -> None:
    found, shards = ShardCache(folder, 150), contents(4)
    files = {name: found.open(name, 100, fill(text)) for name, text in shards.items()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 150
    for name, file in files.items():
        assert file is not None
        assert os.pread(file, 100, 0) == shards[name]
        os.close(file)


def test_a_shard_larger_than_the_cache_is_not_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ShardCache(folder, 99)
    for name, text in contents(2).items():
        assert found.open(name, 100, fill(text)) is None
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(folder.glob("*.tar")) == []


def test_shards_give_way_where_others_fill_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, shards = ShardCache(folder, 10_000), contents(4)
    allocate = os.posix_fallocate

    def tight(file: int, offset: int, size: int) -> None:
        if sum(path.stat().st_size for path in folder.glob("*.tar")) + size > 250:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        allocate(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", tight)
    for tick, (name, text) in enumerate(shards.items()):
        file = found.open(name, 100, fill(text))
        assert file is not None
        os.close(file)
        os.utime(folder / f"{name}.tar", (tick, tick))
    assert {path.stem for path in folder.glob("*.tar")} == set(list(shards)[2:])


@pytest.mark.server
def test_a_data_set_larger_than_its_cache(server: Server, data_folder: Path, folder: Path) -> None:
    local = DataSet(data_folder)
    largest = max(shard["size"] for shard in local.manifest.shards)
    far = DataSet(server.url, cache_gb=2.1 * largest / 1e9, patience=QUICK)
    seen = 0
    for block in range(len(far.checksums)):
        assert far.read(block) == local.read(block)
        seen = max(seen, sum(path.stat().st_size for path in folder.iterdir()))
    assert largest < seen <= 2.1 * largest


@pytest.mark.server
def test_a_shard_that_left_the_cache_is_let_go_when_it_is_not_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its bytes would stay on the disk beside those that the cache may hold."""
    now = [0.0]
    monkeypatch.setattr("cdssl_dist.data.storage.time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def held() -> int:
        gc.collect()
        files = Path("/proc/self/fd").iterdir()
        return sum(".tar (deleted)" in os.readlink(file) for file in files if file.is_symlink())

    largest = max(shard["size"] for shard in DataSet(server.folder).manifest.shards)
    far = DataSet(server.url, cache_gb=2.1 * largest / 1e9, patience=QUICK)
    first = {int(shard): block for block, shard in reversed([*enumerate(far.blocks["shard"])])}
    assert len(first) > 6
    for shard in range(5):
        far.read(first[shard])
        far.read(first[0])  # is in use all the time
    assert held() >= 2
    now[0] += 100.0
    far.read(first[0])
    far.read(first[5])
    assert held() <= 1
    asked = server.asked[far.manifest.shards[0]["name"]]
    far.read(first[0])
    assert server.asked[far.manifest.shards[0]["name"]] == asked


@pytest.mark.server
def test_few_shards_are_open_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdssl_dist.data.storage.OPEN_SHARDS", 2)
    for data in (DataSet(server.folder), DataSet(server.url, patience=QUICK)):
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        all_blocks(data)
        far = data.folder != server.folder
        assert len(os.listdir("/proc/self/fd")) <= before + 2 + 8 * far  # connections that are kept alive


# -- other processes ---------------------------------------------------------------------------------------------------

READER = """
import os, sys
from pathlib import Path
from cdssl_dist.data import remote
from cdssl_dist.data.cache import ShardCache
from cdssl_dist.data.remote import Remote
from cdssl_dist.data.waiting import Patience
from sharding.manifest import read_manifest

url, served, folder, limit = sys.argv[1:]
remote.PIECE = 10_000
far = Remote(url)
cache = ShardCache(Path(folder), int(limit))
print("ready", flush=True)
sys.stdin.readline()
for shard in read_manifest(served).shards:
    def download(file):
        far.download(shard["name"], shard["size"], file)
    file = cache.open(shard["sha256"], shard["size"], download)
    assert file is not None
    assert os.pread(file, shard["size"] + 1, 0) == (Path(served) / shard["name"]).read_bytes()
    os.close(file)
"""


def reader(server: Server, folder: Path, limit: int = 10**9) -> subprocess.Popen[str]:
    """A process that loads all shards when it is sent a line."""
    command = [sys.executable, "-c", READER, server.url, str(server.folder), str(folder), str(limit)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def send(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


@pytest.mark.server
@pytest.mark.parametrize("shards_that_fit", [100, 3])
def test_processes_share_a_cache(server: Server, folder: Path, shards_that_fit: int) -> None:
    entries = DataSet(server.folder).manifest.shards
    limit = shards_that_fit * max(entry["size"] for entry in entries)
    processes = [reader(server, folder, limit) for _ in range(3)]
    for process in processes:
        send(process)
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
    if shards_that_fit == 100:  # each shard came once
        for entry in entries:
            assert server.asked[entry["name"]] == -(-entry["size"] // remote.PIECE)


@pytest.mark.server
def test_a_process_killed_in_its_download(server: Server, folder: Path) -> None:
    entries = DataSet(server.folder).manifest.shards
    server.faults = {entries[1]["name"]: [stall]}
    process = reader(server, folder)
    send(process)
    part = folder / f"{entries[1]['sha256']}.part"
    until = time.monotonic() + 20
    while not (part.exists() and server.asked[entries[1]["name"]]) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert part.exists()
    far = DataSet(server.url, patience=QUICK)
    far.read(int(far.blocks["block"][far.blocks["shard"] == 2][0]))
    assert not part.exists()  # loading any shard removes what a crash has left
    part.write_bytes(b"rubbish" * 10**5)
    far.read(int(far.blocks["block"][far.blocks["shard"] == 1][0]))
    assert not part.exists()
    assert hashlib.sha256(part.with_suffix(".tar").read_bytes()).hexdigest() == part.stem


def test_a_process_that_never_ends_its_download_is_not_waited_for(folder: Path) -> None:
    ((name, text),) = contents(1).items()
    clock = Clock()
    found = ShardCache(folder, 1_000, clock.patience())
    folder.mkdir()
    with cache._locked(folder / f"{name}.part") as held:
        assert held is not None
        assert found.open(name, 100, fill(text)) is None
        assert 120 <= clock.now < 121
    clock.now += cache.RETRY_AFTER
    file = found.open(name, 100, fill(text))
    assert file is not None
    os.close(file)


# -- ahead of the reader -----------------------------------------------------------------------------------------------


def needed(data: DataSet, plan: EpochPlan, steps: range) -> set[str]:
    """Names of the shards that lane 0 reads in some steps."""
    return {shard_of(data, int(plan.table.block[e.index])) for step in steps for e in plan.pack(step, 0)}


def wait_for(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    assert true()


@pytest.mark.server
def test_shards_are_loaded_before_they_are_needed_and_no_more_of_them(
    server: Server, data_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps that they hold are then delivered without the server."""
    monkeypatch.setattr("cdssl_dist.data.plan.SHARDS_MIXED", 2)
    local, far = DataSet(data_folder), DataSet(server.url, patience=Patience(request=0.2, give_up=1.0))
    names = {shard["sha256"]: str(shard["name"]) for shard in far.manifest.shards}
    plans = [EpochPlan(data.table("train"), 3, 1, 1) for data in (local, far)]
    which: dict[str, int] = {"rank": 0, "world_size": 1, "first": 0, "end": 15, "prefetch": 1}
    shape, window = local.shape("train", 1), plans[1].window
    read = 3  # one is taken, one waits, and one is in the hand of the reader
    with Loader(far, plans[1], shape, **which) as found, Loader(local, plans[0], shape, **which) as expected:
        steps = [next(found)]
        coming = needed(far, plans[1], range(read + window))
        assert needed(far, plans[1], range(read)) < coming < needed(far, plans[1], range(15))
        wait_for(lambda: {names[path.stem] for path in folder.glob("*.tar")} == coming)
        time.sleep(0.3)
        assert {names[path.stem] for path in folder.glob("*.tar")} == coming
        server.faults = {"*": [always(busy)]}
        steps += [next(found) for _ in range(read + window - 1)]
        assert_same_steps(steps, [next(expected) for _ in steps])


@pytest.mark.server
def test_what_is_loaded_ahead_in_vain_is_no_error_yet(server: Server, data_folder: Path) -> None:
    """Steps before the lost shard come, then the error that names it."""
    far = DataSet(server.url, patience=QUICK)
    plan = EpochPlan(far.table("train"), 3, 1, 1)
    later = shard_of(far, int(plan.table.block[plan.pack(14, 0)[0].index]))
    first = next(s for s in range(15) if later in needed(far, plan, range(s + 1)))
    (server.folder / later).unlink()
    taken = []
    with (
        pytest.raises(DataSetError, match=f"{later}: there is no such file"),
        Loader(far, plan, far.shape("train", 1), rank=0, world_size=1, first=0, end=15) as found,
    ):
        for step in found:
            taken.append(step.number)
    assert taken == list(range(first))


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.server
def test_leaving_a_loader_that_waits_for_the_network(server: Server, folder: Path) -> None:
    far = DataSet(server.url)
    server.faults = {"*": [always(stall)]}
    with loader(far):
        until = time.monotonic() + 20
        while not list(folder.glob("*.part")) and time.monotonic() < until:
            time.sleep(0.01)
        begin = time.monotonic()
    assert time.monotonic() - begin < 2  # and the fixtures look for threads and files


@pytest.mark.server
def test_nothing_stays_open(server: Server) -> None:
    def open_files() -> int:
        gc.collect()
        time.sleep(0.3)  # connections are closed by the thread of fsspec
        return len(os.listdir("/proc/self/fd"))

    steps(DataSet(server.url, patience=QUICK))  # starts that thread, which stays
    before = open_files()
    far = DataSet(server.url, patience=QUICK)
    steps(far)
    far.close()
    del far
    assert open_files() <= before
