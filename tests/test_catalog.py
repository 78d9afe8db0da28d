"""The registry: versions that nobody gets twice, kills that lose nothing, secrets that only their owner reads."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from amlmount.catalog import Catalog
from amlmount.config import places
from amlmount.credentials import account_of, check_secret
from amlmount.dataset import DatasetRef, Datastore, Source
from amlmount.errors import (
    DatasetNotFound,
    DatastoreNotFound,
    ManifestError,
    RegistryError,
    SecretError,
    UsageError,
)
from amlmount.freeze import freeze
from amlmount.manifest import Manifest
from amlmount.stores.local import LocalStore
from amlmount.uri import parse
from tests.manifests import HERE, build, file

TOP = Path(__file__).resolve().parent.parent
KEY = "Q0FOQVJZY2FuYXJ5Q0FOQVJZ"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(places({"AMLMOUNT_HOME": str(tmp_path / "home")}))


def keep(catalog: Catalog, *names: str, source: Source = HERE) -> str:
    """Put a manifest of files of these names into the registry's folder; return its file name."""
    path = catalog.manifests / f".test-{'-'.join(names)}"
    build(path, [file(name, 1) for name in names], [source])
    return catalog.keep_manifest(path)[1]


# Versions ------------------------------------------------------------------------------------------------------


def test_versions_count_up_and_latest_is_the_newest(catalog: Catalog) -> None:
    a, b = keep(catalog, "a"), keep(catalog, "b")
    first, new = catalog.add_version("weather", a, description="one", tags={"k": "v"}, paths=("/x",))
    assert (new, first.version, first.files, first.bytes) == (True, 1, 1, 1)
    assert (first.description, first.tags, first.paths) == ("one", {"k": "v"}, ("/x",))
    assert catalog.add_version("weather", b)[0].version == 2
    assert catalog.add_version("other", a)[0].version == 1
    assert catalog.find(DatasetRef("weather", None)).version == 2
    assert catalog.find(DatasetRef("weather", 1)) == first
    assert [r.ref() for r in catalog.versions()] == ["other:1", "weather:1", "weather:2"]
    with catalog.open_manifest(first) as manifest:
        assert manifest.info.digest == first.digest


def test_the_same_content_makes_no_new_version_unless_asked(catalog: Catalog) -> None:
    a, b = keep(catalog, "a"), keep(catalog, "b")
    first, _ = catalog.add_version("weather", a)
    assert catalog.add_version("weather", keep(catalog, "a")) == (first, False)
    assert catalog.add_version("weather", a, force=True)[0].version == 2
    catalog.add_version("weather", b)
    # Going back to what an older version held is a new version.
    assert catalog.add_version("weather", a)[0].version == 4


def test_the_same_content_from_elsewhere_is_another_manifest_of_the_same_digest(catalog: Catalog) -> None:
    elsewhere = Source(kind="blob", url="https://other.blob.core.windows.net/c", base="")
    one, other = keep(catalog, "a"), keep(catalog, "a", source=elsewhere)
    assert one != other
    assert one[:64] == other[:64]
    first, _ = catalog.add_version("weather", one)
    second, new = catalog.add_version("weather", other)
    assert new
    assert (first.digest, second.version) == (second.digest, 2)


def test_a_file_that_moved_between_two_sources_is_a_new_version(catalog: Catalog, tmp_path: Path) -> None:
    # The tree is the same, and so is the digest; but the bytes must be read from the new place.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_bytes(b"x")
    moved = tmp_path / "one" / "moved"
    moved.write_bytes(b"x")
    kept = []
    for _ in range(2):
        locations = [parse(str(tmp_path / name), cwd="/") for name in ("one", "two")]
        frozen = freeze(locations, lambda source: LocalStore(), catalog.manifests)
        kept.append(catalog.keep_manifest(frozen.path)[1])
        if moved.exists():
            moved.rename(tmp_path / "two" / "moved")
    first, _ = catalog.add_version("weather", kept[0])
    second, new = catalog.add_version("weather", kept[1])
    assert new
    assert first.digest == second.digest
    with catalog.open_manifest(second) as manifest:
        (entry,) = [e for e in manifest.entries() if e.path == b"moved"]
        assert manifest.info.sources[entry.source].base == f"{tmp_path}/two/"


def test_what_is_not_there(catalog: Catalog) -> None:
    with pytest.raises(DatasetNotFound, match="weather") as caught:
        catalog.find(DatasetRef("weather", None))
    assert "list" in caught.value.hint
    record, _ = catalog.add_version("weather", keep(catalog, "a"))
    with pytest.raises(DatasetNotFound, match="version 7") as caught:
        catalog.find(DatasetRef("weather", 7))
    assert caught.value.hint == "there is 1"
    (catalog.manifests / record.manifest).unlink()
    with pytest.raises(ManifestError):
        catalog.open_manifest(record)


REGISTER = """
import os, sys
from amlmount.catalog import Catalog
from amlmount.config import places
from tests.test_catalog import keep
catalog = Catalog(places(os.environ))
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[2])):
    record, new = catalog.add_version("weather", keep(catalog, f"{sys.argv[1]}-{number}"), force=True)
    assert new
    print(record.version, record.digest, flush=True)
"""


def registering(catalog: Catalog, name: str, times: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", REGISTER, name, str(times)],
        env={**os.environ, "AMLMOUNT_HOME": str(catalog.manifests.parent)},
        cwd=TOP,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_register_at_once_get_versions_of_their_own(catalog: Catalog) -> None:
    processes = [registering(catalog, f"p{number}", 8) for number in range(4)]
    for process in processes:
        go(process)
    told = [line.split() for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(int(version) for version, _ in told) == list(range(1, 33))
    assert {(str(r.version), r.digest) for r in catalog.versions()} == {tuple(line) for line in told}


def test_a_version_is_taken_by_one_at_a_time(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = keep(catalog, "mine"), keep(catalog, "theirs")
    versions: list[int] = []
    other = threading.Thread(
        target=lambda: versions.append(catalog.add_version("weather", theirs)[0].version)
    )
    real = time.time_ns

    def between_looking_and_writing() -> int:
        if not other.ident:
            other.start()
            other.join(0.3)  # it may be done now, or wait its turn
        return real()

    monkeypatch.setattr(time, "time_ns", between_looking_and_writing)
    assert catalog.add_version("weather", mine)[0].version == 1
    other.join(20)
    assert versions == [2]


def test_a_kill_in_the_middle_of_a_register_loses_nothing(catalog: Catalog) -> None:
    told: list[tuple[int, str]] = []
    rng = random.Random(6)
    for number in range(5):
        process = registering(catalog, f"k{number}", 10_000)
        go(process)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(rng.random() * 0.05)  # any moment will do
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].splitlines(keepends=True)
        whole = [line.split() for line in (first, *rest) if line.endswith("\n")]
        told += [(int(version), digest) for version, digest in whole]
    found = {r.version: r for r in catalog.versions("weather")}
    assert sorted(found) == list(range(1, len(found) + 1))
    assert len(told) >= 5
    for version, digest in told:  # what was said is there
        assert found[version].digest == digest
    for record in found.values():  # and what is there is whole
        with catalog.open_manifest(record) as manifest:
            manifest.check()
    assert catalog.add_version("weather", keep(catalog, "after"))[0].version == len(found) + 1


def test_a_registry_that_cannot_be_used(catalog: Catalog) -> None:
    catalog.add_version("weather", keep(catalog, "a"))
    path = catalog.manifests.parent / "registry.sqlite"
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(RegistryError, match="format 99"):
        catalog.versions()
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(RegistryError, match=r"registry\.sqlite"):
        catalog.versions()
    path.unlink()
    path.mkdir()
    with pytest.raises(RegistryError):
        catalog.versions()


def test_what_the_registry_holds_is_private(catalog: Catalog) -> None:
    catalog.add_version("weather", keep(catalog, "a"))
    catalog.put_datastore(Datastore(name="d", account="a", container="c", credential="key"), KEY, new=True)
    top = catalog.manifests.parent
    assert stat.S_IMODE(top.stat().st_mode) == 0o700
    for path in top.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


# Manifests that travel -----------------------------------------------------------------------------------------


def test_a_manifest_exported_and_imported_elsewhere(catalog: Catalog, tmp_path: Path) -> None:
    record, _ = catalog.add_version("weather", keep(catalog, "a", "b"), paths=("/x",))
    catalog.export_manifest(record, tmp_path / "out")
    other = Catalog(places({"AMLMOUNT_HOME": str(tmp_path / "other")}))
    imported, new = other.import_manifest(tmp_path / "out", None)
    assert (imported.name, imported.version, imported.digest, new) == ("weather", 1, record.digest, True)
    assert other.import_manifest(tmp_path / "out", None) == (imported, False)
    assert other.import_manifest(tmp_path / "out", "renamed")[0].ref() == "renamed:1"
    # Not the file's own name, but what is in it, decides.
    assert catalog.import_manifest(tmp_path / "out", None) == (record, False)
    assert [p.name for p in other.manifests.iterdir()] == [imported.manifest]


def test_a_manifest_that_does_not_say_whose_it_is(catalog: Catalog, tmp_path: Path) -> None:
    build(tmp_path / "m", [file("a", 1)])
    with pytest.raises(UsageError, match="which dataset") as caught:
        catalog.import_manifest(tmp_path / "m", None)
    assert "--name" in caught.value.hint
    assert catalog.import_manifest(tmp_path / "m", "weather")[1]


def test_a_damaged_manifest_is_not_imported(catalog: Catalog, tmp_path: Path) -> None:
    build(tmp_path / "m", [file("a", 1)])
    with closing(sqlite3.connect(tmp_path / "m")) as db, db:
        db.execute("UPDATE node SET size = 2 WHERE ino = 2")
    with pytest.raises(ManifestError, match="digest"):
        catalog.import_manifest(tmp_path / "m", "weather")
    assert catalog.versions() == []
    assert list(catalog.manifests.iterdir()) == []


def test_an_export_that_cannot_be_written_leaves_nothing(catalog: Catalog, tmp_path: Path) -> None:
    record, _ = catalog.add_version("weather", keep(catalog, "a"))
    with pytest.raises(UsageError, match="cannot write"):
        catalog.export_manifest(record, tmp_path / "nowhere" / "out")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        catalog.export_manifest(record, tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "home"]


def test_a_registered_manifest_is_never_written_again(catalog: Catalog, tmp_path: Path) -> None:
    record, _ = catalog.add_version("weather", keep(catalog, "a"))
    before = (catalog.manifests / record.manifest).read_bytes()
    catalog.export_manifest(record, tmp_path / "out")
    with Manifest(catalog.manifests / record.manifest) as manifest:
        manifest.check()
        assert manifest.name == ""
    assert (catalog.manifests / record.manifest).read_bytes() == before


# Datastores and secrets ----------------------------------------------------------------------------------------

STORE = Datastore(name="corp", account="acc", container="box", credential="key")


def test_datastores_are_kept_and_replaced(catalog: Catalog) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    assert catalog.datastores() == [catalog.datastore("corp")] == [STORE]
    with pytest.raises(UsageError, match="exists"):
        catalog.put_datastore(STORE, KEY, new=True)
    again = Datastore(name="corp", account="acc", container="box", credential="sas")
    catalog.put_datastore(again, "sv=1&sig=x", new=False)
    assert catalog.datastore("corp") == again
    assert catalog.secrets.read("corp") == "sv=1&sig=x"
    catalog.remove_datastore("corp")
    assert catalog.datastores() == []
    for call in (lambda: catalog.datastore("corp"), lambda: catalog.remove_datastore("corp")):
        with pytest.raises(DatastoreNotFound):
            call()
    with pytest.raises(SecretError):
        catalog.secrets.read("corp")


def test_a_secret_is_in_a_file_of_its_owners_and_nowhere_else(catalog: Catalog) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    top = catalog.manifests.parent
    path = top / "secrets" / "corp"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    holding = [p for p in top.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert holding == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_secret_that_others_can_read_is_refused(catalog: Catalog, mode: int) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    (catalog.manifests.parent / "secrets" / "corp").chmod(mode)
    with pytest.raises(SecretError, match="read by others") as caught:
        catalog.secrets.read("corp")
    assert "chmod 600" in caught.value.hint
    assert KEY not in caught.value.line()


def test_a_secret_behind_a_link_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    path = catalog.manifests.parent / "secrets" / "corp"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecretError):
        catalog.secrets.read("corp")


def test_a_secret_is_written_over_what_a_killed_process_left(catalog: Catalog) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    secrets = catalog.manifests.parent / "secrets"
    (secrets / f".corp.{os.getpid()}").write_text("half")
    catalog.secrets.write("corp", "whole")
    assert catalog.secrets.read("corp") == "whole"
    assert [p.name for p in secrets.iterdir()] == ["corp"]


def test_secrets_that_cannot_be_written_are_one_clear_error(catalog: Catalog) -> None:
    (catalog.manifests.parent / "secrets").write_bytes(b"a file")
    with pytest.raises(SecretError, match="secrets"):
        catalog.put_datastore(STORE, KEY, new=True)
    assert catalog.datastores() == []


# Who may come in -----------------------------------------------------------------------------------------------

BOX = Source(kind="blob", url="https://acc.blob.core.windows.net/box", base="")
SAS = "sv=2024&sig=CANARY%3D"


def opened(catalog: Catalog, source: Source = BOX, **environ: str) -> tuple[str, str, str]:
    access = catalog.access(source, environ)
    assert access.what
    assert (access.url, access.kind) == (source.url, "blob")
    return access.account, access.credential, access.secret


def test_a_datastore_opens_its_own_container(catalog: Catalog) -> None:
    environ = {"AZURE_STORAGE_ACCOUNT": "acc", "AZURE_STORAGE_KEY": "T1RIRVI="}
    catalog.put_datastore(STORE, KEY, new=True)
    named = Source(kind="blob", url=BOX.url, base="", datastore="corp")
    assert opened(catalog, named, **environ) == ("acc", "key", KEY)
    assert opened(catalog, BOX, **environ) == ("acc", "key", KEY)
    other = Source(kind="blob", url="https://acc.blob.core.windows.net/box2", base="")
    assert opened(catalog, other, **environ) == ("acc", "key", "T1RIRVI=")
    catalog.remove_datastore("corp")
    with pytest.raises(DatastoreNotFound, match="corp"):
        catalog.access(named, environ)
    assert opened(catalog, BOX, **environ) == ("acc", "key", "T1RIRVI=")


def test_azures_own_variables(catalog: Catalog) -> None:
    text = f"DefaultEndpointsProtocol=https;AccountName=acc;AccountKey={KEY};EndpointSuffix=core.windows.net"
    assert opened(catalog, AZURE_STORAGE_CONNECTION_STRING=text) == ("acc", "key", KEY)
    text = f"BlobEndpoint=https://acc.blob.core.windows.net;SharedAccessSignature={SAS}"
    assert opened(catalog, AZURE_STORAGE_CONNECTION_STRING=text) == ("acc", "sas", SAS)
    assert opened(catalog, AZURE_STORAGE_ACCOUNT="acc", AZURE_STORAGE_KEY=KEY) == ("acc", "key", KEY)
    assert opened(catalog, AZURE_STORAGE_ACCOUNT_NAME="acc", AZURE_STORAGE_ACCOUNT_KEY=KEY) == (
        "acc",
        "key",
        KEY,
    )
    assert opened(catalog, AZURE_STORAGE_SAS_TOKEN="?" + SAS) == ("acc", "sas", SAS)
    # Another account's credential is not sent to this one.
    assert opened(catalog, AZURE_STORAGE_ACCOUNT="other", AZURE_STORAGE_KEY=KEY) == ("acc", "default", "")
    text = f"AccountName=other;AccountKey={KEY}"
    assert opened(catalog, AZURE_STORAGE_CONNECTION_STRING=text) == ("acc", "default", "")
    assert opened(catalog) == ("acc", "default", "")
    plain = Source(kind="blob", url="http://127.0.0.1:10000/acc/box", base="")
    assert opened(catalog, plain) == ("acc", "anonymous", "")  # a token is never sent in the clear


def test_local_files_need_no_credential(catalog: Catalog) -> None:
    access = catalog.access(Source(kind="local", url="file:///", base="/x/"), {"AZURE_STORAGE_KEY": KEY})
    assert (access.kind, access.secret) == ("local", "")


@pytest.mark.parametrize(
    ("url", "account"),
    [
        ("https://acc.blob.core.windows.net/c", "acc"),
        ("http://127.0.0.1:10000/dev/c", "dev"),
        ("http://localhost/dev/c", "dev"),
        ("http://[::1]:5/dev/c", "dev"),
    ],
)
def test_the_account_of_a_url(url: str, account: str) -> None:
    assert account_of(url) == account


def test_secrets_are_looked_at_before_they_are_kept() -> None:
    assert check_secret("key", f" {KEY}\n") == KEY
    assert check_secret("sas", f"?{SAS}\n") == SAS
    for kind, secret in (("key", "not base64!"), ("key", ""), ("sas", "  "), ("sas", KEY)):
        with pytest.raises(SecretError) as caught:
            check_secret(kind, secret)  # type: ignore[arg-type]
        assert caught.value.hint
        assert not secret.strip() or secret not in caught.value.line()


def test_records_are_json_that_holds_no_secret(catalog: Catalog) -> None:
    catalog.put_datastore(STORE, KEY, new=True)
    catalog.add_version("weather", keep(catalog, "a"))
    with closing(sqlite3.connect(catalog.manifests.parent / "registry.sqlite")) as db:
        found = db.execute("SELECT record FROM datastore UNION ALL SELECT record FROM version")
        rows = [json.loads(row[0]) for row in found]
    assert [row["name"] for row in rows] == ["corp", "weather"]
    assert KEY not in json.dumps(rows)
