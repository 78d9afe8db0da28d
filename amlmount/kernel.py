"""What the kernel and the FUSE tools of this machine can say and do: mount points, rights, unmounting, read-ahead.

Never touches a mount that may not answer: what is mounted is read from /proc/self/mountinfo (proc(5)), not by stat.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

from amlmount.errors import (
    FuseUnavailable,
    MountBusy,
    MountPointError,
    MountPointInUse,
    MountPointNotEmpty,
    NotMounted,
)

FSTYPE = "fuse.amlmount"
_DEVICE = "/dev/fuse"
_TOOL_TIMEOUT_S = 10
_OCTAL = re.compile(r"\\([0-7]{3})")


class MountEntry(NamedTuple):
    """One line of mountinfo."""

    device: str
    """major:minor."""
    path: str
    fstype: str
    source: str


def mounts() -> list[MountEntry]:
    """Return what is mounted, in the order it was."""
    out = []
    for line in Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape").splitlines():
        fields = line.split(" ")
        dash = fields.index("-", 6)
        unescaped = _OCTAL.sub(lambda m: chr(int(m[1], 8)), fields[4])
        out.append(MountEntry(fields[2], unescaped, fields[dash + 1], fields[dash + 2]))
    return out


def mounted_at(path: str) -> MountEntry | None:
    """Return the topmost mount at exactly this path."""
    return next((m for m in reversed(mounts()) if m.path == path), None)


def absolute(path: str) -> str:
    """Return an absolute path with the links of its parents resolved; the last part is not touched: it may hang."""
    head, tail = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(head), tail) if tail else head


def check_mount_point(path: str, *, nonempty: bool) -> None:
    """Raise MountPointError and its kind unless a mount may go to `path`; a dead mount of ours is removed first."""
    for _ in range(16):  # dead mounts can be stacked
        mounted = mounted_at(path)
        if mounted is None:
            break
        if mounted.fstype != FSTYPE or not _is_dead(path):
            raise _in_use(path, mounted)
        unmount(path, lazy=True)
    try:
        status = os.stat(path)
        if not stat.S_ISDIR(status.st_mode):
            raise MountPointError(f"{path} is not a directory")
        if not nonempty and os.listdir(path):
            mounted = mounted_at(path)  # somebody may have been quicker than our two looks
            raise _in_use(path, mounted) if mounted else MountPointNotEmpty(f"{path} is not empty")
    except FileNotFoundError:
        raise MountPointError(f"{path} does not exist", hint=f"mkdir -p {path}") from None
    except OSError as error:
        raise MountPointError(f"{path}: {error.strerror}") from error


def _in_use(path: str, mounted: MountEntry) -> MountPointInUse:
    return MountPointInUse(f"{path}: {mounted.fstype} is mounted there", hint=f"amlmount umount {path}")


def _is_dead(path: str) -> bool:
    """Whether the process behind a FUSE mount is gone: the kernel answers ENOTCONN by itself then, without waiting.

    The question is about the file system, as a file's attributes may be cached; and it is asked by a process that can
    be left behind, as a mount that lives may hang.
    """
    try:
        done = subprocess.run(
            ["stat", "-f", "--", path],
            check=False,
            capture_output=True,
            timeout=2,
            env={"LC_ALL": "C", "PATH": _path()},
        )
    except subprocess.TimeoutExpired:
        return False
    # ECONNABORTED is for a question that was under way when the process ended.
    gone = (os.strerror(code).encode() in done.stderr for code in (errno.ENOTCONN, errno.ECONNABORTED))
    return done.returncode != 0 and any(gone)


def _path() -> str:
    # A service's PATH can be short; fusermount3 lives in /usr/bin or /bin, umount and mount in /bin or /usr/bin.
    return os.environ.get("PATH", "") + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


def check_fuse(*, allow_other: bool) -> None:
    """Raise FuseUnavailable, with what to do, where this user cannot mount."""
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        is_device = stat.S_ISCHR(os.fstat(fd).st_mode)
        os.close(fd)
    except PermissionError:
        # A container's rules can forbid what the mode allows.
        mode = "its mode is usually 0666: chmod 666 /dev/fuse"
        allowed = os.access(_DEVICE, os.R_OK | os.W_OK)
        hint = "start the container with --device /dev/fuse" if allowed else mode
        raise FuseUnavailable("no right to open /dev/fuse", hint=hint) from None
    except OSError:
        is_device = False
    if not is_device:
        hint = "load the fuse module, or start the container with --device /dev/fuse"
        raise FuseUnavailable("there is no /dev/fuse here", hint=hint)
    if not _may_mount():
        hint = "start the container with --cap-add SYS_ADMIN --device /dev/fuse"
        raise FuseUnavailable("nobody may mount here: the capability SYS_ADMIN is out of bounds", hint=hint)
    if os.geteuid() != 0:
        if shutil.which("fusermount3", path=_path()) is None:
            raise FuseUnavailable("fusermount3 is not installed", hint="apt install fuse3")
        if allow_other and not _user_allow_other():
            raise FuseUnavailable(
                "only root may use --allow-other here",
                hint="put the line user_allow_other into /etc/fuse.conf",
            )


def _may_mount() -> bool:
    """Whether CAP_SYS_ADMIN (bit 21) is in this process's bounding set: else not even a setuid program gets it."""
    found = re.search(r"^CapBnd:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return found is None or bool(int(found[1], 16) >> 21 & 1)


def _user_allow_other() -> bool:
    try:
        lines = Path("/etc/fuse.conf").read_text().splitlines()
    except OSError:
        return False
    return any(line.split("#")[0].strip() == "user_allow_other" for line in lines)


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount what is at `path`; raise MountBusy while it is in use, NotMounted, or MountPointError."""
    if os.geteuid() == 0:
        command = ["umount", "-i", *(["-l"] if lazy else []), "--", path]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", path]
    env = {"PATH": _path(), "LC_ALL": "C"}
    try:
        done = subprocess.run(command, check=False, capture_output=True, timeout=_TOOL_TIMEOUT_S, env=env)
    except FileNotFoundError:
        raise FuseUnavailable(f"{command[0]} is not installed", hint="apt install fuse3") from None
    except subprocess.TimeoutExpired:
        raise MountBusy(f"{path}: {command[0]} does not return", hint="amlmount umount --force") from None
    if done.returncode == 0:
        return
    if mounted_at(path) is None:
        raise NotMounted(f"nothing is mounted at {path}")
    if done.returncode == 32 or b"busy" in done.stderr:
        raise MountBusy(f"{path} is in use", hint=busy_hint(path))
    raise MountPointError(f"{path}: {done.stderr.decode(errors='replace').strip()}")


def busy_hint(path: str) -> str:
    """Name the processes that use a mount, as far as this user may see them."""
    users = []
    for process in psutil.process_iter(["pid", "name"]):
        folder = f"/proc/{process.pid}"
        try:
            links = [f"{folder}/cwd", *(f"{folder}/fd/{fd}" for fd in os.listdir(f"{folder}/fd"))]
        except OSError:
            continue
        for link in links:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target == path or target.startswith(path + "/"):
                users.append(f"{process.info['name']} ({process.info['pid']})")
                break
    who = f"used by {', '.join(users[:5])}; " if users else ""
    return f"{who}close the files, or amlmount umount --lazy {path}"


def abort(device: str) -> bool:
    """Abort a FUSE connection: every request that waits on it fails; False where that is not allowed here."""
    try:
        Path(f"/sys/fs/fuse/connections/{device.partition(':')[2]}/abort").write_text("1")
    except OSError:
        return False
    return True


def set_read_ahead(device: str, size: int) -> str:
    """Raise a mount's kernel read-ahead to `size` bytes; return what came of it, for the log."""
    knob = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    try:
        before = int(knob.read_text())
        if before * 1024 >= size:
            return f"kernel read-ahead is {before} KiB"
        knob.write_text(str(size // 1024))
        return f"kernel read-ahead raised from {before} to {size // 1024} KiB"
    except (OSError, ValueError) as error:
        return f"kernel read-ahead stays as it is, no right to raise it ({error})"
