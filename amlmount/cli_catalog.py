"""The commands that work on the registry: datasets, manifests and datastores."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import msgspec

from amlmount.catalog import Catalog
from amlmount.config import Places, load
from amlmount.credentials import check_secret
from amlmount.dataset import DatasetRef, Datastore, DatasetVersion, Source, check_name, printable, text
from amlmount.errors import DriftFound, FreezeError, SecretError, UsageError
from amlmount.freeze import Frozen, compare, freeze, freeze_again
from amlmount.manifest import Manifest
from amlmount.stores import ObjectStore, Retrying, open_store
from amlmount.uri import Location, looks_like_uri, parse

_SHOWN = 1000


def human_bytes(count: float) -> str:
    """Return a number of bytes for people: 512 B, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


class Resolved(NamedTuple):
    """A manifest to mount."""

    ref: str
    manifest: Path
    digest: str
    files: int
    bytes: int


class Resolver:
    """Turns what a user wrote into manifests and stores."""

    def __init__(self, catalog: Catalog, environ: Mapping[str, str] = os.environ) -> None:
        self.catalog = catalog
        self._environ = environ
        self._settings = load(environ).settings
        self.open_store = lru_cache(maxsize=None)(self._open_store)

    def _open_store(self, source: Source) -> ObjectStore:
        access = self.catalog.access(source, self._environ)
        store = open_store(access, stall_timeout_s=self._settings.stall_timeout)
        return Retrying(store, patience_s=self._settings.read_timeout)

    def locate(self, uri: str) -> Location:
        """Parse a URI against the working directory and the known datastores."""
        datastores = self.catalog.datastores() if "://" in uri else ()
        return parse(uri, cwd=os.getcwd(), datastores=datastores)

    def locate_source(self, source: Source) -> Location:
        """Parse a frozen source's URI anew; local paths were made absolute when they were frozen."""
        return self.locate(source.uri)

    def freeze(self, uris: Sequence[str], *, strict: bool) -> Frozen:
        """Freeze URIs and report the names that were left out."""
        locations = [self.locate(uri) for uri in uris]
        locations = [loc._replace(uri=loc.path) if loc.kind == "local" else loc for loc in locations]
        frozen = freeze(locations, self.open_store, self.catalog.manifests, progress())
        report_rejected(frozen, strict=strict)
        return frozen

    def resolve(self, ref: str, *, strict: bool = False) -> Resolved:
        """Return the manifest of a REF; a URI is frozen on the spot."""
        if looks_like_uri(ref):
            frozen = self.freeze([ref], strict=strict)
            digest, name = self.catalog.keep_manifest(frozen.path)
            return Resolved(ref, self.catalog.manifests / name, digest, frozen.info.files, frozen.info.bytes)
        record = self.catalog.find(DatasetRef.parse(ref))
        path = self.catalog.manifests / record.manifest
        with Manifest(path):
            return Resolved(record.ref(), path, record.digest, record.files, record.bytes)


def progress() -> Callable[[int], None]:
    """Return a callback that keeps one line of a terminal up to date, and does nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda _: None
    begin = time.monotonic()

    def show(seen: int) -> None:
        rate = seen / max(1e-3, time.monotonic() - begin)
        click.echo(f"\r\x1b[Klisted {seen:,} ({rate:,.0f}/s)", nl=False, err=True)

    return show


def report_rejected(frozen: Frozen, *, strict: bool) -> None:
    """Name each path that is not in the tree, on standard error; raise FreezeError where `strict`."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    count = frozen.info.rejected
    if not count:
        return
    with Manifest(frozen.path) as manifest:
        for path, reason in manifest.rejected(_SHOWN):
            click.echo(f"amlmount: left out: {printable(path)!r} {reason}", err=True)
    if count > _SHOWN:
        click.echo(f"amlmount: and {count - _SHOWN:,} more", err=True)
    if strict:
        frozen.path.unlink()
        raise FreezeError(f"{count:,} names cannot be in a file tree", hint="without --strict they are left out")


@click.command()
@click.argument("name")
@click.option("--path", "paths", multiple=True, required=True, metavar="URI", help="File, folder or pattern; repeatable.")
@click.option("--description", default="", help="A line about this version.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Repeatable.")
@click.option("--strict", is_flag=True, help="Fail where a name cannot be in a file tree, rather than leave it out.")
@click.option("--new-version", is_flag=True, help="Make a version even where nothing changed.")
@click.pass_obj
def register(
    where: Places, name: str, paths: tuple[str, ...], description: str, tags: tuple[str, ...], strict: bool, new_version: bool
) -> None:
    """Freeze what is at the paths as the next version of dataset NAME; prints NAME:VERSION and the digest."""
    check_name(name, "dataset")
    pairs = dict(tag.partition("=")[::2] for tag in tags)
    if any("=" not in tag for tag in tags):
        raise UsageError("a tag is K=V")
    catalog = Catalog(where)
    resolver = Resolver(catalog)
    frozen = resolver.freeze(paths, strict=strict)
    _, kept = catalog.keep_manifest(frozen.path)
    record, new = catalog.add_version(
        name, kept, description=description, tags=pairs, paths=tuple(s.uri for s in frozen.info.sources), force=new_version
    )
    info = frozen.info
    if new:
        click.echo(f"{record.ref()} {record.digest}")
        click.echo(f"{info.files:,} files, {human_bytes(info.bytes)} in {info.directories:,} directories", err=True)
    else:
        click.echo(f"{record.ref()} {record.digest} unchanged")


@click.command("list")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def list_(where: Places, as_json: bool) -> None:
    """List the registered versions."""
    records = Catalog(where).versions()
    if as_json:
        click.echo(json.dumps({"datasets": msgspec.to_builtins(records)}, indent=2))
        return
    for r in records:
        made = datetime.fromtimestamp(r.created_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M")
        click.echo(f"{r.ref():32} {r.digest[:16]} {r.files:>12,} files {human_bytes(r.bytes):>12}  {made}  {r.description}")


@click.command()
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True)
@click.option("--files", is_flag=True, help="The files, one a line: size, modification time (ns), tag, path.")
@click.pass_obj
def show(where: Places, ref: str, as_json: bool, files: bool) -> None:
    """Show one version: digest, sources, size, and names that were left out."""
    catalog = Catalog(where)
    record = catalog.find(DatasetRef.parse(ref))
    with catalog.open_manifest(record) as manifest:
        if files:
            for entry in manifest.entries():
                if not entry.is_dir:
                    click.echo(f"{entry.size}\t{entry.mtime_ns}\t{entry.tag}\t{printable(entry.path)}")
            return
        info = manifest.info
        rejected = [[text(path), reason] for path, reason in manifest.rejected(_SHOWN)]
    if as_json:
        value = msgspec.to_builtins(record) | {"sources": msgspec.to_builtins(info.sources)}
        value |= {"directories": info.directories, "rejected": [[printable(p), r] for p, r in rejected]}
        click.echo(json.dumps(value, indent=2))
        return
    click.echo(f"{record.ref()}\ndigest       {record.digest}")
    click.echo(f"content      {info.files:,} files, {human_bytes(info.bytes)}, {info.directories:,} directories")
    for source in info.sources:
        through = f" through datastore {source.datastore}" if source.datastore else ""
        click.echo(f"source       {printable(source.uri)}{through}")
    if record.description:
        click.echo(f"description  {record.description}")
    for key, value in record.tags.items():
        click.echo(f"tag          {key}={value}")
    for path, reason in rejected:
        click.echo(f"left out     {printable(path)!r} {reason}")


@click.command()
@click.argument("ref")
@click.option("--json", "as_json", is_flag=True)
@click.pass_obj
def verify(where: Places, ref: str, as_json: bool) -> None:
    """Compare a version with what its storage holds now; exit code 3 says that they differ."""
    catalog = Catalog(where)
    resolver = Resolver(catalog)
    record = catalog.find(DatasetRef.parse(ref))
    with catalog.open_manifest(record) as old:
        again = freeze_again(old, resolver.locate_source, resolver.open_store, catalog.manifests, progress())
        try:
            if again is None:
                missing = [printable(entry.path) for entry in old.entries()]
                changed, new = [], []
            else:
                with Manifest(again.path) as now:
                    changed, missing, new = compare(old, now)
        finally:
            if again is not None:
                again.path.unlink()
    if as_json:
        click.echo(json.dumps({"ref": record.ref(), "changed": changed, "missing": missing, "new": new}, indent=2))
    else:
        for kind, names in (("changed", changed), ("missing", missing), ("new", new)):
            for name in names:
                click.echo(f"{kind}\t{name}")
    if changed or missing or new:
        raise DriftFound(
            f"{record.ref()} has drifted: {len(changed):,} changed, {len(missing):,} missing, {len(new):,} new",
            hint=f"amlmount register {record.name} freezes what is there now",
        )
    if not as_json:
        click.echo(f"{record.ref()} is as it was frozen: {record.files:,} files")


@click.group()
def manifest() -> None:
    """Carry a frozen file list from one machine to another."""


@manifest.command("export")
@click.argument("ref")
@click.argument("file", type=click.Path(path_type=Path))
@click.pass_obj
def export(where: Places, ref: str, file: Path) -> None:
    """Write the manifest of REF to FILE."""
    catalog = Catalog(where)
    record = catalog.find(DatasetRef.parse(ref))
    catalog.export_manifest(record, file.absolute())
    click.echo(f"{record.ref()} {record.digest} written to {file}")


@manifest.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Dataset name; the exported one where not given.")
@click.pass_obj
def import_(where: Places, file: Path, name: str | None) -> None:
    """Check FILE against its digest and make it the next version of its dataset."""
    if name is not None:
        check_name(name, "dataset")
    record, new = Catalog(where).import_manifest(file.absolute(), name)
    click.echo(f"{record.ref()} {record.digest}{'' if new else ' unchanged'}")


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
@click.option("--endpoint", default="", help="The account's blob service, where not https://ACCOUNT.blob.core.windows.net.")
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


def add_commands(group: click.Group) -> None:
    """Add these commands to the command line."""
    for command in (register, list_, show, verify, manifest, datastore):
        group.add_command(command)


__all__ = ["DatasetVersion", "Resolved", "Resolver", "add_commands", "human_bytes"]
