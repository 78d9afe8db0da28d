"""amlmount: frozen datasets from cloud storage, mounted read-only for training jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amlmount.readorder import ReadOrder

__all__ = ["ReadOrder", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "ReadOrder":  # on first use: every command imports this package
        from amlmount.readorder import ReadOrder

        return ReadOrder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
