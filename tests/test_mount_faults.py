"""Mounts while storage, the cache disk or the session itself fails: right bytes or the right errno, in time."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amlmount.cache import FORMAT
from tests import mount_probe as on
from tests.block_records import Record, block_files, records
from tests.mounting import FSTYPE, Home, Mount, Probe, mounted, probes, tmpfs, until
from tests.servers.azurite import Azurite
from tests.servers.faults import (
    Action,
    Drip,
    EditHeaders,
    FaultProxy,
    Garbage,
    IgnoreRange,
    Reset,
    Respond,
    ShortBody,
    Stall,
    Truncate,
    WrongContentRange,
    denied,
    redirect,
    throttled,
    wrong_etag,
)

pytestmark = [pytest.mark.fuse, pytest.mark.azurite]

KIB, MIB = 1 << 10, 1 << 20
DATA = random.Random(5).randbytes(5 * MIB + 4321)


FILES = {"data.bin": DATA, **{f"{number}.bin": DATA[number : number + MIB + 7] for number in range(6)}}
"""What `remote.mounted()` mounts; no test changes it."""


class Remote:
    """A container behind a proxy, and an amlmount with no cache yet that knows them."""

    def __init__(self, azurite: Azurite, container: str, faults: FaultProxy, home: Home, path: Path) -> None:
        self.azurite = azurite
        self.container = container
        self.faults = faults
        self.home = home
        self.path = path

    def freeze(self, files: dict[str, bytes]) -> str:
        """Upload files into a folder of their own and register it; return the reference."""
        folder = uuid.uuid4().hex
        self.azurite.upload_many(self.container, [(f"{folder}/{name}", data) for name, data in files.items()])
        return self.home.register(f"set-{folder}", f"azureml://datastores/store/paths/{folder}/")

    def blob(self, name: str) -> str:
        """Return the full name of a blob that the proxy has seen."""
        seen = {request.path for request in self.faults.requests(path=f"/{name}$")}
        [path] = seen
        return path.partition(f"/{self.container}/")[2]

    @contextmanager
    def mounted(self, ref: str = "fixed", **settings: object) -> Iterator[Mount]:
        """Mount a dataset with a short patience."""
        settings = {"read_timeout": 6, "stall_timeout": 1, **settings}
        words = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
        with self.home.mount(ref, self.path, *words) as mount:
            yield mount


@pytest.fixture(scope="module")
def origin(azurite: Azurite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    container = "faults"
    azurite.create_container(container)
    azurite.upload_many(container, [(f"fixed/{name}", data) for name, data in FILES.items()])
    home = Home(tmp_path_factory.mktemp("origin") / "home")
    with FaultProxy(azurite.url) as proxy:
        home.register("fixed", home.datastore("store", proxy.url, container) + "/fixed/")
        yield Remote(azurite, container, proxy, home, home.folder)
    azurite.delete_container(container)


@pytest.fixture
def remote(origin: Remote, tmp_path: Path) -> Iterator[Remote]:
    shutil.copytree(origin.home.folder, tmp_path / "home")
    origin.faults.forget()
    yield Remote(origin.azurite, origin.container, origin.faults, Home(tmp_path / "home"), tmp_path / "mnt")
    origin.faults.clear()
    origin.faults.release()


# Storage: faults that another attempt mends -----------------------------------------------------------------

MENDED: dict[str, Action] = {
    "throttled": throttled(),
    "throttled-429": throttled(1, 429),
    "internal-error": Respond(500, code="InternalError"),
    "operation-timed-out": Respond(500, code="OperationTimedOut"),
    "bad-gateway": Respond(502),
    "request-timeout": Respond(408),
    "reset": Reset(None),
    "reset-in-the-body": Reset(100_000),
    "truncated": Truncate(100_000),
    "truncated-at-once": Truncate(0),
    "short-body": ShortBody(1000),
    "stalled": Stall(None),
    "stalled-in-the-body": Stall(100_000),
    "range-ignored": IgnoreRange(),
    "wrong-total": WrongContentRange(total=77),
    "wrong-range": WrongContentRange(shift=4096),
    "no-content-range": EditHeaders({"Content-Range": None}),
    "not-http": Garbage(),
}


def test_faults_that_another_attempt_mends(remote: Remote, probe: Probe) -> None:
    files = {f"{name}.bin": DATA for name in MENDED}
    ref = remote.freeze(files)
    with remote.mounted(ref, cache_size=0, read_timeout=20) as mount, probes(len(MENDED)) as pool:
        for name, fault in MENDED.items():
            remote.faults.push(fault, path=f"/{name}.bin", ranged=True, times=2)
        calls = {
            name: reader.begin(on.read, mount / f"{name}.bin")
            for name, reader in zip(MENDED, pool, strict=True)
        }
        wrong = [name for name, call in calls.items() if call.result() != DATA]
        assert not wrong
        assert mount.count("read_errors") == 0
        assert mount.count("retries") >= 2 * len(MENDED)
        assert mount.lines("[error") == []


def test_every_ranged_read_carries_if_match(remote: Remote, probe: Probe) -> None:
    with remote.mounted() as mount:
        remote.faults.push(Reset(1000), ranged=True, times=3)  # the attempts after a fault, too
        assert probe.call(on.read, mount / "data.bin") == DATA
    tag = remote.azurite.etag(remote.container, "fixed/data.bin")
    asked = remote.faults.requests(path="data.bin", ranged=True)
    assert len(asked) > 4
    assert {request.if_match for request in asked} == {f'"{tag}"'}


# Storage: faults that last ----------------------------------------------------------------------------------

LASTING: dict[str, tuple[Action, str]] = {
    "throttled": (throttled(), "EIO"),
    "throttled-for-long": (throttled(100), "EIO"),
    "internal-error": (Respond(500, code="InternalError"), "EIO"),
    "reset": (Reset(None), "EIO"),
    "reset-in-the-body": (Reset(100_000), "EIO"),
    "truncated": (Truncate(100), "EIO"),
    "short-body": (ShortBody(1000), "EIO"),
    "stalled": (Stall(None), "EIO"),
    "stalled-in-the-body": (Stall(100), "EIO"),
    "range-ignored": (IgnoreRange(), "EIO"),
    "wrong-range": (WrongContentRange(shift=4096), "EIO"),
    "wrong-total": (WrongContentRange(total=77), "EIO"),
    "not-http": (Garbage(), "EIO"),
    "drip": (Drip(300), "EIO"),
    "redirected": (redirect("http://127.0.0.1:1/elsewhere"), "EIO"),
    "wrong-etag": (wrong_etag(), "ESTALE"),
    "denied": (denied(), "EACCES"),
    "unauthorized": (Respond(401, code="NoAuthenticationInformation"), "EACCES"),
    "gone": (Respond(404, code="BlobNotFound"), "EIO"),
    "container-gone": (Respond(404, code="ContainerNotFound"), "EIO"),
    "archived": (Respond(409, code="BlobArchived"), "EIO"),
    "bad-request": (Respond(400, code="InvalidHeaderValue"), "EIO"),
}
PATIENCE_S = 2.0


def test_faults_that_last_end_in_an_errno_in_time(remote: Remote, probe: Probe) -> None:
    files = {f"{name}.bin": DATA[: 300 * KIB] for name in LASTING}
    files["fine.bin"] = DATA
    ref = remote.freeze(files)
    with (
        remote.mounted(ref, read_timeout=PATIENCE_S) as mount,
        probes(len(LASTING), timeout_s=20) as pool,
    ):
        for name, (fault, _) in LASTING.items():
            remote.faults.push(fault, path=f"/{name}.bin", ranged=True)
        calls = {
            name: reader.begin(on.timed_outcome, mount / f"{name}.bin")
            for name, reader in zip(LASTING, pool, strict=True)
        }
        assert probe.call(on.read, mount / "fine.bin") == DATA  # all the while
        results = {name: call.result() for name, call in calls.items()}
        outcomes = {name: outcome for name, (outcome, _) in results.items()}
        assert outcomes == {name: outcome for name, (_, outcome) in LASTING.items()}
        late = {name: took for name, (_, took) in results.items() if took > PATIENCE_S + 5.0 + 3.0}
        assert not late
        # One line each, that names the file, the errno and what to do.
        said = {name: mount.lines(f"/{name}.bin") for name in LASTING}
        wrong = {
            name: lines
            for name, lines in said.items()
            if len(lines) != 1 or f"errno={LASTING[name][1]}" not in lines[0] or "do= " in lines[0]
        }
        assert not wrong, mount.log()
        assert "Traceback" not in mount.log()


def test_an_endpoint_that_is_down(azurite: Azurite, remote: Remote, probe: Probe) -> None:
    with FaultProxy(azurite.url) as proxy:
        root = remote.home.datastore("down", proxy.url, remote.container)
        with remote.home.mount(f"{root}/fixed/", remote.path, read_timeout=PATIENCE_S) as mount:
            assert probe.call(on.read, mount / "data.bin") == DATA
            proxy.close()
            began = time.monotonic()
            assert probe.call(on.outcome, mount / "1.bin") == "EIO"
            assert time.monotonic() - began < PATIENCE_S + 3
            assert probe.call(on.read, mount / "data.bin") == DATA
            assert len(mount.lines("1.bin")) == 1


def test_mounted_while_storage_does_not_answer(remote: Remote, probe: Probe) -> None:
    """What is cached can be read all the same."""
    with remote.mounted() as mount:
        assert probe.call(on.read, mount / "1.bin") == FILES["1.bin"]
    remote.faults.push(Stall(None))
    with remote.mounted(read_timeout=PATIENCE_S) as mount:
        assert len(mount.lines("reads will try again")) == 1
        assert probe.call(on.read, mount / "1.bin") == FILES["1.bin"]
        assert probe.call(on.outcome, mount / "2.bin") == "EIO"


def test_a_read_goes_on_after_the_fault_is_over(remote: Remote) -> None:
    """An outage shorter than the patience is a pause, for every reader, and costs no error."""
    with remote.mounted(read_timeout=30) as mount, probes(4) as pool:
        outage = remote.faults.push(Reset(None), ranged=True)
        calls = [reader.begin(on.read, mount / f"{number}.bin") for number, reader in enumerate(pool)]
        until(lambda: outage.hits >= 12, what="12 failed requests")
        remote.faults.remove(outage)
        for number, call in enumerate(calls):
            assert call.result() == FILES[f"{number}.bin"]
        assert mount.count("read_errors") == 0


def test_overwritten_while_it_is_read(remote: Remote, probe: Probe) -> None:
    ref = remote.freeze({"data.bin": b"a" * 9 * MIB})
    with remote.mounted(ref, cache_size=0) as mount:
        fd = probe.call(on.hold, mount / "data.bin")
        assert probe.call(on.read_held, fd, 0, 4096) == b"a" * 4096
        remote.azurite.upload(remote.container, remote.blob("data.bin"), b"b" * 3)  # shorter, too
        assert probe.call(on.held_outcome, fd, 9 * MIB - 4096, 4096) == "ESTALE"
        assert probe.call(on.status, mount / "data.bin")["st_size"] == 9 * MIB
        [line] = mount.lines("was overwritten")
        assert "register a new version" in line
        probe.call(on.let_go, fd)


# The cache disk ---------------------------------------------------------------------------------------------


def written(mount: Mount) -> None:
    """Wait until all that was fetched is on the cache disk."""
    until(lambda: mount.count("cache_writes") == mount.count("requests") - mount.count("retries"))


def read_all(probe: Probe, mount: Mount, files: dict[str, bytes] = FILES) -> None:
    for name, data in files.items():
        assert probe.call(on.read, mount / name) == data, name


def test_a_full_cache_disk(as_root: None, remote: Remote, probe: Probe, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 2 * MIB) as disk:
        with remote.mounted(cache_dir=disk, cache_min_free=0, cache_size=64 * MIB) as mount:
            (disk / "filler").write_bytes(bytes(MIB))  # somebody else's, while mounted
            read_all(probe, mount)
            mount.counted("cache_dropped", 1)
            assert mount.count("read_errors") == 0
        assert not list((disk / FORMAT / "tmp").iterdir())


def test_a_disk_that_fills_up_under_the_cache(
    as_root: None, remote: Remote, probe: Probe, tmp_path: Path
) -> None:
    """Inodes run out, which no count of free bytes shows."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=8,mode=0700", "t", disk], check=True)
    try:
        with remote.mounted(cache_dir=disk, cache_min_free=0) as mount:
            read_all(probe, mount)
            mount.counted("cache_dropped", 1)
            assert len(mount.lines("the cache disk fails")) == 1
            assert mount.count("read_errors") == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_read_only_cache_disk_can_still_be_read(
    as_root: None, remote: Remote, probe: Probe, tmp_path: Path
) -> None:
    with tmpfs(tmp_path / "disk", 64 * MIB) as disk:
        some = {name: FILES[name] for name in ("0.bin", "1.bin", "2.bin")}
        with remote.mounted(cache_dir=disk, cache_min_free=0) as mount:
            read_all(probe, mount, some)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        remote.faults.forget()
        with remote.mounted(cache_dir=disk, cache_min_free=0) as mount:
            read_all(probe, mount)
            assert mount.count("read_errors") == 0


@pytest.mark.parametrize("spoil", ["no folder", "a file", "no right", "a link to a file"])
def test_a_cache_folder_that_cannot_be(spoil: str, remote: Remote, probe: Probe, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    if spoil == "no folder":
        folder = Path("/proc/no/such/folder")
    elif spoil == "a file":
        folder.write_bytes(b"")
    elif spoil == "no right":
        (folder / FORMAT).mkdir(parents=True)
        (folder / FORMAT).chmod(0o777)  # others could put blocks there
    else:
        folder.mkdir()
        (tmp_path / "target").write_bytes(b"")
        (folder / FORMAT).symlink_to(tmp_path / "target")
    some = {name: FILES[name] for name in ("0.bin", "1.bin")}
    with remote.mounted(cache_dir=folder) as mount:
        read_all(probe, mount, some)
        assert len(mount.lines("no disk cache")) == 1
        assert mount.count("read_errors") == 0


def test_a_cache_that_vanishes_and_comes_back(remote: Remote, probe: Probe) -> None:
    with remote.mounted(memory_budget="16MiB") as mount:
        for name, data in FILES.items():
            assert probe.call(on.read, mount / name) == data
            until(lambda: mount.count("cache_writes") + mount.count("cache_dropped") > 0)
            shutil.rmtree(remote.home.cache, ignore_errors=True)
            probe.call(on.forget_pages, mount / name)
            assert probe.call(on.read, mount / name) == data
        assert mount.count("read_errors") == 0


def test_a_flipped_bit_in_every_block(remote: Remote, probe: Probe) -> None:
    with remote.mounted() as mount:
        read_all(probe, mount)
        written(mount)
    blocks = list(records(remote.home.cache))
    assert len(blocks) >= 12
    assert len(block_files(remote.home.cache)) < len(blocks)  # some of them in packs
    chosen = random.Random(3)
    for record in blocks:
        record.flip(chosen.randrange(len(record.read())), chosen.randrange(8))
    with remote.mounted() as mount:
        read_all(probe, mount)
        assert mount.count("cache_corrupt") == len(blocks)
        assert mount.count("bytes_from_disk") == 0
        assert mount.count("read_errors") == 0


def test_blocks_of_another_object_under_a_blocks_name(remote: Remote, probe: Probe) -> None:
    with remote.mounted() as mount:
        read_all(probe, mount)
        written(mount)
    by_size: dict[int, list[Record]] = {}
    for record in records(remote.home.cache):
        by_size.setdefault(record.length, []).append(record)
    moved = 0
    for same in by_size.values():
        contents = [record.read() for record in same]
        for record, content in zip(same, contents[1:] + contents[:1], strict=True):
            record.write(content)
        moved += len(same) if len(same) > 1 else 0
    assert moved >= 12
    with remote.mounted() as mount:
        read_all(probe, mount)
        assert mount.count("cache_corrupt") == moved


def test_a_cache_disk_that_hangs(remote: Remote, probe: Probe) -> None:
    """A FIFO that nobody writes to hangs whoever opens it, and a lock that is held hangs whoever wants it."""
    with remote.mounted() as mount:
        read_all(probe, mount)
        written(mount)
    for path in block_files(remote.home.cache):
        path.unlink()
        os.mkfifo(path, 0o600)
    with remote.mounted() as mount:
        locks = [path.open("rb") for path in (remote.home.cache / FORMAT).glob("*") if path.is_file()]
        try:
            for lock in locks:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            began = time.monotonic()
            read_all(probe, mount)
            assert time.monotonic() - began < 6
            assert len(mount.lines("does not answer; reading past it")) == 1
            remote.home.run("status", mount.path)  # whatever it says, the mount goes on
            probe.call(on.forget_pages, mount / "data.bin")
            assert probe.call(on.read, mount / "data.bin") == DATA
            mount.signal(signal.SIGTERM)
        finally:
            for lock in locks:
                lock.close()


# The session ------------------------------------------------------------------------------------------------


def test_killed_while_it_is_read_and_mounted_again(remote: Remote) -> None:
    ref, path = "fixed", remote.path
    with Probe() as reader, remote.home.mount(ref, path, detach=True) as first:
        stall = remote.faults.push(Stall(None), ranged=True)
        call = reader.begin(on.outcome, first / "data.bin")
        assert remote.faults.wait_for(1, ranged=True)
        os.kill(first.pid, signal.SIGKILL)
        assert call.result(5) in ("ENOTCONN", "ECONNABORTED")  # at once, not after a time-out
        first.wait(5)
        assert [line.fstype for line in mounted(path)] == [FSTYPE]
        assert f"{path}: dead" in remote.home.run("status", timeout_s=5).out
        remote.faults.remove(stall)
        with remote.home.mount(ref, path, detach=True) as second, Probe() as another:
            assert len(mounted(path)) == 1
            assert another.call(on.read, second / "data.bin") == DATA
        first.over = True


def test_a_dead_mount_can_be_unmounted(remote: Remote) -> None:
    with remote.home.mount("fixed", remote.path, detach=True) as mount:
        os.kill(mount.pid, signal.SIGKILL)
        mount.wait(5)
        assert "dead" in remote.home.run("status").out
        remote.home.run("umount", remote.path)
        assert "nothing is mounted" in remote.home.run("status").out
        mount.over = True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_while_readers_wait_for_a_store_that_hangs(number: signal.Signals, remote: Remote) -> None:
    with remote.mounted(read_timeout=60, stall_timeout=60) as mount, probes(4) as pool:
        remote.faults.push(Stall(100), ranged=True)
        calls = [reader.begin(on.outcome, mount / f"{index}.bin") for index, reader in enumerate(pool)]
        assert remote.faults.wait_for(4, ranged=True)
        until(lambda: mount.count("reads") >= 4)
        assert mount.signal(number) == 0
        assert not mounted(mount.path)
        assert all(call.result(5) != "read" for call in calls)  # nobody waits for ever
        assert len(mount.lines("stopping")) == 1


def test_signal_while_files_are_open(remote: Remote, probe: Probe) -> None:
    with remote.mounted() as mount:
        fd = probe.call(on.hold, mount / "data.bin")
        assert mount.signal(signal.SIGTERM) == 0
        assert not mounted(mount.path)
        assert probe.call(on.held_outcome, fd, MIB, 4096) in ("ENOTCONN", "ECONNABORTED")


def test_unmounted_from_outside(remote: Remote, probe: Probe) -> None:
    with remote.mounted() as mount:
        assert probe.call(on.read, mount / "data.bin") == DATA
        tool = ["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]
        subprocess.run([*tool, mount.root], check=True, timeout=10)
        assert mount.wait(5) == 0
        mount.over = True


def test_unmount_while_files_are_open(remote: Remote, probe: Probe) -> None:
    with remote.home.mount("fixed", remote.path, detach=True) as mount:
        fd = probe.call(on.hold, mount / "data.bin")
        busy = remote.home.run("umount", mount.path, code=34)
        assert str(probe.pid) in busy.err  # who it is
        assert probe.call(on.read_held, fd, 0, 4096) == DATA[:4096]
        remote.home.run("umount", mount.path, "--lazy")
        assert not mounted(mount.path)
        assert probe.call(on.read_held, fd, MIB, 4096) == DATA[MIB : MIB + 4096]
        probe.call(on.let_go, fd)
        mount.wait(5)
        mount.over = True


def test_forced_unmount_while_a_reader_waits(remote: Remote) -> None:
    with remote.home.mount("fixed", remote.path, detach=True) as mount, Probe() as reader:
        remote.faults.push(Stall(None), ranged=True)
        call = reader.begin(on.outcome, mount / "data.bin")
        assert remote.faults.wait_for(1, ranged=True)
        remote.home.run("umount", mount.path, "--force", timeout_s=20)
        assert call.result(5) != "read"
        mount.wait(12)
        mount.over = True


def test_a_bug_in_a_handler_costs_one_request(remote: Remote, probe: Probe, tmp_path: Path) -> None:
    """An exception that nobody foresaw: EIO, a traceback in the log, and the mount goes on."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import amlmount.reader as reader\n"
        "begin = reader.FileReader.begin\n"
        "def broken(self, *args):\n"
        "    if self.file.object.path.endswith('/0.bin'):\n"
        "        raise RuntimeError('a bug')\n"
        "    return begin(self, *args)\n"
        "reader.FileReader.begin = broken\n"
    )
    remote.home.environ["PYTHONPATH"] = str(hook)
    with remote.mounted() as mount:
        assert probe.call(on.outcome, mount / "0.bin") == "EIO"
        assert "RuntimeError: a bug" in mount.log()
        assert probe.call(on.read, mount / "data.bin") == DATA
