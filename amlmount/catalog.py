"""The registry of one user: dataset versions, datastores, and the manifest files they lead to.

A SQLite file in rollback-journal mode with full syncs: every change is one transaction, so several processes may write
and a kill at any moment loses the change under way and nothing else. A manifest file is renamed into its folder before
the row that names it is committed; one without a row is harmless.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from amlmount.config import Places, private_folder
from amlmount.credentials import Access, SecretFolder, resolve
from amlmount.dataset import DatasetRef, DatasetVersion, Datastore, Source
from amlmount.errors import DatasetNotFound, DatastoreNotFound, RegistryError, UsageError
from amlmount.manifest import Manifest, set_name

_SCHEMA = """
CREATE TABLE IF NOT EXISTS version (
    name TEXT NOT NULL, version INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY (name, version)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS datastore (name TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
"""
_FORMAT = 1


class Catalog:
    """The registry at a user's places. Opens the database for each call, so it holds nothing between them."""

    def __init__(self, where: Places) -> None:
        self._state = private_folder(where.state)
        self._path = self._state / "registry.sqlite"
        self.manifests = private_folder(self._state / "manifests")
        self.secrets = SecretFolder(self._state / "secrets")

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as db:
                os.chmod(self._path, 0o600)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                made = db.execute("PRAGMA user_version").fetchone()[0]
                if made == 0:
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                    db.execute(f"PRAGMA user_version = {_FORMAT}")
                elif made != _FORMAT:
                    raise RegistryError(f"{self._path} has format {made}; this amlmount knows {_FORMAT}")
                yield db
                db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise RegistryError(f"cannot use the registry {self._path}: {error}") from error

    # Dataset versions

    def versions(self, name: str | None = None) -> list[DatasetVersion]:
        """Return all versions, or those of one dataset, by name and number."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT record FROM version WHERE ? IS NULL OR name = ? ORDER BY name, version", (name, name)
            ).fetchall()
        return [msgspec.json.decode(row[0], type=DatasetVersion) for row in rows]

    def find(self, ref: DatasetRef) -> DatasetVersion:
        """Return a version, the newest where the ref names none; raise DatasetNotFound."""
        found = self.versions(ref.name)
        if not found:
            raise DatasetNotFound(f"no dataset {ref.name!r}")
        if ref.version is None:
            return found[-1]
        for record in found:
            if record.version == ref.version:
                return record
        there = f"{found[0].version}" if len(found) == 1 else f"{found[0].version} to {found[-1].version}"
        raise DatasetNotFound(f"no version {ref.version} of dataset {ref.name!r}", hint=f"there is {there}")

    def keep_manifest(self, path: Path) -> tuple[str, str]:
        """Move a finished manifest into the folder; return its digest and its file name there.

        The name says content and origin: the same content from another place is another file.
        """
        with Manifest(path) as manifest:
            info = manifest.info
            name = f"{info.digest}-{manifest.origin()[:12]}.sqlite"
        target = self.manifests / name
        if target.exists():
            path.unlink()
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.chmod(0o600)
            path.rename(target)
        return info.digest, name

    def add_version(
        self,
        name: str,
        manifest: str,
        *,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        paths: tuple[str, ...] = (),
        force: bool = False,
    ) -> tuple[DatasetVersion, bool]:
        """Make the next version of a dataset; return it and True.

        Where the newest version has that very manifest, return that one and False, unless `force`.
        """
        with Manifest(self.manifests / manifest) as opened:
            info = opened.info
        with self._transaction() as db:
            row = db.execute(
                "SELECT record FROM version WHERE name = ? ORDER BY version DESC LIMIT 1", (name,)
            ).fetchone()
            newest = msgspec.json.decode(row[0], type=DatasetVersion) if row else None
            if newest is not None and newest.manifest == manifest and not force:
                return newest, False
            record = DatasetVersion(
                name=name,
                version=newest.version + 1 if newest else 1,
                digest=info.digest,
                manifest=manifest,
                created_ns=time.time_ns(),
                files=info.files,
                bytes=info.bytes,
                description=description,
                tags=dict(tags or {}),
                paths=paths,
            )
            db.execute(
                "INSERT INTO version VALUES (?, ?, ?)", (name, record.version, msgspec.json.encode(record))
            )
        return record, True

    def open_manifest(self, record: DatasetVersion) -> Manifest:
        """Open a version's manifest; raise ManifestError where it is gone or damaged."""
        return Manifest(self.manifests / record.manifest)

    def export_manifest(self, record: DatasetVersion, target: Path) -> None:
        """Write a version's manifest to a file, whole or not at all."""
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.copyfile(self.manifests / record.manifest, temporary)
            set_name(temporary, record.name)
            temporary.rename(target)
        except OSError as error:
            raise UsageError(f"cannot write {target}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def import_manifest(self, source: Path, name: str | None) -> tuple[DatasetVersion, bool]:
        """Check a manifest file against its digest and make it a version; as `add_version`."""
        with Manifest(source) as manifest:
            manifest.check()
            name = name or manifest.name
            paths = tuple(s.uri for s in manifest.info.sources)
        if not name:
            raise UsageError(f"{source} does not say which dataset it is", hint="give --name NAME")
        fd, temporary = tempfile.mkstemp(prefix=".importing-", suffix=".sqlite", dir=self.manifests)
        os.close(fd)
        try:
            shutil.copyfile(source, temporary)
            _, kept = self.keep_manifest(Path(temporary))
        finally:
            Path(temporary).unlink(missing_ok=True)
        return self.add_version(name, kept, paths=paths)

    # Datastores

    def datastores(self) -> list[Datastore]:
        """Return all datastores by name."""
        with self._transaction() as db:
            rows = db.execute("SELECT record FROM datastore ORDER BY name").fetchall()
        return [msgspec.json.decode(row[0], type=Datastore) for row in rows]

    def datastore(self, name: str) -> Datastore:
        """Return one datastore; raise DatastoreNotFound."""
        for record in self.datastores():
            if record.name == name:
                return record
        raise DatastoreNotFound(f"no datastore {name!r}")

    def put_datastore(self, record: Datastore, secret: str | None, *, new: bool) -> None:
        """Add or replace a datastore; the secret is written first, so that no row ever leads to none."""
        exists = any(d.name == record.name for d in self.datastores())
        if new and exists:
            raise UsageError(
                f"datastore {record.name!r} exists", hint=f"amlmount datastore update {record.name}"
            )
        if secret is not None:
            self.secrets.write(record.name, secret)
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO datastore VALUES (?, ?)", (record.name, msgspec.json.encode(record))
            )

    def remove_datastore(self, name: str) -> None:
        """Remove a datastore and its secret; raise DatastoreNotFound."""
        self.datastore(name)
        with self._transaction() as db:
            db.execute("DELETE FROM datastore WHERE name = ?", (name,))
        self.secrets.remove(name)

    def access(self, source: Source, environ: Mapping[str, str]) -> Access:
        """Return how to open a source's store, as `credentials.resolve`."""
        if source.kind == "local":
            return Access("local", source.url)
        datastores = self.datastores()
        name = source.datastore
        if not name:
            name = next((d.name for d in datastores if d.url().lower() == source.url.lower()), "")
        return resolve(source.url, name, datastores, self.secrets, environ)
