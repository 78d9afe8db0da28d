"""The command that says which files are read next: names from a file or standard input, in their order."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from amlmount import announce, kernel, namelist
from amlmount.config import Places
from amlmount.errors import UsageError

LEARNED = "learned"
"""In place of a file: the order in which a pass is read is recorded, and declared for the next one."""


@click.command()
@click.argument("path", type=click.Path())
@click.option(
    "--order",
    metavar="FILE",
    help="Files in the order of the reads, one a line: paths, or numbers in the list of files; - is standard input."
    " The list of files itself where not given.",
)
@click.option("-0", "--null", is_flag=True, help="Names in FILE end with a NUL, not with the line.")
@click.option("--replace", is_flag=True, help="Drop what was declared before, rather than go on after it.")
@click.option("--skip-unknown", is_flag=True, help="Leave out lines that are no file, rather than fail.")
@click.pass_obj
def prefetch(
    where: Places, path: str, order: str | None, null: bool, replace: bool, skip_unknown: bool
) -> None:
    """Declare the order in which files of the mount at PATH are read next: they are fetched ahead of their readers.

    A wrong order costs speed, never a wrong byte. The order of a next epoch may be declared while one is read.
    """
    target = kernel.absolute(path)
    record = announce.session_at(where.run, target)
    if order == LEARNED:
        announce.learn(where.run, record)
        click.echo(f"{record.ref} on {target}: the order of the reads is recorded, for the next pass")
        return
    names = None if order is None else namelist.split(_read(order), null=null)
    with announce.open_manifest(record) as manifest:
        if names is None:
            inodes = namelist.files(manifest)
        else:
            named = namelist.resolve(names, manifest, [target, os.path.abspath(path)])
            inodes = named.known(target, skip_unknown=skip_unknown)
    if not inodes:
        raise UsageError("the order holds no files")
    queued = announce.declare(where.run, record, inodes, keep=0 if replace else None)
    orders = "1 order" if queued == 1 else f"{queued} orders"
    click.echo(f"{record.ref} on {target}: {len(inodes):,} files declared; {orders} to be read")


def _read(order: str) -> bytes:
    if order == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(order).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {order}: {error.strerror}") from error
