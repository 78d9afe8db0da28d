"""Azure Blob storage: bytes through obstore, everything else, and every second attempt, through `blob_rest`.

obstore reads without the GIL, several times as many ranges a second as any client in Python. It checks little: the
length, ETag and total size of every answer are compared here. Its failures say too little to act on, so a failed range
is asked for once more through `blob_rest`, whose answer can be classified by status.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError, PreconditionError
from obstore.store import AzureStore

from amlmount.credentials import Access
from amlmount.dataset import ListedObject, ObjectId, printable
from amlmount.errors import ObjectChanged, ObjectMissing, StoreError, TransientStoreError
from amlmount.stores.blob_rest import BlobRest, ListPage

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import AzureBearerToken

_REQUEST_TIMEOUT_S = 120
"""Seconds for one whole request: 4 MiB at 35 kB/s. `stall_timeout` ends one that stands still much earlier."""


class BlobStore:
    """One container. Thread-safe."""

    cacheable = True

    def __init__(self, access: Access, *, stall_timeout_s: float) -> None:
        self.identity = access.url
        self._access = access
        self._stall_timeout_s = stall_timeout_s
        self._rest = BlobRest(access, stall_timeout_s=stall_timeout_s)
        self._lock = threading.Lock()
        self._obstore: AzureStore | None = None

    def _open(self) -> AzureStore:
        with self._lock:
            if self._obstore is None:
                self._obstore = self._make()
            return self._obstore

    def _make(self) -> AzureStore:
        endpoint, _, container = self._access.url.rpartition("/")
        config: dict[str, Any] = {
            "account_name": self._access.account,
            "endpoint": endpoint,
            # Said outright, as obstore would else let Azure's environment variables decide.
            "use_emulator": False,
        }
        provider = None
        if self._access.credential == "key":
            config |= {
                "account_key": self._access.secret,
                "credential_type": "access_key",
                "skip_signature": False,
            }
        elif self._access.credential == "sas":
            config |= {
                "sas_key": self._access.secret,
                "credential_type": "sas_token",
                "skip_signature": False,
            }
        elif self._access.credential == "default" and self._rest.token() is not None:
            provider = self._bearer
        else:
            config["skip_signature"] = True
        try:
            return AzureStore(
                container,
                config=config,  # type: ignore[arg-type]  # a plain dict stands for the TypedDict
                client_options={
                    "allow_http": endpoint.startswith("http:"),
                    "connect_timeout": timedelta(seconds=min(5.0, self._stall_timeout_s)),
                    "read_timeout": timedelta(seconds=self._stall_timeout_s),
                    "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
                    "user_agent": "amlmount",
                },
                retry_config={"max_retries": 0},
                credential_provider=provider,
            )
        except (BaseError, ValueError) as error:
            raise StoreError(
                f"cannot open {self._access.url}", hint="check the endpoint and the account"
            ) from error

    def _bearer(self) -> AzureBearerToken:
        token = self._rest.token()
        if token is None:
            return {"token": "", "expires_at": datetime.now(UTC)}
        # A token with under five minutes left is asked for anew by azure-identity at every call: let obstore ask then.
        return {
            "token": token.token,
            "expires_at": datetime.fromtimestamp(token.expires_on, UTC) - timedelta(minutes=5),
        }

    def list_page(self, prefix: str, marker: str) -> ListPage:
        """Return one page of the blobs whose names begin with `prefix`."""
        return self._rest.list_page(prefix, marker)

    def head(self, path: str) -> ListedObject | None:
        """Return a blob's properties, or None where there is none."""
        return self._rest.head(path)

    def read(self, obj: ObjectId, start: int, stop: int, attempt: int = 0) -> memoryview:
        """Return exactly [start, stop) of the pinned blob: by obstore at the first attempt, else by `blob_rest`."""
        if attempt > 0:
            return self._read_again(obj, start, stop)
        try:
            options: GetOptions = {"range": (start, stop), "if_match": f'"{obj.tag}"'}
            if obj.version:
                options["version"] = obj.version
            result = obstore.get(self._open(), obj.path, options=options)
            meta = result.meta
            data = result.bytes()
        except ValueError:  # a name that obstore cannot express
            return self._read_again(obj, start, stop)
        except PreconditionError:
            raise self._gone(obj) from None
        except FileNotFoundError:
            raise ObjectMissing(f"{printable(obj.path)}: no such blob in {self.identity}") from None
        except BaseError as error:
            # Which failure it was shows in the next attempt's status; this one's text is not for classifying.
            raise TransientStoreError(
                f"{printable(obj.path)}: {str(error).partition(chr(10))[0]}", hint=""
            ) from None
        if len(data) != stop - start or meta["size"] != obj.size:
            what = f"{printable(obj.path)}: {len(data)} bytes of {stop - start}, size {meta['size']} of {obj.size}"
            raise TransientStoreError(what, hint="")
        if (meta["e_tag"] or "").strip('"') != obj.tag:
            raise ObjectChanged(f"{printable(obj.path)} was overwritten since it was frozen")
        return memoryview(data)

    def _read_again(self, obj: ObjectId, start: int, stop: int) -> memoryview:
        try:
            return self._rest.read(obj, start, stop)
        except ObjectChanged:
            raise self._gone(obj) from None

    def _gone(self, obj: ObjectId) -> StoreError:
        """Return the error for a failed If-Match: some services give it for a blob that is not there, too."""
        now = self._rest.head(obj.path)
        if now is None:
            return ObjectMissing(f"{printable(obj.path)}: no such blob in {self.identity}")
        if now.tag == obj.tag:
            return TransientStoreError(
                f"{printable(obj.path)}: If-Match failed for the tag that the blob has", hint=""
            )
        return ObjectChanged(
            f"{printable(obj.path)} was overwritten since it was frozen (its ETag is {now.tag} now)"
        )

    def close(self) -> None:
        """Close the connections."""
        self._rest.close()
