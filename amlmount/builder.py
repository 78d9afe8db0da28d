"""Makes a manifest from listed entries, in bounded memory: staged in a temporary SQLite file, sorted there.

Names that a store allows and a file system does not are never in the tree: `reject_reason` is the rule. A name that is
both a file and a folder is a folder; the file is reported as rejected. Nothing here does I/O beyond the two files.
"""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from amlmount.dataset import ManifestEntry, ManifestInfo, Source, printable
from amlmount.errors import FreezeError, ManifestError
from amlmount.manifest import APPLICATION_ID, FORMAT, ROOT, SCHEMA, DigestBuilder

NAME_MAX = 255
"""Bytes of one path segment: Linux's NAME_MAX."""

_STAGING = """
CREATE TABLE staging.entry (
    path BLOB PRIMARY KEY, depth INTEGER NOT NULL, parent BLOB NOT NULL, sort BLOB NOT NULL, dir INTEGER NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, tag TEXT NOT NULL, md5 BLOB NOT NULL, source INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE staging.folder (path BLOB PRIMARY KEY, mtime_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE staging.numbered (
    ino INTEGER PRIMARY KEY, path BLOB, parent BLOB, dir INTEGER, size INTEGER, mtime_ns INTEGER, tag TEXT, md5 BLOB,
    source INTEGER);
"""


# Finds what makes a path worth a closer look: an empty, '.' or '..' segment, a NUL, 256 bytes without a slash.
_ODD = re.compile(rb"(?:^|/)\.{0,2}(?:/|\Z)|\0|[^/]{%d}" % (NAME_MAX + 1))


def reject_reason(path: bytes) -> str | None:
    """Return why a path cannot be in a tree, or None: the rule that the README's Semantics states."""
    if _ODD.search(path) is None:
        return None
    if b"\0" in path:
        return "holds a NUL byte"
    for part in path.split(b"/"):
        if not part:
            return "has an empty segment"
        if part in (b".", b".."):
            return "has a '.' or '..' segment"
        if len(part) > NAME_MAX:
            return f"has a segment of over {NAME_MAX} bytes"
    return None


class ManifestBuilder:
    """Builds one manifest at `path`; a context manager that removes what is unfinished.

    Call `add` any number of times, then `finish` once.
    """

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self._path = path
        self._staging = path.with_name(path.name + ".staging")
        self._sources = tuple(sources)
        self._done = False
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        # Nothing needs to survive a crash here: an unfinished manifest is thrown away, a finished one is renamed.
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("PRAGMA cache_size = -32768")
        self._db.execute("ATTACH ? AS staging", (str(self._staging),))
        self._db.execute("PRAGMA staging.journal_mode = OFF")
        self._db.execute("PRAGMA staging.synchronous = OFF")
        self._db.execute("PRAGMA staging.cache_size = -32768")
        self._db.executescript(SCHEMA + _STAGING)
        self._db.execute("BEGIN")

    def __enter__(self) -> ManifestBuilder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()
        with suppress(FileNotFoundError):
            self._staging.unlink()
        if not self._done:
            with suppress(FileNotFoundError):
                self._path.unlink()

    def reject(self, path: bytes, reason: str) -> None:
        """Report a name that will not be in the tree."""
        self._db.execute("INSERT INTO rejected VALUES (?, ?)", (path, reason))

    def add(self, entries: Sequence[ManifestEntry]) -> None:
        """Take in entries, in any order; names that cannot be in a tree are rejected.

        Raises FreezeError where two different objects have one path.
        """
        rows = []
        for entry in entries:
            path = entry.path
            if (reason := reject_reason(path)) is not None:
                self.reject(path, reason)
                continue
            parent = path.rpartition(b"/")[0]
            md5 = bytes.fromhex(entry.md5)
            rows.append(
                (
                    path,
                    path.count(b"/"),
                    parent,
                    path.replace(b"/", b"\x00"),
                    int(entry.is_dir),
                    entry.size,
                    entry.mtime_ns,
                    entry.tag,
                    md5,
                    entry.source,
                )
            )
        before = self._db.total_changes
        self._db.executemany("INSERT OR IGNORE INTO staging.entry VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
        if self._db.total_changes - before != len(rows):
            for row in rows:
                self._check_twin(row[0], row[4] != 0, row[6], row[9])

    def _check_twin(self, path: bytes, is_dir: bool, mtime_ns: int, source: int) -> None:
        twin_is_dir, twin_source = self._db.execute(
            "SELECT dir, source FROM staging.entry WHERE path = ?", (path,)
        ).fetchone()
        if is_dir != (twin_is_dir != 0):
            if is_dir:  # nothing of the file stays: the order of a listing must not show in the digest
                self._db.execute(
                    "UPDATE staging.entry SET dir = 1, size = 0, mtime_ns = ?, tag = '', md5 = x'' WHERE path = ?",
                    (mtime_ns, path),
                )
            self.reject(path, "is also a folder")
        elif not is_dir and self._object(source, path) != self._object(twin_source, path):
            names = " and ".join(self._object(s, path) for s in (twin_source, source))
            raise FreezeError(
                f"two files would be {printable(path)}: {names}",
                hint="freeze them as two datasets, or narrow a path",
            )

    def _object(self, source: int, path: bytes) -> str:
        origin = self._sources[source]
        return f"{origin.url.removesuffix('/')}/{origin.base.lstrip('/')}{printable(path)}"

    def finish(self) -> ManifestInfo:
        """Sort, number and write everything; return what the manifest now says of itself."""
        db = self._db
        self._find_folders()
        # A name that is a file and a folder is a folder; a folder with something below needs no entry of its own.
        shadowed = (
            "SELECT path FROM staging.entry WHERE dir = 0 AND path IN (SELECT path FROM staging.folder)"
        )
        found = db.execute(f"INSERT INTO rejected SELECT path, 'is also a folder' FROM ({shadowed})").rowcount
        db.execute("DELETE FROM staging.entry WHERE path IN (SELECT path FROM staging.folder)")
        if found:
            self._find_folders()  # once more: the times of those files must not show in their folders'
        digest, files, size = self._digest()
        db.create_function("depth_of", 1, lambda p: p.count(b"/"), deterministic=True)
        db.create_function("parent_of", 1, lambda p: p.rpartition(b"/")[0], deterministic=True)
        db.create_function("sort_of", 1, lambda p: p.replace(b"/", b"\0"), deterministic=True)
        db.execute(
            "INSERT INTO staging.numbered (path, parent, dir, size, mtime_ns, tag, md5, source)"
            " SELECT path, parent, dir, size, mtime_ns, tag, md5, source FROM ("
            "  SELECT depth, sort, path, parent, dir, size, mtime_ns, tag, md5, source FROM staging.entry UNION ALL"
            "  SELECT depth_of(path), sort_of(path), path, parent_of(path), 1, 0, mtime_ns, '', x'', 0"
            "  FROM staging.folder WHERE path != x'')"
            " ORDER BY depth, sort"
        )
        db.execute("CREATE UNIQUE INDEX staging.by_path ON numbered (path) WHERE dir = 1")
        newest = db.execute("SELECT mtime_ns FROM staging.folder WHERE path = x''").fetchone()
        db.execute(
            "INSERT INTO node (ino, parent, name, dir, size, mtime_ns, tag, md5, source)"
            " VALUES (?, ?, x'', 1, 0, ?, '', x'', 0)",
            (ROOT, ROOT, newest[0] if newest else 0),
        )
        db.execute(
            "INSERT INTO node (ino, parent, name, dir, size, mtime_ns, tag, md5, source)"
            " SELECT n.ino + 1, ifnull(p.ino + 1, 1),"
            " CASE WHEN n.parent = x'' THEN n.path ELSE substr(n.path, length(n.parent) + 2) END,"
            " n.dir, n.size, n.mtime_ns, n.tag, n.md5, n.source FROM staging.numbered AS n"
            " LEFT JOIN staging.numbered AS p ON p.dir = 1 AND p.path = n.parent ORDER BY n.ino"
        )
        db.execute("CREATE UNIQUE INDEX node_name ON node (parent, name)")
        db.execute("CREATE TEMP TABLE span (parent INTEGER PRIMARY KEY, first, count, subdirs)")
        db.execute(
            "INSERT INTO span SELECT parent, min(ino), count(*), sum(dir) FROM node WHERE ino > 1 GROUP BY parent"
        )
        db.execute(
            "UPDATE node SET (first, count, subdirs) = (SELECT first, count, subdirs FROM span WHERE parent = ino)"
            " WHERE ino IN (SELECT parent FROM span)"
        )
        directories = db.execute("SELECT count(*) FROM node WHERE dir = 1").fetchone()[0]
        rejected = db.execute("SELECT count(*) FROM rejected").fetchone()[0]
        created_ns = time.time_ns()
        db.executemany(
            "INSERT INTO source VALUES (?, ?)", list(enumerate(map(msgspec.json.encode, self._sources)))
        )
        db.executemany(
            "INSERT INTO meta VALUES (?, ?)",
            [
                ("format", FORMAT),
                ("digest", digest),
                ("files", files),
                ("directories", directories),
                ("bytes", size),
                ("rejected", rejected),
                ("created_ns", created_ns),
            ],
        )
        try:
            db.execute("COMMIT")
            db.execute("DETACH staging")
        except sqlite3.DatabaseError as error:
            raise ManifestError(f"cannot write {self._path}: {error}") from error
        self._done = True
        return ManifestInfo(
            digest=digest,
            files=files,
            directories=directories,
            bytes=size,
            rejected=rejected,
            sources=self._sources,
            created_ns=created_ns,
        )

    def _find_folders(self) -> None:
        """Note every folder that a path implies, with the modification time of the newest file below it."""
        add = "INSERT OR REPLACE INTO staging.folder VALUES (?, ?)"
        stack: list[tuple[bytes, int]] = [
            (b"", 0)
        ]  # open folders, outermost first, each with its newest time

        def close_until(parent: bytes) -> None:
            while stack[-1][0] and parent != stack[-1][0] and not parent.startswith(stack[-1][0] + b"/"):
                path, newest = stack.pop()
                self._db.execute(add, (path, newest))
                if newest > stack[-1][1]:
                    stack[-1] = (stack[-1][0], newest)

        # A folder's own time says nothing of its content, so it counts only where nothing is below it.
        leaves = (
            "SELECT path, mtime_ns FROM staging.entry AS e WHERE dir = 0 OR NOT EXISTS (SELECT 1 FROM staging.entry"
            " WHERE path > CAST(e.path || x'2f' AS BLOB) AND path < CAST(e.path || x'30' AS BLOB)) ORDER BY path"
        )
        for path, mtime_ns in self._db.execute(leaves):
            parent = path.rpartition(b"/")[0]
            if parent != stack[-1][0]:
                close_until(parent)
                while len(stack[-1][0]) < len(parent):
                    at = parent.find(b"/", len(stack[-1][0]) + 1)
                    stack.append((parent if at < 0 else parent[:at], 0))
            if mtime_ns > stack[-1][1]:
                stack[-1] = (parent, mtime_ns)
        close_until(b"\0")
        self._db.execute(add, stack[0])

    def _digest(self) -> tuple[str, int, int]:
        digest, files, size = DigestBuilder(), 0, 0
        rows = self._db.execute("SELECT path, dir, size, mtime_ns, tag, md5 FROM staging.entry ORDER BY path")
        for path, is_dir, length, mtime_ns, tag, md5 in rows:
            digest.add(path, is_dir != 0, length, mtime_ns, tag, md5.hex())
            if not is_dir:
                files += 1
                size += length
        return digest.hexdigest(), files, size
