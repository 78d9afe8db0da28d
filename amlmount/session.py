"""One mount, from its spec to its end: builds every part, reports ready, runs, tears down in reverse.

One process has one session (pyfuse3 holds it in a module's globals), and this process never touches its own mount.
Ending: SIGTERM and SIGINT unmount, lazily where files are open, and end the process within `STOP_S` seconds whatever
the store does; an unmount from outside ends it too.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pyfuse3
import structlog
import trio

from amlmount import channel, kernel
from amlmount.cache import BlockCache
from amlmount.catalog import Catalog
from amlmount.config import Places, Settings, private_folder
from amlmount.dataset import MountSpec, Source
from amlmount.desk import Desk, Owner
from amlmount.epoch import Epoch, unpack
from amlmount.errors import (
    AccessDenied,
    AmlmountError,
    MountBusy,
    MountFailed,
    MountPointError,
    StoreError,
    UsageError,
)
from amlmount.fetch import Fetcher
from amlmount.manifest import Manifest
from amlmount.memory import BlockMemory, default_budget, memory_limit, tune_malloc
from amlmount.metrics import Counters
from amlmount.operations import Operations
from amlmount.relay import Relay, device_fds
from amlmount.status import History, MountStatus
from amlmount.stores import Retrying, open_store
from amlmount.tree import Tree

STOP_S = 4.0
"""Seconds from SIGTERM to the end at the most; the rest of the 5 s that are promised is the interpreter's."""

_UNMOUNT_S = 1.5
_ACCESS_S = 3.0  # seconds to ask a store whether the credential is good
_PLAIN = re.compile(r"[A-Za-z0-9:@._/-]{1,200}\Z")


class MountSession:
    """Everything behind one mount point."""

    def __init__(
        self, spec: MountSpec, settings: Settings, where: Places, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        self._spec = spec
        self._settings = settings
        self._log = log
        self._run = private_folder(where.run)
        self._catalog = Catalog(where)
        self._counters = Counters()
        self._stop = threading.Event()
        self._started_ns = time.time_ns()
        self._state = "starting"
        self._device = ""
        self._history = History()

    def _open_stores(self, sources: Sequence[Source]) -> list[Retrying]:
        accesses = [self._catalog.access(source, os.environ) for source in sources]
        opened = {
            access: Retrying(
                open_store(access, stall_timeout_s=self._settings.stall_timeout),
                patience_s=self._settings.read_timeout,
                counters=self._counters,
                stop=self._stop,
            )
            for access in set(accesses)
        }
        return [opened[access] for access in accesses]

    def _options(self) -> set[str]:
        spec = self._spec
        name = spec.ref if _PLAIN.match(spec.ref) else f"amlmount-{spec.digest[:12]}"
        options = {f"fsname={name}", "subtype=amlmount", "ro", "nosuid", "nodev", "default_permissions"}
        if spec.allow_other:
            options.add("allow_other")
        return options

    async def run(self, ready: Callable[[], None]) -> None:
        """Mount, call `ready` when the tree answers, and serve until unmounted or told to stop.

        Raises AmlmountError where the mount cannot be made; then nothing is left behind.
        """
        spec, settings = self._spec, self._settings
        kernel.check_fuse(allow_other=spec.allow_other)
        _raise_open_files()
        tune_malloc()
        # Of the HTTP library's: with one for each core they compete with the threads that wait for them.
        os.environ.setdefault("TOKIO_WORKER_THREADS", str(max(1, len(os.sched_getaffinity(0)) // 2)))
        budget = settings.memory_budget or default_budget(memory_limit())
        queue_bytes = min(budget // 8, 64 << 20)
        with Manifest(Path(spec.manifest)) as manifest:
            tree = Tree(manifest)
            stores = self._open_stores(tree.info.sources)
            self._memory = BlockMemory(budget - queue_bytes, self._counters)
            self._cache = self._open_cache(stores, queue_bytes)
            self._fetcher = Fetcher(
                stores, self._memory, self._cache, self._counters,
                connections=settings.connections, read_timeout_s=settings.read_timeout,
            )  # fmt: skip
            self._desk = Desk(
                tree, stores, self._fetcher, self._counters, self._log,
                owner=Owner(spec.uid, spec.gid, spec.umask), null_reads=settings.null_reads,
            )  # fmt: skip
            if settings.order == "learned":
                self._desk.across.learn()
            self._operations = Operations(self._desk, stores, handleless=lambda: self._relay.handleless)
            try:
                await self._check_access(tree, stores)
                await self._serve(ready)
            finally:
                self._stop.set()
                self._fetcher.close()
                if self._cache is not None:
                    self._cache.close(flush_s=1.0)
                channel.remove_record(self._run, spec.path)
                self._log.info("unmounted", path=spec.path, **self._counters.snapshot())

    async def _check_access(self, tree: Tree, stores: Sequence[Retrying]) -> None:
        """Raise AccessDenied where a store refuses the credential; a store out of reach is only told of.

        What is cached can be read without it, and it may be back when it is needed.
        """
        asked: set[Retrying] = set()
        for source, store in enumerate(stores):
            one = tree.any_object(source)
            if one is None or store in asked:
                continue
            asked.add(store)
            # The store itself, not its retries: one answer is all that is wanted, and not for long.
            with trio.move_on_after(_ACCESS_S) as patience:
                try:
                    await trio.to_thread.run_sync(store.store.head, one.object.path, abandon_on_cancel=True)
                except AccessDenied:
                    raise
                except StoreError as error:
                    self._log.warning("storage cannot be asked now; reads will try again", error=str(error))
            if patience.cancelled_caught:
                self._log.warning("storage does not answer now; reads will try again", store=store.identity)

    def _open_cache(self, stores: Sequence[Retrying], queue_bytes: int) -> BlockCache | None:
        if not any(store.cacheable for store in stores) or self._settings.cache_size == 0:
            return None
        return BlockCache(
            self._settings.cache_dir, cache_size=self._settings.cache_size, min_free=self._settings.cache_min_free,
            queue_bytes=queue_bytes, counters=self._counters, log=self._log,
        )  # fmt: skip

    async def _serve(self, ready: Callable[[], None]) -> None:
        spec = self._spec
        # libfuse stacks a second mount on a first without a word: look and mount as one step.
        with channel.only_one(self._run, spec.path):
            kernel.check_mount_point(spec.path, nonempty=spec.nonempty)
            before = device_fds()
            try:
                pyfuse3.init(self._operations, spec.path, self._options())
            except RuntimeError:
                raise MountFailed(
                    f"{spec.path}: the kernel or fusermount3 refused the mount",
                    hint="the reason is in the line above",
                ) from None
        mounted = kernel.mounted_at(spec.path)
        self._device = mounted.device if mounted else ""
        (opened,) = device_fds() - before
        self._relay = Relay(opened, self._desk, self._counters)
        self._fetcher.answers = self._relay
        try:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._main, nursery.cancel_scope)
                    nursery.start_soon(self._end_on_signal, signals, nursery.cancel_scope)
                    nursery.start_soon(self._fetcher.watch)
                    nursery.start_soon(self._remember)
                    with trio.fail_after(30):
                        await self._relay.begun.wait()
                    self._log.info(
                        kernel.set_read_ahead(self._device, self._settings.read_ahead), path=spec.path
                    )
                    await nursery.start(channel.serve, self._run, spec.path, self._answer)
                    started_at = psutil.Process().create_time()
                    channel.write_record(
                        self._run,
                        channel.SessionRecord(
                            ref=spec.ref,
                            path=spec.path,
                            digest=spec.digest,
                            pid=os.getpid(),
                            started_at=started_at,
                            manifest=spec.manifest,
                        ),
                    )
                    self._state = "mounted"
                    self._log.info("mounted", ref=spec.ref, path=spec.path, digest=spec.digest)
                    gc.freeze()  # what is here stays: the collector need not look at it again
                    gc.set_threshold(50_000, 20, 50)
                    ready()
        except trio.TooSlowError:
            raise MountFailed(f"{spec.path}: the kernel did not answer in 30 s") from None
        finally:
            self._unmount_now()
            self._relay.close()
            pyfuse3.close(unmount=False)

    async def _main(self, scope: trio.CancelScope) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main)
            await self._relay.run()
            pyfuse3.terminate()
        scope.cancel()

    async def _end_on_signal(self, signals: Any, scope: trio.CancelScope) -> None:
        async for number in signals:
            self._log.info("stopping", signal=signal.Signals(number).name)
            self._state = "stopping"
            self._stop.set()
            # A store that hangs holds threads, and those cannot be ended: only the process can.
            threading.Thread(target=_exit_later, name="exit", daemon=True).start()
            with trio.move_on_after(_UNMOUNT_S):
                # The unmount asks this file system, so the loop has to go on meanwhile.
                await trio.to_thread.run_sync(self._unmount_now, abandon_on_cancel=True)
            scope.cancel()
            return

    def _unmount_now(self) -> None:
        path = self._spec.path
        mounted = kernel.mounted_at(path)
        if mounted is None or mounted.device != self._device:
            return
        try:
            try:
                kernel.unmount(path)
            except MountBusy:
                self._log.warning("files are open; unmounting lazily", path=path)
                kernel.unmount(path, lazy=True)
        except MountPointError as error:
            self._log.error(error.line(), path=path)

    def _answer(self, question: dict[str, Any], body: bytes) -> dict[str, Any]:
        if question.get("ask") == "status":
            answer: dict[str, Any] = msgspec.to_builtins(self.status())
            return answer
        if question.get("ask") == "prefetch":
            return self._declare(question, body)
        return {"error": "unknown question"}

    def _declare(self, question: dict[str, Any], body: bytes) -> dict[str, Any]:
        """Take in an order of reads; called in a thread, as building its index takes 0.2 s a million files."""
        across = self._desk.across
        try:
            if question.get("order") == "learned":
                return {"files": trio.from_thread.run_sync(across.learn), "queued": 0}
            epoch = Epoch(unpack(body), self._desk.tree.inodes)
            keep = question.get("keep")
            declare = functools.partial(
                across.declare,
                epoch,
                reader=str(question.get("reader", "")),
                keep=None if keep is None else int(keep),
            )
            return {"files": len(epoch.inodes), "queued": trio.from_thread.run_sync(declare)}
        except UsageError as error:
            return {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}

    def _figures(self) -> dict[str, float]:
        figures = self._counters.snapshot()
        for since in (self._desk.waits_since, self._fetcher.waits_since):
            if since is not None:
                figures["waiting_s"] += time.monotonic() - since
        return figures

    async def _remember(self) -> None:
        """Keep what the counters were, second by second, for a verdict; a task for ever."""
        while True:
            self._history.remember(time.monotonic(), self._figures())
            await trio.sleep(1.0)

    def status(self) -> MountStatus:
        """Return what this session is and has done."""
        statistics = self._figures()
        verdict = self._history.verdict(time.monotonic(), statistics)
        statistics |= {
            "memory_bytes": self._memory.used,
            "memory_budget_bytes": self._memory.budget,
            "active_files": self._desk.active,
            "window_files": self._desk.across.window_files,
            "in_flight": self._fetcher.in_flight(),
        }
        if self._cache is not None:
            statistics |= {"cache_bytes": self._cache.used(), "cache_limit_bytes": self._cache.limit}
        spec = self._spec
        return MountStatus(
            ref=spec.ref, path=spec.path, digest=spec.digest, mode="mount", state=self._state, pid=os.getpid(),
            started_ns=self._started_ns, files=self._desk.tree.info.files,
            bytes=self._desk.tree.info.bytes, statistics=statistics, histograms=self._counters.spreads(),
            verdict=verdict,
        )  # fmt: skip


def _raise_open_files() -> None:
    """Allow this process as many descriptors as it may have: each request to a store takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _exit_later() -> None:
    time.sleep(STOP_S)
    sys.stderr.flush()
    os._exit(0)


def run(
    spec: MountSpec,
    settings: Settings,
    where: Places,
    log: structlog.typing.FilteringBoundLogger,
    ready: Callable[[], None],
) -> None:
    """Run one session to its end; raise AmlmountError where it could not be made."""
    failure: AmlmountError | None = None

    async def main() -> None:
        nonlocal failure
        try:
            await MountSession(spec, settings, where, log).run(ready)
        except* AmlmountError as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            assert isinstance(error, AmlmountError)
            failure = error

    # The event loop waits this long for a thread that holds the interpreter; the default, 5 ms, is a round trip.
    sys.setswitchinterval(0.02)
    trio.run(main)
    if failure is not None:
        raise failure
