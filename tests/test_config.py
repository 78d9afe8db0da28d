"""Settings: three forms, one order, checked values; and the folders of a user."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amlmount.blocks import GIB, MIB
from amlmount.config import SETTINGS, Settings, load, parse_size, places, private_folder
from amlmount.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"AMLMOUNT_HOME": str(tmp_path)}


def write(home: dict[str, str], text: str) -> None:
    Path(home["AMLMOUNT_HOME"], "config.toml").write_text(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("1m", MIB),
        ("1MB", MIB),
        ("1MiB", MIB),
        (" 1.5 GiB ", 3 * GIB // 2),
        ("10b", 10),
        ("2T", 2048 * GIB),
        ("-5G", -5 * GIB),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "1x", "--1", "1 2", "1e3", "1.", ".5", "½", "1bb", "0x10", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="a size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_number_of_bytes_is_exact(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(f"-{size}") == -size


def test_defaults(home: dict[str, str]) -> None:
    resolved = load(home)
    assert resolved.settings == Settings(cache_dir=Path(home["AMLMOUNT_HOME"]) / "cache")
    assert set(resolved.origins.values()) == {"default"}
    assert set(resolved.origins) == {setting.name for setting in SETTINGS}


def test_every_setting_is_in_the_table_and_has_three_forms(home: dict[str, str]) -> None:
    values = {
        "cache_dir": ("/c/1", "/c/2", "/c/3"),
        "cache_size": ("1G", "0", "-2G"),
        "cache_min_free": ("1", "2", "3"),
        "memory_budget": ("auto", "64M", "32M"),
        "read_timeout": ("1", "2s", "3"),
        "stall_timeout": ("1", "2", "3.5"),
        "connections": ("1", "2", "3"),
        "read_ahead": ("1", "2", "3"),
        "order": ("learned", "AUTO", "learned"),
        "log_level": ("debug", "INFO", "error"),
        "null_reads": ("true", "no", "on"),
    }
    assert set(values) == {s.name for s in SETTINGS} == set(Settings.__dataclass_fields__)
    for name, (in_file, in_environ, as_flag) in values.items():
        parsed = {s.name: s.parse for s in SETTINGS}[name]
        write(home, f'{name} = "{in_file}"\n')
        found = load(home)
        assert getattr(found.settings, name) == parsed(in_file)
        assert found.origins[name].endswith("config.toml")
        variable = f"AMLMOUNT_{name.upper()}"
        found = load({**home, variable: in_environ})
        assert (getattr(found.settings, name), found.origins[name]) == (parsed(in_environ), variable)
        found = load({**home, variable: in_environ}, {name: as_flag})
        assert getattr(found.settings, name) == parsed(as_flag)
        assert found.origins[name] == f"--{name.replace('_', '-')}"
        assert load({**home, variable: ""}, {name: None}).origins[name].endswith("config.toml")


def test_toml_values_need_no_quotes(home: dict[str, str]) -> None:
    write(home, "connections = 7\nread_timeout = 1.5\nnull_reads = true\n")
    settings = load(home).settings
    assert (settings.connections, settings.read_timeout, settings.null_reads) == (7, 1.5, True)


BAD = [
    ("cache_size", "much", "a size"),
    ("cache_min_free", "-1", "at least 0"),
    ("memory_budget", "1M", "16MiB"),
    ("memory_budget", "x", "a size"),
    ("read_timeout", "0", "seconds"),
    ("read_timeout", "soon", "seconds"),
    ("read_timeout", "nan", "seconds"),
    ("read_timeout", "inf", "seconds"),
    ("stall_timeout", "-1", "seconds"),
    ("connections", "0", "1 to 1024"),
    ("connections", "2000", "1 to 1024"),
    ("connections", "many", "1 to 1024"),
    ("read_ahead", "-1", "at least 0"),
    ("order", "random", "auto or learned"),
    ("log_level", "loud", "debug"),
    ("null_reads", "perhaps", "true or false"),
]


@pytest.mark.parametrize(("name", "value", "valid"), BAD)
def test_a_bad_value_says_where_it_is_and_what_would_do(
    home: dict[str, str], name: str, value: str, valid: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load({**home, f"AMLMOUNT_{name.upper()}": value})
    assert f"AMLMOUNT_{name.upper()}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert valid in caught.value.hint


def test_an_unknown_setting_names_the_known(home: dict[str, str]) -> None:
    write(home, 'cache_sice = "1G"\n')
    with pytest.raises(ConfigError, match="cache_sice") as caught:
        load(home)
    assert "cache_size" in caught.value.hint


@pytest.mark.parametrize("content", [b"not toml", b"\xff", b"a = "])
def test_a_config_file_that_cannot_be_read(home: dict[str, str], content: bytes) -> None:
    Path(home["AMLMOUNT_HOME"], "config.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(home)


def test_other_variables_are_nobodys_business(home: dict[str, str]) -> None:
    assert load({**home, "AMLMOUNT_SOMETHING": "x", "CACHE_SIZE": "x"}).origins["cache_size"] == "default"


def test_the_folders_are_below_home_or_the_xdg_directories() -> None:
    here = places({"AMLMOUNT_HOME": "/h", "XDG_DATA_HOME": "/elsewhere"})
    assert (here.config_file, here.state, here.cache) == (
        Path("/h/config.toml"),
        Path("/h"),
        Path("/h/cache"),
    )
    xdg = places({"HOME": "/u", "XDG_DATA_HOME": "/d", "XDG_CACHE_HOME": "relative", "XDG_RUNTIME_DIR": "/r"})
    assert (xdg.state, xdg.cache, xdg.run) == (
        Path("/d/amlmount"),
        Path("/u/.cache/amlmount"),
        Path("/r/amlmount"),
    )
    plain = places({"HOME": "/u"})
    assert plain.config_file == Path("/u/.config/amlmount/config.toml")
    assert plain.run == Path("/u/.local/share/amlmount/run")


def test_a_private_folder_is_private(tmp_path: Path) -> None:
    made = private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert private_folder(made) == made
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError):
            private_folder(bad)
