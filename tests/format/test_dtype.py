"""Element types, against torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from distckpt.errors import Unsupported
from distckpt.format.dtype import ITEM_SIZE, TAG_SIZE, item_size, stored_as, widens

NUMBERS = [n for n in ITEM_SIZE if n in {"float64", "float32", "bfloat16", "float16", "float8_e5m2", "float8_e4m3fn"}]
INTEGERS = [n for n in ITEM_SIZE if "int" in n]


@pytest.mark.parametrize("dtype", ITEM_SIZE)
def test_an_item_is_as_large_as_torch_s(dtype):
    assert item_size(dtype) == getattr(torch, dtype).itemsize


@pytest.mark.parametrize("dtype", ITEM_SIZE)
def test_bytes_are_kept_whatever_a_dtype_is_stored_as(dtype):
    tag, shape = stored_as(dtype, (3, 5))
    count = 1
    for n in shape:
        count *= n
    assert count * TAG_SIZE[tag] == 3 * 5 * item_size(dtype)
    assert shape[:2] == (3, 5)


def test_every_dtype_of_torch_that_has_whole_items_can_be_stored():
    ours = {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)}
    sub_byte = {d for d in ours if d.removeprefix("u").removeprefix("int") in {*"1234567"}}
    quantized = {d for d in ours if d.startswith(("q", "bits"))}
    assert ours - sub_byte - quantized == set(ITEM_SIZE)


@pytest.mark.parametrize("dtype", ["", "float", "int4", "qint8", "torch.float32"])
def test_another_dtype_is_unsupported(dtype):
    with pytest.raises(Unsupported, match="cannot be stored"):
        item_size(dtype)
    with pytest.raises(Unsupported):
        stored_as(dtype, (1,))


def samples(dtype: str) -> torch.Tensor:
    """Every value of a dtype of one or two bytes; of a larger one those at the edges."""
    kind = getattr(torch, dtype)
    if kind.itemsize <= 2:
        width = {1: torch.uint8, 2: torch.uint16}[kind.itemsize]
        return torch.arange(2 ** (8 * kind.itemsize)).to(width).view(kind)
    if kind.is_floating_point:
        info = torch.finfo(kind)
        return torch.tensor([info.max, info.min, info.tiny, info.tiny * info.eps, 1 + info.eps, 0.0], dtype=kind)
    info = torch.iinfo(kind)
    return torch.tensor([info.max, info.min, 0, 1], dtype=kind)


def exact(tensor: torch.Tensor) -> list:
    values = tensor.to(torch.float64).tolist() if tensor.is_floating_point() else tensor.tolist()
    return ["nan" if v != v else v for v in values]


@pytest.mark.parametrize("group", [NUMBERS, INTEGERS], ids=["floats", "integers"])
def test_a_dtype_widens_to_those_that_hold_each_of_its_values(group):
    assert len(group) in {6, 8}
    for source in group:
        values = samples(source)
        for target in group:
            kept = exact(values.to(getattr(torch, target))) == exact(values)
            assert widens(source, target) == (kept and source != target), (source, target)


def test_complex_dtypes_widen_among_themselves_only():
    kinds = ["complex32", "complex64", "complex128"]
    assert {(a, b) for a in kinds for b in ITEM_SIZE if widens(a, b)} == set(itertools.combinations(kinds, 2))


@pytest.mark.parametrize(("source", "target"), [("bool", "uint8"), ("int8", "float32"), ("uint8", "bool")])
def test_what_changes_the_kind_of_a_value_is_no_widening(source, target):
    assert not widens(source, target)
