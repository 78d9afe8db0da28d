"""The commands that work on the registry: datasets, versions and manifests."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from amlmount.catalog import Catalog
from amlmount.config import Places
from amlmount.dataset import DatasetRef, check_name, printable, text
from amlmount.errors import DriftFound, UsageError
from amlmount.freeze import compare, freeze_again
from amlmount.manifest import Manifest
from amlmount.resolve import NAMES_SHOWN, Resolver, human_bytes, progress


@click.command()
@click.argument("name")
@click.option(
    "--path",
    "paths",
    multiple=True,
    required=True,
    metavar="URI",
    help="File, folder or pattern; repeatable.",
)
@click.option("--description", default="", help="A line about this version.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Repeatable.")
@click.option(
    "--strict", is_flag=True, help="Fail where a name cannot be in a file tree, rather than leave it out."
)
@click.option("--new-version", is_flag=True, help="Make a version even where nothing changed.")
@click.pass_obj
def register(
    where: Places,
    name: str,
    paths: tuple[str, ...],
    description: str,
    tags: tuple[str, ...],
    strict: bool,
    new_version: bool,
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
        name,
        kept,
        description=description,
        tags=pairs,
        paths=tuple(s.uri for s in frozen.info.sources),
        force=new_version,
    )
    info = frozen.info
    if new:
        click.echo(f"{record.ref()} {record.digest}")
        click.echo(
            f"{info.files:,} files, {human_bytes(info.bytes)} in {info.directories:,} directories", err=True
        )
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
        click.echo(
            f"{r.ref():32} {r.digest[:16]} {r.files:>12,} files {human_bytes(r.bytes):>12}  {made}  {r.description}"
        )


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
        rejected = [[text(path), reason] for path, reason in manifest.rejected(NAMES_SHOWN)]
    if as_json:
        value = msgspec.to_builtins(record) | {"sources": msgspec.to_builtins(info.sources)}
        value |= {"directories": info.directories, "rejected": [[printable(p), r] for p, r in rejected]}
        click.echo(json.dumps(value, indent=2))
        return
    click.echo(f"{record.ref()}\ndigest       {record.digest}")
    click.echo(
        f"content      {info.files:,} files, {human_bytes(info.bytes)}, {info.directories:,} directories"
    )
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
            with Manifest(again.path) as now:
                changed, missing, new = compare(old, now)
        finally:
            again.path.unlink()
    if as_json:
        click.echo(
            json.dumps({"ref": record.ref(), "changed": changed, "missing": missing, "new": new}, indent=2)
        )
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


def add_commands(group: click.Group) -> None:
    """Add these commands to the command line."""
    for command in (register, list_, show, verify, manifest):
        group.add_command(command)
