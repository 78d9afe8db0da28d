"""Fixtures for the test servers, and the one rule for what is not there: skip on a desk, fail in CI."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from typing import NoReturn

import pytest

from .azurite import Azurite, AzuriteUnavailable
from .faults import FaultProxy


def unavailable(reason: str) -> NoReturn:
    """End the test: a skip on a developer's machine, a failure where CI=true promises that all is there."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"CI=true, but {reason}", pytrace=False)
    pytest.skip(reason)


def fuse_missing() -> str | None:
    """Why nothing can be mounted here, or None when it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or this user may not open it"
    if shutil.which("fusermount3") is None:
        return "fusermount3 is not installed (run: make setup)"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Apply the rule to every test marked ``fuse``."""
    if item.get_closest_marker("fuse") is not None and (reason := fuse_missing()) is not None:
        unavailable(reason)


@pytest.fixture(scope="session")
def azurite() -> Iterator[Azurite]:
    """One Azurite for the whole session; each test makes containers of its own (see `container`)."""
    server = Azurite()
    try:
        server.start()
    except AzuriteUnavailable as error:
        unavailable(str(error))
    with server:
        yield server


@pytest.fixture
def container(azurite: Azurite) -> Iterator[str]:
    """The name of a new private container, deleted after the test."""
    name = f"test-{uuid.uuid4().hex}"
    azurite.create_container(name)
    yield name
    azurite.delete_container(name)


@pytest.fixture
def public_container(azurite: Azurite) -> Iterator[str]:
    """The name of a new container that anyone may list and read, deleted after the test."""
    name = f"public-{uuid.uuid4().hex}"
    azurite.create_container(name, public=True)
    yield name
    azurite.delete_container(name)


@pytest.fixture
def faults(azurite: Azurite) -> Iterator[FaultProxy]:
    """A pass-through proxy in front of `azurite`, ready for rules."""
    with FaultProxy(azurite.url) as proxy:
        yield proxy
