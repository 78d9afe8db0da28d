"""How fast a container of N blobs is frozen, next to the SDK's own iterator on the same origin.

Duty: time `amlmount register` as a whole process, and `ContainerClient.list_blobs()` of azure-storage-blob in
a process of its own (`python -m bench.listing URL`), both with interpreter start and imports, both with their
resident peak. The container is one the origin makes up: `listing-N`.
"""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

from azure.storage.blob import ContainerClient

from bench.origin import Origin
from bench.peers import Amlmount
from bench.processes import CommandError, run

LIMIT_S = 1800


def freeze(subject: Amlmount, origin: Origin, entries: int, state: Path) -> dict[str, float]:
    """`amlmount register` of the container."""
    env = subject.environment(origin, state, uuid.uuid4().hex)
    (state / "home").mkdir(parents=True)
    uri = subject.add_datastore(origin, f"listing-{entries}", env)
    origin.reset()
    done = run(
        [sys.executable, "-m", "amlmount", "register", "listing", "--path", uri], env=env, limit_s=LIMIT_S
    )
    return _figures(entries, done.seconds, done.cpu_s, done.peak_rss, origin)


def iterate_sdk(origin: Origin, entries: int) -> dict[str, float]:
    """The SDK's iterator over a container of that many blobs, doing nothing with them."""
    url = f"{origin.url}/listing-{entries}"
    origin.reset()
    done = run([sys.executable, "-m", "bench.listing", url], limit_s=LIMIT_S)
    if done.stdout.strip() != str(entries):
        raise CommandError(f"the SDK listed {done.stdout.strip()} blobs of {entries}")
    return _figures(entries, done.seconds, done.cpu_s, done.peak_rss, origin)


def _figures(entries: int, seconds: float, cpu_s: float, peak_rss: int, origin: Origin) -> dict[str, float]:
    served = origin.served()
    return {
        "entries_s": entries / seconds,
        "entries": float(entries),
        "seconds": seconds,
        "cpu_s": cpu_s,
        "peak_rss_mb": peak_rss / 1e6,
        "pages": float(served.list),
        "listed_mb": served.bytes / 1e6,
    }


def main() -> int:
    """Iterate over the container at the URL given, print how many blobs there were."""
    container = ContainerClient.from_container_url(sys.argv[1])
    print(sum(1 for _ in container.list_blobs()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
