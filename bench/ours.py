"""amlmount as a subject of the bench: this checkout, by its command line, as a user runs it.

Duty: register a container once for each origin, mount its first version with an empty cache in the state
folder, announce an order where asked to, unmount. The registry is kept with the origin and the cache with
the run: every mount is of an already registered version. Durations in seconds.
"""

from __future__ import annotations

import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.mounting import Mount, end_marked, environment, mount_point, unmount, wait_ready
from bench.origin import Origin
from bench.processes import CommandError, run

COMMAND = (sys.executable, "-m", "amlmount")
REGISTER_LIMIT_S = 600


@dataclass(frozen=True)
class Amlmount:
    """amlmount with its default settings. `declares`: the reader announces its order before it starts."""

    name: str = "amlmount"
    settings: str = "default settings"
    extra_env: dict[str, str] = field(default_factory=dict)
    declares: bool = False

    def missing(self) -> str | None:
        """None when the commands needed are there."""
        words = ("prefetch", "--help") if self.declares else ("--help",)
        try:
            run([*COMMAND, *words], limit_s=20)
        except CommandError as error:
            return " ".join(str(error).split())
        return None

    def register(self, origin: Origin, container: str, home: Path) -> None:
        """Make all of a container the first version of the dataset `bench`, in a new home."""
        home.mkdir(parents=True)
        env = environment(origin, "") | {"AMLMOUNT_HOME": str(home)}
        try:
            _amlmount(env, "register", "bench", "--path", self.add_datastore(origin, container, env))
        except CommandError:
            shutil.rmtree(home)
            raise

    def add_datastore(self, origin: Origin, container: str, env: dict[str, str]) -> str:
        """Make the container known; the URI of all of it."""
        _amlmount(
            env, "datastore", "add", "bench", "--kind", "blob", "--account", origin.account,
            "--container", container, "--endpoint", origin.url, "--credential", "anonymous",
        )  # fmt: skip
        return "azureml://datastores/bench/paths/"

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Mount the container's first version, which is registered when it is asked for first."""
        home = origin.folder / f"home-{container}"
        if not home.exists():
            self.register(origin, container, home)
        mark = uuid.uuid4().hex
        places = {"AMLMOUNT_HOME": str(home), "AMLMOUNT_CACHE_DIR": str(state / "cache")}
        env = environment(origin, mark) | places | self.extra_env
        path = mount_point(state)
        words = [f"{name}={value}" for name, value in places.items()]
        declare = ("env", *words, *COMMAND, "prefetch", str(path), "--order") if self.declares else ()
        try:
            start = time.perf_counter()
            _amlmount(env, "mount", "bench:1", str(path))
            wait_ready(path, None)
            yield Mount(path, mark, ready_s=time.perf_counter() - start, declare=declare)
        finally:
            with suppress(CommandError):
                _amlmount(env, "umount", str(path))
            unmount(path)
            end_marked(mark)


def _amlmount(env: dict[str, str], *arguments: str) -> str:
    return run([*COMMAND, *arguments], env=env, limit_s=REGISTER_LIMIT_S).stdout
