"""A real Azurite Blob service, in memory, on a free loopback port, for as long as a test session needs it.

Duty: start it quickly, fill it quickly, stop it without a trace. Facts relied on, from Azurite's README and
from trying version 3.35.0:

- The account name and key are public constants, and the account is the first segment of the path.
- ``--blobPort 0`` takes a free port; the line "successfully listens on URL" on standard output says which,
  even with ``--silent``, so no port can be taken by another process in between.
- ``--inMemoryPersistence`` keeps blobs in memory, up to half of the machine's memory unless
  ``--extentMemoryLimit`` (in MiB) says otherwise. It must not be combined with ``--location``.
- With If-Match, a GET of a blob that does not exist is answered by 412 and not by 404.
- A container's name has three characters or more.
- ``--skipApiVersionCheck`` accepts clients that are newer than it.
"""

from __future__ import annotations

import base64
import datetime
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from azure.core.exceptions import ResourceExistsError
from azure.storage.blob import (
    AccountSasPermissions,
    BlobServiceClient,
    ContainerClient,
    ContainerSasPermissions,
    ContentSettings,
    PublicAccess,
    ResourceTypes,
    generate_account_sas,
    generate_container_sas,
)

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

MAIN = (
    Path(__file__).resolve().parent.parent
    / "azurite"
    / "node_modules"
    / "azurite"
    / "dist"
    / "src"
    / "blob"
    / "main.js"
)
"""Where ``make azurite`` puts the Blob service's own entry point."""

_LISTENS = re.compile(rb"successfully listens on (http://127\.0\.0\.1:\d+)")
_UPLOADERS = 8


class AzuriteUnavailable(RuntimeError):
    """Azurite or node is missing, or it did not start. Under CI=true a test must fail on this, not skip."""


class Azurite:
    """One Azurite process. Use it as a context manager, or call `start` and `stop`, from a thread that stays.

    >>> with Azurite() as azurite:  # doctest: +SKIP
    ...     azurite.create_container("data")
    ...     azurite.upload("data", "a/b.bin", b"bytes")
    """

    account = ACCOUNT
    key = KEY

    def __init__(self, *, memory_mib: int = 2048, start_timeout_s: float = 60.0) -> None:
        self._memory_mib = memory_mib
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._service: BlobServiceClient | None = None
        self.origin = ""
        """``http://127.0.0.1:PORT``, without the account."""

    @staticmethod
    def missing() -> str | None:
        """What is not installed, in words, or None when Azurite can start."""
        if shutil.which("node") is None:
            return "node is not installed (run: make setup)"
        if not MAIN.exists():
            return "Azurite is not installed (run: make azurite)"
        return None

    @property
    def url(self) -> str:
        """The Blob endpoint with its account: ``http://127.0.0.1:PORT/devstoreaccount1``."""
        return f"{self.origin}/{ACCOUNT}"

    @property
    def pid(self) -> int:
        """The node process."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def service(self) -> BlobServiceClient:
        """An SDK client with the account key, for what the methods below do not do."""
        assert self._service is not None, "not started"
        return self._service

    # Life cycle ---------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start the process and return when it answers; raise `AzuriteUnavailable` when it does not."""
        if (reason := self.missing()) is not None:
            raise AzuriteUnavailable(reason)
        self._directory = tempfile.TemporaryDirectory(prefix="amlmount-azurite-")
        command = [
            "node", str(MAIN), "--silent", "--disableTelemetry", "--skipApiVersionCheck",
            "--inMemoryPersistence", "--extentMemoryLimit", str(self._memory_mib),
            "--blobHost", "127.0.0.1", "--blobPort", "0",
        ]  # fmt: skip
        if (
            shutil.which("setpriv") is not None
        ):  # then it ends with this thread, even when this process is killed
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        self._process = subprocess.Popen(
            command,
            cwd=self._directory.name,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            self.origin = self._read_origin(self._process)
        except BaseException:
            self.stop()
            raise
        self._service = BlobServiceClient(
            self.url, credential=KEY, connection_timeout=5, read_timeout=30, retry_total=2
        )
        return self

    def _read_origin(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        output = b""
        deadline = time.monotonic() + self._start_timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([process.stdout], [], [], left)[0]:
                break
            piece = os.read(process.stdout.fileno(), 65536)
            output += piece
            if (found := _LISTENS.search(output)) is not None:
                return found.group(1).decode()
            if not piece:
                break
        raise AzuriteUnavailable(
            f"Azurite did not start: {output.decode(errors='replace').strip() or 'no output'}"
        )

    def stop(self) -> None:
        """End the process started here, by its id. May be called twice."""
        if self._service is not None:
            self._service.close()
            self._service = None
        process, self._process = self._process, None
        if process is not None:
            process.kill()  # nothing to save: everything is in memory
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def __enter__(self) -> Self:
        return self if self._process is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Content ------------------------------------------------------------------------------------------------

    def container(self, name: str) -> ContainerClient:
        """The SDK's client for one container."""
        return self.service.get_container_client(name)

    def container_url(self, name: str) -> str:
        """``http://127.0.0.1:PORT/devstoreaccount1/NAME``."""
        return f"{self.url}/{name}"

    def create_container(self, name: str, *, public: bool = False) -> str:
        """Create the container if it is not there; return its URL. Anyone may list and read a public one."""
        access = PublicAccess.CONTAINER if public else None
        try:
            self.service.create_container(name, public_access=access)
        except ResourceExistsError:
            self.container(name).set_container_access_policy(signed_identifiers={}, public_access=access)
        return self.container_url(name)

    def delete_container(self, name: str) -> None:
        """Delete the container and every blob in it."""
        self.service.delete_container(name)

    def upload(
        self,
        container: str,
        path: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        md5: bytes | None = None,
        content_encoding: str | None = None,
    ) -> str:
        """Write one blob, replacing one of that name, and return its new ETag without quotes.

        Without `md5` the service stores the MD5 that it computes itself, as Azure does for a blob put in one
        request.
        """
        settings = ContentSettings(
            content_md5=bytearray(md5) if md5 else None, content_encoding=content_encoding
        )
        blob = self.container(container).get_blob_client(path)
        answer = blob.upload_blob(
            data, overwrite=True, metadata=dict(metadata or {}), content_settings=settings
        )
        return str(answer["etag"]).strip('"')

    def upload_many(self, container: str, files: Iterable[tuple[str, bytes | Path]]) -> int:
        """Write many blobs at once, each from bytes or from a file, and return how many."""
        client = self.container(container)

        def put(item: tuple[str, bytes | Path]) -> None:
            path, source = item
            data = source if isinstance(source, bytes) else source.read_bytes()
            client.get_blob_client(path).upload_blob(data, overwrite=True)

        with ThreadPoolExecutor(_UPLOADERS, thread_name_prefix="azurite-upload") as pool:
            return sum(1 for _ in pool.map(put, files))

    def upload_tree(self, container: str, directory: Path, prefix: str = "") -> int:
        """Write every regular file below `directory` under `prefix`; return how many. Links are left out."""
        lead = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        files = (
            (lead + file.relative_to(directory).as_posix(), file)
            for file in sorted(directory.rglob("*"))
            if file.is_file() and not file.is_symlink()
        )
        return self.upload_many(container, files)

    def mark_directory(self, container: str, path: str) -> None:
        """Write what Data Lake tools write for a directory: an empty blob with ``hdi_isfolder=true``."""
        self.upload(container, path.rstrip("/"), b"", metadata={"hdi_isfolder": "true"})

    def etag(self, container: str, path: str) -> str:
        """The blob's ETag now, without quotes."""
        return str(self.container(container).get_blob_client(path).get_blob_properties().etag).strip('"')

    def delete(self, container: str, path: str) -> None:
        """Delete one blob."""
        self.container(container).delete_blob(path)

    # Credentials --------------------------------------------------------------------------------------------

    def container_sas(self, container: str, *, permission: str = "rl", valid_s: float = 3600) -> str:
        """A SAS for one container, without a leading '?'. A negative `valid_s` gives one that has expired."""
        start, expiry = _period(valid_s)
        return generate_container_sas(
            ACCOUNT,
            container,
            account_key=KEY,
            permission=ContainerSasPermissions.from_string(permission),
            start=start,
            expiry=expiry,
        )

    def account_sas(self, *, valid_s: float = 3600) -> str:
        """A SAS to read and list every container of the account, without a leading '?'."""
        start, expiry = _period(valid_s)
        return generate_account_sas(
            ACCOUNT,
            account_key=KEY,
            resource_types=ResourceTypes(service=True, container=True, object=True),
            permission=AccountSasPermissions(read=True, list=True),
            start=start,
            expiry=expiry,
        )

    def wrong_key(self) -> str:
        """A well-formed account key that the service refuses."""
        return base64.b64encode(b"\0" * 64).decode()


def _period(valid_s: float) -> tuple[datetime.datetime, datetime.datetime]:
    now = datetime.datetime.now(datetime.UTC)
    return now - datetime.timedelta(days=1), now + datetime.timedelta(seconds=valid_s)
