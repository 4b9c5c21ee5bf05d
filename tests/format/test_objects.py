"""Non-tensor values: exact types and bits, strict JSON, and no other exception than the tree's."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from distckpt.errors import FormatError, Unsupported
from distckpt.format.objects import MAX_DEPTH, TensorRef, decode, encode, tag, untag
from tests.format.draw import damaged, json_values

any_bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", struct.pack(">Q", n))[0])
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(),
    any_bits,
    st.text(max_size=5),
    st.sampled_from(["$int", "$", "\ud800", "\0", -0.0, 2**53, 2**53 + 1, -(2**53) - 1, 10**4000]),
    st.binary(max_size=9),
    st.complex_numbers(),
    st.builds(TensorRef, st.text(max_size=4), st.sampled_from(["torch", "numpy"])),
)
hashables = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(hashables, max_size=3),
        st.frozensets(hashables, max_size=3),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.dictionaries(st.sampled_from(["$int", "$x", "a"]), inner, max_size=3),
        st.dictionaries(hashables, inner, max_size=3),
        st.dictionaries(hashables, inner, max_size=3).map(OrderedDict),
        st.dictionaries(hashables, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=10,
)


def bits(value):
    """Type and bits of a value, all the way down; what == forgives (1 and True, 0.0 and -0.0, nan) differs here."""
    kind = type(value).__name__
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, complex):
        return kind, struct.pack(">dd", value.real, value.imag)
    if isinstance(value, list | tuple):
        return kind, [bits(v) for v in value]
    if isinstance(value, set | frozenset):
        return kind, sorted((bits(v) for v in value), key=str)
    if isinstance(value, dict):
        return kind, [(bits(k), bits(v)) for k, v in value.items()]
    return kind, hex(value) if isinstance(value, int) else value


@given(values)
@example(collections.Counter({"a": -1, (1, 2): 3}))
@example({"$int": "0x1", 1: {True: {None: {0.5: b"x"}}}})
def test_a_value_comes_back_with_its_type_and_its_bits(value):
    assert bits(decode(encode(value))) == bits(value)


@given(values)
def test_the_text_is_strict_json_with_no_integer_that_other_readers_round(value):
    def refuse(text):
        raise AssertionError(text)

    def exact(text):
        assert abs(int(text)) <= 2**53
        return int(text)

    json.loads(encode(value), parse_constant=refuse, parse_int=exact)


@pytest.mark.parametrize("payload", [0x7FF0000000000001, 0x7FF8000000000000, 0xFFF8DEADBEEF0001, 0xFFFFFFFFFFFFFFFF])
def test_the_payload_of_a_nan_survives(payload):
    (value,) = struct.unpack(">d", payload.to_bytes(8, "big"))
    assert math.isnan(value)
    assert struct.pack(">d", decode(encode([value]))[0]) == payload.to_bytes(8, "big")


def test_equal_sets_have_equal_bytes():
    # 8 and 16 share a slot of a small table, so these two sets iterate in the order they were filled in
    one, other = {8, 16}, {16, 8}
    assert list(one) != list(other)
    assert encode(one) == encode(other)


def test_integers_too_long_to_print_in_decimal_survive_as_values_and_as_keys():
    value = {10**5000: -(10**5000), (10**5000,): 1}
    assert bits(decode(encode(value))) == bits(value)


def test_what_json_has_stands_as_itself():
    assert encode({"lr": 0.1, "betas": [0.9, 1], "on": True, "no": None}) == (
        b'{"lr":0.1,"betas":[0.9,1],"on":true,"no":null}'
    )


class Colour(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    a: int
    b: int


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        object(),
        Colour.RED,
        Text("x"),
        dt.date(2020, 1, 1),
        Pair(1, 2),
        defaultdict(list),
        np.float32(1),
        np.int64(1),
        np.zeros(2),
        torch.zeros(2),
        torch.float32,
        torch.nn.Linear,
        bytearray(b"x"),
        range(3),
        lambda: 0,
    ],
    ids=lambda v: type(v).__name__,
)
def test_an_unknown_type_is_refused_with_the_path_to_it(value):
    with pytest.raises(Unsupported, match=r"^\$\.a\[1\]\.7: a .* cannot be saved"):
        encode({"a": [0, {7: value}]})


def test_an_unknown_type_in_a_key_is_refused_with_the_path_to_its_dict():
    with pytest.raises(Unsupported, match=r"^\$\.a\.<key>: "):
        encode({"a": {Colour.RED: 1}})


def test_a_value_in_a_circle_is_refused():
    circle: list = []
    circle.append(circle)
    with pytest.raises(Unsupported, match="circle"):
        encode(circle)


@pytest.mark.parametrize(
    "nest", [lambda v: [v], lambda v: {"a": v}, lambda v: {1: v}, lambda v: (v,), lambda v: OrderedDict(a=v)]
)
def test_what_is_as_deep_as_may_be_written_can_be_read(nest):
    value = None
    for _ in range(MAX_DEPTH):
        value = nest(value)
    assert bits(decode(encode(value))) == bits(value)
    with pytest.raises(Unsupported, match="deep"):
        encode(nest(value))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"{",
        b"NaN",
        b"[Infinity]",
        b"[1]x",
        b'{"a":1,"a":2}',
        b'{"$int":5}',
        b'{"$int":"zz"}',
        b'{"$int":"0x1","a":1}',
        b'{"$new":1}',
        b'{"$float":"00"}',
        b'{"$float":3}',
        b'{"$bytes":"*"}',
        b'{"$bytes":null}',
        b'{"$complex":"00"}',
        b'{"$tuple":"ab"}',
        b'{"$tuple":{"a":1}}',
        b'{"$set":[[1]]}',
        b'{"$set":3}',
        b'{"$dict":[[1]]}',
        b'{"$dict":["ab"]}',
        b'{"$dict":[[[1],2]]}',
        b'{"$dict":[[1,2],[1,3]]}',
        b'{"$ordered":{"a":1}}',
        b'{"$tensor":["a"]}',
        b'{"$tensor":"ab"}',
        b'{"$tensor":[1,2]}',
        b"123456789012345678901234567890",
        b"9" * 5000,
        b"[" * 300 + b"]" * 300,
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda t: t[:24].decode("latin1"),
)
def test_what_is_no_tagged_json_is_a_format_error(text):
    with pytest.raises(FormatError):
        decode(text)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_format_error(data):
    try:
        value = decode(data)
    except FormatError:
        return
    assert bits(decode(encode(value))) == bits(value)


@given(st.one_of(json_values, values.map(tag).flatmap(damaged)))
def test_any_json_is_a_value_that_survives_or_a_format_error(data):
    try:
        value = untag(data)
    except FormatError:
        return
    assert bits(decode(encode(value))) == bits(value)


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)


lrs = torch.optim.lr_scheduler
SCHEDULERS = {
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 2), lrs.ExponentialLR(o, 0.9)], o),
    "ConstantLR": lrs.ConstantLR,
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, mode="exp_range"),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LinearLR": lrs.LinearLR,
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 2, 5]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.95),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.5, total_steps=10),
    "PolynomialLR": lrs.PolynomialLR,
    "ReduceLROnPlateau": lrs.ReduceLROnPlateau,
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), lrs.ExponentialLR(o, 0.9)], [2]),
    "StepLR": lambda o: lrs.StepLR(o, 2),
}


def test_the_list_of_schedulers_is_torch_s():
    assert set(lrs.__all__) - {"LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_state_of_every_torch_scheduler_survives(name):
    def run(scheduler, opt, steps):
        seen = []
        for _ in range(steps):
            opt.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            seen.append(opt.param_groups[0]["lr"])
        return seen

    opt = optimizer()
    scheduler = SCHEDULERS[name](opt)
    run(scheduler, opt, 3)
    state = scheduler.state_dict()
    read = decode(encode(state))
    assert bits(read) == bits(state)

    later_opt = optimizer()
    later = SCHEDULERS[name](later_opt)
    later.load_state_dict(read)
    later_opt.load_state_dict(opt.state_dict())
    assert run(later, later_opt, 4) == run(scheduler, opt, 4)
