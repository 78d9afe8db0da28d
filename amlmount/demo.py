"""The main job, shown on a directory of this machine: register, mount, compare every byte, measure, unmount.

`make demo` runs it. It needs no account and no network, works below one temporary folder and removes that at the end.
ARGS="DIR" takes another directory than the one that Python keeps its installed packages in.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def run(home: Path, *args: str) -> str:
    """Run one amlmount command, show it, and return what it printed; end the demo where it fails."""
    print(f"$ amlmount {shlex.join(args)}")
    environ = {**os.environ, "AMLMOUNT_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "amlmount", *args],
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(done.stdout + done.stderr, end="")
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    return done.stdout


def files_below(top: Path) -> list[Path]:
    """Return the paths of all files below a directory, relative to it, in order."""
    return sorted(
        Path(folder, name).relative_to(top)
        for folder, _, names in os.walk(top)
        for name in names
        if Path(folder, name).is_file()
    )


def read_all(top: Path, names: list[Path]) -> Iterator[bytes]:
    """Yield the content of each file."""
    for name in names:
        yield (top / name).read_bytes()


def timed(what: str, top: Path, names: list[Path]) -> None:
    """Read every file once and print the rates."""
    begin = time.perf_counter()
    size = sum(len(content) for content in read_all(top, names))
    seconds = time.perf_counter() - begin
    print(
        f"{what}: {len(names) / seconds:,.0f} files/s, {size / seconds / 1e6:,.0f} MB/s ({len(names):,} files)"
    )


def show_tree(top: Path, most: int = 12) -> None:
    """Print the first few names at the top."""
    names = sorted(os.listdir(top))
    for name in names[:most]:
        print(f"  {name}{'/' if (top / name).is_dir() else ''}")
    if len(names) > most:
        print(f"  ... and {len(names) - most} more")


def demo(source: Path) -> None:
    """Run the whole job on one directory."""
    with tempfile.TemporaryDirectory(prefix="amlmount-demo-") as folder:
        home, mount = Path(folder, "home"), Path(folder, "mnt")
        mount.mkdir()
        print(f"dataset: {source}")
        run(home, "register", "demo", "--path", str(source))
        run(home, "mount", "demo", str(mount))
        try:
            show_tree(mount)
            names = files_below(source)
            mounted = files_below(mount)
            if names != mounted:
                raise SystemExit(f"the names differ: {sorted(set(names) ^ set(mounted))[:5]}")
            timed("cold (through amlmount)", mount, names)
            timed("warm (from the page cache)", mount, names)
            timed("the directory itself", source, names)
            pairs = zip(names, read_all(source, names), read_all(mount, names), strict=True)
            wrong = [name for name, ours, theirs in pairs if ours != theirs]
            if wrong:
                raise SystemExit(f"{len(wrong)} files differ: {wrong[:5]}")
            print(f"compared: {len(names):,} files are the same, byte for byte")
            run(home, "status")
        finally:
            run(home, "umount", str(mount))
    print("nothing is left behind")


if __name__ == "__main__":
    demo(Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("purelib")).resolve())
