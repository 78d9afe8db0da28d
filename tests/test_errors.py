"""The tree of errors is the one that its docstring draws: names, parents, exit codes, errnos."""

from __future__ import annotations

import copy
import errno
import re

import pytest

from amlmount import errors
from amlmount.errors import AmlmountError, Throttled, TransientStoreError

_ROW = re.compile(r"^    ( *)([A-Z]\w+) +(\d+)(?: +(E[A-Z]+))?(?: |$)", re.MULTILINE)


def _drawn() -> list[tuple[str, str, int, str]]:
    """Return (name, parent, exit code, errno or nothing where it is the parent's) of each row."""
    rows, above = [], dict[int, str]()
    for indent, name, code, number in _ROW.findall(errors.__doc__ or ""):
        depth = len(indent) // 2
        above[depth] = name
        rows.append((name, above.get(depth - 1, "Exception"), int(code), number))
    return rows


def _classes() -> dict[str, type[AmlmountError]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, AmlmountError)
    }


def test_the_table_names_every_class_once() -> None:
    names = [row[0] for row in _drawn()]
    assert len(names) > 20
    assert sorted(names) == sorted(_classes())


@pytest.mark.parametrize(("name", "parent", "exit_code", "number"), _drawn())
def test_a_row_is_its_class(name: str, parent: str, exit_code: int, number: str) -> None:
    kind = _classes()[name]
    assert kind.__base__ is not None
    assert kind.__base__.__name__ == parent
    assert kind.exit_code == exit_code
    inherited = errno.errorcode[_classes()[parent].errno] if parent != "Exception" else "EIO"
    assert errno.errorcode[kind.errno] == (number or inherited)
    assert kind.__doc__


def test_exit_codes_say_one_thing_each() -> None:
    codes = [kind.exit_code for kind in _classes().values()]
    shared = {code for code in codes if codes.count(code) > 1}
    # 24: three ways to say that the store does not answer; 1: an inode that is not there never ends a command.
    assert shared == {1, 24}
    assert 0 not in codes
    # Shells use 126 and over; 1 and 2 are the general failure and the usage error everywhere.
    assert max(codes) < 126


def test_a_read_never_fails_with_an_errno_that_means_another_thing() -> None:
    told = {errno.errorcode[k.errno] for k in _classes().values() if issubclass(k, errors.StoreError)}
    assert told == {"EIO", "ESTALE", "EACCES"}


def test_one_line_with_the_hint() -> None:
    assert AmlmountError("it broke").line() == "it broke"
    assert AmlmountError("it broke", hint="mend it").line() == "it broke (mend it)"
    assert errors.AccessDenied("no").hint == errors.AccessDenied.default_hint != ""
    assert errors.AccessDenied("no", hint="").line() == "no"


def test_an_error_can_be_copied_for_each_reader() -> None:
    error = Throttled("later", hint="wait", retry_after_s=3.0)
    twin = copy.copy(error)
    assert type(twin) is Throttled
    assert (str(twin), twin.hint, twin.retry_after_s) == ("later", "wait", 3.0)
    assert TransientStoreError("x").retry_after_s is None
