"""The command line: arguments in, one line or a table out, and the exit code of whatever failed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click
import msgspec

from amlmount import __version__, logs
from amlmount.catalog import Catalog
from amlmount.cli_catalog import add_commands
from amlmount.cli_datastore import datastore
from amlmount.cli_prefetch import prefetch
from amlmount.cli_status import status
from amlmount.config import SETTINGS, Places, load, places
from amlmount.dataset import MountSpec
from amlmount.errors import AmlmountError, UsageError
from amlmount.resolve import Resolver, human_bytes

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

C = TypeVar("C", bound=Callable[..., Any])


class Errors(click.Group):
    """A group whose commands' errors become one line and their exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except AmlmountError as error:
            click.echo(f"amlmount: {logs.redact(error.line())}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=Errors, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="amlmount")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Frozen datasets from cloud storage, mounted read-only for training jobs.

    REF is a dataset (weather, weather:2, weather@latest, azureml:weather:2), a storage URI or a local path.
    """
    ctx.obj = places(os.environ)


def setting_options(command: C) -> C:
    """Give a command one flag for each setting."""
    for setting in reversed(SETTINGS):
        flag = f"--{setting.name.replace('_', '-')}"
        command = click.option(
            flag, setting.name, metavar="VALUE", help=setting.help, hidden=setting.name == "null_reads"
        )(command)
    return command


@cli.command()
@click.argument("ref")
@click.argument("path", type=click.Path())
@click.option(
    "-f", "--foreground", is_flag=True, help="Stay, and say on standard output when the tree answers."
)
@click.option(
    "--mode", type=click.Choice(["auto", "mount"]), default="auto", help="How: auto is mount, through FUSE."
)
@click.option("--uid", type=int, help="Owner of the files; the mounting user where not given.")
@click.option("--gid", type=int, help="Group of the files.")
@click.option(
    "--umask", default="022", metavar="OCTAL", show_default=True, help="Permission bits taken away."
)
@click.option("--allow-other", is_flag=True, help="Let other users read, too.")
@click.option("--nonempty", is_flag=True, help="Mount over a directory that holds files.")
@click.option("--strict", is_flag=True, help="For a URI: fail where a name cannot be in a file tree.")
@click.option(
    "--timeout", default=60.0, show_default=True, metavar="S", help="Seconds until the tree must answer."
)
@setting_options
@click.pass_obj
def mount(
    where: Places, /, ref: str, path: str, foreground: bool, mode: str, uid: int | None, gid: int | None, umask: str,
    allow_other: bool, nonempty: bool, strict: bool, timeout: float, **flags: str | None,
) -> None:  # fmt: skip
    """Mount REF at PATH; returns when the tree answers and leaves the session running."""
    from amlmount import kernel

    del mode  # there is one
    settings = load(os.environ, flags).settings
    target = kernel.absolute(path)
    # Before a listing that may take long; the session looks again.
    kernel.check_fuse(allow_other=allow_other)
    kernel.check_mount_point(target, nonempty=nonempty)
    resolved = Resolver(Catalog(where)).resolve(ref, strict=strict)
    try:
        bits = int(umask, 8) & 0o777
    except ValueError:
        raise UsageError(f"{umask!r} is no umask", hint="octal digits, as 022") from None
    spec = MountSpec(
        ref=resolved.ref, path=target, manifest=str(resolved.manifest), digest=resolved.digest,
        uid=os.getuid() if uid is None else uid, gid=os.getgid() if gid is None else gid, umask=bits,
        allow_other=allow_other, nonempty=nonempty,
    )  # fmt: skip
    size = f"{resolved.files:,} files, {human_bytes(resolved.bytes)}, digest {resolved.digest}"
    if foreground:
        logs.configure(settings.log_level)
        _serve(
            spec,
            where,
            settings,
            lambda: click.echo(f"{spec.ref} is ready at {target} ({size}), pid {os.getpid()}"),
        )
    from amlmount import launch

    environ = dict(os.environ)
    environ |= {f"AMLMOUNT_{name.upper()}": value for name, value in flags.items() if value is not None}
    report = launch.start(spec, where, environ, timeout_s=timeout)
    click.echo(f"{spec.ref} on {target} ({size}), pid {report.pid}")


@cli.command(hidden=True)
@click.pass_obj
def session(where: Places) -> None:
    """Run the session whose spec is on standard input: what `mount` leaves behind."""
    from amlmount.launch import Report

    settings = load(os.environ).settings
    logs.configure(settings.log_level)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=MountSpec)

    def report(answer: Report) -> None:
        os.write(1, msgspec.json.encode(answer) + b"\n")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)

    try:
        _serve(spec, where, settings, lambda: report(Report(pid=os.getpid())))
    except AmlmountError as error:
        report(Report(pid=os.getpid(), error=str(error), hint=error.hint, exit_code=error.exit_code))
        raise


def _serve(spec: MountSpec, where: Places, settings: Any, ready: Callable[[], None]) -> NoReturn:
    from amlmount import session as sessions

    def tell() -> None:
        ready()
        sys.stdout.flush()

    sessions.run(spec, settings, where, logs.get(), tell)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that wait for a store cannot be ended, and the interpreter would wait for them.
    os._exit(0)


@cli.command()
@click.argument("path", type=click.Path())
@click.option("--lazy", is_flag=True, help="Detach now; the mount ends when its last file is closed.")
@click.option("--force", is_flag=True, help="End the mount whatever uses it: reads under way fail.")
@click.pass_obj
def umount(where: Places, path: str, lazy: bool, force: bool) -> None:
    """Unmount PATH and wait for its session to end."""
    from amlmount import kernel, launch

    ended = launch.stop(where, kernel.absolute(path), lazy=lazy, force=force)
    click.echo(f"{ended['ref']} unmounted from {ended['path']}")


@cli.command()
@click.option("--json", "as_json", is_flag=True)
@setting_options
@click.pass_obj
def config(where: Places, /, as_json: bool, **flags: str | None) -> None:
    """Print every setting's value and where it came from."""
    resolved = load(os.environ, flags)
    rows = {}
    for setting in SETTINGS:
        value = getattr(resolved.settings, setting.name)
        shown = "auto" if value is None else str(value) if isinstance(value, Path) else value
        rows[setting.name] = {"value": shown, "origin": resolved.origins[setting.name], "help": setting.help}
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for name, row in rows.items():
        click.echo(f"{name:16} {row['value']!s:28} {row['origin']:24} {row['help']}")
    click.echo(f"config file: {where.config_file}; state: {where.state}")


add_commands(cli)
cli.add_command(datastore)
cli.add_command(prefetch)
cli.add_command(status)


def main() -> NoReturn:
    """Run the command line."""
    try:
        cli(prog_name="amlmount")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # a thread may wait for a store, and the interpreter would wait for it
        raise
    raise SystemExit(0)
