"""The commands that keep datastores: named places in storage, with their credentials."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import msgspec

from amlmount.catalog import Catalog
from amlmount.config import Places
from amlmount.credentials import check_secret
from amlmount.dataset import Datastore, check_name
from amlmount.errors import SecretError, UsageError


@click.group()
def datastore() -> None:
    """Named places in storage, with their credentials."""


def _read_secret(kind: Any, secret_file: Path | None, secret_env: str | None) -> str | None:
    if kind not in ("key", "sas"):
        return None
    if secret_file is not None:
        try:
            return check_secret(kind, secret_file.read_text())
        except OSError as error:
            raise SecretError(f"cannot read {secret_file}: {error.strerror}") from error
    if secret_env is not None:
        return check_secret(kind, os.environ.get(secret_env, ""))
    if sys.stdin.isatty():
        return check_secret(kind, click.prompt("secret", hide_input=True, err=True))
    return check_secret(kind, sys.stdin.read())


_secret_options = (
    click.option("--secret-file", type=click.Path(path_type=Path), help="File that holds the key or SAS."),
    click.option("--secret-env", metavar="VARIABLE", help="Environment variable that holds it."),
)


def _with_secret(command: Any) -> Any:
    for option in _secret_options:
        command = option(command)
    return command


_CREDENTIALS = click.Choice(["key", "sas", "anonymous", "default"])


@datastore.command("add")
@click.argument("name")
@click.option("--kind", type=click.Choice(["blob"]), default="blob", show_default=True)
@click.option("--account", required=True)
@click.option("--container", required=True)
@click.option(
    "--endpoint",
    default="",
    help="The account's blob service, where not https://ACCOUNT.blob.core.windows.net.",
)
@click.option("--credential", type=_CREDENTIALS, default="default", show_default=True)
@_with_secret
@click.pass_obj
def add(
    where: Places, name: str, kind: Any, account: str, container: str, endpoint: str, credential: Any,
    secret_file: Path | None, secret_env: str | None,
) -> None:  # fmt: skip
    """Add a datastore; a key or SAS is read from standard input, a file or a variable."""
    check_name(name, "datastore")
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"{endpoint!r} is no endpoint", hint="a URL: https://HOST")
    record = Datastore(
        name=name, kind=kind, account=account, container=container, endpoint=endpoint, credential=credential
    )
    Catalog(where).put_datastore(record, _read_secret(credential, secret_file, secret_env), new=True)
    click.echo(f"datastore {name}: {record.url()} ({credential})")


@datastore.command("update")
@click.argument("name")
@click.option("--credential", type=_CREDENTIALS, help="Another kind of credential.")
@_with_secret
@click.pass_obj
def update(
    where: Places, name: str, credential: Any, secret_file: Path | None, secret_env: str | None
) -> None:
    """Replace a datastore's credential."""
    catalog = Catalog(where)
    old = catalog.datastore(name)
    record = msgspec.structs.replace(old, credential=credential or old.credential)
    catalog.put_datastore(record, _read_secret(record.credential, secret_file, secret_env), new=False)
    click.echo(f"datastore {name}: {record.url()} ({record.credential})")


@datastore.command("list")
@click.pass_obj
def list_datastores(where: Places) -> None:
    """List the datastores."""
    for record in Catalog(where).datastores():
        click.echo(f"{record.name:24} {record.kind:6} {record.url()} ({record.credential})")


@datastore.command("show")
@click.argument("name")
@click.pass_obj
def show_datastore(where: Places, name: str) -> None:
    """Show a datastore, without its secret, as JSON."""
    click.echo(json.dumps(msgspec.to_builtins(Catalog(where).datastore(name)), indent=2))


@datastore.command("remove")
@click.argument("name")
@click.pass_obj
def remove(where: Places, name: str) -> None:
    """Remove a datastore and its secret."""
    Catalog(where).remove_datastore(name)
    click.echo(f"datastore {name} removed")
