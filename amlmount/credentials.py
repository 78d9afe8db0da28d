"""Who amlmount is to a store: a datastore's credential, or the environment's; and where secrets are kept.

Secrets live in one file a datastore, mode 0600, in a folder of mode 0700. They come from standard input, a file or
the environment, never from an argument, and no object here shows one in its repr.

Azure's standard variables, looked at where no datastore covers a container: AZURE_STORAGE_CONNECTION_STRING,
AZURE_STORAGE_ACCOUNT (or _NAME) with AZURE_STORAGE_KEY (or _ACCOUNT_KEY) or AZURE_STORAGE_SAS_TOKEN; after them
azure-identity's default chain, which has its own.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from amlmount.dataset import CredentialKind, Datastore, StoreKind
from amlmount.errors import DatastoreNotFound, SecretError

TOKEN_SCOPE = "https://storage.azure.com/.default"  # noqa: S105  # an audience, not a secret


@dataclass(frozen=True, slots=True)
class Access:
    """A store's address and the credential that opens it."""

    kind: StoreKind
    url: str
    account: str = ""
    credential: CredentialKind = "anonymous"
    secret: str = field(default="", repr=False)
    what: str = ""
    """Where the credential comes from, for error lines."""


class SecretFolder:
    """The secrets of one user, a file each."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, name: str, secret: str) -> None:
        """Keep a secret; the file appears whole or not at all. Raises SecretError where it cannot be written."""
        temporary = self._path / f".{name}.{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # of a process that was killed
            with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
                file.write(secret)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise SecretError(f"cannot keep a secret in {self._path}: {error.strerror}") from error

    def read(self, name: str) -> str:
        """Return a secret; raise SecretError where it is missing or others can read it."""
        path = self._path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SecretError(
                f"no secret for datastore {name}: {path}: {error.strerror}",
                hint=f"amlmount datastore update {name}",
            ) from error
        with os.fdopen(fd) as file:
            status = os.fstat(fd)
            if stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (os.geteuid(), 0):
                raise SecretError(
                    f"{path} can be read by others", hint=f"chmod 600 {path}, and replace the secret"
                )
            return file.read()

    def remove(self, name: str) -> None:
        """Forget a secret."""
        (self._path / name).unlink(missing_ok=True)


def check_secret(kind: CredentialKind, secret: str) -> str:
    """Return the secret without surrounding blanks; raise SecretError where it cannot be one of that kind."""
    secret = secret.strip()
    if not secret:
        raise SecretError(f"no {kind} given", hint="give it on standard input or with --secret-file FILE")
    if kind == "key":
        try:
            base64.b64decode(secret, validate=True)
        except binascii.Error as error:
            raise SecretError(
                "this is no account key", hint="an account key is base64, about 88 characters"
            ) from error
    elif kind == "sas":
        secret = secret.removeprefix("?")
        if "sig=" not in secret:
            raise SecretError("this is no SAS", hint="a SAS looks like sv=...&sig=...")
    return secret


def account_of(url: str) -> str:
    """Return the account of a container's URL: the host's first label, or the path's first part behind an address."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host == "localhost" or ":" in host or host.replace(".", "").isdigit():
        return parts.path.lstrip("/").partition("/")[0]
    return host.partition(".")[0]


def resolve(
    url: str,
    datastore: str,
    datastores: Sequence[Datastore],
    secrets: SecretFolder,
    environ: Mapping[str, str],
) -> Access:
    """Return how to open a container.

    Raises DatastoreNotFound for a datastore that is gone, SecretError for a secret that cannot be used.
    """
    if datastore:
        record = next((d for d in datastores if d.name == datastore), None)
        if record is None:
            raise DatastoreNotFound(f"no datastore {datastore!r}, which holds the credential for {url}")
        secret = secrets.read(datastore) if record.credential in ("key", "sas") else ""
        return Access("blob", url, record.account, record.credential, secret, f"datastore {datastore}")
    return _from_environment(url, environ)


def _from_environment(url: str, environ: Mapping[str, str]) -> Access:
    account = account_of(url)
    text = environ.get("AZURE_STORAGE_CONNECTION_STRING", "")
    given = dict(part.split("=", 1) for part in text.split(";") if "=" in part)
    if given and given.get("AccountName", account) == account:
        what = "AZURE_STORAGE_CONNECTION_STRING"
        if key := given.get("AccountKey"):
            return Access("blob", url, account, "key", check_secret("key", key), what)
        if sas := given.get("SharedAccessSignature"):
            return Access("blob", url, account, "sas", check_secret("sas", sas), what)
    named = environ.get("AZURE_STORAGE_ACCOUNT") or environ.get("AZURE_STORAGE_ACCOUNT_NAME") or account
    if named == account:
        for variable in ("AZURE_STORAGE_KEY", "AZURE_STORAGE_ACCOUNT_KEY"):
            if key := environ.get(variable):
                return Access("blob", url, account, "key", check_secret("key", key), variable)
        if sas := environ.get("AZURE_STORAGE_SAS_TOKEN"):
            return Access("blob", url, account, "sas", check_secret("sas", sas), "AZURE_STORAGE_SAS_TOKEN")
    if not url.startswith("https:"):
        # azure-identity's tokens are never sent over plain HTTP.
        return Access("blob", url, account, "anonymous", "", "no credential, as for public containers")
    return Access("blob", url, account, "default", "", "azure-identity's default chain")
