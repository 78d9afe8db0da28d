"""Local files and folders as a store: an object's name is its absolute path, its tag `mtime_ns-size`.

Symbolic links to files are read as the files they lead to; links to folders, broken links and special files are
reported, not followed: a loop of links would have no end.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Generator

from amlmount.dataset import ListedObject, ObjectId, printable
from amlmount.errors import AccessDenied, ObjectChanged, ObjectMissing, StoreError, TransientStoreError
from amlmount.stores.base import ListedPage

_PAGE = 5000


def tag_of(status: os.stat_result) -> str:
    """Return the tag that pins a file's version."""
    return f"{status.st_mtime_ns}-{status.st_size}"


class LocalStore:
    """The local file system."""

    identity = "file:///"
    cacheable = False

    def __init__(self) -> None:
        self._walks: dict[str, Generator[ListedPage, None, None]] = {}

    def list_page(self, prefix: str, marker: str) -> ListedPage:
        """List the files below the folder `prefix` (which ends in '/'), and its empty and non-empty folders."""
        if not marker:
            self._walks[prefix] = self._walk(prefix)
        page = next(self._walks[prefix])
        if not page.next_marker:
            self._walks.pop(prefix).close()
        return page

    def _walk(self, prefix: str) -> Generator[ListedPage, None, None]:
        listed: list[ListedObject] = []
        refused: list[tuple[str, str]] = []
        folders = [prefix]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        self._take(entry, listed, refused, folders)
            except OSError as error:
                raise _translate(error, folder) from error
            if len(listed) >= _PAGE:
                yield ListedPage(listed, "more", refused)
                listed, refused = [], []
        yield ListedPage(listed, "", refused)

    def _take(
        self,
        entry: os.DirEntry[str],
        listed: list[ListedObject],
        refused: list[tuple[str, str]],
        folders: list[str],
    ) -> None:
        try:
            status = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink():
                refused.append((entry.path, "is a broken symbolic link"))
            return
        except OSError as error:
            if entry.is_symlink():
                refused.append((entry.path, f"is a symbolic link that cannot be followed: {error.strerror}"))
                return
            raise
        if stat.S_ISREG(status.st_mode):
            listed.append(ListedObject(entry.path, status.st_size, status.st_mtime_ns, tag_of(status)))
        elif not stat.S_ISDIR(status.st_mode):
            refused.append((entry.path, "is a special file"))
        elif entry.is_symlink():
            refused.append((entry.path, "is a symbolic link to a folder"))
        else:
            folders.append(entry.path + "/")
            listed.append(ListedObject(entry.path, 0, status.st_mtime_ns, "", "", True))

    def head(self, path: str) -> ListedObject | None:
        """Return what the file system says of a file or folder."""
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _translate(error, path) from error
        if stat.S_ISDIR(status.st_mode):
            return ListedObject(path, 0, status.st_mtime_ns, "", "", True)
        return ListedObject(path, status.st_size, status.st_mtime_ns, tag_of(status))

    def read(self, obj: ObjectId, start: int, stop: int, attempt: int = 0) -> memoryview:
        """Return bytes of a file that is still as it was frozen, before and after the read."""
        del attempt
        try:
            data = b""
            fd = os.open(obj.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                tags = {obj.tag, tag_of(os.fstat(fd))}
                if len(tags) == 1:  # what is there now may not even be a file
                    data = os.pread(fd, stop - start, start)
                    tags.add(tag_of(os.fstat(fd)))
            finally:
                os.close(fd)
        except OSError as error:
            raise _translate(error, obj.path) from error
        if len(tags) > 1:
            raise ObjectChanged(f"{printable(obj.path)} was changed since it was frozen")
        if len(data) != stop - start:
            raise TransientStoreError(f"{printable(obj.path)}: {len(data)} bytes of {stop - start}")
        return memoryview(data)

    def close(self) -> None:
        """Forget unfinished listings."""
        self._walks.clear()


def _translate(error: OSError, path: str) -> StoreError:
    what = f"{printable(path)}: {error.strerror}"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectMissing(what)
    if isinstance(error, PermissionError):
        return AccessDenied(what, hint="the user who mounts must be able to read it")
    return TransientStoreError(what, hint="")
