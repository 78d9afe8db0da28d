"""Logging for the whole process: one line an event, on standard error, with secrets taken out.

`amlmount.logs.get()` gives a structlog logger; `configure` is called once by an entry point. Repeated events of one
object are thinned by `Thinned`.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import structlog  # takes longer to import than most commands take: only what logs pays for it

_SECRETS = (
    re.compile(r"(?i)((?<![a-z0-9_.-])sig(?:=|%3d))[^&\s'\";]+"),
    re.compile(r"(?i)((?:[?&;]|^)(?:sv|se|sp|st|spr|sr|skoid|sktid)=)[^&\s'\";]+"),
    re.compile(
        r"(?i)((?:(?:account|storage)_?key|sharedaccesssignature|secret|password|token)['\"]?\s*[=:]\s*['\"]?)[^\s,;'\"&]+"
    ),
    re.compile(r"(?i)((?:bearer|sharedkey)\s+)[^\s,;'\"]+"),
)


def redact(text: str) -> str:
    """Return text with signatures, keys and tokens replaced by `***`."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def _redact_line(_: Any, __: str, line: Any) -> str:
    # The finished line, as a secret can be in a value of any type, and in a traceback.
    return redact(line)


class _Redacting(logging.Formatter):
    """The same for libraries that log through the standard module."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the finished line."""
        return redact(super().format(record))


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Send logs of `level` and above to `stream` (standard error where None)."""
    import structlog

    stream = stream or sys.stderr
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), pad_event_to=0, pad_level=False),
            _redact_line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module; their warnings matter, their requests do not.
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Redacting("%(asctime)s [%(levelname)s] %(name)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def get() -> structlog.typing.FilteringBoundLogger:
    """Return the process's logger."""
    import structlog

    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger


class Thinned:
    """Decides that an event of one key is worth a line: the first, then one a minute with the number passed over."""

    def __init__(self, interval_s: float = 60.0, keys: int = 1024) -> None:
        self._interval_s = interval_s
        self._keys = keys
        self._seen: dict[object, tuple[float, int]] = {}

    def due(self, key: object) -> int | None:
        """Return how many were passed over since the last line, or None where this one is passed over too."""
        now = time.monotonic()
        last = self._seen.get(key)
        if last is not None and now - last[0] < self._interval_s:
            self._seen[key] = (last[0], last[1] + 1)
            return None
        if len(self._seen) >= self._keys:
            self._seen.clear()
        self._seen[key] = (now, 0)
        return 0 if last is None else last[1]
