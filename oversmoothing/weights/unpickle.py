"""Reads tensors and plain values from ``torch.save`` files: executes nothing, and checks sizes before it allocates.

torch's own weights-only reader executes nothing either, but it calls constructors with any argument: 200 bytes are
enough for ``torch.Tensor(10**10)``, ``bytearray(10**10)`` or a tensor that is larger than its storage. Here a file may
hold dense tensors, the types of JSON and a few containers, and every declared size is compared with the file's content
before memory is allocated. Both layouts of ``torch.save`` are read: the zip archive and the older sequence of pickles.
"""

import argparse
import io
import os
import pickle
import pickletools
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_PICKLE = 16 << 20  # bytes; name, shape and position take about 300 per tensor
MAX_DEPTH = 32  # of nested containers
MAX_EXPANSION = 20  # of compressed records; torch.save does not compress at all
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
    )
}
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class Refused(Exception):
    """The file asks for a Python object that no checkpoint needs; the text is its name."""


class _Storage(NamedTuple):
    """Named in the pickle, read after it. Immutable like `_Tensor`, since a pickle can change attributes of objects."""

    key: str
    dtype: torch.dtype
    nbytes: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as are the strides
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def load(file: BinaryIO) -> Any:
    """Reads a file of ``torch.save``.

    Returns:
        Its content: tensors (on the CPU), dict, list, tuple, set, str, bytes, numbers, None, ``Namespace``,
        ``torch.dtype`` and ``torch.device``. Storages shared by tensors in the file are shared here.

    Raises:
        Refused: If it asks for anything else.
        Exception: Of many kinds, if it is damaged or declares sizes that do not fit its content.
    """
    length = os.fstat(file.fileno()).st_size
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    return _load_zip(file, length) if is_zip else _load_sequence(file, length)


def _load_zip(file: BinaryIO, length: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        main = next((name for name in records if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
        if main is None:
            raise ValueError("no record data.pkl: a zip archive, but not torch.save's")
        prefix = main.removesuffix("data.pkl")
        order = f"{prefix}byteorder"
        if order in records and records[order].file_size < 9 and archive.read(order) != b"little":
            raise ValueError("it was written on a big-endian machine")
        if records[main].file_size > MAX_PICKLE:
            raise ValueError(f"its description of the tensors takes more than {MAX_PICKLE >> 20} MB")
        found, storages = _unpickle(archive.read(main))
        _check(found, [10 * records[main].file_size])
        total = 0
        for storage in storages.values():
            info = records[f"{prefix}data/{storage.key}"]
            total += info.file_size
            if info.file_size != storage.nbytes or total > MAX_EXPANSION * length:
                raise ValueError(f"the storage {storage.key} is declared with {storage.nbytes} bytes")
            if info.compress_type == zipfile.ZIP_STORED and total > length:
                raise ValueError("its storages overlap")

        # Reading compares a record with its CRC.
        contents = {key: _tensor_of(bytearray(archive.read(f"{prefix}data/{key}"))) for key in storages}
    return _build(found, contents)


def _load_sequence(file: BinaryIO, length: int) -> Any:
    head = io.BytesIO(file.read(MAX_PICKLE))

    def next_pickle() -> tuple[Any, dict[str, _Storage]]:
        start = head.tell()
        for _ in pickletools.genops(head):  # to its end
            pass
        return _unpickle(head.getvalue()[start : head.tell()])

    if next_pickle()[0] != LEGACY_MAGIC or next_pickle()[0] != 1001:
        raise ValueError("a pickle, but not torch.save's")
    next_pickle()  # sizes of C types on the machine that wrote it
    found, storages = next_pickle()
    _check(found, [10 * head.tell()])
    keys = next_pickle()[0]
    file.seek(head.tell())
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("its list of storages does not fit its tensors")
    if sum(storage.nbytes for storage in storages.values()) > length:
        raise ValueError("its tensors are declared larger than the file")
    contents = {}
    for key in keys:
        elements = int.from_bytes(file.read(8), "little", signed=True)
        nbytes = storages[key].nbytes
        buffer = bytearray(file.read(nbytes))
        if elements * storages[key].dtype.itemsize != nbytes or len(buffer) != nbytes:
            raise ValueError(f"the storage {key} is cut short")
        contents[key] = _tensor_of(buffer)
    return _build(found, contents)


def _tensor_of(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)


# ---- the pickle ----


def _unpickle(content: bytes) -> tuple[Any, dict[str, _Storage]]:
    """One pickle's object, its tensors still `_Tensor`, and the storages it names."""
    for opcode, argument, _ in pickletools.genops(content):  # checks all lengths against the content
        if "PUT" in opcode.name and argument > len(content):  # Python's reader allocates memory for all lower numbers
            raise ValueError("the pickle numbers more objects than it holds")
    unpickler = _Unpickler(io.BytesIO(content), encoding="utf-8")
    return unpickler.load(), unpickler.storages


def _tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride), storage.dtype)


def _tensor_v3(
    storage: _Storage, offset: int, size: tuple, stride: tuple, _: Any, __: Any, dtype: Any, *___: Any
) -> _Tensor:
    return _Tensor(storage, offset, tuple(size), tuple(stride), dtype)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


def _of_type(rebuild: Callable, kind: Any, arguments: tuple, *_: Any) -> Any:
    return rebuild(*arguments)


def _encode(text: str, encoding: str) -> bytes:
    """How pickles before protocol 3 hold bytes."""
    return text.encode("latin1")


# The names that a pickle may use. Types of tensors and storages are values here, not constructors.
ALLOWED: dict[str, Any] = {
    **DTYPES,
    **{f"{module}.{name}": dtype for name, dtype in STORAGES.items() for module in ("torch", "torch.cuda")},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.Tensor": "torch.Tensor",
    "torch.nn.parameter.Parameter": "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "builtins.set": set,
    "_codecs.encode": _encode,
    "argparse.Namespace": argparse.Namespace,  # DeiT's and timm's "args"
}


class _Unpickler(pickle.Unpickler):
    """Python's reader, restricted to the names in `ALLOWED`."""

    def __init__(self, file: BinaryIO, **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a Python object."""
        try:
            return ALLOWED[f"{module.replace('__builtin__', 'builtins')}.{name}"]
        except KeyError:
            raise Refused(ascii(f"{module}.{name}")[1:-1][:100]) from None

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, by ("storage", type, key, device, elements[, view])."""
        kind, dtype, key, _, elements, *view = pid
        if (
            kind != "storage"
            or not isinstance(dtype, torch.dtype)
            or not isinstance(key, str)
            or view not in ([], [None])
        ):
            raise ValueError("it names a storage in an unknown way")
        if type(elements) is not int or elements < 0:
            raise ValueError(f"the storage {key[:20]} is declared with {str(elements)[:20]} elements")
        storage = _Storage(key, dtype, elements * dtype.itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"the storage {key[:20]} is declared in two ways")
        return storage


# ---- from the pickle to the result ----

PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def _children(value: Any) -> list:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def _check(value: Any, budget: list[int], depth: int = 0) -> None:
    """Refuses containers that hold themselves, and those that expand to more than the file holds."""
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise ValueError("its containers are nested too deeply")
    if isinstance(value, _Tensor):
        _check_tensor(value)
    elif type(value) is int:
        if not -(2**63) <= value < 2**64:
            raise ValueError("it holds a number of more than 64 bits")
    elif isinstance(value, _Storage) or not isinstance(value, (*PLAIN, argparse.Namespace, dict, list, tuple, set)):
        raise ValueError(f"it holds a {type(value).__name__}")
    else:
        for child in _children(value):
            _check(child, budget, depth + 1)


def _check_tensor(tensor: _Tensor) -> None:
    """Every element lies in the storage, and the tensor has no more elements than it: a copy cannot be larger."""
    storage, offset, size, stride, dtype = tensor
    numbers = (offset, *size, *stride)
    good = isinstance(storage, _Storage) and isinstance(dtype, torch.dtype) and len(size) == len(stride) <= 64
    if not good or not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise ValueError("it declares a tensor in an unknown way")
    elements, last = 1, offset
    for side, step in zip(size, stride, strict=True):
        elements *= side
        last += (side - 1) * step
    held = storage.nbytes // dtype.itemsize
    if (elements and (last >= held or elements > held)) or (not elements and max(size) > 2**31):
        raise ValueError(f"a tensor of shape {size} is declared on a storage of {storage.nbytes} bytes")


def _build(value: Any, storages: dict[str, Tensor]) -> Any:
    """A copy with real tensors, of a value that :func:`_check` has accepted."""
    if isinstance(value, _Tensor):
        raw = storages[value.storage.key]
        dtype = torch.uint8 if value.dtype == torch.bool else value.dtype
        tensor = torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), value.offset, value.size, value.stride)
        return tensor != 0 if value.dtype == torch.bool else tensor  # bytes other than 0 and 1 are no valid bools
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**{str(name): _build(entry, storages) for name, entry in vars(value).items()})
    if isinstance(value, dict):
        return {key: _build(entry, storages) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return (type(value) if type(value) in (list, set) else tuple)(_build(entry, storages) for entry in value)
    return value
