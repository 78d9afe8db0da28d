"""The command line, as scripts see it: words, exit codes, one line an error, and no secret ever.

Everything here runs `python -m amlmount`; nothing is mounted (see test_mount_door for that).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from amlmount import errors
from tests.servers.azurite import Azurite
from tests.servers.faults import FaultProxy, denied

TOP = Path(__file__).resolve().parent.parent
CANARIES = ("Q0FOQVJZa2V5Q0FOQVJZ", "CANARYsas")
KEY, SAS = CANARIES[0], f"sv=2024-01-01&sp=rl&sig={CANARIES[1]}%3D"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what failed."""
        lines = [line for line in self.err.splitlines() if not line.startswith("amlmount: left out")]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("amlmount: ")
        return lines[0]


class Home:
    """One user's amlmount."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *args: object, stdin: str = "", cwd: Path | None = None, **environ: str) -> Result:
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("AMLMOUNT", "AZURE"))
        }
        done = subprocess.run(
            [sys.executable, "-m", "amlmount", *(a if isinstance(a, bytes) else str(a) for a in args)],
            env={**clean, "AMLMOUNT_HOME": str(self.folder), "PYTHONPATH": str(TOP), **environ},
            cwd=cwd or TOP,
            input=stdin.encode(),
            capture_output=True,
            timeout=60,
        )
        out, err = (text.decode("utf-8", "surrogateescape") for text in (done.stdout, done.stderr))
        assert "Traceback" not in out + err
        for canary in CANARIES:
            assert canary not in out + err
        return Result(done.returncode, out, err)

    def ok(self, *args: object, stdin: str = "", **more: Any) -> str:
        result = self.run(*args, stdin=stdin, **more)
        assert result.code == 0, result.err
        return result.out

    def fails(self, code: int, *args: object, stdin: str = "", **more: Any) -> str:
        result = self.run(*args, stdin=stdin, **more)
        assert result.code == code, result.err
        return result.error

    def register(self, name: str, *paths: object, **more: Any) -> list[str]:
        """Register paths; return the words of the answer."""
        return self.ok("register", name, *(w for path in paths for w in ("--path", path)), **more).split()

    def files(self, ref: str) -> list[str]:
        """Return the names in a dataset's tree."""
        return [line.split("\t")[3] for line in self.ok("show", ref, "--files").splitlines()]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with a few files of fixed times."""
    top = tmp_path / "data"
    for name in ("a.csv", "b.txt", "sub/c.csv", "sub/deep/d.csv"):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        os.utime(path, ns=(10**18, 10**18 + len(name)))
    (top / "empty").mkdir()
    os.utime(top / "empty", ns=(10**18, 10**18))
    return top


# Register ------------------------------------------------------------------------------------------------------


def test_register_prints_the_version_and_the_digest(home: Home, data: Path) -> None:
    first = home.register("weather", data)
    assert first[0] == "weather:1"
    assert re.fullmatch("[0-9a-f]{64}", first[1])
    # The same content again says so, and makes no version unless asked.
    assert home.register("weather", data) == [*first, "unchanged"]
    again = home.ok("register", "weather", "--path", data, "--new-version").split()
    assert again == ["weather:2", first[1]]
    (data / "new").write_text("x")
    third = home.register("weather", data)
    assert third[0] == "weather:3"
    assert third[1] != first[1]
    assert home.files("weather:1") == ["a.csv", "b.txt", "sub/c.csv", "sub/deep/d.csv"]
    assert home.files("weather@latest") == home.files("weather") == home.files("azureml:weather:3")
    assert len(home.files("weather")) == 5


def test_list_and_show(home: Home, data: Path) -> None:
    assert home.ok("list") == ""
    assert json.loads(home.ok("list", "--json")) == {"datasets": []}
    home.ok(
        "register", "weather", "--path", data, "--description", "of 2024", "--tag", "k=v", "--tag", "x=a=b"
    )
    home.register("other", data / "a.csv")
    listed = home.ok("list").splitlines()
    assert [line.split()[0] for line in listed] == ["other:1", "weather:1"]
    assert "of 2024" in listed[1]
    shown = json.loads(home.ok("show", "weather", "--json"))
    assert (shown["version"], shown["files"], shown["directories"]) == (1, 4, 4)
    assert shown["tags"] == {"k": "v", "x": "a=b"}
    assert shown["sources"][0]["base"] == f"{data}/"
    assert shown["rejected"] == []
    text = home.ok("show", "weather:1")
    for word in (shown["digest"], "of 2024", "k=v", str(data)):
        assert word in text
    line = home.ok("show", "other", "--files")
    assert line == f"5\t{10**18 + 5}\t{10**18 + 5}-5\ta.csv\n"


def test_several_paths_are_one_tree(home: Home, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "sub").mkdir(parents=True)
    (other / "sub" / "e.csv").write_text("e")
    (tmp_path / "single.bin").write_text("1")
    home.register("joined", data, other, tmp_path / "single.bin", data / "a.csv")
    assert home.files("joined") == [
        "a.csv", "b.txt", "single.bin", "sub/c.csv", "sub/deep/d.csv", "sub/e.csv",
    ]  # fmt: skip


def test_two_files_at_one_path_are_an_error_that_names_both(home: Home, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "sub"
    other.mkdir(parents=True)
    (other / "c.csv").write_text("another")
    said = home.fails(14, "register", "w", "--path", data, "--path", other.parent)
    assert f"{data}/sub/c.csv" in said
    assert f"{other}/c.csv" in said
    assert home.ok("list") == ""
    assert list((home.folder / "manifests").iterdir()) == []


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.csv", ["a.csv"]),
        ("**/*.csv", ["a.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("s?b/[a-c].csv", ["sub/c.csv"]),
        ("sub/**", ["c.csv", "deep/d.csv"]),
        ("sub/deep/d.csv", ["d.csv"]),
        ("sub/", ["c.csv", "deep/d.csv"]),
    ],
)
def test_what_a_path_takes(home: Home, data: Path, pattern: str, names: list[str]) -> None:
    home.register("w", f"{data}/{pattern}")
    assert home.files("w") == names


def test_relative_paths_and_file_uris(home: Home, data: Path) -> None:
    first = home.register("w", "sub", cwd=data)
    for uri in (f"file://{data}/sub", "./sub/", f"{data}/empty/../sub"):
        assert home.register("w", uri, cwd=data) == [*first, "unchanged"]
    assert home.ok("verify", "w", cwd=data.parent)  # frozen paths do not depend on where one stands


def test_names_that_are_left_out_are_told_and_strict_refuses(home: Home, data: Path) -> None:
    (data / "sub" / "loop").symlink_to(data)
    os.mkfifo(data / "pi\npe")
    result = home.run("register", "w", "--path", data)
    assert result.code == 0
    left_out = [line for line in result.err.splitlines() if "left out" in line]
    assert len(left_out) == 2
    assert "sub/loop" in result.err
    assert "pi\\\\npe" in result.err  # escaped, on its line
    assert len(home.files("w")) == 4
    assert [r[0] for r in json.loads(home.ok("show", "w", "--json"))["rejected"]] == ["pi\\npe", "sub/loop"]
    assert "2 names" in home.fails(14, "register", "w2", "--path", data, "--strict")
    assert "w2" not in home.ok("list")
    assert len(list((home.folder / "manifests").iterdir())) == 1


def test_names_are_printed_on_one_line_each(home: Home, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in (b"new\nline", b"\x1b[31mred", b"\xff\xfe", "ü".encode()):
        (tmp_path / "odd" / os.fsdecode(name)).write_bytes(b"1")
    home.register("w", odd)
    assert home.files("w") == ["\\x1b[31mred", "new\\nline", "ü", "\\udcff\\udcfe"]


def test_a_folder_whose_name_is_not_utf8(home: Home, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/above/\xff\xfe"
    os.makedirs(odd)
    with open(odd + b"/f", "wb") as file:
        file.write(b"1")
    # It cannot be written down as a source; what is below a folder above it can.
    assert "UTF-8" in home.fails(13, "register", "w", "--path", odd)
    home.register("w", tmp_path / "above")
    assert "\\udcff\\udcfe/f" in home.files("w")
    assert home.ok("verify", "w")


def test_the_digest_is_the_same_on_every_machine(home: Home, data: Path, tmp_path: Path) -> None:
    digest = home.register("weather", data)[1]
    copy = tmp_path / "a copy elsewhere"
    shutil.copytree(data, copy)  # with the times of files, not those of the folders that hold any
    os.utime(copy / "sub", (1, 1))
    os.utime(copy / "empty", ns=(10**18, 10**18))
    there = Home(tmp_path / "another home")
    assert there.register("renamed", copy)[1] == digest
    assert there.register("parts", copy / "sub", f"{copy}/*.csv")[1] != digest
    os.utime(copy / "a.csv", ns=(1, 1))
    assert there.register("renamed", copy)[1] != digest


# Verify, export, import ----------------------------------------------------------------------------------------


def test_drift_has_an_exit_code_and_names(home: Home, data: Path) -> None:
    home.register("w", data)
    assert "as it was frozen" in home.ok("verify", "w")
    (data / "a.csv").write_text("changed")
    (data / "b.txt").unlink()
    (data / "new").write_text("new")
    (data / "empty").rmdir()
    result = home.run("verify", "w:1")
    assert result.code == 3
    assert result.out == "changed\ta.csv\nmissing\tb.txt\nmissing\tempty\nnew\tnew\n"
    assert "1 changed, 2 missing, 1 new" in result.error
    told = json.loads(home.run("verify", "w", "--json").out)
    assert told == {"ref": "w:1", "changed": ["a.csv"], "missing": ["b.txt", "empty"], "new": ["new"]}
    shutil.rmtree(data)
    result = home.run("verify", "w")
    assert result.code == 3
    assert len(result.out.splitlines()) == 5
    assert len(list((home.folder / "manifests").iterdir())) == 1


def test_a_manifest_travels(home: Home, data: Path, tmp_path: Path) -> None:
    digest = home.register("weather", data)[1]
    assert digest in home.ok("manifest", "export", "weather", "out.manifest", cwd=tmp_path)
    there = Home(tmp_path / "there")
    assert there.ok("manifest", "import", tmp_path / "out.manifest").split()[:2] == ["weather:1", digest]
    assert there.ok("manifest", "import", tmp_path / "out.manifest").split()[2:] == ["unchanged"]
    assert there.ok("manifest", "import", tmp_path / "out.manifest", "--name", "b").split()[0] == "b:1"
    assert there.files("weather") == home.files("weather")
    assert there.ok("verify", "weather")
    assert "cannot write" in home.fails(2, "manifest", "export", "weather", tmp_path / "no" / "where")
    (tmp_path / "out.manifest").write_bytes(b"damaged")
    for path in (tmp_path / "out.manifest", tmp_path / "nowhere", data):
        assert str(path) in there.fails(15, "manifest", "import", path)


# Exit codes ----------------------------------------------------------------------------------------------------


def test_each_way_to_be_wrong_has_its_code(home: Home, data: Path, tmp_path: Path) -> None:
    home.register("weather", data)
    for kind, word, args in (
        (errors.UsageError, "'x'", ["show", "weather:x"]),
        (errors.UsageError, "newest", ["show", "weather@newest"]),
        (errors.DatasetNotFound, "nothing", ["show", "nothing"]),
        (errors.DatastoreNotFound, "'no'", ["register", "w", "--path", "azureml://datastores/no/paths/x"]),
        (errors.UriError, "s3", ["register", "w", "--path", "s3://bucket/key"]),
        (errors.FreezeError, "nowhere", ["register", "w", "--path", str(tmp_path / "nowhere")]),
    ):
        assert word in home.fails(kind.exit_code, *args)
    home.fails(10, "show", "weather:2")
    home.fails(10, "verify", "nothing@latest")
    home.fails(10, "manifest", "export", "nothing", tmp_path / "x")
    home.fails(2, "register", "bad name", "--path", data)
    home.fails(2, "register", "w", "--path", data, "--tag", "novalue")
    home.fails(14, "register", "w", "--path", f"{data}/*.parquet")
    home.fails(13, "register", "w", "--path", f"{data}/[a")
    home.fails(13, "register", "w", "--path", "")


def test_words_that_are_off_are_clicks_business(home: Home) -> None:
    for args in (["nonsense"], ["register", "w"], ["show"], ["config", "--nope"], ["datastore", "add", "x"]):
        result = home.run(*args)
        assert result.code == 2
        assert result.err.startswith("Usage: ")
    assert home.ok("--version").startswith("amlmount, version ")
    assert "register" in home.ok("--help")


def test_a_registry_or_a_home_that_cannot_be_used(home: Home, data: Path) -> None:
    home.register("w", data)
    (home.folder / "registry.sqlite").write_bytes(b"garbage" * 1000)
    assert "registry.sqlite" in home.fails(16, "list")
    (data / "file").write_text("")
    broken = Home(data / "file")
    assert "AMLMOUNT_HOME" in broken.fails(4, "list")
    with closing(sqlite3.connect(home.folder / "new")) as db:
        db.execute("PRAGMA user_version = 99")
    (home.folder / "new").replace(home.folder / "registry.sqlite")
    assert "format 99" in home.fails(16, "register", "w", "--path", data)


def test_a_full_disk_is_one_line(tmp_path: Path, data: Path) -> None:
    from tests.servers.fixtures import unavailable

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", small], capture_output=True)
    if mounted.returncode != 0:
        unavailable("this user may not mount a tmpfs")
    try:
        for number in range(2000):
            (data / f"file number {number}").touch()
        result = Home(small / "home").run("register", "w", "--path", data)
        assert result.code in (errors.ManifestError.exit_code, errors.RegistryError.exit_code, 1)
        assert "full" in result.error
        left = [p for p in (small / "home").rglob("*") if p.is_file() and ".freezing" in p.name]
        assert left == []
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_reader_that_goes_away_is_no_error_message(home: Home, data: Path) -> None:
    for number in range(3000):
        (data / f"a file with a rather long name, number {number}").touch()
    home.register("w", data)
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m amlmount show w --files | head -n 1"],
        env={**os.environ, "AMLMOUNT_HOME": str(home.folder)},
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# Secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        f"https://acc.blob.core.windows.net/c/x?{SAS}",
        f"wasbs://c@acc.blob.core.windows.net/x?{SAS}",
        f"/local?{SAS}",
    ],
)
def test_a_sas_in_a_uri_is_refused_and_not_repeated(home: Home, uri: str) -> None:
    assert "stdin" in home.fails(13, "register", "w", "--path", uri)
    for command in ("show", "verify"):
        assert home.run(command, uri).code == 2


def add(home: Home, *args: object, stdin: str = "", **more: Any) -> str:
    return home.ok(
        "datastore", "add", "corp", "--account", "acc", "--container", "box", *args, stdin=stdin, **more
    )


@pytest.mark.parametrize("way", ["stdin", "file", "environment"])
@pytest.mark.parametrize(("kind", "secret"), [("key", KEY), ("sas", SAS)])
def test_a_secret_comes_on_stdin_from_a_file_or_the_environment(
    home: Home, tmp_path: Path, way: str, kind: str, secret: str
) -> None:
    if way == "stdin":
        add(home, "--credential", kind, stdin=secret + "\n")
    elif way == "file":
        (tmp_path / "secret").write_text(secret + "\n")
        add(home, "--credential", kind, "--secret-file", tmp_path / "secret")
    else:
        add(home, "--credential", kind, "--secret-env", "MY_SECRET", MY_SECRET=secret)
    assert (home.folder / "secrets" / "corp").read_text() == secret
    assert json.loads(home.ok("datastore", "show", "corp")) == {
        "name": "corp", "kind": "blob", "account": "acc", "container": "box", "endpoint": "", "credential": kind,
    }  # fmt: skip


def test_datastores_are_kept(home: Home) -> None:
    add(home, "--credential", "key", stdin=KEY)
    assert "exists" in home.fails(
        2, "datastore", "add", "corp", "--account", "a", "--container", "b", "--credential", "anonymous"
    )
    listed = home.ok("datastore", "list")
    assert listed.split()[:2] == ["corp", "blob"]
    assert "https://acc.blob.core.windows.net/box" in listed
    assert "(sas)" in home.ok("datastore", "update", "corp", "--credential", "sas", stdin=SAS)
    assert (home.folder / "secrets" / "corp").read_text() == SAS
    home.ok("datastore", "remove", "corp")
    assert home.ok("datastore", "list") == ""
    assert not (home.folder / "secrets" / "corp").exists()
    for command in ("show", "remove", "update"):
        home.fails(11, "datastore", command, "corp")


def test_secrets_that_are_none(home: Home, tmp_path: Path) -> None:
    new = ["datastore", "add", "corp", "--account", "acc", "--container", "box", "--credential"]
    assert "standard input" in home.fails(12, *new, "key", stdin="")
    home.fails(12, *new, "key", stdin="not base64 CANARY!")
    home.fails(12, *new, "sas", stdin=KEY)
    home.fails(12, *new, "sas", "--secret-file", tmp_path / "nowhere")
    home.fails(12, *new, "sas", "--secret-env", "NOT_SET")
    home.fails(2, *new, "anonymous", "--endpoint", "ftp://x")
    home.fails(
        2, "datastore", "add", "../x", "--account", "a", "--container", "b", "--credential", "anonymous"
    )
    result = home.run(*new, "key", f"--secret={KEY}")  # there is no such option, on purpose
    assert result.code == 2
    assert home.ok("datastore", "list") == ""


def test_a_secret_that_others_can_read_is_refused(home: Home) -> None:
    add(home, "--credential", "key", stdin=KEY)
    (home.folder / "secrets" / "corp").chmod(0o640)
    said = home.fails(12, "register", "w", "--path", "azureml://datastores/corp/paths/x")
    assert "chmod 600" in said


# Settings ------------------------------------------------------------------------------------------------------


def test_config_says_what_holds_and_why(home: Home) -> None:
    home.folder.mkdir()
    (home.folder / "config.toml").write_text('connections = 7\ncache_size = "1G"\n')
    told = json.loads(home.ok("config", "--json", "--read-timeout", "5", AMLMOUNT_CONNECTIONS="9"))
    assert (told["connections"]["value"], told["connections"]["origin"]) == (9, "AMLMOUNT_CONNECTIONS")
    assert (told["cache_size"]["value"], told["cache_size"]["origin"]) == (
        1 << 30,
        f"{home.folder}/config.toml",
    )
    assert (told["read_timeout"]["value"], told["read_timeout"]["origin"]) == (5, "--read-timeout")
    assert (told["memory_budget"]["value"], told["memory_budget"]["origin"]) == ("auto", "default")
    assert told["cache_dir"]["value"] == f"{home.folder}/cache"
    text = home.ok("config")
    assert all(name in text for name in told)
    assert str(home.folder / "config.toml") in text


def test_settings_that_are_wrong(home: Home) -> None:
    assert "1 to 1024" in home.fails(4, "config", "--connections", "0")
    assert "AMLMOUNT_CACHE_SIZE" in home.fails(4, "config", AMLMOUNT_CACHE_SIZE="much")
    home.folder.mkdir()
    (home.folder / "config.toml").write_text("cache_sice = 1")
    assert "cache_size" in home.fails(4, "config")
    assert "cache_sice" in home.fails(4, "register", "w", "--path", "/")


# Storage -------------------------------------------------------------------------------------------------------


@pytest.mark.azurite
def test_register_from_blob_storage(home: Home, azurite: Azurite, container: str) -> None:
    for name in ("t/a.csv", "t/sub/b.csv", "u/c.bin"):
        azurite.upload(container, name, name.encode())
    url = azurite.container_url(container)
    environ = {"AZURE_STORAGE_ACCOUNT": azurite.account, "AZURE_STORAGE_KEY": azurite.key}
    first = home.register("w", f"{url}/t/", **environ)
    assert home.files("w") == ["a.csv", "sub/b.csv"]
    home.ok(
        "datastore", "add", "emu", "--account", azurite.account, "--container", container,
        "--endpoint", azurite.url, "--credential", "key", stdin=azurite.key,
    )  # fmt: skip
    assert azurite.key not in home.ok("datastore", "show", "emu")
    # Through the datastore, by either name; what is in the tree has not changed.
    assert home.register("w", "azureml://datastores/emu/paths/t/")[1] == first[1]
    assert home.register("x", f"{url}/**/*.csv", "azureml://datastores/emu/paths/u/c.bin")[0] == "x:1"
    assert home.files("x") == ["c.bin", "t/a.csv", "t/sub/b.csv"]
    assert home.ok("verify", "x")
    azurite.upload(container, "t/a.csv", b"overwritten")
    azurite.delete(container, "u/c.bin")
    result = home.run("verify", "x")
    assert (result.code, result.out) == (3, "changed\tt/a.csv\nmissing\tc.bin\n")
    home.ok("datastore", "update", "emu", "--credential", "sas", stdin=azurite.container_sas(container))
    assert home.run("verify", "x").code == 3


@pytest.mark.azurite
def test_what_storage_refuses(home: Home, azurite: Azurite, container: str, faults: FaultProxy) -> None:
    url = f"{faults.url}/{container}"
    azurite.upload(container, "a", b"1")
    environ = {"AZURE_STORAGE_ACCOUNT": azurite.account, "AZURE_STORAGE_KEY": azurite.key}
    wrong = {**environ, "AZURE_STORAGE_KEY": azurite.wrong_key()}
    said = home.fails(23, "register", "w", "--path", f"{url}/", **wrong)
    assert "AZURE_STORAGE_KEY" in said
    assert azurite.wrong_key() not in said
    assert "no such container" in home.fails(
        22, "register", "w", "--path", f"{faults.url}/nowhere/", **environ
    )
    assert "nothing there" in home.fails(14, "register", "w", "--path", f"{url}/nope/", **environ)
    home.register("w", f"{url}/", **environ)
    faults.push(denied())
    said = home.fails(23, "verify", "w", **environ)
    assert "sig=" not in said
    faults.close()
    said = home.fails(24, "verify", "w", AMLMOUNT_READ_TIMEOUT="1", **environ)
    assert "gave up" in said
    assert list((home.folder / "manifests").glob(".*")) == []


def test_a_register_removes_what_a_killed_one_left(tmp_path: Path, data: Path) -> None:
    folder = tmp_path / "state"
    home = Home(folder)
    home.register("w", data)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    )
    left = folder / "manifests" / f".freezing-{dead.stdout.strip()}-abc.sqlite"
    under_way = folder / "manifests" / f".freezing-{os.getpid()}-abc.sqlite"
    for path in (left, under_way):
        path.touch()
    home.register("w", data)
    assert (left.exists(), under_way.exists()) == (False, True)
