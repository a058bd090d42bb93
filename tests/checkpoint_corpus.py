"""Corrupt and malicious checkpoint files for the tests, made on the spot."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from monai_mamba.weights.io import write_safetensors

#: What must happen. A flipped bit may hit a byte without a meaning, and the older torch format has no checksum.
MUST_FAIL = "must fail"
MUST_FAIL_OR_EQUAL = "must fail or load the same values"
MUST_FAIL_OR_LOAD_SHAPES = "must fail or load the same shapes"


@dataclass(frozen=True)
class Case:
    name: str
    data: bytes
    verdict: str = MUST_FAIL


def weights() -> dict[str, torch.Tensor]:
    """Small weights with the kinds of tensors that networks have."""
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(8, 1, 3, 3, generator=generator),
        "stem.bias": torch.randn(8, generator=generator),
        "norm.running_var": torch.rand(8, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
        "blocks.0.A_logs": torch.randn(64, 16, generator=generator),
        "head.weight": torch.randn(6, 64, generator=generator).half(),
    }


def torch_file(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def good_files(folder: Path) -> dict[str, bytes]:
    """The same weights in the three formats that are read."""
    path = folder / "good.safetensors"
    write_safetensors(path, weights(), overwrite=True)
    return {
        "zip": torch_file(weights()),
        "legacy": torch_file(weights(), _use_new_zipfile_serialization=False),
        "safetensors": path.read_bytes(),
    }


def rewrite_zip(data: bytes, change: Callable[[str, bytes], bytes | None], **options: object) -> bytes:
    """Copy an archive, changing entries, or dropping those for which ``change`` returns None."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w", **options) as target:
        for entry in source.infolist():
            content = change(entry.filename, source.read(entry))
            if content is not None:
                target.writestr(entry.filename, content)
    return stream.getvalue()


def zip_with_pickle(payload: bytes) -> bytes:
    return rewrite_zip(torch_file(weights()), lambda name, data: payload if name.endswith("data.pkl") else data)


def legacy_with_pickle(payload: bytes) -> bytes:
    """A file of the older format whose content is ``payload``."""
    legacy = torch_file(weights(), _use_new_zipfile_serialization=False)
    stream = io.BytesIO(legacy)
    for _ in range(3):  # magic number, protocol, system
        pickle.load(stream)
    return legacy[: stream.tell()] + payload


def containers(payload: bytes) -> Iterator[tuple[str, bytes]]:
    """The three ways in which a pickle can arrive."""
    yield "bare", payload
    yield "zip", zip_with_pickle(payload)
    yield "legacy", legacy_with_pickle(payload)


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def calling(module: str, name: str, *arguments: str) -> bytes:
    """A protocol 2 pickle that would call ``module.name(*arguments)``."""
    return b"\x80\x02" + f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text, arguments)) + b"tR."


def attacks(canary: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that would create ``canary`` or run other code."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    for module, name, argument in (
        ("os", "system", command),
        ("posix", "system", command),
        ("os", "popen", command),
        ("subprocess", "Popen", command),
        ("subprocess", "getoutput", command),
        ("builtins", "eval", code),
        ("builtins", "exec", code),
        ("__builtin__", "eval", code),
        ("builtins", "__import__", "os"),
        ("builtins", "getattr", "os"),
        ("builtins", "open", str(canary)),
        ("importlib", "import_module", "os"),
        ("runpy", "run_path", str(canary)),
        ("pty", "spawn", command),
        ("timeit", "timeit", code),
        ("code", "interact", code),
        ("pickle", "loads", code),
        ("torch", "load", str(canary)),
        ("torch.hub", "load", str(canary)),
        ("torch.jit", "load", str(canary)),
        ("torch.serialization", "load", str(canary)),
        ("numpy", "load", str(canary)),
        ("numpy.f2py.crackfortran", "myeval", code),
        ("functools", "partial", code),
        ("operator", "attrgetter", "system"),
        ("copyreg", "_reconstructor", code),
        ("webbrowser", "open", command),
        ("shutil", "rmtree", str(canary.parent)),
        ("monai_mamba.weights.io", "write_safetensors", str(canary)),
    ):
        yield f"{module}.{name}", calling(module, name, argument)
    call = calling("os", "system", command)[2:-1]
    yield "tensor-from-a-call", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"K\x00))\x89NtR."
    yield "call-in-a-dictionary", b"\x80\x02}" + text("a") + call + b"s."
    yield "call-before-the-weights", b"\x80\x02" + call + b"0}" + text("a") + b"K\x01s."
    yield "call-as-state", b"\x80\x02}" + call + b"b."
    yield "stack-global", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    yield "new-object", b"\x80\x02csubprocess\nPopen\n(" + text("true") + b"t\x81."
    yield "instance-opcode", f"\x80\x02(S'{command}'\nios\nsystem\n.".encode("latin-1")
    yield "object-opcode", b"\x80\x02(cos\nsystem\n" + text("true") + b"o."
    yield "extension-opcode", b"\x80\x02\x82\x01)R."
    yield "persistent-id-as-text", b"\x80\x02Pos.system\n."
    yield "storage-type-is-a-call", b"\x80\x02(" + text("storage") + call + text("0") + text("cpu") + b"K\x01tQ."
    yield "name-with-dots", b"\x80\x04\x8c\x0btorch._utils\x8c\x09os.system\x93\x8c\x04true\x85R."


def storage_lies() -> Iterator[tuple[str, bytes]]:
    """Sizes that do not fit the file."""

    def tensor_pickle(numel: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + integer(numel) + b"tQ"
        body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset)
        body += b"(" + b"".join(map(integer, shape)) + b"t(" + b"".join(map(integer, stride)) + b"t\x89}tR"
        return b"\x80\x02}" + text("stem.weight") + body + b"s."

    good = torch_file({"stem.weight": torch.zeros(100)})
    for name, arguments in {
        "storage-larger-than-file": (10**9, 0, (10**9,), (1,)),
        "storage-of-a-petabyte": (2**47, 0, (2**47,), (1,)),
        "storage-negative": (-100, 0, (100,), (1,)),
        "storage-smaller": (50, 0, (50,), (1,)),
        "tensor-beyond-storage": (100, 0, (200,), (1,)),
        "tensor-offset-beyond": (100, 90, (20,), (1,)),
        "tensor-negative-offset": (100, -10, (20,), (1,)),
        "tensor-negative-stride": (100, 50, (20,), (-1,)),
        "tensor-negative-shape": (100, 0, (-20,), (1,)),
        "tensor-expanded-hugely": (100, 0, (2**40,), (0,)),
        "tensor-shape-overflow": (100, 0, (2**32, 2**32), (0, 0)),
        "tensor-stride-overflow": (100, 0, (2, 2), (2**47, 1)),
        "tensor-too-few-strides": (100, 0, (10, 10), (10,)),
    }.items():
        payload = tensor_pickle(*arguments)
        yield name, rewrite_zip(good, lambda entry, data, p=payload: p if entry.endswith("data.pkl") else data)

    def safetensors(entries: dict[str, object], data: bytes = bytes(400)) -> bytes:
        header = json.dumps(entries).encode()
        return struct.pack("<Q", len(header)) + header + data

    def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}

    yield "safe-larger-than-file", safetensors({"a": entry([10**9], 0, 4 * 10**9)})
    yield "safe-offsets-lie", safetensors({"a": entry([100], 0, 200)})
    yield "safe-overlap", safetensors({"a": entry([100], 0, 400), "b": entry([100], 0, 400)})
    yield "safe-gap", safetensors({"a": entry([10], 0, 40), "b": entry([10], 360, 400)})
    yield "safe-negative", safetensors({"a": entry([-100], 0, -400)})
    yield "safe-trailing", safetensors({"a": entry([10], 0, 40)})
    yield "safe-unknown-type", safetensors({"a": entry([100], 0, 400, "X32")})
    yield "safe-not-a-table", safetensors({"a": 3})
    yield "safe-header-lies", struct.pack("<Q", 2**62) + b'{"a":{}}'
    yield "safe-nested", struct.pack("<Q", 100_000) + b'{"a":' * 20_000
    yield "safe-repeated-key", struct.pack("<Q", 22) + b'{"a": null, "a": null}'


def broken_archives() -> Iterator[tuple[str, bytes]]:
    """Zip files that torch.save would not have written."""
    good = torch_file(weights())

    def with_entry(data: bytes, name: str, content: bytes) -> bytes:
        stream = io.BytesIO(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile warns of a repeated name
            with zipfile.ZipFile(stream, "a") as archive:
                archive.writestr(name, content)
        return stream.getvalue()

    def drop(suffix: str) -> bytes:
        return rewrite_zip(good, lambda name, data: None if name.endswith(suffix) else data)

    def edit(suffix: str, content: Callable[[bytes], bytes], **options: object) -> bytes:
        return rewrite_zip(good, lambda name, data: content(data) if name.endswith(suffix) else data, **options)

    root = zipfile.ZipFile(io.BytesIO(good)).namelist()[0].split("/")[0]
    yield "zip-without-data-pkl", drop("data.pkl")
    yield "zip-without-a-storage", drop("data/4")
    yield "zip-short-storage", edit("data/4", lambda data: data[:-4])
    yield "zip-compressed", edit("-", lambda data: data, compression=zipfile.ZIP_DEFLATED)
    yield "zip-bomb", edit("data/4", lambda data: bytes(200_000_000), compression=zipfile.ZIP_DEFLATED)
    yield "zip-big-endian", edit("byteorder", lambda data: b"big")
    yield "zip-torchscript", with_entry(good, f"{root}/constants.pkl", b"\x80\x02).")
    yield "zip-two-data-pkl", with_entry(good, "other/data.pkl", b"\x80\x02}.")
    yield "zip-repeated-entry", with_entry(good, f"{root}/data.pkl", b"\x80\x02}.")
    yield "zip-bytes-behind-pickle", edit("data.pkl", lambda data: data + b"\x80\x02}.")
    position = good.index(weights()["blocks.0.A_logs"].numpy().tobytes())
    yield "zip-wrong-checksum", good[:position] + b"\xff" + good[position + 1 :]
    yield "zip-empty", b"PK\x05\x06" + bytes(18)
    yield "zip-of-something-else", with_entry(b"", "readme.txt", b"hello")


def wrong_content() -> Iterator[tuple[str, bytes]]:
    """Files that are whole but hold no usable weights."""
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors = weights()
        tensors["blocks.0.A_logs"][3, 5] = value
        yield f"{value}-zip", torch_file(tensors)
        yield f"{value}-legacy", torch_file(tensors, _use_new_zipfile_serialization=False)
    tensors = weights()
    tensors["head.weight"][0, 0] = float("nan")
    yield "nan-in-half-precision", torch_file(tensors)
    yield "no-tensors", torch_file({"epoch": 3})
    yield "a-list", torch_file([1, 2, 3])
    yield "a-number", torch_file(3)
    yield "none", torch_file(None)
    yield "empty", b""
    yield "one-byte", b"P"
    yield "zeros", bytes(1000)
    yield "text", b"hello " * 100
    yield "web-page", b"<!DOCTYPE html><html><body>Google Drive - Virus scan warning</body></html>"
    yield "png", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "random", random.Random(0).randbytes(5000)
    yield "plain-pickle", pickle.dumps({"a": [1.0, 2.0]})
    yield "whole-module", torch_file(torch.nn.Linear(2, 2))
    yield "deep-list", zip_with_pickle(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")
    yield "deep-dictionary", zip_with_pickle(b"\x80\x02" + (b"}" + text("a")) * 30_000 + b"N" + b"s" * 30_000 + b".")
    yield "deep-tuple-as-key", zip_with_pickle(b"\x80\x02})" + b"\x85" * 50_000 + b"K\x01s.")
    yield "list-in-itself", zip_with_pickle(b"\x80\x02]q\x00h\x00a" + b"h\x00a" * 1000 + b".")
    yield "dictionary-in-itself", zip_with_pickle(b"\x80\x02}q\x00" + text("a") + b"h\x00s.")
    doubled = b"".join(b"h%c" % i + b"h%c" % i + b"\x86q%c" % (i + 1) + b"0" for i in range(200))
    yield "doubled-two-hundred-times", zip_with_pickle(b"\x80\x02)q\x000" + doubled + b"}" + text("a") + b"h\xc8s.")


def many_keys() -> Iterator[tuple[str, bytes]]:
    """A million names in each format."""
    names = b"".join(b"X\x07\x00\x00\x00%07dN" % i for i in range(1_000_000))
    for container, data in containers(b"\x80\x02}(" + names + b"u."):
        yield f"million-keys-{container}", data
    groups = b"".join(b"X\x07\x00\x00\x00%07d}" % i for i in range(90_000))
    yield "ninety-thousand-empty-groups", zip_with_pickle(b"\x80\x02}(" + groups + b"u.")
    entries = b",".join(b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000))
    yield "million-keys-safetensors", struct.pack("<Q", len(entries) + 2) + b"{" + entries + b"}"


def cases(folder: Path, canary: Path) -> Iterator[Case]:
    """All files; ``folder`` is for a temporary file, ``canary`` what an attack would create."""
    for kind, data in good_files(folder).items():
        for percent in range(0, 100, 5):
            yield Case(f"truncated-{kind}-{percent:02d}-percent", data[: len(data) * percent // 100])
        yield Case(f"truncated-{kind}-by-one-byte", data[:-1])
        yield Case(f"byte-appended-{kind}", data + b"\0", MUST_FAIL_OR_EQUAL)
        chooser = random.Random(kind)
        for _ in range(25):
            position, bit = chooser.randrange(len(data)), chooser.randrange(8)
            flipped = data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]
            verdict = MUST_FAIL_OR_LOAD_SHAPES if kind == "legacy" else MUST_FAIL_OR_EQUAL
            yield Case(f"bit-flip-{kind}-byte-{position}-bit-{bit}", flipped, verdict)
    for name, payload in attacks(canary):
        for container, data in containers(payload):
            yield Case(f"attack-{name}-{container}", data)
    for group in (storage_lies(), broken_archives(), wrong_content(), many_keys()):
        for name, data in group:
            yield Case(name, data)
