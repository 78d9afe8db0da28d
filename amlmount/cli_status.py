"""The command that says what is mounted, what it has done, and what bounds it."""

from __future__ import annotations

import json
import time

import click
import msgspec

from amlmount.config import Places
from amlmount.resolve import human_bytes
from amlmount.status import MountStatus

_BOUNDS = {
    "idle": "idle",
    "reader": "bound by the reader",
    "store": "bound by the store",
    "budget": "bound by the memory budget",
    "cache disk": "bound by the cache disk",
    "fuse": "bound by FUSE",
}


@click.command()
@click.argument("path", required=False, type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="All there is to know, as JSON.")
@click.pass_obj
def status(where: Places, path: str | None, as_json: bool) -> None:
    """Say what is mounted, by whom it is served, what it has done, and what bounds its speed."""
    from amlmount import channel, kernel

    wanted = kernel.absolute(path) if path else None
    found = [
        channel.status_of(where.run, record)
        for record in channel.records(where.run)
        if (wanted is None or record.path == wanted)
        and (channel.is_alive(record) or kernel.mounted_at(record.path))
    ]
    if as_json:
        click.echo(json.dumps({"mounts": msgspec.to_builtins(found)}, indent=2))
        return
    if not found:
        click.echo("nothing is mounted" if wanted is None else f"amlmount has nothing mounted at {wanted}")
    for mounted in found:
        for line in lines(mounted, time.time()):
            click.echo(line)


def lines(mounted: MountStatus, now_s: float) -> list[str]:
    """Return what a person is told of one mount at a moment, in seconds since 1970."""
    seconds = max(0, int(now_s - mounted.started_ns / 1e9))
    said = mounted.statistics
    out = [
        f"{mounted.ref} on {mounted.path}: {mounted.state}, pid {mounted.pid}, up {seconds} s",
        f"  digest {mounted.digest}, {mounted.files:,} files, {human_bytes(mounted.bytes)}",
    ]
    if not said:
        return out
    if mounted.verdict is not None:
        bound = _BOUNDS[mounted.verdict.bound]
        out.append(f"  {bound} (over {mounted.verdict.over_s:.0f} s): {mounted.verdict.why}")
    out += [
        f"  read {human_bytes(said['bytes_asked'])} in {said['reads']:,.0f} requests;"
        f" from the store {human_bytes(said['bytes_fetched'])} ({said['fetched_per_asked']} per byte asked),"
        f" from the cache disk {human_bytes(said['bytes_from_disk'])}",
        f"  ahead: {said['prefetched']:,.0f} blocks, {said['prefetch_used']:,.0f} in time,"
        f" {said['prefetch_late']:,.0f} late, {said['prefetch_wasted']:,.0f} wasted; now {said['in_flight']:,.0f} on"
        f" their way, {said['window_files']:,.0f} files ahead; memory {human_bytes(said['memory_bytes'])} of"
        f" {human_bytes(said['memory_budget_bytes'])}",
        f"  store: {said['requests']:,.0f} requests, {said['retries']:,.0f} retries,"
        f" {said['throttled']:,.0f} throttled{_times(mounted)}; errors to readers: {said['read_errors']:,.0f};"
        f" damaged cache blocks: {said['cache_corrupt']:,.0f}",
    ]
    return out


def _times(mounted: MountStatus) -> str:
    times = mounted.histograms.get("request_seconds")
    if times is None or not times.count:
        return ""
    return (
        f", half within {times.quantile_s(0.5) * 1e3:g} ms, 99 % within {times.quantile_s(0.99) * 1e3:g} ms"
    )
