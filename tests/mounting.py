"""Real mounts for tests: an amlmount of its own for each test, and a way to touch a mount that cannot hang the test.

The process that runs the tests never touches a mount: a `Probe`, a process with a deadline for each call, does. What a
deadline kills may wait in the kernel for an answer of the mount, so the end of a mount that misbehaves is to abort its
FUSE connection first.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, ParamSpec, Self, TypeVar

import psutil
import pytest

from amlmount.channel import ask, records
from amlmount.config import places
from amlmount.launch import log_file

from . import mount_probe
from .servers.azurite import Azurite
from .servers.fixtures import unavailable

P = ParamSpec("P")
T = TypeVar("T")

FSTYPE = "fuse.amlmount"
ENDS_WITHIN_S = 5.0
"""What the README promises for the end of a session."""

_SLACK_S = 2.0
_PUBLIC = "amlmount-test-"
_OCTAL = re.compile(r"\\([0-7]{3})")


def until(condition: Callable[[], T], *, within_s: float = 10.0, what: str = "") -> T:
    """Return the first true value of `condition`; fail the test when the time is over."""
    deadline = time.monotonic() + within_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {what or condition}")
        time.sleep(0.01)


# What is mounted --------------------------------------------------------------------------------------------


class MountLine(NamedTuple):
    """One line of mountinfo."""

    device: str
    path: str
    fstype: str
    source: str
    options: str


def mount_lines() -> list[MountLine]:
    """Return what is mounted in this namespace."""
    lines = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" ")
        dash = fields.index("-", 6)
        path = os.fsdecode(
            _OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[4]).encode("utf-8", "surrogateescape")
        )
        lines.append(MountLine(fields[2], path, fields[dash + 1], fields[dash + 2], fields[5]))
    return lines


def mounted(path: Path | str) -> list[MountLine]:
    """Return the mounts at exactly this path, the topmost last."""
    return [line for line in mount_lines() if line.path == str(path)]


def abort(line: MountLine) -> None:
    """Fail every request that waits on a FUSE mount, then detach it."""
    with suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{line.device.partition(':')[2]}/abort").write_text("1")
    command = ["umount", "-i", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
    subprocess.run([*command, line.path], check=False, capture_output=True, timeout=10)


def running(pid: int) -> bool:
    """Whether a process runs, or any thread of it; one that ended and was not waited for does not."""
    try:
        if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            return True
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False


def sweep(below: Path) -> list[str]:
    """Remove every amlmount below a folder; return their paths."""
    left = [line for line in mount_lines() if line.fstype == FSTYPE and Path(line.path).is_relative_to(below)]
    for line in reversed(left):
        abort(line)
    return [line.path for line in left]


# The probe --------------------------------------------------------------------------------------------------


class Hung(AssertionError):
    """A call on a mount did not return in time."""


class Call(Generic[T]):
    """A call under way in a probe."""

    def __init__(self, answer: Callable[[float | None], Any]) -> None:
        self._answer = answer

    def result(self, timeout_s: float | None = None) -> T:
        """Return what the function returned, or raise what it raised; `Hung` when the time is over."""
        value: T = self._answer(timeout_s)
        return value


class Probe:
    """A process that touches mounts; `call` runs a function of `tests.mount_probe` there."""

    def __init__(self, *, timeout_s: float = 30.0, command: Sequence[str] = ()) -> None:
        self.timeout_s = timeout_s
        self._process = subprocess.Popen(
            command or [sys.executable, "-I", "-S", mount_probe.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
        )

    def begin(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> Call[T]:
        """Start a call; one at a time."""
        assert self._process.stdin is not None
        question = pickle.dumps((function.__name__, args, options))
        self._process.stdin.write(struct.pack("<Q", len(question)) + question)
        self._process.stdin.flush()
        return Call(lambda timeout_s: self._answer(function.__name__, timeout_s))

    def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Return what the function returns there, or raise what it raises."""
        return self.begin(function, *args, **options).result()

    def _answer(self, what: str, timeout_s: float | None) -> Any:
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        size = struct.unpack("<Q", self._exactly(8, deadline, what))[0]
        worked, value = pickle.loads(self._exactly(size, deadline, what))
        if not worked:
            raise value
        return value

    def _exactly(self, count: int, deadline: float, what: str) -> bytes:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        data = bytearray()
        while len(data) < count:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise Hung(f"{what} did not return in time")
            piece = os.read(fd, min(1 << 20, count - len(data)))
            if not piece:
                raise Hung(f"the probe ended during {what}")
            data += piece
        return bytes(data)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def close(self) -> None:
        """End the process; one that is stuck in the kernel is left to whoever aborts its mount."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.returncode = 0  # or its destructor would warn, in some other test

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def probes(count: int, *, timeout_s: float = 30.0) -> Iterator[list[Probe]]:
    """Give `count` probes, for calls at the same time."""
    with ExitStack() as stack:
        yield [stack.enter_context(Probe(timeout_s=timeout_s)) for _ in range(count)]


# An amlmount of one test ------------------------------------------------------------------------------------


class Done(NamedTuple):
    """A finished command."""

    code: int
    out: str
    err: str


class Home:
    """One AMLMOUNT_HOME, and the command line that uses it."""

    def __init__(self, folder: Path, *, command: Sequence[str] = (), environ: Mapping[str, str] = {}) -> None:
        self.folder = folder
        self.command = [*(command or (sys.executable, "-m", "amlmount"))]
        # Nothing of the machine's own: neither its credentials nor its settings.
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "AMLMOUNT_HOME": str(folder),
            **environ,
        }

    @property
    def cache(self) -> Path:
        """The default folder of the disk cache."""
        return self.folder / "cache"

    def run(
        self,
        *args: str | Path,
        code: int | None = 0,
        stdin: str = "",
        timeout_s: float = 60.0,
        environ: Mapping[str, str] = {},
        prefix: Sequence[str] = (),
    ) -> Done:
        """Run one command to its end; fail where its exit code is another than `code` (None: any will do)."""
        command = [*prefix, *self.command, *map(str, args)]
        ran = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout_s,
            env={**self.environ, **environ}, cwd="/", errors="surrogateescape",
        )  # fmt: skip
        done = Done(ran.returncode, ran.stdout, ran.stderr)
        assert code is None or done.code == code, f"{' '.join(command)}: {done}"
        return done

    def register(self, name: str, *uris: str | Path, flags: Sequence[str] = ()) -> str:
        """Freeze the URIs as the next version of a dataset; return NAME:VERSION."""
        paths = [word for uri in uris for word in ("--path", str(uri))]
        return self.run("register", name, *paths, *flags).out.split()[0]

    def datastore(
        self, name: str, url: str, container: str, *, credential: str = "key", secret: str = Azurite.key
    ) -> str:
        """Add a container as a datastore; return the URI of its root."""
        self.run(
            "datastore", "add", name, "--account", Azurite.account, "--container", container,
            "--endpoint", url, "--credential", credential, stdin=secret,
        )  # fmt: skip
        return f"azureml://datastores/{name}/paths"

    @contextmanager
    def mount(
        self,
        ref: str | Path,
        path: Path,
        *flags: str,
        detach: bool = False,
        prefix: Sequence[str] = (),
        **settings: object,
    ) -> Iterator[Mount]:
        """Mount REF at `path`, made where it is missing, until the end of the block.

        Settings are given as flags (`read_timeout=2`). With `detach` the command returns and leaves a session behind;
        else the session is a child of this process. Either way it must end by itself, in time, with exit code 0, and
        leave nothing behind; a test that ended it in its own way says so by `Mount.over`.
        """
        path.mkdir(parents=True, exist_ok=True)
        words = [
            word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        command = ["mount", str(ref), str(path), *flags, *words]
        if detach:
            said = self.run(*command, prefix=prefix).out
            log = log_file(places(self.environ), str(path))
            mount = Mount(self, path, _pid_in(said), log, None)
        else:
            mount = self._foreground(command, path, prefix)
        try:
            yield mount
        except BaseException:
            mount.kill()
            raise
        mount.end()

    def _foreground(self, command: Sequence[str], path: Path, prefix: Sequence[str]) -> Mount:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"foreground-{path.name}.log"
        with log.open("ab") as stderr:
            begin = stderr.tell()
            process = subprocess.Popen(
                [*prefix, *self.command, *command, "--foreground"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, env=self.environ, cwd="/",
            )  # fmt: skip
        assert process.stdout is not None
        ready = select.select([process.stdout], [], [], 30)[0]
        said = os.read(process.stdout.fileno(), 65536).decode() if ready else ""
        mount = Mount(self, path, process.pid, log, process, begin)
        if "is ready at" not in said:
            log_text = mount.log()
            mount.kill()
            pytest.fail(f"no mount: {said} {log_text}")
        mount.pid = _pid_in(said)
        return mount


def _pid_in(said: str) -> int:
    found = re.search(r", pid (\d+)$", said.strip())
    assert found is not None, said
    return int(found[1])


class Mount:
    """One mount and the session behind it."""

    def __init__(
        self,
        home: Home,
        path: Path,
        pid: int,
        log: Path,
        process: subprocess.Popen[bytes] | None,
        log_from: int = 0,
    ) -> None:
        self.home = home
        self.path = path
        self.pid = pid
        self.over = False
        """Whether the test has ended it already; it must still be gone without a trace."""
        self._log = log
        self._log_from = log_from
        self._process = process

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    @property
    def root(self) -> str:
        """The mount point."""
        return str(self.path)

    def log(self) -> str:
        """Return what the session logged."""
        return self._log.read_bytes()[self._log_from :].decode(errors="replace")

    def lines(self, word: str) -> list[str]:
        """Return the lines of the log that hold a word."""
        return [line for line in self.log().splitlines() if word in line]

    def status(self) -> dict[str, Any]:
        """Return what `amlmount status --json` says of this mount."""
        [found] = json.loads(self.home.run("status", self.path, "--json").out)["mounts"]
        assert isinstance(found, dict)
        return found

    def count(self, name: str) -> float:
        """Return one of the session's counters, asked of the session itself."""
        said = ask(places(self.home.environ).run, self.root, {"ask": "status"})
        assert said is not None, "the session does not answer"
        return float(said["statistics"][name])

    def counted(self, name: str, least: float, *, within_s: float = 10.0) -> None:
        """Wait until a counter has reached a value."""
        until(lambda: self.count(name) >= least, within_s=within_s, what=f"{name} >= {least}")

    def resident(self) -> int:
        """Return the session's resident memory, in bytes."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def signal(self, number: signal.Signals) -> int | None:
        """Send a signal that ends the session; return its exit code, where it is known, once it has ended.

        Fails where that takes longer than promised.
        """
        began = time.monotonic()
        os.kill(self.pid, number)
        code = self.wait(ENDS_WITHIN_S + _SLACK_S)
        took = time.monotonic() - began
        assert took < ENDS_WITHIN_S + 0.5, f"{number.name} took {took:.1f} s"
        self.over = True
        return code

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the session's process to end; return its exit code where it is this process's child."""
        if self._process is not None:
            code = self._process.wait(timeout_s)
            if self._process.stdout is not None:
                self._process.stdout.close()
            return code
        until(lambda: not running(self.pid), within_s=timeout_s, what=f"end of process {self.pid}")
        return None

    def end(self) -> None:
        """End the session as a user would, and check that nothing is left."""
        try:
            if not self.over:
                if self._process is None:
                    self.home.run("umount", self.path, timeout_s=20)
                    self.wait(1)
                else:
                    assert self.signal(signal.SIGTERM) == 0, self.log()
            assert not mounted(self.path)
            assert not running(self.pid)
            run = places(self.home.environ).run
            assert not [record for record in records(run) if record.path == self.root]
            assert len(list(run.glob("*.sock"))) == len(records(run))
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """End it by force, whatever state it is in."""
        for line in mounted(self.path):
            if line.fstype == FSTYPE:
                abort(line)
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self.wait(10)
        elif running(self.pid):
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.wait(10)
        self.over = True


def expected_tree(source: str) -> dict[bytes, mount_probe.Seen]:
    """Return what a mount of a source directory must show.

    A directory's time is that of the newest file below it; an empty one has its own, and counts as a file there.
    """
    tree = mount_probe.walk(source)
    parents = {name.rpartition(b"/")[0] for name in tree}
    times: dict[bytes, int] = {}
    for name, (kind, _, mtime_ns, _) in tree.items():
        if kind == "file" or name not in parents:
            above = name
            while above:
                above = above.rpartition(b"/")[0]
                times[above] = max(times.get(above, 0), mtime_ns)
    return {
        name: (kind, size, times.get(name, mtime_ns), digest)
        for name, (kind, size, mtime_ns, digest) in tree.items()
    }


def compare_trees(probe: Probe, mount_root: str, source: str) -> None:
    """Fail unless a mount shows what a source directory holds: names, kinds, sizes, times and bytes."""
    ours, theirs = probe.call(mount_probe.walk, mount_root), expected_tree(source)
    assert sorted(ours) == sorted(theirs)
    assert {name: seen for name, seen in ours.items() if seen != theirs[name]} == {}


# Fixtures ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def nothing_stays_mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove dead mounts of earlier runs; fail where this run leaves one."""
    base = tmp_path_factory.getbasetemp()
    for run in base.parent.glob("pytest-*"):
        if not _in_use(run):
            sweep(run)
    for folder in Path(tempfile.gettempdir()).glob(f"{_PUBLIC}*"):
        if not running(int(folder.name.split("-")[2])):
            sweep(folder)
    yield
    left = sweep(base)
    assert not left, f"still mounted after the tests: {left}"


def _in_use(run: Path) -> bool:
    """Whether a run of pytest, whose folder this is, still goes on: its lock holds its process number."""
    try:
        return running(int((run / ".lock").read_text()))
    except (OSError, ValueError):
        return False


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An amlmount of this test's own."""
    return Home(tmp_path / "home")


@pytest.fixture
def probe() -> Iterator[Probe]:
    """A process to touch mounts with."""
    with Probe() as probe:
        yield probe


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp(prefix=f"{_PUBLIC}{os.getpid()}-"))
    folder.chmod(0o755)
    yield folder
    sweep(folder)
    left = [line.path for line in mount_lines() if Path(line.path).is_relative_to(folder)]
    assert not left  # what is mounted there must not be removed with it
    shutil.rmtree(folder)


@pytest.fixture
def as_root() -> None:
    """Ask for root: the test mounts a file system of its own."""
    if os.geteuid() != 0:
        unavailable("this test mounts file systems, which takes root")


@contextmanager
def tmpfs(path: Path, size: int) -> Iterator[Path]:
    """Mount a small tmpfs at `path` until the end of the block."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "amlmount-test", path],
        check=True,
        timeout=10,
    )
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True, timeout=10)
