"""How fast a container of N blobs is frozen, next to the SDK's own iterator on the same origin.

Duty: the row `listing`: time `amlmount register` as a whole process, and `ContainerClient.list_blobs()` of
azure-storage-blob in a process of its own (`python -m bench.listing URL`), both with interpreter start and
imports, both with their resident peak. The container is one the origin makes up: `listing-N`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from azure.storage.blob import ContainerClient

from bench.mounting import Mount, Subject, environment
from bench.origin import Origin
from bench.ours import COMMAND, Amlmount
from bench.processes import CommandError, Finished, run
from bench.report import Compared
from bench.workload import Context, Figures, Workload

LIMIT_S = 1800


@dataclass(frozen=True)
class Sdk:
    """The SDK's iterator: it has nothing to mount."""

    name: str = "azure-storage-blob"
    settings: str = "ContainerClient.list_blobs(), doing nothing with the blobs"

    def missing(self) -> str | None:
        """amlmount depends on it."""
        return None

    @contextmanager
    def mounted(self, origin: Origin, container: str, state: Path) -> Iterator[Mount]:
        """Nothing to do."""
        del origin, container
        yield Mount(state)


def listed(subject: Subject, context: Context, state: Path) -> Figures:
    """The container listed once, frozen by us or forgotten by the SDK."""
    origin, container = context.origin, context.container
    entries = int(container.removeprefix("listing-"))
    if isinstance(subject, Amlmount):
        env = environment(origin, "") | {"AMLMOUNT_HOME": str(state / "home")}
        (state / "home").mkdir()
        uri = subject.add_datastore(origin, container, env)
        origin.reset()
        done = run([*COMMAND, "register", "listing", "--path", uri], env=env, limit_s=LIMIT_S)
    else:
        origin.reset()
        done = run([sys.executable, "-m", "bench.listing", f"{origin.url}/{container}"], limit_s=LIMIT_S)
        if done.stdout.strip() != str(entries):
            raise CommandError(f"the SDK listed {done.stdout.strip()} blobs of {entries}")
    return _figures(entries, done, origin)


def _figures(entries: int, done: Finished, origin: Origin) -> Figures:
    served = origin.served()
    return {
        "entries_s": entries / done.seconds,
        "entries": float(entries),
        "seconds": done.seconds,
        "cpu_s": done.cpu_s,
        "peak_rss_mb": done.peak_rss / 1e6,
        "pages": float(served.list),
        "listed_mb": served.bytes / 1e6,
    }


def workload(entries: int) -> Workload:
    """The row, for so many blobs."""
    return Workload(
        "listing",
        f"{entries:,} blobs listed and frozen",
        "near",
        f"listing-{entries}",
        ("amlmount", "azure-storage-blob"),
        listed,
        (Compared("entries_s"),),
        bounds=(("entries_s", 40_000, math.inf), ("peak_rss_mb", 0, 300)),
        rounds=2,
    )


def main() -> int:
    """Iterate over the container at the URL given, print how many blobs there were."""
    container = ContainerClient.from_container_url(sys.argv[1])
    print(sum(1 for _ in container.list_blobs()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
