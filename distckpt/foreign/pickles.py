"""Pickles read without running anything: every global of an allow-list is an inert stand-in, any other is refused.

    INDEX    what the index of a DCP directory needs: objects with attributes, sizes, dtypes
    VALUES   what plain values and tensors need; tensors come out as Located

Rule 1: `find_class` imports nothing. Rule 2: what it returns cannot be changed by the pickle (BUILD on a stand-in
fails), so one file cannot prepare the reading of another. Rule 3: a global of VALUES that is not known makes an
Unknown, which costs its value and not the whole file; of INDEX it is refused outright.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import Counter, OrderedDict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from distckpt.errors import DistckptError, FormatError
from distckpt.foreign.located import Located, Record, Undecodable, within
from distckpt.foreign.opcodes import check_memo
from distckpt.format.dtype import ITEM_SIZE, item_size
from distckpt.format.text import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Storage = Callable[[str, int], Record]
    """Where a storage lies, by its key; the second argument is the bytes that the pickle says it has."""


class Stub:
    """An instance of a class: what it was made with, and the state it was given."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Stub:  # noqa: D102, PYI034  a stand-in, whatever the subclass
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """Attribute of this name in its state; None where there is none."""
        return self.state.get(name) if isinstance(self.state, dict) else None


class Attributes(Stub):
    """An instance of a class that is known to be no more than its attributes: becomes a dict of them."""

    __slots__ = ()


class Unknown(Stub):
    """An instance of a class that is not known: takes whatever the pickle does to it, and does nothing."""

    __slots__ = ()
    name = ""

    def append(self, value: Any) -> None:
        """Nothing."""

    def extend(self, values: Any) -> None:
        """Nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing."""


class Function:
    """Stand-in of a function, or of a class that makes plain values: can be called, and not be changed."""

    __slots__ = ("_make",)
    _make: Callable[..., Any]

    def __init__(self, make: Callable[..., Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        return self._make(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FormatError("a pickle tries to change what it may only call")


class Dtype(str):
    """A torch dtype, by name."""

    __slots__ = ()


INDEX, VALUES = "index", "values"
_WINDOWS = 1 << 20, 16 << 20
"""Bytes in which the end of a pickle is looked for: in the second only where it is not in the first."""
PLAIN: Mapping[tuple[str, str], Any] = MappingProxyType({})
"""No globals beside those that plain values and tensors need."""


def unpickle(
    data: bytes, where: str, kind: str, storage: Storage | None = None, more: Mapping[tuple[str, str], Any] = PLAIN
) -> Any:
    """Value in a pickle, of stand-ins. `kind`: INDEX or VALUES. FormatError, with `where`, for anything else.

    `storage` tells where the data of a storage lies. more: globals that are known besides.
    """
    check_memo(data, where)
    return _unpickled(io.BytesIO(data), where, kind, storage, more)


def unpickle_stream(
    stream: io.BufferedReader,
    where: str,
    more: Mapping[tuple[str, str], Any] = PLAIN,
    storage: Storage | None = None,
) -> Any:
    """Value in the pickle that begins here, as VALUES; the stream is left behind it."""
    start = stream.tell()
    for window in _WINDOWS:
        ends = check_memo(stream.read(window), where)
        stream.seek(start)
        if ends:
            break
    else:
        raise FormatError(f"{where}: a pickle that does not end within {_WINDOWS[-1]} bytes of byte {start}")
    return _unpickled(stream, where, VALUES, storage, more)


def _unpickled(stream: Any, where: str, kind: str, storage: Storage | None, more: Mapping[tuple[str, str], Any]) -> Any:
    try:
        return _Unpickler(stream, where, kind, storage, more).load()
    except DistckptError:
        raise
    except Exception as e:  # a pickle that was tampered with can make the unpickler raise anything
        raise FormatError(f"{where}: not a pickle that can be read: {type(e).__name__}: {e}") from e


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, stream: Any, where: str, kind: str, storage: Storage | None, more: Mapping[tuple[str, str], Any]
    ) -> None:
        super().__init__(stream)
        self._where, self._kind, self._storage = where, kind, storage
        self._known = (_index() if kind == INDEX else _values()) | dict(more)

    def find_class(self, module: str, name: str) -> Any:
        """Stand-in of a global."""
        if module == "torch" and name in ITEM_SIZE:
            return Dtype(name)
        found = self._known.get((module, name))
        if found is not None:
            return found
        if self._kind == VALUES:
            return type("Unknown", (Unknown,), {"__slots__": (), "name": f"{module}.{name}"})
        raise FormatError(
            f"{self._where}: names the global {module}.{name}, which no such file needs; it was neither imported nor "
            "called. Do not load this file with torch, which would run it, unless you trust whoever wrote it"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Storage of a tensor: where its data lies."""
        match pid:
            case ("storage", kind, str(key), str(), int(count), *rest) if (
                self._storage and isinstance(kind, _StorageKind) and count >= 0 and rest in ([], [None])
            ):
                return _StorageAt(self._storage(key, count * item_size(kind.dtype or "uint8")), kind.dtype)
        raise FormatError(f"{self._where}: refers to {shown(pid)}, which is not a storage as torch.save names it")


# -- tensors -----------------------------------------------------------------------------------------------------


class _StorageKind:
    """Class of a storage: the dtype of its elements, "" where it has none."""

    __slots__ = ("dtype",)
    dtype: str

    def __init__(self, dtype: str) -> None:
        object.__setattr__(self, "dtype", dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        raise FormatError("a pickle tries to change what it may only name")


class _StorageAt:
    __slots__ = ("dtype", "record")

    def __init__(self, record: Record, dtype: str) -> None:
        self.record, self.dtype = record, dtype


STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
}


def _tensor(storage: Any, first: Any, shape: Any, steps: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor_v2: (..., requires_grad, hooks, metadata)."""
    return _any_tensor(storage, storage.dtype, (first, shape, steps), rest[2:])


def _typed_tensor(storage: Any, first: Any, shape: Any, steps: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_tensor_v3: (..., requires_grad, hooks, dtype, metadata)."""
    return _any_tensor(storage, str(rest[2]), (first, shape, steps), rest[3:])


def _any_tensor(storage: Any, dtype: str, geometry: tuple[Any, Any, Any], metadata: tuple[Any, ...]) -> Any:
    if not isinstance(storage, _StorageAt) or dtype not in ITEM_SIZE:
        raise FormatError(f"a tensor over {shown(storage)} of dtype {dtype!r}")
    if metadata and metadata[0]:
        return Undecodable(f"a tensor with {shown(metadata[0])} (conjugate or negative bit): resolve it before saving")
    return within(storage.record, dtype, *geometry)


def _parameter(data: Any, *_rest: Any) -> Any:
    return data if isinstance(data, (Located, Undecodable)) else Undecodable("a parameter that is no tensor")


def _of_type(make: Any, kind: Any, args: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    if isinstance(make, Function) and isinstance(kind, str) and kind in _TENSOR_CLASSES:
        return make(*args)
    return Undecodable(f"a tensor of {getattr(kind, 'name', kind)}")


_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


def _values() -> dict[tuple[str, str], Any]:
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("collections", "defaultdict"): Function(lambda *_: {}),
        ("collections", "Counter"): Function(Counter),
        ("torch", "Size"): Function(_size),
        ("torch", "device"): Function(lambda *at: _text(":", *at)),
        ("torch.serialization", "_get_layout"): Function(lambda name: _text("", name)),
        ("_codecs", "encode"): Function(_encoded),
        ("numpy", "dtype"): _NumpyDtype,
        ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): Function(_typed_tensor),
        ("torch._utils", "_rebuild_parameter"): Function(_parameter),
        ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
        ("torch._tensor", "_rebuild_from_type_v2"): Function(_of_type),
    }
    known |= {("torch", name): _StorageKind(dtype) for name, dtype in STORAGES.items()}
    known |= {(module, "UntypedStorage"): _StorageKind("") for module in ("torch", "torch.storage")}
    known |= {tuple(name.rsplit(".", 1)): name for name in _TENSOR_CLASSES}  # type: ignore[misc]
    known |= {(f"numpy.{core}.multiarray", "scalar"): Function(_numpy_scalar) for core in ("core", "_core")}
    for module in ("builtins", "__builtin__"):
        known |= {(module, kind.__name__): kind for kind in (set, frozenset, complex)}
        known[module, "bytes"] = Function(lambda: b"")  # protocol 2 calls it for empty bytes
        known |= {(module, name): f"{module}.{name}" for name in ("int", "float", "list", "dict", "str", "bool")}
    return known


_SCALERS = "deepspeed.runtime.fp16.loss_scaler"
DEEPSPEED: Mapping[tuple[str, str], Any] = MappingProxyType(
    {
        (_SCALERS, "LossScaler"): type("LossScaler", (Attributes,), {"__slots__": ()}),
        (_SCALERS, "DynamicLossScaler"): type("DynamicLossScaler", (Attributes,), {"__slots__": ()}),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"): Function(int),
    }
)
"""Globals of a DeepSpeed tag that say something which is wanted."""


# -- plain values ------------------------------------------------------------------------------------------------


def _size(sizes: Any = ()) -> tuple[int, ...]:
    found = tuple(sizes)
    if not all(type(n) is int and n >= 0 for n in found):
        raise FormatError(f"not a torch.Size: {shown(found)}")
    return found


def _text(between: str, *parts: Any) -> str:
    """Parts of a name, joined. FormatError for what could grow without end: a pickle can join what it has joined."""
    found = between.join(str(p) for p in parts if type(p) in {str, int})
    if len(found) > _LONGEST_NAME or not all(type(p) in {str, int} for p in parts):
        raise FormatError(f"a name of {len(parts)} parts, {len(found)} characters long")
    return found


_LONGEST_NAME = 4096


def _encoded(text: Any, encoding: Any) -> bytes:
    """Bytes, as old pickle protocols have them."""
    if encoding != "latin1" or not isinstance(text, str):
        raise FormatError(f"bytes encoded as {shown(encoding)}")
    return text.encode("latin1")


class _NumpyDtype(Stub):
    __slots__ = ()


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    """NumPy scalar as a Python number."""
    code = str(dtype.args[0]) if isinstance(dtype, _NumpyDtype) and dtype.args else "?"
    little = code != "?" and isinstance(dtype.state, tuple) and dtype.state[1:2] in {("<",), ("|",)}
    form = _NUMPY_FORMS.get(code)
    if not form or not little or not isinstance(data, bytes):
        return Undecodable(f"a NumPy scalar of dtype {shown(code)}")
    return struct.unpack("<" + form, data)[0]


_NUMPY_FORMS = {
    "f8": "d",
    "f4": "f",
    "f2": "e",
    "b1": "?",
    "i8": "q",
    "i4": "i",
    "i2": "h",
    "i1": "b",
    "u8": "Q",
    "u4": "I",
    "u2": "H",
    "u1": "B",
}


# -- the index of a DCP directory ----------------------------------------------------------------------------------


def _index() -> dict[tuple[str, str], Any]:
    """Fresh stand-ins: the globals that `.metadata` needs."""
    metadata, filesystem = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    classes = {
        metadata: (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        ),
        filesystem: ("_StorageInfo",),
    }
    known: dict[tuple[str, str], Any] = {
        (module, name): type(name, (Stub,), {"__slots__": ()}) for module, names in classes.items() for name in names
    }
    return known | {
        (metadata, "_MEM_FORMAT_ENCODING"): Function(lambda number: number),
        ("torch", "Size"): Function(_size),
        ("torch.serialization", "_get_layout"): Function(lambda name: _text("", name)),
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (module, name): Function(lambda *parts: _text("/", *parts))
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath")
        },
    }
