"""The unpickler: what a pickle that was made by hand can do, which is nothing."""

from __future__ import annotations

import collections
import pickle

import pytest

from distckpt.errors import FormatError
from distckpt.foreign import pickles, plain_values
from distckpt.foreign.emit import Call, Global, Persistent, pickled
from distckpt.foreign.located import Record, Undecodable
from distckpt.foreign.pickles import INDEX, VALUES, Stub, unpickle
from distckpt.foreign.plain_values import plain


def values(data):
    return plain(unpickle(data, "here", VALUES, lambda key, nbytes: Record(0, 400, 0)), "here")


@pytest.mark.parametrize("module", ["os", "builtins", "torch", "numpy", "distckpt.foreign.pickles"])
@pytest.mark.parametrize("name", ["system", "eval", "getattr", "load", "Stub", "__import__"])
def test_a_global_that_is_not_on_the_list_is_refused_in_an_index_and_inert_in_a_value(module, name):
    data = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    with pytest.raises(FormatError, match=f"here: names the global {module}.{name}, "):
        unpickle(data, "here", INDEX)
    found = values(data)
    assert isinstance(found, Undecodable)
    assert f"{module}.{name}" in found.why


@pytest.mark.parametrize(
    "name",
    [
        b"ccollections\nOrderedDict\n",
        b"ccollections\nCounter\n",
        b"cbuiltins\nset\n",
        b"ctorch\nSize\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"cnumpy\ndtype\n",
        b"cos\nsystem\n",
    ],
)
def test_no_stand_in_can_be_changed_by_a_pickle(name):
    before = {k: dict(vars(v)) for k, v in vars(pickles).items() if isinstance(v, type)}
    for state in (b"}S'__init__'\nI1\ns", b"(N}S'__call__'\nI1\nst", b"(N}S'_make'\nI1\nst", b"(N}S'dtype'\nI1\nst"):
        with pytest.raises(FormatError):
            values(name + state + b"b.")
    after = {k: dict(vars(v)) for k, v in vars(pickles).items() if isinstance(v, type)}
    assert after == before
    assert collections.Counter("aa") == {"a": 2}


def test_the_stand_ins_of_one_index_are_not_those_of_another():
    data = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}S'version'\nS'1'\nsb."
    one, other = unpickle(data, "a", INDEX), unpickle(data, "b", INDEX)
    assert isinstance(one, Stub)
    assert one.get("version") == "1"
    assert type(one) is not type(other)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"\x80\x02",
        b"N",
        b"(lp0\n",
        b"\x80\x02]q\x00",
        b"R.",
        b"\x80\x09N.",
        b"P1\n.",
        b"\x8b\xff\xff\xff\x7f",
    ],
)
def test_what_is_no_pickle_is_one_error(data):
    with pytest.raises(FormatError, match="here"):
        values(data)


def test_a_pickle_that_unfolds_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(plain_values, "_MOST_VALUES", 20_000)
    doubled = b"(l" + b"".join(b"p%d\n(lg%d\nag%d\na" % (i, i, i) for i in range(60)) + b"."
    with pytest.raises(FormatError, match="unfolds to more than"):
        values(doubled)
    itself = []
    itself.append(itself)
    with pytest.raises(FormatError, match="unfolds to more than"):
        values(pickle.dumps(itself))


@pytest.mark.parametrize(
    "put", [b"r\x00\x00\x00\x10", b"p268435456\n", b"r\x00\x04\x00\x00", b"p-1\n", b"p" + b"1" * 5000 + b"\n"]
)
@pytest.mark.parametrize("kind", [INDEX, VALUES])
def test_a_memo_index_that_would_take_memory_is_refused(put, kind):
    """The unpickler makes room for all smaller ones: for 0x10000000 that is 4 GB."""
    for before in (b"", b"]", b"X\x02\x00\x00\x00no"):
        with pytest.raises(FormatError, match=r"here: not a pickle that can be read: opcode b'[rp]"):
            unpickle(b"\x80\x02" + before + b"N" + put + b".", "here", kind)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_opcode_of_plain_values_is_passed(protocol):
    value = {
        "texts": ["", "ü", "r" * 300, "r" * 70_000],
        "bytes": [b"", b"r", b"r" * 300],
        "numbers": [0, 255, 65_535, -1, 2**31, 2**70, -(2**3000), 1.5, True, None, 1 + 2j],
        "members": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}, set(), {5}, frozenset({6})],
        "many": [[i, str(i)] for i in range(1000)],
    }
    data = pickle.dumps(value, protocol)
    assert values(data) == value
    for length in range(0, len(data), 211):
        with pytest.raises(FormatError, match="here"):
            values(data[:length])


@pytest.mark.parametrize(("kind", "name"), [(INDEX, b"cpathlib\nPosixPath\n"), (VALUES, b"ctorch\ndevice\n")])
def test_a_name_that_is_joined_of_itself_again_and_again_is_refused(kind, name):
    twice = b"".join(b"0h\x00(h\x01h\x01tRq\x01" for _ in range(40))
    with pytest.raises(FormatError, match="a name of 2 parts"):
        unpickle(b"\x80\x02" + name + b"q\x00X\x01\x00\x00\x00aq\x01" + twice + b".", "here", kind)


@pytest.mark.parametrize(
    "geometry",
    [
        (0, (101,), (1,)),
        (90, (20,), (1,)),
        (0, (2, 2), (1,)),
        (0, (-1,), (1,)),
        (0, (3,), (-1,)),
        ("x", (1,), (1,)),
        (0, (2,), (1 << 60,)),
        (0, [2], (1,)),
        (0, (1 << 40,), (0,)),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(geometry):
    storage = Persistent(("storage", Global("torch", "FloatStorage"), "0", "cpu", 100))
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    assert values(pickled(Call(rebuild, (storage, 0, (100,), (1,), False, None)))).shape == (100,)
    with pytest.raises(FormatError, match=r"not the geometry of a tensor|in a storage of 400 bytes"):
        values(pickled(Call(rebuild, (storage, *geometry, False, None))))


@pytest.mark.parametrize("pid", [("module", "x"), ("storage", "x", "0", "cpu", 1), 5, ("storage",)])
def test_nothing_but_a_storage_stands_outside_of_a_pickle(pid):
    with pytest.raises(FormatError, match=r"which is not a storage as torch\.save names it"):
        values(pickled(Persistent(pid)))
