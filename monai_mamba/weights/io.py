"""Read weight files without running anything in them, and write them whole or not at all.

Three formats are read: the zip archives and the older plain files of ``torch.save``, and safetensors. Shapes and
names are known before any tensor is read (:class:`WeightFile`), sizes are compared with the file before memory is
asked for, and only the storages of the tensors asked for are read. Written is safetensors alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from monai_mamba.errors import CheckpointError
from monai_mamba.weights.pickle_tree import PickleLimits, PickleRefused, StorageRef, TensorRef, read_pickle_tree

#: Names under which training programs keep the weights, in the order in which they are tried.
STATE_DICT_NAMES = (
    "state_dict",
    "model",
    "model_state_dict",
    "network_weights",
    "model_ema",
    "ema_state_dict",
    "network",
    "net",
    "weights",
)

_SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DIGEST_KEY = "monai_mamba.sha256"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Bounds of what a file may ask for; raise one to read an unusual file that you trust.

    Attributes:
        max_bytes: size of the file.
        max_header_bytes: size of its table of contents (the pickle, the zip directory, the safetensors header).
        max_tensors: number of tensors and of entries of the archive.
        max_repeat: bytes of all tensors together over the bytes stored, for modules that are listed several times.
        pickle: bounds of the pickle.
    """

    max_bytes: int = 16 * 2**30
    max_header_bytes: int = 8 * 2**20
    max_tensors: int = 50_000
    max_repeat: int = 16
    pickle: PickleLimits = field(default_factory=PickleLimits)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of a tensor that may not have been read yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFile:
    """A checked weight file whose tensors are read on demand.

    Args:
        path: the file.
        limits: bounds of what the file may ask for.

    Attributes:
        path: the file.
        format: ``"torch"``, ``"torch-legacy"`` or ``"safetensors"``.
        tree: content with :class:`~monai_mamba.weights.pickle_tree.TensorRef` in place of tensors.
        metadata: texts stored beside the tensors (safetensors only).

    Raises:
        CheckpointError: if the file cannot be read, is damaged, unsafe or larger than the limits.
    """

    def __init__(self, path: os.PathLike[str] | str, limits: Limits | None = None) -> None:
        self.path = Path(path)
        self.limits = limits or Limits()
        self.metadata: dict[str, str] = {}
        self._positions: dict[str, tuple[int, int]] = {}
        with self._refusals():
            self._size = self._check_file()
            with open(self.path, "rb") as file:
                start = file.read(8)
                if start[:4] == b"PK\x03\x04":
                    self.format = "torch"
                    self.tree = self._read_zip_tree(file)
                elif start[:1] == b"\x80":
                    self.format = "torch-legacy"
                    self.tree = self._read_legacy_tree(file)
                elif self._looks_like_safetensors(file, start):
                    self.format = "safetensors"
                    self.tree = self._read_safetensors_tree(file, start)
                elif start.lstrip()[:1] == b"<":
                    raise PickleRefused("it is a web page, not weights: the download failed, fetch the file again")
                else:
                    raise PickleRefused(
                        "it is neither a file of torch.save nor a safetensors file (its first bytes are "
                        f"{start.hex() or 'missing'})"
                    )

    # Opening

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except PickleRefused as error:
            raise CheckpointError(f"not loaded: {error}", self.path) from error
        except (OSError, zipfile.BadZipFile, EOFError, struct.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise CheckpointError(f"cannot be read: {reason or type(error).__name__}", self.path) from error
        except (MemoryError, RecursionError, ValueError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(f"is damaged: {str(error)[:200] or type(error).__name__}", self.path) from error

    def _check_file(self) -> int:
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise PickleRefused("it is not a regular file")
        if status.st_size == 0:
            raise PickleRefused("the file is empty")
        if status.st_size > self.limits.max_bytes:
            raise PickleRefused(
                f"it has {status.st_size} bytes, more than the limit of {self.limits.max_bytes}; "
                "raise `max_bytes` if that is right"
            )
        return status.st_size

    def _read_zip_tree(self, file: BinaryIO) -> Any:
        self._check_zip_directory(file)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            names = {entry.filename for entry in entries}
            if len(names) != len(entries):
                raise PickleRefused("two entries of the archive have the same name")
            total = 0
            for entry in entries:
                if entry.flag_bits & 0x1:
                    raise PickleRefused("an entry of the archive is encrypted")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise PickleRefused("an entry of the archive is compressed, which torch.save never does")
                total += entry.file_size
            if total > self._size:
                raise PickleRefused(f"its entries claim {total} bytes, the file has {self._size}")
            roots = sorted(name[: -len("data.pkl")] for name in names if name.endswith("/data.pkl"))
            if len(roots) != 1:
                raise PickleRefused(
                    "it is a zip archive but not one of torch.save (no data.pkl)"
                    if not roots
                    else "it holds more than one data.pkl"
                )
            root = roots[0]
            if f"{root}constants.pkl" in names:
                raise PickleRefused(
                    "it is a TorchScript program, not a weight file; load it with torch.jit.load if you trust it"
                )
            if f"{root}byteorder" in names and self._read_entry(archive, f"{root}byteorder") != b"little":
                raise PickleRefused("it was written on a big-endian machine; save it again on a little-endian one")
            pickle = self._read_entry(archive, f"{root}data.pkl")
            tree, end = read_pickle_tree(pickle, self.limits.pickle)
            if end != len(pickle):
                raise PickleRefused("there are bytes behind the end of its pickle")
            self._zip_root = f"{root}data/"
            sizes = {entry.filename: entry.file_size for entry in entries}
            for storage in self._storages(tree):
                size = sizes.get(self._zip_root + storage.key)
                if size != storage.num_bytes:
                    claim = f"storage {storage.key[:20]!r} claims {storage.num_bytes} bytes"
                    raise PickleRefused(f"{claim}, the archive holds {'none' if size is None else size}")
        return tree

    def _check_zip_directory(self, file: BinaryIO) -> None:
        """Bound the directory before zipfile reads all of it into memory."""
        tail_size = min(self._size, 65_557)
        file.seek(self._size - tail_size)
        tail = file.read(tail_size)
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or end + 22 > len(tail):
            raise PickleRefused("the end of the archive is missing: the file is truncated")
        num_entries, directory_size = struct.unpack("<HI", tail[end + 10 : end + 16])
        locator = tail.rfind(b"PK\x06\x07", 0, end)
        if locator >= 0 and end - locator == 20:
            (position,) = struct.unpack("<Q", tail[locator + 8 : locator + 16])
            if position + 56 > self._size:
                raise PickleRefused("its archive directory lies beyond the end of the file")
            file.seek(position)
            record = file.read(56)
            num_entries, directory_size = struct.unpack("<QQ", record[32:48])
        if num_entries > 2 * self.limits.max_tensors or directory_size > self.limits.max_header_bytes:
            raise PickleRefused(
                f"its archive directory claims {num_entries} entries in {directory_size} bytes, more than allowed"
            )
        file.seek(0)

    def _read_entry(self, archive: zipfile.ZipFile, name: str) -> bytes:
        entry = archive.getinfo(name)
        if entry.file_size > self.limits.max_header_bytes:
            raise PickleRefused(
                f"its table of contents has {entry.file_size} bytes, more than the limit of "
                f"{self.limits.max_header_bytes}: far more than the names of a network need"
            )
        return archive.read(entry)

    def _read_legacy_tree(self, file: BinaryIO) -> Any:
        file.seek(0)
        head = file.read(min(self._size, self.limits.max_header_bytes))
        position, parts = 0, []
        for _ in range(5):  # magic number, protocol, system, content, storage keys
            part, position = read_pickle_tree(head, self.limits.pickle, position)
            parts.append(part)
            if len(parts) == 1 and part != _LEGACY_MAGIC:
                raise PickleRefused("it is a pickle but not one of torch.save")
        _, protocol, system, tree, keys = parts
        if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise PickleRefused("it is of an unknown version of the older torch.save format")
        storages = {storage.key: storage for storage in self._storages(tree)}
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise PickleRefused("its list of storages is damaged")
        for key in keys:
            file.seek(position)
            header = file.read(8)
            if len(header) < 8:
                raise PickleRefused("the file is truncated")
            (numel,) = struct.unpack("<q", header)
            storage = storages.get(key)
            if storage is None or storage.dtype is None:
                raise PickleRefused("it stores bytes that no tensor describes")
            if numel * storage.dtype.itemsize != storage.num_bytes:
                raise PickleRefused(f"storage {key[:20]!r} claims {storage.num_bytes} bytes, the file has another size")
            if position + 8 + storage.num_bytes > self._size:
                raise PickleRefused("the file is truncated")
            self._positions[key] = (position + 8, storage.num_bytes)
            position += 8 + storage.num_bytes
        if missing := set(storages) - set(self._positions):
            raise PickleRefused(f"{len(missing)} storages are missing from the file")
        if position != self._size:
            raise PickleRefused(f"there are {self._size - position} bytes behind its end")
        return tree

    def _looks_like_safetensors(self, file: BinaryIO, start: bytes) -> bool:
        if len(start) < 8:
            return False
        file.seek(8)
        return file.read(1) == b"{"

    def _read_safetensors_tree(self, file: BinaryIO, start: bytes) -> Any:
        (header_size,) = struct.unpack("<Q", start)
        if header_size > self.limits.max_header_bytes:
            raise PickleRefused(
                f"its header claims {header_size} bytes, more than the limit of {self.limits.max_header_bytes}"
            )
        if 8 + header_size > self._size:
            raise PickleRefused("its header is longer than the file: the file is truncated")
        file.seek(8)
        text = file.read(header_size)
        # A cheap count before parsing: every tensor costs one brace.
        if text.count(b"{") > self.limits.max_tensors + 2:
            raise PickleRefused(f"it holds more than {self.limits.max_tensors} tensors")
        try:
            header = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise PickleRefused(f"its header is damaged ({type(error).__name__})") from error
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise PickleRefused("its metadata is damaged")
        self.metadata = metadata
        data_start, tree, ranges = 8 + header_size, {}, []
        for key, entry in header.items():
            match entry:
                case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                    pass
                case _:
                    raise PickleRefused("a tensor is described in an unknown way")
            dtype = _SAFE_DTYPES.get(code)
            if dtype is None:
                raise PickleRefused(f"tensor {key[:80]!r} has the type {code[:10]!r}, which no network here uses")
            if len(shape) > 16 or not all(type(n) is int and 0 <= n <= 2**48 for n in shape):
                raise PickleRefused(f"tensor {key[:80]!r} has an impossible shape")
            size = math.prod(shape) * dtype.itemsize
            if end - begin != size or begin < 0 or data_start + end > self._size:
                raise PickleRefused(f"tensor {key[:80]!r} claims {size} bytes, the file holds others: it is truncated")
            stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
            tree[key] = TensorRef(StorageRef(key, dtype, size), dtype, 0, tuple(shape), stride)
            self._positions[key] = (data_start + begin, size)
            ranges.append((begin, end))
        expected = 0
        for begin, end in sorted(ranges):
            if begin != expected:
                raise PickleRefused("its tensors overlap or leave gaps")
            expected = end
        if data_start + expected != self._size:
            raise PickleRefused(f"there are {self._size - data_start - expected} bytes behind its last tensor")
        return tree

    def _storages(self, tree: Any) -> list[StorageRef]:
        """Collect the storages of a tree, each once, and check their number and what the tensors make of them."""
        storages: dict[str, StorageRef] = {}
        num_tensors = total = 0
        seen: set[int] = set()
        pending = [tree]
        while pending:
            node = pending.pop()
            if isinstance(node, TensorRef):
                num_tensors += 1
                total += node.num_bytes
                known = storages.setdefault(node.storage.key, node.storage)
                if known.num_bytes != node.storage.num_bytes:
                    raise PickleRefused(f"storage {known.key[:20]!r} is described with two sizes")
            elif isinstance(node, dict | list | tuple):
                if id(node) not in seen:
                    seen.add(id(node))
                    pending.extend(node.values() if isinstance(node, dict) else node)
        if num_tensors > self.limits.max_tensors:
            raise PickleRefused(f"it holds {num_tensors} tensors, more than the limit of {self.limits.max_tensors}")
        if total > self.limits.max_repeat * self._size:
            raise PickleRefused(
                f"its tensors claim {total} bytes together, over {self.limits.max_repeat} times the size of the file"
            )
        return list(storages.values())

    # Looking and reading

    def state_dicts(self) -> dict[str, dict[str, TensorSpec]]:
        """Return every group of tensors in the file by name; the name is empty for tensors at the top."""
        groups: dict[str, dict[str, TensorSpec]] = {}
        for name, group in self._groups().items():
            groups[name] = {key: TensorSpec(ref.shape, ref.dtype) for key, ref in group.items()}
        return groups

    def state_dict(self, name: str | None = None) -> tuple[str, dict[str, TensorSpec]]:
        """Choose the weights in the file.

        Args:
            name: key under which they lie, e.g. ``"model_ema"``; default the first of `STATE_DICT_NAMES`.

        Returns:
            The name and the shape and type of every tensor.

        Raises:
            CheckpointError: if there are no such weights.
        """
        groups = self.state_dicts()
        found = ", ".join(repr(group) for group in groups if group) or "none"
        if name is not None:
            if name not in groups:
                raise CheckpointError(f"there are no weights under {name!r}; it holds: {found}", self.path)
            return name, groups[name]
        for candidate in (*STATE_DICT_NAMES, ""):
            if candidate in groups:
                return candidate, groups[candidate]
        named = {group: specs for group, specs in groups.items() if group.rpartition(".")[0] == ""}
        if len(named) == 1:
            return next(iter(named.items()))
        raise CheckpointError(
            "it holds no tensors" if not groups else f"say which weights to load, it holds: {found}", self.path
        )

    def _groups(self) -> dict[str, dict[str, TensorRef]]:
        groups: dict[str, dict[str, TensorRef]] = {}

        def collect(prefix: str, node: Any, depth: int) -> None:
            if not isinstance(node, dict):
                return
            tensors = {
                key: value for key, value in node.items() if isinstance(key, str) and isinstance(value, TensorRef)
            }
            if tensors:
                groups[prefix] = tensors
            if depth:
                for key, value in node.items():
                    if isinstance(key, str) and isinstance(value, dict):
                        collect(f"{prefix}.{key}" if prefix else key, value, depth - 1)

        collect("", self.tree, 2)
        return groups

    def load(self, name: str, keys: Iterable[str] | None = None, *, check_finite: bool = True) -> dict[str, Tensor]:
        """Read tensors of one group; tensors that share a storage in the file share it in memory.

        Args:
            name: the group, as `state_dict` returns it.
            keys: the tensors; default all.
            check_finite: refuse NaN and infinity.

        Raises:
            CheckpointError: if the bytes are damaged or a value is not finite.
        """
        group = self._groups()[name]
        wanted = {key: group[key] for key in (group if keys is None else keys)}
        storages: dict[str, Tensor] = {}
        with self._refusals(), open(self.path, "rb") as file:
            if self.format == "torch":
                with zipfile.ZipFile(file) as archive:
                    for ref in wanted.values():
                        key = ref.storage.key
                        if key not in storages:
                            with archive.open(self._zip_root + key) as entry:
                                storages[key] = _read_bytes(entry, ref.storage.num_bytes)
                                if entry.read(1):  # reaching the end makes zipfile compare the checksum
                                    raise PickleRefused("a storage is longer than the archive says")
            else:
                for ref in wanted.values():
                    key = ref.storage.key
                    if key not in storages:
                        position, size = self._positions[key]
                        file.seek(position)
                        storages[key] = _read_bytes(file, size)
            tensors = {key: _view(storages[ref.storage.key], ref) for key, ref in wanted.items()}
            if keys is None and _DIGEST_KEY in self.metadata and content_digest(tensors) != self.metadata[_DIGEST_KEY]:
                raise PickleRefused("its checksum does not fit its content: the file was damaged")
            if check_finite:
                for key, tensor in tensors.items():
                    if not is_finite(tensor):
                        raise PickleRefused(f"tensor {key[:120]!r} holds NaN or infinite values")
        return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("repeated key")
    return result


def _read_bytes(stream: Any, size: int) -> Tensor:
    """Read into memory of just that size, block by block, so that no second copy exists."""
    storage = torch.empty(size, dtype=torch.uint8)
    view = storage.numpy().data if size else memoryview(b"")
    position = 0
    while position < size:
        count = stream.readinto(view[position : position + _BLOCK])
        if not count:
            raise PickleRefused("the file is truncated")
        position += count
    return storage


def _view(storage: Tensor, ref: TensorRef) -> Tensor:
    if math.prod(ref.shape) == 0:
        return torch.empty(ref.shape, dtype=ref.dtype)
    usable = storage.numel() // ref.dtype.itemsize * ref.dtype.itemsize
    return storage[:usable].view(ref.dtype).as_strided(ref.shape, ref.stride, ref.offset)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor is free of NaN and infinity, without a temporary copy of it."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # both are NaN if any value is
    return bool(torch.isfinite(low) and torch.isfinite(high))


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, types, shapes and values, whatever the order and the format of the file."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def file_digest(path: os.PathLike[str] | str) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_state_dict(
    path: os.PathLike[str] | str, name: str | None = None, *, limits: Limits | None = None, check_finite: bool = True
) -> dict[str, Tensor]:
    """Read the weights of a file on the CPU, without running anything in it.

    Args:
        path: file of ``torch.save`` (new or old format) or safetensors.
        name: key under which the weights lie; default the first of `STATE_DICT_NAMES`.
        limits: bounds of what the file may ask for.
        check_finite: refuse NaN and infinity.

    Raises:
        CheckpointError: if the file is damaged, unsafe, larger than the limits or holds no such weights.
    """
    file = WeightFile(path, limits)
    return file.load(file.state_dict(name)[0], check_finite=check_finite)


@contextlib.contextmanager
def atomic_path(path: os.PathLike[str] | str) -> Iterator[Path]:
    """Give a temporary path beside ``path`` and move it there at the end; on an error nothing is left."""
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(
    path: os.PathLike[str] | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write weights as safetensors, whole or not at all, with a checksum of the content in the metadata.

    Args:
        path: the file.
        tensors: the weights; a tensor listed under two names is written twice.
        metadata: texts to store beside them.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: if the file is there and ``overwrite`` is False.
        ValueError: if there is nothing to write.
    """
    from safetensors.torch import save_file

    if not tensors:
        raise ValueError("`tensors` is empty; there is nothing to write")
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name or allow it to be overwritten")
    written: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        is_whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        written[key] = tensor if is_whole and address not in storages else tensor.clone()
        storages.add(address)
    texts = {"format": "pt", **(metadata or {}), _DIGEST_KEY: content_digest(written)}
    with atomic_path(target) as temporary:
        save_file(written, temporary, texts)
