"""Settings: one name in three forms (config file, AMLMOUNT_*, flag), parsed and checked once, then frozen.

Order of precedence: flag, environment, config file, default. `SETTINGS` is the table; `load` walks it. The only I/O is
reading the config file.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from amlmount.blocks import GIB, MIB
from amlmount.errors import ConfigError

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(-?)(\d+(?:\.\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?\Z", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Parse a size in bytes: `1048576`, `512MB`, `1.5GiB` (all units are powers of 1024); ValueError otherwise."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError("a size: 1048576, 512MB, 1.5GiB")
    value = int(float(match[2]) * _UNITS[(match[3] or "").lower()])
    return -value if match[1] else value


def _auto_or_size(text: str) -> int | None:
    return None if text.strip().lower() == "auto" else parse_size(text)


def _positive_size(text: str) -> int:
    value = parse_size(text)
    if value < 0:
        raise ValueError("a size of at least 0")
    return value


def _budget(text: str) -> int | None:
    value = _auto_or_size(text)
    if value is not None and value < 16 * MIB:
        raise ValueError("auto, or a size of at least 16MiB")
    return value


def _seconds(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*s?\s*", text)
    value = float(match[1]) if match else 0.0
    if not 0 < value <= 86400:
        raise ValueError("seconds, over 0 and up to 86400")
    return value


def _count(text: str) -> int:
    value = int(text) if text.strip().isdecimal() else 0
    if not 1 <= value <= 1024:
        raise ValueError("a number from 1 to 1024")
    return value


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def _log_level(text: str) -> str:
    if text.lower() not in ("debug", "info", "warning", "error"):
        raise ValueError("debug, info, warning or error")
    return text.lower()


def _order(text: str) -> str:
    if text.lower() not in ("auto", "learned"):
        raise ValueError("auto or learned")
    return text.lower()


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one process, checked. Sizes in bytes, durations in seconds."""

    cache_dir: Path
    cache_size: int | None = None
    """None: half of the cache disk; 0: no disk cache; negative: as much as leaves so many bytes free."""
    cache_min_free: int = GIB
    memory_budget: int | None = None
    """None: a quarter of the cgroup's or machine's memory, between 128 MiB and 1 GiB."""
    read_timeout: float = 60.0
    stall_timeout: float = 10.0
    connections: int = 32
    read_ahead: int = MIB
    order: str = "auto"
    """auto: as declared, else as in the tree; learned: as in an earlier pass, too."""
    log_level: str = "info"
    null_reads: bool = False


class Setting(NamedTuple):
    """One row of the table."""

    name: str
    parse: Callable[[str], Any]
    help: str


SETTINGS = (
    Setting("cache_dir", lambda text: Path(text).expanduser().absolute(), "folder of the disk cache"),
    Setting(
        "cache_size",
        _auto_or_size,
        "bytes of disk cache; auto: half the disk; 0: none; -N: leave N bytes free",
    ),
    Setting("cache_min_free", _positive_size, "bytes of the cache disk that stay free"),
    Setting("memory_budget", _budget, "bytes of memory for blocks; auto: a quarter, 128 MiB to 1 GiB"),
    Setting("read_timeout", _seconds, "seconds after which a read that storage cannot answer fails with EIO"),
    Setting("stall_timeout", _seconds, "seconds without a byte after which a request is made again"),
    Setting("connections", _count, "requests to storage under way at once"),
    Setting(
        "read_ahead", _positive_size, "bytes of kernel read-ahead, where the user has the right to set it"
    ),
    Setting("order", _order, "what is fetched before it is read: auto, or learned from an earlier pass, too"),
    Setting("log_level", _log_level, "debug, info, warning or error"),
    Setting("null_reads", _flag, "answer reads with zeros: measures the FUSE ceiling"),
)


@dataclass(frozen=True, slots=True)
class Places:
    """The folders and files of one user's amlmount."""

    config_file: Path
    state: Path
    """Registry, manifests and secrets."""
    cache: Path
    run: Path
    """Records and sockets of running sessions."""
    logs: Path


def places(environ: Mapping[str, str]) -> Places:
    """Return the folders: all below AMLMOUNT_HOME when set, else the XDG base directories."""
    if home := environ.get("AMLMOUNT_HOME"):
        top = Path(home).expanduser().absolute()
        return Places(top / "config.toml", top, top / "cache", top / "run", top / "logs")

    def xdg(variable: str, default: str) -> Path:
        # The specification has relative values ignored.
        value = environ.get(variable, "")
        return (
            Path(value) if value.startswith("/") else Path(environ.get("HOME", "/root")) / default
        ) / "amlmount"

    state = xdg("XDG_DATA_HOME", ".local/share")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    run = Path(runtime) / "amlmount" if runtime.startswith("/") else state / "run"
    return Places(
        xdg("XDG_CONFIG_HOME", ".config") / "config.toml",
        state,
        xdg("XDG_CACHE_HOME", ".cache"),
        run,
        xdg("XDG_STATE_HOME", ".local/state"),
    )


class Resolved(NamedTuple):
    """Settings, and for each where its value came from."""

    settings: Settings
    origins: dict[str, str]


def load(environ: Mapping[str, str], flags: Mapping[str, str | None] | None = None) -> Resolved:
    """Resolve every setting; raise ConfigError for an unknown name or a bad value, with the valid ones."""
    where = places(environ)
    known = {setting.name for setting in SETTINGS}
    values: dict[str, Any] = {"cache_dir": where.cache}
    origins = dict.fromkeys(known, "default")
    given: list[tuple[str, str, str]] = []
    for name, value in _read_file(where.config_file).items():
        given.append((name, value, str(where.config_file)))
    for variable, value in environ.items():
        if variable.startswith("AMLMOUNT_") and (name := variable[9:].lower()) in known and value:
            given.append((name, value, variable))
    for name, flag in (flags or {}).items():
        if flag is not None:
            given.append((name, flag, f"--{name.replace('_', '-')}"))
    parsers = {setting.name: setting.parse for setting in SETTINGS}
    for name, value, origin in given:
        if name not in known:
            raise ConfigError(
                f"unknown setting {name!r} in {origin}", hint=f"known: {', '.join(sorted(known))}"
            )
        try:
            values[name] = parsers[name](value)
        except ValueError as error:
            raise ConfigError(
                f"{origin}: {value!r} is no value for {name}", hint=f"it takes {error}"
            ) from error
        origins[name] = origin
    return Resolved(Settings(**values), origins)


def _read_file(path: Path) -> dict[str, str]:
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in table.items()
    }


def private_folder(path: Path) -> Path:
    """Return `path`, made with mode 0700 where it was missing; raise ConfigError where that fails."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.stat(path)
    except OSError as error:
        raise ConfigError(
            f"cannot make {path}: {error.strerror}", hint="set AMLMOUNT_HOME to a folder of yours"
        ) from error
    return path
