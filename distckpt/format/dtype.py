"""Element types by torch's names, their sizes, and their safetensors tags.

A dtype without a tag (complex, float8_e8m0fnu, float4) is stored as U8 with one more dimension, its item size; the
manifest names the true dtype. Tags that only newer readers know are not used.
"""

from __future__ import annotations

from distckpt.errors import Unsupported

_TAGGED = {
    "float64": (8, "F64"),
    "int64": (8, "I64"),
    "uint64": (8, "U64"),
    "float32": (4, "F32"),
    "int32": (4, "I32"),
    "uint32": (4, "U32"),
    "float16": (2, "F16"),
    "bfloat16": (2, "BF16"),
    "int16": (2, "I16"),
    "uint16": (2, "U16"),
    "float8_e4m3fn": (1, "F8_E4M3"),
    "float8_e5m2": (1, "F8_E5M2"),
    "int8": (1, "I8"),
    "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}
_UNTAGGED = {
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1,
}

TAG_SIZE: dict[str, int] = {tag: size for size, tag in _TAGGED.values()}
"""Bytes of one element, by safetensors tag."""

DTYPE_OF_TAG: dict[str, str] = {tag: name for name, (_, tag) in _TAGGED.items()}
"""Torch's name of a dtype, by safetensors tag."""

ITEM_SIZE: dict[str, int] = {name: size for name, (size, _) in _TAGGED.items()} | _UNTAGGED


def item_size(dtype: str) -> int:
    """Bytes of one element. Unsupported for a dtype that cannot be stored."""
    try:
        return ITEM_SIZE[dtype]
    except KeyError:
        raise Unsupported(f"dtype {dtype} cannot be stored; known are {', '.join(ITEM_SIZE)}") from None


def stored_as(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """(safetensors tag, shape) under which elements of this dtype stand in a data file."""
    if dtype in _TAGGED:
        return _TAGGED[dtype][1], shape
    return "U8", (*shape, item_size(dtype))


_EXPONENT_MANTISSA = {
    "float64": (11, 52),
    "float32": (8, 23),
    "bfloat16": (8, 7),
    "float16": (5, 10),
    "float8_e5m2": (5, 2),
    "float8_e4m3fn": (4, 3),
}
_INTEGER_RANGE = {
    f"{sign}int{bits}": ((-(2 ** (bits - 1)), 2 ** (bits - 1)) if not sign else (0, 2**bits))
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}


def widens(source: str, target: str) -> bool:
    """Whether every value of `source` is a value of `target` (and they differ): the casts a load makes unasked."""
    if source == target:
        return False
    if source in _EXPONENT_MANTISSA and target in _EXPONENT_MANTISSA:
        return all(s <= t for s, t in zip(_EXPONENT_MANTISSA[source], _EXPONENT_MANTISSA[target], strict=True))
    if source in _INTEGER_RANGE and target in _INTEGER_RANGE:
        (low, high), (target_low, target_high) = _INTEGER_RANGE[source], _INTEGER_RANGE[target]
        return target_low <= low and high <= target_high
    return (source, target) in {
        ("complex32", "complex64"),
        ("complex32", "complex128"),
        ("complex64", "complex128"),
    }
