"""A frozen file list: one SQLite file, opened read-only and immutable, whose memory does not grow with the dataset.

Identity. A manifest's digest is SHA-256 over the line "amlmount-manifest-1\\n" and then, for each entry in the order of
its path's bytes, six fields, each followed by a NUL byte: path (bytes), kind ("f" file, "d" directory), size,
modification time in nanoseconds since 1970 (decimal, without leading zeros), tag (ETag without quotes; local files:
`mtime_ns-size`), MD5 (lower-case hexadecimal, or empty). Directories are entries only where nothing is below them. No
field holds a NUL, so equal digests mean equal lists. Where the files come from (the sources) is not part of it: the
same content frozen on two machines has one digest.

Nodes. Row `ino` of `node` is inode `ino`; 1 is the root. Nodes are numbered by depth, then by path, so the children of
a directory are consecutive numbers in the order of their names: a directory is listed, and its next files are found,
by number alone.

`Manifest` is not safe for use from several threads. `builder` writes the files; `tree` puts names on top.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from amlmount.dataset import ManifestEntry, ManifestInfo, Source
from amlmount.errors import ManifestError

FORMAT = 1
"""Version of the file's schema; a test holds the bytes of a digest, so that a change must raise it."""

APPLICATION_ID = 0x414D4C4D
"""'AMLM' in the SQLite header, so that file(1) and this module know a manifest from another database."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE source (id INTEGER PRIMARY KEY, json BLOB NOT NULL);
CREATE TABLE node (
    ino INTEGER PRIMARY KEY, parent INTEGER NOT NULL, name BLOB NOT NULL, dir INTEGER NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, tag TEXT NOT NULL, md5 BLOB NOT NULL, source INTEGER NOT NULL,
    first INTEGER NOT NULL DEFAULT 0, count INTEGER NOT NULL DEFAULT 0, subdirs INTEGER NOT NULL DEFAULT 0);
CREATE TABLE rejected (path BLOB NOT NULL, reason TEXT NOT NULL);
"""

ROOT = 1

# SQLite maps this many bytes at the most; the rest is read page by page. Mapped pages count as resident memory.
_MMAP_BYTES = 128 << 20


class Node(NamedTuple):
    """One inode."""

    ino: int
    parent: int
    name: bytes
    is_dir: bool
    size: int
    mtime_ns: int
    tag: str
    md5: str
    source: int
    first: int
    """Inode of a directory's first child; the others follow without a gap."""
    children: int
    """Number of children."""
    subdirs: int


_COLUMNS = "ino, parent, name, dir, size, mtime_ns, tag, md5, source, first, count, subdirs"


# What reading a damaged file can raise: its text need not be UTF-8, its values need not have their columns' types.
_DAMAGE = (
    sqlite3.Error,
    msgspec.MsgspecError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)

# What `builder.reject_reason` keeps out, and what is no size.
_HOSTILE = (
    "SELECT count(*) FROM node WHERE ino > 1 AND (typeof(name) != 'blob' OR typeof(size) != 'integer' OR size < 0"
    " OR name IN (x'', x'2e', x'2e2e') OR length(name) > 255 OR instr(name, x'2f') OR instr(name, x'00'))"
)


def _node(row: tuple[int, int, bytes, int, int, int, str, bytes, int, int, int, int]) -> Node:
    ino, parent, name, is_dir, size, mtime_ns, tag, md5, source, first, count, subdirs = row
    digest = md5.hex() if md5 else ""
    # The class's own constructor takes as long as the query.
    return tuple.__new__(
        Node, (ino, parent, name, is_dir != 0, size, mtime_ns, tag, digest, source, first, count, subdirs)
    )


class DigestBuilder:
    """The digest of a manifest, fed entry by entry in the order of their paths' bytes."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"amlmount-manifest-%d\n" % FORMAT)

    def add(self, path: bytes, is_dir: bool, size: int, mtime_ns: int, tag: str, md5: str) -> None:
        """Take in the next entry."""
        kind = b"d" if is_dir else b"f"
        self._hash.update(
            b"%b\0%b\0%d\0%d\0%b\0%b\0"
            % (path, kind, size, mtime_ns, tag.encode("utf-8"), md5.encode("ascii"))
        )

    def hexdigest(self) -> str:
        """Return the digest so far: 64 hexadecimal digits."""
        return self._hash.hexdigest()


def connect_readonly(path: Path) -> sqlite3.Connection:
    """Open a SQLite file that nobody writes; raise ManifestError where there is none."""
    if not path.is_file():
        raise ManifestError(f"no manifest at {path}")
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True, check_same_thread=False)


class Manifest:
    """An open manifest; a context manager."""

    def __init__(self, path: Path) -> None:
        """Open the file at `path`; raise ManifestError for anything that is no whole manifest of this format."""
        self.path = path
        self._db = connect_readonly(path)
        try:
            if self._db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise ManifestError(f"{path} is no amlmount manifest")
            self._db.execute(f"PRAGMA mmap_size = {_MMAP_BYTES}")
            meta = dict(self._db.execute("SELECT key, value FROM meta"))
            if meta.get("format") != FORMAT:
                raise ManifestError(
                    f"{path} has manifest format {meta.get('format')}; this amlmount reads {FORMAT}"
                )
            sources = self._db.execute("SELECT json FROM source ORDER BY id")
            self.info = ManifestInfo(
                digest=meta["digest"],
                files=meta["files"],
                directories=meta["directories"],
                bytes=meta["bytes"],
                rejected=meta["rejected"],
                sources=tuple(msgspec.json.decode(row[0], type=Source) for row in sources),
                created_ns=meta["created_ns"],
            )
            self.name = str(meta.get("name", ""))
        except _DAMAGE as error:
            self._db.close()
            raise ManifestError(f"{path} is damaged or no manifest: {error}") from error
        except ManifestError:
            self._db.close()
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, ino: int) -> Node | None:
        """Return an inode, or None where the manifest has no such number."""
        row = self._db.execute(f"SELECT {_COLUMNS} FROM node WHERE ino = ?", (ino,)).fetchone()
        return None if row is None else _node(row)

    def lookup(self, parent: int, name: bytes) -> Node | None:
        """Return the child of that name, or None."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM node WHERE parent = ? AND name = ?", (parent, name)
        ).fetchone()
        return None if row is None else _node(row)

    def run(self, ino: int, limit: int) -> list[Node]:
        """Return up to `limit` inodes from number `ino` on, in order."""
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM node WHERE ino >= ? ORDER BY ino LIMIT ?", (ino, limit)
        )
        return [_node(row) for row in rows]

    def nodes(self, inodes: Sequence[int]) -> list[Node]:
        """Return those of up to 1,000 inodes that there are, in no particular order."""
        marks = ",".join("?" * len(inodes))
        return [
            _node(row)
            for row in self._db.execute(f"SELECT {_COLUMNS} FROM node WHERE ino IN ({marks})", inodes)
        ]

    def levels(self) -> list[int]:
        """Return the first inode of each depth, the root's and one past the last included."""
        found, begin, end = [ROOT], ROOT, ROOT + 1
        last = self._db.execute("SELECT max(ino) FROM node").fetchone()[0]
        while end <= last:
            # The children of a depth's last folder end the next depth.
            query = "SELECT first + count FROM node WHERE ino >= ? AND ino < ? AND count > 0 ORDER BY ino DESC LIMIT 1"
            begin, end = end, self._db.execute(query, (begin, end)).fetchone()[0]
            found.append(begin)
        return [*found, end]

    def any_file(self, source: int) -> Node | None:
        """Return one file of a source, or None where it has none."""
        row = self._db.execute(
            f"SELECT {_COLUMNS} FROM node WHERE source = ? AND dir = 0 LIMIT 1", (source,)
        ).fetchone()
        return None if row is None else _node(row)

    def children(self, directory: Node, start: int = 0, limit: int = -1) -> list[Node]:
        """Return up to `limit` children of a directory in name order, from child number `start` (from 0) on."""
        if directory.children <= start:
            return []
        stop = directory.first + directory.children
        rows = self._db.execute(
            f"SELECT {_COLUMNS} FROM node WHERE ino >= ? AND ino < ? ORDER BY ino LIMIT ?",
            (directory.first + start, stop, limit),
        )
        return [_node(row) for row in rows]

    def files_in(self, directory: Node) -> Iterator[tuple[bytes, int]]:
        """Yield name and inode of each file in a directory, in name order."""
        return self._db.execute(
            "SELECT name, ino FROM node WHERE ino >= ? AND ino < ? AND dir = 0 ORDER BY ino",
            (directory.first, directory.first + directory.children),
        )

    def path_of(self, node: Node) -> bytes:
        """Return a node's path in the tree; empty for the root."""
        parts: list[bytes] = []
        while node.ino != ROOT:
            parts.append(node.name)
            parent = self.get(node.parent)
            if parent is None:
                raise ManifestError(f"{self.path} is damaged: inode {node.ino} has no parent")
            node = parent
        return b"/".join(reversed(parts))

    def entries(self) -> Iterator[ManifestEntry]:
        """Yield the entries in the order of their paths' bytes: files, and directories with nothing below."""
        root = self.get(ROOT)
        if root is None:
            raise ManifestError(f"{self.path} is damaged: it has no root")
        stack: list[tuple[bytes, Iterator[Node]]] = [(b"", iter(self.in_path_order(root)))]
        while stack:
            prefix, nodes = stack[-1]
            node = next(nodes, None)
            if node is None:
                stack.pop()
            elif node.is_dir and node.children:
                stack.append((prefix + node.name + b"/", iter(self.in_path_order(node))))
            else:
                path = prefix + node.name
                yield ManifestEntry(
                    path, node.size, node.mtime_ns, node.tag, node.md5, node.source, node.is_dir
                )

    def in_path_order(self, directory: Node) -> list[Node]:
        """Return a directory's children in the order of the paths below them."""
        # A path below "a" begins with "a/", and "a-b" sorts before that: so a folder's key is its name with the slash.
        return sorted(
            self.children(directory), key=lambda n: n.name + b"/" if n.is_dir and n.children else n.name
        )

    def origin(self) -> str:
        """Return 64 hexadecimal digits over what the digest leaves out: the sources, and which file is whose."""
        sources = self.info.sources
        origin = hashlib.sha256(
            b"\0".join(f"{s.kind} {s.url} {s.base} {s.datastore}".encode() for s in sources)
        )
        if len(sources) > 1:
            for (source,) in self._db.execute("SELECT source FROM node WHERE dir = 0 ORDER BY ino"):
                origin.update(b"\0%d" % source)
        return origin.hexdigest()

    def rejected(self, limit: int = -1) -> list[tuple[bytes, str]]:
        """Return up to `limit` names that could not be in the tree, each with the reason."""
        return list(self._db.execute("SELECT path, reason FROM rejected ORDER BY path LIMIT ?", (limit,)))

    def check(self) -> None:
        """Read everything and compare with the digest; raise ManifestError where it differs.

        Besides the entries it holds names and numbering to what `tree` and the kernel rely on: a forged manifest must
        not lead out of the tree, nor in a circle.
        """
        try:
            if self._db.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                raise ManifestError(f"{self.path} is damaged: SQLite's integrity check failed")
            numbered = self._db.execute(
                "SELECT count(*) FROM node AS n JOIN node AS p ON p.ino = n.parent WHERE n.ino > 1 AND p.ino < n.ino"
                " AND p.dir = 1 AND n.ino BETWEEN p.first AND p.first + p.count - 1"
            ).fetchone()[0]
            total, sources, folders = self._db.execute(
                "SELECT count(*), max(source), sum(dir) FROM node"
            ).fetchone()
            hostile = self._db.execute(_HOSTILE).fetchone()[0]
            if numbered != total - 1 or sources >= max(1, len(self.info.sources)):
                raise ManifestError(f"{self.path} is damaged: its inodes are not numbered as they should be")
            if hostile:
                raise ManifestError(f"{self.path} is damaged: {hostile} of its names or sizes cannot be")
            digest, files, size = digest_of(self.entries())
        except _DAMAGE as error:
            raise ManifestError(f"{self.path} is damaged: {error}") from error
        info = self.info
        if (digest, files, size, folders) != (info.digest, info.files, info.bytes, info.directories):
            raise ManifestError(
                f"{self.path} is damaged: its content has digest {digest}, it says {self.info.digest}"
            )


def digest_of(entries: Iterable[ManifestEntry]) -> tuple[str, int, int]:
    """Return digest, number of files and bytes of entries given in the order of their paths' bytes."""
    digest, files, size = DigestBuilder(), 0, 0
    for entry in entries:
        digest.add(entry.path, entry.is_dir, entry.size, entry.mtime_ns, entry.tag, entry.md5)
        if not entry.is_dir:
            files += 1
            size += entry.size
    return digest.hexdigest(), files, size


def set_name(path: Path, name: str) -> None:
    """Write the dataset's name into a copy of a manifest, for the machine that imports it."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT OR REPLACE INTO meta VALUES ('name', ?)", (name,))
