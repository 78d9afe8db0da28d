"""The one tree of errors, each with its errno, its exit code and a hint; no I/O.

A class says what a failure means to the two kinds of people who meet it: a program that reads through the mount gets
`errno`, a person or a script that runs a command gets `exit_code` and one line, `str(error)`, followed by `hint`.
Libraries' own exceptions are translated where they are called and never travel further.

    AmlmountError                 1  EIO
      ReportedError               1  EIO      what another process failed with; each has that error's exit code
      NoSuchInode                 1  ESTALE   a number that this manifest has not: from an earlier mount
      UsageError                  2  EINVAL   the command's words are off
      DriftFound                  3  ESTALE   verify: the store no longer holds what was frozen
      ConfigError                 4  EINVAL   a setting's name or value is wrong
      DatasetNotFound            10  ENOENT   no such dataset, version or label
      DatastoreNotFound          11  ENOENT
      SecretError                12  EACCES   a secret is missing, or its file is readable by others
      UriError                   13  EINVAL   unknown scheme or malformed URI
      FreezeError                14  EIO      nothing at the URI, two files of one name, --strict refused a name
      ManifestError              15  EIO      not a manifest, damaged, or its digest does not match
      RegistryError              16  EIO      the registry cannot be read or written
      StoreError                 20  EIO      storage: anything not named below
        ObjectChanged            21  ESTALE   the pinned version is gone: the object was overwritten
        ObjectMissing            22  EIO
        AccessDenied             23  EACCES
        TransientStoreError      24  EIO      reset, time-out, 5xx, a body of the wrong length: worth another attempt
          Throttled              24  EIO      429 or 503: worth another attempt, later
        StoreUnreachable         24  EIO      the patience for transient errors is over
      MountPointError            30  EINVAL   missing, not a directory
        MountPointNotEmpty       31  ENOTEMPTY
        MountPointInUse          32  EBUSY    something is mounted there
        NotMounted               33  EINVAL   umount of what amlmount did not mount
        MountBusy                34  EBUSY    umount while files are open
      FuseUnavailable            35  ENODEV   no /dev/fuse, no right to it, no fusermount3
      MountFailed                36  EIO      the session ended or stayed silent before it was ready
"""

from __future__ import annotations

import copy
import errno
from typing import ClassVar, Self


class AmlmountError(Exception):
    """A failure with a face: what happened, to what, and what to do."""

    errno: ClassVar[int] = errno.EIO
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = self.default_hint if hint is None else hint

    def line(self) -> str:
        """Return the one line that a person sees."""
        return f"{self} ({self.hint})" if self.hint else str(self)

    def fresh(self) -> Self:
        """Return a copy for one more reader: a traceback belongs to one task."""
        again = copy.copy(self).with_traceback(None)
        again.__cause__ = self.__cause__
        return again


class ReportedError(AmlmountError):
    """What another process of amlmount's failed with; carries that error's exit code."""

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code  # type: ignore[misc]  # the class's elsewhere; this one is another process's


def unexpected(cause: Exception | None) -> AmlmountError:
    """Return the error for what nobody foresaw."""
    failure = AmlmountError(f"unexpected: {cause!r}")
    failure.__cause__ = cause
    return failure


class NoSuchInode(AmlmountError):
    """An inode's number that the manifest has not."""

    errno = errno.ESTALE


class UsageError(AmlmountError):
    """The command's words are off."""

    errno = errno.EINVAL
    exit_code = 2


class DriftFound(AmlmountError):
    """The store no longer holds what was frozen."""

    errno = errno.ESTALE
    exit_code = 3


class ConfigError(AmlmountError):
    """A setting's name or value is wrong."""

    errno = errno.EINVAL
    exit_code = 4


class DatasetNotFound(AmlmountError):
    """No such dataset, version or label in the registry."""

    errno = errno.ENOENT
    exit_code = 10
    default_hint = "amlmount list shows what is registered"


class DatastoreNotFound(AmlmountError):
    """No such datastore in the registry."""

    errno = errno.ENOENT
    exit_code = 11
    default_hint = "amlmount datastore list shows what there is; amlmount datastore add makes one"


class SecretError(AmlmountError):
    """A secret is missing, malformed, or kept where others can read it."""

    errno = errno.EACCES
    exit_code = 12


class UriError(AmlmountError):
    """An unknown scheme or a malformed URI."""

    errno = errno.EINVAL
    exit_code = 13


class FreezeError(AmlmountError):
    """The paths given cannot become one tree of files."""

    exit_code = 14


class ManifestError(AmlmountError):
    """A manifest that is damaged, of another format, or not what its digest says."""

    exit_code = 15


class RegistryError(AmlmountError):
    """The registry cannot be read or written."""

    exit_code = 16


class StoreError(AmlmountError):
    """Storage refused or failed in a way not named by a subclass."""

    exit_code = 20


class ObjectChanged(StoreError):
    """The object was overwritten since it was frozen: the pinned version cannot be read any more."""

    errno = errno.ESTALE
    exit_code = 21
    default_hint = "register a new version of the dataset, or restore the object"


class ObjectMissing(StoreError):
    """The object, or the container, is not there."""

    exit_code = 22
    default_hint = "restore it, or register a new version of the dataset"


class AccessDenied(StoreError):
    """The credential was refused, or may not read this."""

    errno = errno.EACCES
    exit_code = 23
    default_hint = "check the datastore's credential: its expiry, and its right to read and list"


class TransientStoreError(StoreError):
    """One attempt failed in a way that another attempt may mend."""

    exit_code = 24
    default_hint = "check the network and the endpoint's address"

    def __init__(self, message: str, *, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class Throttled(TransientStoreError):
    """The store asks for fewer requests; `retry_after_s` where it said when to come back."""


class StoreUnreachable(StoreError):
    """Every attempt failed until the patience was over."""

    exit_code = 24
    default_hint = "check the network and the endpoint; AMLMOUNT_READ_TIMEOUT sets the patience"


class MountPointError(AmlmountError):
    """The mount point is missing or not a directory."""

    errno = errno.EINVAL
    exit_code = 30


class MountPointNotEmpty(MountPointError):
    """The mount point holds files that a mount would hide."""

    errno = errno.ENOTEMPTY
    exit_code = 31
    default_hint = "choose an empty directory"


class MountPointInUse(MountPointError):
    """Something is mounted there already."""

    errno = errno.EBUSY
    exit_code = 32


class NotMounted(MountPointError):
    """There is nothing of amlmount's at this path."""

    exit_code = 33
    default_hint = "amlmount status shows what is mounted"


class MountBusy(MountPointError):
    """A process still uses the mount."""

    errno = errno.EBUSY
    exit_code = 34


class FuseUnavailable(AmlmountError):
    """FUSE cannot be used here."""

    errno = errno.ENODEV
    exit_code = 35


class MountFailed(AmlmountError):
    """The mount did not come up."""

    exit_code = 36
