"""Strict JSON, and how values are shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.errors import FormatError
from distckpt.format.text import read_json, shown


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe[\x001\x00]\x00",
        "[1]".encode("utf-16"),
        b"\xef\xbb\xbf[]",
        b'{"a":1,"a":1}',
        b"[-Infinity]",
        b"[9223372036854775808]",
        b"[-9223372036854775809]",
        b"1" * 10_000,
        b"[" * 100_000,
        b'"\x01"',
    ],
    ids=lambda d: repr(d[:20]),
)
def test_lax_json_is_a_format_error(data):
    with pytest.raises(FormatError):
        read_json(data)


def test_integers_of_64_bits_are_read():
    assert read_json(b"[-9223372036854775808,9223372036854775807,-0]") == [-(2**63), 2**63 - 1, 0]


@given(st.recursive(st.one_of(st.none(), st.text(), st.floats(allow_nan=False)), st.lists))
@example("Infinity")
def test_what_python_writes_is_read(value):
    text = json.dumps(value).encode()
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:  # it has an infinity; the word alone may stand in a string
        with pytest.raises(FormatError):
            read_json(text)
    else:
        assert read_json(memoryview(text)) == value


def test_a_value_too_deep_or_too_long_to_print_is_still_shown():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "a list too large to show"
    assert shown(10**5000) == "a int too large to show"
    for _ in range(60):
        deep = [deep, deep]
    assert shown(deep) == "a list too large to show"
    assert shown({1: (2, {3})}) == "{1: (2, {3})}"
    assert shown("x" * 1000) == "'" + "x" * 199 + "..."
    while deep:  # unwound by hand: the interpreter's own deallocation may recurse as deep
        deep = deep.pop()
