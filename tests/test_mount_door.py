"""Errors at the door: one line, an exit code from the table in `errors`, and nothing left behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import amlmount
from tests import mount_probe as on
from tests.mounting import Done, Home, MountLine, Probe, compare_trees, mount_lines, mounted, running, tmpfs
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy, Stall
from tests.servers.fixtures import unavailable

pytestmark = pytest.mark.fuse

SITE_PACKAGES = str(Path(psutil.__file__).parent.parent)
REPOSITORY = str(Path(amlmount.__file__).parent.parent)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"content of a")
    (folder / "sub" / "b.bin").write_bytes(os.urandom(300_000))
    return folder


@pytest.fixture
def point(tmp_path: Path) -> Path:
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


def sessions(home: Home) -> list[int]:
    """Return the processes that belong to an amlmount."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("AMLMOUNT_HOME") == str(home.folder) and running(process.pid):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def mounts_of(home: Home) -> list[MountLine]:
    """Return the mounts in this test's folder; other people mount, too."""
    return [line for line in mount_lines() if Path(line.path).is_relative_to(home.folder.parent)]


def refused(
    home: Home,
    *words: str | Path,
    code: int,
    prefix: Sequence[str] = (),
    environ: dict[str, str] | None = None,
) -> str:
    """Run a command that must fail; return the one line that it says. Nothing may be left."""
    before = mounts_of(home)
    done = home.run(*words, code=code, prefix=prefix, environ=environ or {})
    return only_line(home, done, before)


def only_line(home: Home, done: Done, before: Sequence[MountLine]) -> str:
    assert done.out == ""
    [line] = done.err.splitlines()
    assert line.startswith("amlmount: ")
    assert mounts_of(home) == before
    assert sessions(home) == []
    run = home.folder / "run"
    assert [*run.glob("*.json"), *run.glob("*.sock")] == []
    return line


# Mount points -----------------------------------------------------------------------------------------------


def test_missing(home: Home, source: Path, tmp_path: Path) -> None:
    line = refused(home, "mount", source, tmp_path / "nowhere", code=30)
    assert f"{tmp_path}/nowhere does not exist (mkdir -p {tmp_path}/nowhere)" in line


def test_a_file(home: Home, source: Path) -> None:
    line = refused(home, "mount", source, source / "a.txt", code=30)
    assert "a.txt is not a directory" in line


def test_below_a_file(home: Home, source: Path) -> None:
    refused(home, "mount", source, source / "a.txt" / "x", code=30)


def test_not_empty(home: Home, source: Path, point: Path, probe: Probe) -> None:
    (point / "precious").write_bytes(b"data")
    line = refused(home, "mount", source, point, code=31)
    assert f"{point} is not empty" in line
    with home.mount(source, point, "--nonempty") as mount:
        assert probe.call(on.names, mount.root) == ["a.txt", "sub"]
    assert (point / "precious").read_bytes() == b"data"


def test_in_use_by_another_file_system(as_root: None, home: Home, source: Path, point: Path) -> None:
    with tmpfs(point, 1 << 20):
        line = refused(home, "mount", source, point, code=32)
        assert f"{point}: tmpfs is mounted there" in line
        line = refused(home, "umount", point, code=33)  # not ours to unmount
        assert "tmpfs" in line


def test_in_use_by_amlmount(home: Home, source: Path, point: Path, probe: Probe) -> None:
    with home.mount(source, point, detach=True) as mount:
        for words in ([point], [point, "--foreground"], [f"{point}/"]):
            done = home.run("mount", source, *map(str, words), code=32)
            assert done.out == ""
            [line] = done.err.splitlines()
            assert f"amlmount umount {point}" in line
        assert len(mounted(point)) == 1
        assert sessions(home) == [mount.pid]
        compare_trees(probe, mount.root, str(source))


def test_two_at_once_on_one_mount_point(home: Home, source: Path, point: Path, probe: Probe) -> None:
    ref = home.register("data", source)
    racing = [
        subprocess.Popen(
            [*home.command, "mount", ref, str(point)],
            env=home.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
        )
        for _ in range(4)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in racing]
    codes = sorted(process.returncode for process in racing)
    assert codes == [0, 32, 32, 32], said
    assert len(mounted(point)) == 1
    compare_trees(probe, str(point), str(source))
    home.run("umount", point)
    assert sessions(home) == []
    assert not mounted(point)


def test_stale_and_stacked(home: Home, source: Path, point: Path, probe: Probe) -> None:
    with home.mount(source, point, detach=True) as dead:
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait(5)
        with home.mount(source, point) as mount:  # replaces it
            assert len(mounted(point)) == 1
            compare_trees(probe, mount.root, str(source))
        dead.over = True


def test_through_a_link_and_by_a_relative_path(home: Home, source: Path, point: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with home.mount(source, tmp_path / "link" / "mnt", detach=True) as mount:
        mount.path = point
        assert len(mounted(point)) == 1
        ran = subprocess.run(
            [*home.command, "umount", "mnt"], env=home.environ, cwd=tmp_path, capture_output=True, timeout=20
        )
        assert ran.returncode == 0
        mount.over = True


def test_umount_of_nothing(home: Home, point: Path) -> None:
    line = refused(home, "umount", point, code=33)
    assert f"amlmount has nothing mounted at {point}" in line


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An amlmount that knows version 1 of one dataset, data."""
    folder = tmp_path_factory.mktemp("knowing")
    (folder / "source").mkdir()
    home = Home(folder / "home")
    home.register("data", folder / "source")
    return home


# What to mount ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "code", "says"),
    [
        ("weather", 10, "weather"),
        ("data:2", 10, "no version 2"),
        ("data:0", 2, "version"),
        ("data@oldest", 2, "@latest"),
        ("azureml:weather:1", 10, "weather"),
        ("bad name", 2, "dataset name"),
        ("gopher://host/x", 13, "unknown scheme 'gopher'"),
        ("azureml://datastores/nowhere/paths/x", 11, "nowhere"),
        ("azureml://jobs/x", 13, "azureml://jobs/x"),
        ("https://example.com/x", 13, "example.com"),
        ("/no/such/folder", 14, "/no/such/folder"),
        ("https://a.blob.core.windows.net/c/x?sig=SECRET", 13, "SAS"),
    ],
)
def test_what_there_is_not(ref: str, code: int, says: str, knowing: Home, point: Path) -> None:
    line = refused(knowing, "mount", ref, point, code=code)
    assert not mounted(point)
    assert says in line
    assert "SECRET" not in line


def test_settings_that_are_wrong(home: Home, source: Path, point: Path) -> None:
    assert "memory_budget" in refused(home, "mount", source, point, "--memory-budget", "lots", code=4)
    bad = {"AMLMOUNT_READ_TIMEOUT": "never"}
    assert "AMLMOUNT_READ_TIMEOUT" in refused(home, "mount", source, point, code=4, environ=bad)
    assert "umask" in refused(home, "mount", source, point, "--umask", "9", code=2)


@pytest.mark.azurite
def test_credentials_that_are_wrong(
    azurite: Azurite, container: str, public_container: str, home: Home, point: Path, probe: Probe
) -> None:
    azurite.upload(container, "data.txt", b"private")
    azurite.upload(public_container, "data.txt", b"public")
    bad = {
        "key": azurite.wrong_key(),
        "sas": azurite.container_sas(container, valid_s=-60),
        "anonymous": "",
    }
    for kind, secret in bad.items():
        uri = home.datastore(f"bad-{kind}", azurite.url, container, credential=kind, secret=secret)
        line = refused(home, "mount", uri, point, code=23)
        assert f"bad-{kind}" in line
        assert "expiry" in line
        assert not secret or secret not in line
    ref = home.register("data", home.datastore("store", azurite.url, container))
    home.run("datastore", "update", "store", stdin=azurite.wrong_key())  # went bad after the freeze
    assert "datastore store" in refused(home, "mount", ref, point, code=23)
    missing = home.datastore("missing", azurite.url, "no-such-container")
    assert "no such container" in refused(home, "mount", missing, point, code=22)
    done = home.run(
        "datastore", "add", "x", "--account", "a", "--container", "c", "--credential", "sas", code=12
    )
    assert "--secret-file" in done.err
    public = home.datastore("public", azurite.url, public_container, credential="anonymous", secret="")
    with home.mount(public, point) as mount:
        assert probe.call(on.read, mount / "data.txt") == b"public"


@pytest.mark.azurite
def test_a_secret_that_others_can_read(azurite: Azurite, container: str, home: Home, point: Path) -> None:
    azurite.upload(container, "data.txt", b"private")
    ref = home.register("data", home.datastore("store", azurite.url, container))
    [secret] = [path for path in home.folder.rglob("store") if path.is_file()]
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    secret.chmod(0o644)
    assert "chmod 600" in refused(home, "mount", ref, point, code=12)


def test_an_endpoint_that_is_not_there(home: Home, point: Path) -> None:
    uri = home.datastore("gone", "http://127.0.0.1:9/devstoreaccount1", "container")
    began = time.monotonic()
    line = refused(home, "mount", uri, point, code=24, environ={"AMLMOUNT_READ_TIMEOUT": "1"})
    assert "127.0.0.1:9" in line
    assert time.monotonic() - began < 5


@pytest.mark.azurite
def test_interrupted_while_a_listing_hangs(
    azurite: Azurite, container: str, faults: FaultProxy, home: Home, point: Path
) -> None:
    uri = home.datastore("store", faults.url, container)
    faults.push(Stall(None))
    process = subprocess.Popen(
        [*home.command, "mount", uri, str(point)],
        env=home.environ,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    assert faults.wait_for(1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert not mounted(point)
    assert sessions(home) == []


def test_a_manifest_that_is_damaged(home: Home, source: Path, point: Path) -> None:
    ref = home.register("data", source)
    [manifest] = (home.folder / "manifests").glob("*.sqlite")
    content = manifest.read_bytes()
    for damage in (b"", b"not a database" * 100, content[:5000]):
        manifest.chmod(0o600)
        manifest.write_bytes(damage)
        refused(home, "mount", ref, point, code=15)
    manifest.unlink()
    assert "no manifest" in refused(home, "mount", ref, point, code=15)


def test_a_session_that_dies_before_it_is_ready(
    home: Home, source: Path, point: Path, tmp_path: Path
) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.argv[-1:] == ['session'] or 'session' in sys.orig_argv:\n"
        "    import pyfuse3\n"
        "    def init(*args): os.write(2, b'it broke here\\n'); os._exit(9)\n"
        "    pyfuse3.init = init\n"
    )
    line = refused(home, "mount", source, point, code=36, environ={"PYTHONPATH": str(hook)})
    assert "it broke here" in line
    assert "see " in line


# The right to mount -----------------------------------------------------------------------------------------


def test_no_fuse_device(as_root: None, home: Home, source: Path, point: Path) -> None:
    """In a namespace of its own, where /dev/fuse is not there, or is something else."""
    ref = home.register("data", source)
    for hide, says in (
        ("mount -t tmpfs none /dev", "there is no /dev/fuse here"),
        ("mount --bind /etc/hostname /dev/fuse", "there is no /dev/fuse here"),
    ):
        inside = ["unshare", "-m", "sh", "-c", f'{hide} && exec "$@"', "sh"]
        line = refused(home, "mount", ref, point, code=35, prefix=inside)
        assert says in line
        assert "--device /dev/fuse" in line


def test_root_without_the_right_to_mount(as_root: None, home: Home, source: Path, point: Path) -> None:
    """As in a container that was started without --cap-add SYS_ADMIN."""
    ref = home.register("data", source)
    bound = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    line = refused(home, "mount", ref, point, code=35, prefix=bound)
    assert "--cap-add SYS_ADMIN" in line


def test_a_mount_that_the_kernel_refuses(as_root: None, home: Home, source: Path, point: Path) -> None:
    """A device that is not FUSE's passes the look before; the line says where libfuse's own words are."""
    ref = home.register("data", source)
    inside = ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null /dev/fuse && exec "$@"', "sh"]
    line = refused(home, "mount", ref, point, code=36, prefix=inside)
    log = Path(line.partition("(see ")[2].rstrip(")"))
    assert "fuse" in log.read_text()


NOBODY = pwd.getpwnam("nobody")
AS_NOBODY = ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", "--clear-groups"]


@pytest.fixture
def device_mode() -> Iterator[int]:
    """The mode of /dev/fuse, restored afterwards."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    yield mode
    os.chmod("/dev/fuse", mode)


@contextmanager
def reachable(folder: str, at: Path) -> Iterator[str]:
    """Give a path by which another user can reach a folder, where the folder's own is closed to others."""
    test = [*AS_NOBODY, "test", "-r", f"{folder}/.", "-a", "-x", f"{folder}/."]
    if subprocess.run(test, check=False).returncode == 0:
        yield folder
        return
    at.mkdir()
    subprocess.run(["mount", "-o", "bind,ro", folder, at], check=True, timeout=10)
    try:
        yield str(at)
    finally:
        subprocess.run(["umount", "-l", at], check=True, timeout=10)


@pytest.fixture
def nobodys(as_root: None, public_folder: Path) -> Iterator[Home]:
    """An amlmount of a user without privileges; its commands take AS_NOBODY as their prefix."""
    home = public_folder / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY.pw_uid, NOBODY.pw_gid)
    with (
        reachable(REPOSITORY, public_folder / "repository") as repository,
        reachable(SITE_PACKAGES, public_folder / "packages") as packages,
        reachable(sys.base_prefix, public_folder / "python") as python,
    ):
        name = f"python{sys.version_info.major}.{sys.version_info.minor}"
        paths = os.pathsep.join((repository, packages))
        found = Home(
            home,
            command=[f"{python}/bin/{name}", "-m", "amlmount"],
            environ={
                "PYTHONPATH": paths,
                "PYTHONDONTWRITEBYTECODE": "1",
                "LD_LIBRARY_PATH": f"{python}/lib",  # of a Python that was moved
            },
        )
        tried = subprocess.run(
            [*AS_NOBODY, found.command[0], "-c", "import amlmount.session, amlmount.cli, obstore"],
            env=found.environ, cwd="/", capture_output=True, timeout=30, text=True,
        )  # fmt: skip
        if tried.returncode != 0:
            unavailable(f"another user cannot run amlmount from here: {tried.stderr}")
        yield found


def test_no_right_to_the_device(nobodys: Home, public_folder: Path, device_mode: int) -> None:
    point = public_folder / "mnt"
    point.mkdir()
    os.chown(point, NOBODY.pw_uid, NOBODY.pw_gid)
    os.chmod("/dev/fuse", 0o600)
    line = refused(nobodys, "mount", "/usr/include", point, code=35, prefix=AS_NOBODY)
    assert "no right to open /dev/fuse" in line
    assert "0666" in line


def test_without_privileges(nobodys: Home, public_folder: Path, device_mode: int) -> None:
    source, point = public_folder / "source", public_folder / "mnt"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"content of a")
    (source / "sub" / "b.bin").write_bytes(os.urandom(300_000))
    point.mkdir()
    os.chown(point, NOBODY.pw_uid, NOBODY.pw_gid)
    os.chmod("/dev/fuse", 0o666)
    shutil.copy(on.__file__, public_folder / "probe.py")
    command = [*AS_NOBODY, nobodys.command[0], "-I", "-S", f"{public_folder}/probe.py"]
    command = ["env", f"LD_LIBRARY_PATH={nobodys.environ['LD_LIBRARY_PATH']}", *command]
    config = Path("/etc/fuse.conf")
    if not config.exists() or "user_allow_other" not in config.read_text().split():
        line = refused(nobodys, "mount", source, point, "--allow-other", code=35, prefix=AS_NOBODY)
        assert "user_allow_other" in line
    for detach in (True, False):
        with (
            nobodys.mount(source, point, detach=detach, prefix=AS_NOBODY) as mount,
            Probe(command=command) as theirs,
            Probe() as ours,
        ):
            assert psutil.Process(mount.pid).uids().effective == NOBODY.pw_uid
            compare_trees(theirs, mount.root, str(source))
            assert theirs.call(on.status, mount / "a.txt")["st_uid"] == NOBODY.pw_uid
            with pytest.raises(PermissionError):  # others are shut out, root too
                ours.call(on.names, mount.root)
            assert len(mount.lines("kernel read-ahead stays as it is")) == 1
            if detach:
                nobodys.run("umount", mount.path, prefix=AS_NOBODY)
                mount.over = True


def test_allow_other(as_root: None, home: Home, source: Path, public_folder: Path) -> None:
    point = public_folder / "mnt"
    shutil.copy(on.__file__, public_folder / "probe.py")
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if python is None:
        unavailable("there is no system Python that another user can run")
    command = [*AS_NOBODY, python, "-I", "-S", f"{public_folder}/probe.py"]
    with home.mount(source, point) as mount, Probe(command=command) as theirs, pytest.raises(PermissionError):
        theirs.call(on.names, mount.root)
    with home.mount(source, point, "--allow-other") as mount, Probe(command=command) as theirs:
        assert theirs.call(on.read, mount / "a.txt") == b"content of a"
    with (
        home.mount(source, point, "--allow-other", "--umask", "077") as mount,
        Probe(command=command) as theirs,
        pytest.raises(PermissionError),
    ):
        theirs.call(on.read, mount / "a.txt")
