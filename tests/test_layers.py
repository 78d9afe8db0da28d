"""The table of layers, held against the imports that the code really makes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import amlmount

TOP = Path(amlmount.__file__).parent

LAYERS = [
    ("vocabulary", "errors blocks dataset uri config logs metrics"),
    (
        "pure core",
        "manifest builder tree window order epoch course declared learned namelist quota status wire",
    ),
    (
        "I/O leaves",
        "stores stores.base stores.blob stores.blob_rest stores.local stores.retry"
        " credentials memory usage blockfile behind packs cache kernel",
    ),
    ("services", "catalog freeze crew pilot fetch resolve"),
    ("one open file", "reader across desk"),
    ("adapter", "operations relay"),
    ("composition", "channel announce session launch"),
    ("entry", "cli cli_catalog cli_datastore cli_prefetch cli_status readorder demo __main__"),
]
"""Each module imports only from its own layer and those above it in this list."""

LEVEL = {module: level for level, (_, modules) in enumerate(LAYERS) for module in modules.split()}
FUSE = {"operations", "session"}
PURE = {m for m, level in LEVEL.items() if level < 2}
MAX_LINES = 400

# Modules that do input or output, or wait, at import or by their nature: nothing of them belongs above the leaves.
DEVICES = {
    "socket",
    "subprocess",
    "threading",
    "asyncio",
    "trio",
    "pyfuse3",
    "obstore",
    "urllib3",
    "azure",
    "psutil",
}


def modules() -> dict[str, Path]:
    """Return every module but the package's root by its name within it."""
    found = {}
    for path in sorted(TOP.rglob("*.py")):
        parts = path.relative_to(TOP).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path, name: str) -> Iterator[str]:
    """Yield the full name of everything a module imports, inside functions too, but not for type checking alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = ["amlmount", *name.split(".")]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def own(name: str) -> set[str]:
    """Return the package's modules that a module imports."""
    found = set()
    for full in imports(MODULES[name], name):
        if not full.startswith("amlmount."):
            continue
        inner = full.removeprefix("amlmount.")
        while inner and inner not in MODULES:  # a name from a module, rather than a module
            inner = inner.rpartition(".")[0]
        if inner and inner != name:
            found.add(inner)
    return found


GRAPH = {name: own(name) for name in MODULES}


def test_the_table_names_every_module_once() -> None:
    named = [module for _, modules in LAYERS for module in modules.split()]
    assert sorted(named) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_its_own_layer_and_those_above(name: str) -> None:
    below = {other for other in GRAPH[name] if LEVEL[other] > LEVEL[name]}
    assert not below, f"{name} ({LAYERS[LEVEL[name]][0]}) imports {below}"


def test_there_are_no_cycles() -> None:
    # A package's __init__ and its modules count as one, as importing either runs both.
    done: list[str] = []
    left = {n: {o for o in out if n.partition(".")[0] != o.partition(".")[0]} for n, out in GRAPH.items()}
    while left:
        free = sorted(n for n, out in left.items() if not out & set(left))
        assert free, f"a cycle among {sorted(left)}"
        done += free
        for name in free:
            del left[name]
    assert len(done) == len(MODULES)


def test_the_stores_know_nothing_of_each_others_kind() -> None:
    inner = {n: {o for o in GRAPH[n] if o.startswith("stores.")} for n in MODULES if n.startswith("stores.")}
    assert inner["stores.base"] == set()
    assert inner["stores.local"] <= {"stores.base"}
    assert inner["stores.retry"] <= {"stores.base"}
    assert "stores.local" not in inner["stores.blob"] | inner["stores.blob_rest"]


def test_only_operations_and_session_know_fuse() -> None:
    users = {n for n in MODULES if any(i.split(".")[0] == "pyfuse3" for i in imports(MODULES[n], n))}
    assert users == FUSE


@pytest.mark.parametrize("name", sorted(PURE))
def test_what_is_pure_has_no_devices(name: str) -> None:
    used = {full.split(".")[0] for full in imports(MODULES[name], name)}
    assert not used & DEVICES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short_named_apart_and_documented(name: str) -> None:
    source = MODULES[name].read_text()
    assert len(source.splitlines()) <= MAX_LINES
    stem = name.rpartition(".")[2]
    assert stem == "__main__" or stem not in sys.stdlib_module_names
    assert stem not in ("utils", "util", "helpers", "common", "misc")
    assert ast.get_docstring(ast.parse(source))


def test_the_check_itself_sees_what_it_should() -> None:
    assert {"cli", "cli_catalog", "cli_datastore"} - {"cli"} <= GRAPH["cli"]  # at the top
    assert "session" in GRAPH["cli"]  # inside a function
    assert "stores.retry" in GRAPH["stores"] | GRAPH["fetch"]
    assert "stores" in GRAPH["fetch"]
    assert GRAPH["errors"] == set()
