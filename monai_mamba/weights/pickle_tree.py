"""Read the tree of a pickled checkpoint without unpickling it.

``torch.load(weights_only=True)`` still runs a pickle machine that imports and calls, if only listed names; it had a
hole of its own (CVE-2026-24747, torch before 2.10), and it refuses published files that carry a harmless
configuration object beside the weights. The machine here walks over the opcodes and builds nothing but dicts, lists,
tuples, plain values and *descriptions* of tensors. It imports nothing and calls nothing: a name in the file is only
compared with a list. Names on the list without a meaning for weights turn into :class:`Inert` marks; any other name
ends the reading.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


class PickleRefused(Exception):
    """The pickle is damaged, too large, or names something that is not on the list."""


@dataclass(frozen=True)
class StorageRef:
    """A run of bytes in the file.

    Attributes:
        key: name of the run within the file.
        dtype: element type, None for untyped bytes.
        num_bytes: size the pickle claims; checked against the file by the reader.
    """

    key: str
    dtype: torch.dtype | None
    num_bytes: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read yet: a view of a storage."""

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Name:
    """A global name met in the pickle; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Inert:
    """Stands for an object of a harmless class (a configuration, a numpy scalar) whose content is not read."""

    name: str


@dataclass
class PickleLimits:
    """Bounds of the work a pickle may ask for.

    Attributes:
        max_opcodes: steps of the pickle machine; a network with optimizer state needs about 150 per tensor.
        max_items: entries of all dicts together.
    """

    max_opcodes: int = 1_000_000
    max_items: int = 100_000


_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_DTYPE_NAMES = {str(dtype)[6:]: dtype for dtype in (*_STORAGE_DTYPES.values(), torch.complex64, torch.complex128)}

# Classes seen beside weights in checkpoints of training programs. Nothing of them is built: the names are here so
# that such a file can be read at all. yacs: VMamba's `config`; argparse: many training scripts; numpy: metrics.
_INERT_NAMES = frozenset(
    {
        "argparse.Namespace",
        "yacs.config.CfgNode",
        "easydict.EasyDict",
        "collections.Counter",
        "collections.defaultdict",
        "collections.deque",
        # pathlib._local: Python 3.13 alone.
        *(
            f"{module}.{name}"
            for module in ("pathlib", "pathlib._local")
            for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        ),
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy.core.multiarray.scalar",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy.dtypes.Float32DType",
        "numpy.dtypes.Float64DType",
        "numpy.dtypes.Int64DType",
        "_codecs.encode",
        "torch.device",
        "torch.torch_version.TorchVersion",
        *(f"{b}.{n}" for b in ("builtins", "__builtin__") for n in ("set", "frozenset", "list", "dict", "tuple")),
        *(f"{b}.{n}" for b in ("builtins", "__builtin__") for n in ("complex", "bytearray", "slice", "range")),
        *(f"{b}.{n}" for b in ("builtins", "__builtin__") for n in ("int", "float", "bool", "str", "bytes")),
    }
)

_MAX_KEY = 2**31  # larger integers as dict keys could be chosen to collide
_MAX_KEY_LENGTH = 1024


@dataclass
class _Machine:
    limits: PickleLimits
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    num_items: int = 0

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def spend(self, num_items: int) -> None:
        self.num_items += num_items
        if self.num_items > self.limits.max_items:
            raise PickleRefused(f"it holds more than {self.limits.max_items} dictionary entries")

    def fill(self, target: Any, items: list[Any]) -> None:
        self.spend(len(items) // 2)
        if len(items) % 2:
            raise PickleRefused("a dictionary has a key without a value")
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict):
            raise PickleRefused(f"an entry is set on a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not (
                (isinstance(key, str) and len(key) <= _MAX_KEY_LENGTH)
                or (isinstance(key, int) and abs(key) < _MAX_KEY)
                or key is None
            ):
                raise PickleRefused(
                    f"a dictionary key must be a short text or a small integer, got {type(key).__name__}"
                )
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):
            raise PickleRefused(f"items are appended to a {type(target).__name__}")


def read_pickle_tree(data: bytes, limits: PickleLimits | None = None, offset: int = 0) -> tuple[Any, int]:
    """Walk one pickle and return its tree.

    Args:
        data: the pickle, possibly with more bytes behind it.
        limits: bounds of the work.
        offset: where the pickle starts in ``data``.

    Returns:
        The tree (dicts, lists, tuples, plain values, `TensorRef`, `Inert`) and the position behind the pickle.

    Raises:
        PickleRefused: if the pickle is damaged, exceeds the limits or names something that is not on the list.
    """
    limits = limits or PickleLimits()
    machine = _Machine(limits)
    stream = io.BytesIO(data)
    stream.seek(offset)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= limits.max_opcodes:
                raise PickleRefused(f"it has more than {limits.max_opcodes} steps")
            if opcode.name == "STOP":
                if len(machine.stack) != 1 or machine.marks:
                    raise PickleRefused("it ends with an unfinished stack")
                return machine.stack[0], stream.tell()
            handler = _HANDLERS.get(opcode.name)
            if handler is None:
                raise PickleRefused(f"it uses the opcode {opcode.name}, which no weight file needs")
            handler(machine, argument)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError) as error:
        # Damaged bytes show as any of these; text from the file is kept out of the message.
        raise PickleRefused(f"it is damaged ({type(error).__name__})") from error
    raise PickleRefused("it has no end")


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(value)


def _push_argument(machine: _Machine, argument: Any) -> None:
    machine.stack.append(argument)


def _new(factory: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.stack.append(factory())


def _mark(machine: _Machine, _: Any) -> None:
    machine.marks.append(len(machine.stack))


def _pop(machine: _Machine, _: Any) -> None:
    if machine.marks and machine.marks[-1] == len(machine.stack):
        machine.marks.pop()
    else:
        machine.stack.pop()


def _tuple_of(size: int) -> Callable[[_Machine, Any], None]:
    def handler(machine: _Machine, _: Any) -> None:
        if len(machine.stack) < size:
            raise PickleRefused("it is damaged (short stack)")
        items = tuple(machine.stack[-size:])
        del machine.stack[-size:]
        machine.stack.append(items)

    return handler


def _tuple(machine: _Machine, _: Any) -> None:
    machine.stack.append(tuple(machine.pop_to_mark()))


def _list(machine: _Machine, _: Any) -> None:
    machine.stack.append(machine.pop_to_mark())


def _dict(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    target: dict[Any, Any] = {}
    machine.fill(target, items)
    machine.stack.append(target)


def _set(machine: _Machine, _: Any) -> None:
    machine.pop_to_mark()
    machine.stack.append(Inert("builtins.frozenset"))


def _append(machine: _Machine, _: Any) -> None:
    item = machine.stack.pop()
    machine.extend([item])


def _appends(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.extend(items)


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.fill(machine.stack[-1], [key, value])


def _set_items(machine: _Machine, _: Any) -> None:
    items = machine.pop_to_mark()
    machine.fill(machine.stack[-1], items)


def _put(machine: _Machine, argument: int) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _get(machine: _Machine, argument: int) -> None:
    machine.stack.append(machine.memo[argument])


def _global(machine: _Machine, argument: str) -> None:
    module, name = argument.split(" ", 1)
    machine.stack.append(_admit(Name(module, name)))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleRefused("a name in it is not a text")
    machine.stack.append(_admit(Name(module, name)))


def _persistent_id(machine: _Machine, _: Any) -> None:
    machine.stack.append(_storage(machine.stack.pop()))


def _reduce(machine: _Machine, _: Any) -> None:
    arguments, function = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(_describe(machine, function, arguments))


def _new_object(machine: _Machine, _: Any) -> None:
    arguments, cls = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(_describe(machine, cls, arguments))


def _new_object_ex(machine: _Machine, _: Any) -> None:
    machine.stack.pop()
    _new_object(machine, _)


def _build(machine: _Machine, _: Any) -> None:
    # The state of an object (an OrderedDict's `_metadata`, a configuration's content) is not part of the weights.
    machine.stack.pop()
    if not isinstance(machine.stack[-1], dict | Inert | TensorRef):
        raise PickleRefused(f"a state is set on a {type(machine.stack[-1]).__name__}")


_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    **{name: lambda machine, _: None for name in ("PROTO", "FRAME")},
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    **{
        name: _push_argument
        for name in (
            *("INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
        )
    },
    "EMPTY_DICT": _new(dict),
    "EMPTY_LIST": _new(list),
    "EMPTY_TUPLE": _new(tuple),
    "EMPTY_SET": _new(lambda: Inert("builtins.set")),
    "FROZENSET": _set,
    "MARK": _mark,
    "POP": _pop,
    "POP_MARK": lambda machine, _: (machine.pop_to_mark(), None)[1],
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": _tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": _list,
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": _appends,
    "ADDITEMS": _appends,
    "SETITEM": _set_item,
    "SETITEMS": _set_items,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent_id,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "BUILD": _build,
}


def _is_storage_type(name: Name) -> bool:
    return (name.module == "torch" and name.name in _STORAGE_DTYPES) or (
        name.module in ("torch", "torch.storage") and name.name in ("UntypedStorage", "TypedStorage")
    )


def _admit(name: Name) -> Name:
    """Let a name pass that has a meaning here or is known to be harmless; refuse every other one."""
    text = str(name)
    if (
        text in _DESCRIBERS
        or text in _INERT_NAMES
        or _is_storage_type(name)
        or (name.module == "torch" and name.name in _DTYPE_NAMES)
    ):
        return name
    shown = text if len(text) <= 120 and text.isprintable() else "a name that cannot be printed"
    raise PickleRefused(
        f"it refers to `{shown}`, which no weight file needs: it is a whole pickled object or an attempt to run code, "
        "and is not read. From a source you trust, save `model.state_dict()` alone and load that"
    )


def _storage(identifier: Any) -> StorageRef:
    match identifier:
        case ("storage", Name() as kind, str() as key, _, int() as numel, *_) if _is_storage_type(kind):
            pass
        case _:
            raise PickleRefused("a storage is described in an unknown way")
    dtype = _STORAGE_DTYPES.get(kind.name)
    if isinstance(numel, bool) or numel < 0 or numel > 2**48:
        raise PickleRefused("a storage has an impossible size")
    return StorageRef(key, dtype, numel * (dtype.itemsize if dtype else 1))


def _describe(machine: _Machine, function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise PickleRefused("it calls something that is not a name")
    describer = _DESCRIBERS.get(str(function))
    return Inert(str(function)) if describer is None else describer(machine, arguments)


def _tensor(machine: _Machine, arguments: tuple[Any, ...]) -> TensorRef:
    match arguments:
        case (StorageRef() as storage, int() as offset, tuple() as shape, tuple() as stride, *rest):
            pass
        case _:
            raise PickleRefused("a tensor is described in an unknown way")
    # _rebuild_tensor_v3 names the type of the elements; the older forms take it from the storage.
    named = next((_DTYPE_NAMES.get(r.name) for r in rest if isinstance(r, Name)), None)
    dtype = named or storage.dtype
    if dtype is None:
        raise PickleRefused("a tensor has no element type")
    sizes = (offset, *shape, *stride)
    if len(shape) != len(stride) or len(shape) > 16:
        raise PickleRefused("a tensor has a shape and strides that do not belong together")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= 2**48 for n in sizes):
        raise PickleRefused("a tensor has an impossible shape, stride or offset")
    numel = math.prod(shape)
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if numel else 0
    capacity = storage.num_bytes // dtype.itemsize
    if numel and last >= capacity:
        raise PickleRefused(f"a tensor of shape {shape} reaches beyond its storage of {capacity} elements")
    if numel > capacity:
        raise PickleRefused(f"a tensor of shape {shape} claims more elements than the {capacity} stored for it")
    return TensorRef(storage, dtype, offset, shape, stride)


def _first_argument(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], TensorRef):
        raise PickleRefused("a parameter is described in an unknown way")
    return arguments[0]


def _from_type(machine: _Machine, arguments: tuple[Any, ...]) -> Any:
    """A tensor saved with its Python class: (rebuild function, class, its arguments, state)."""
    match arguments:
        case (Name() as function, _, tuple() as inner, *_) if str(function) in _TENSOR_BUILDERS:
            return _tensor(machine, inner)
    raise PickleRefused("a tensor of an unknown class is described")


def _mapping(machine: _Machine, arguments: tuple[Any, ...]) -> dict[Any, Any]:
    match arguments:
        case () | ([],):
            return {}
        case (list() as pairs,):
            items: list[Any] = []
            machine.spend(len(pairs))
            for pair in pairs:
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise PickleRefused("an ordered dictionary is described in an unknown way")
                items.extend(pair)
            target: dict[Any, Any] = {}
            machine.fill(target, items)
            return target
    raise PickleRefused("an ordered dictionary is described in an unknown way")


def _size(machine: _Machine, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    match arguments:
        case (tuple() | list() as sizes,):
            machine.spend(len(sizes))
            return tuple(sizes)
    raise PickleRefused("a size is described in an unknown way")


_TENSOR_BUILDERS = (
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
)

_DESCRIBERS: dict[str, Callable[[_Machine, tuple[Any, ...]], Any]] = {
    **{name: _tensor for name in _TENSOR_BUILDERS},
    "torch._utils._rebuild_parameter": _first_argument,
    "torch._utils._rebuild_parameter_with_state": _first_argument,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _first_argument,
    "torch.Tensor": lambda machine, arguments: Inert("torch.Tensor"),
    "torch.Size": _size,
    "collections.OrderedDict": _mapping,
}
