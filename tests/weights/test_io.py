from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from monai_mamba.errors import CheckpointError
from monai_mamba.weights.io import Limits, WeightFile, content_digest, is_finite, read_state_dict, write_safetensors
from tests import checkpoint_corpus as corpus


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


FORMATS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "zip-protocol4": {"pickle_protocol": 4},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_read_torch_file_equals_what_was_saved(tmp_path, options):
    base = torch.arange(24.0)
    tensors = {
        **corpus.weights(),
        "view": base[4:16].view(3, 4),
        "transposed": torch.randn(4, 5).t(),
        "empty": torch.empty(0, 3),
        "bfloat16": torch.randn(3).bfloat16(),
        "bool": torch.tensor([True, False]),
        "int8": torch.arange(5, dtype=torch.int8),
        "double": torch.randn(2).double(),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    path = tmp_path / "file.pt"
    torch.save(tensors, path, **options)
    assert same(read_state_dict(path), tensors)


def test_read_shared_tensors_stay_shared(tmp_path):
    tensor = torch.randn(10)
    torch.save({"a": tensor, "b": tensor, "c": tensor[2:]}, tmp_path / "file.pt")
    read = read_state_dict(tmp_path / "file.pt")
    assert read["a"].data_ptr() == read["b"].data_ptr() == read["c"].data_ptr() - 8
    assert torch.equal(read["c"], tensor[2:])


def test_read_parameter_with_python_attribute(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter._no_weight_decay = True
    torch.save(OrderedDict(A_log=parameter), tmp_path / "file.pt")
    assert torch.equal(read_state_dict(tmp_path / "file.pt")["A_log"], parameter)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"model": {"a": 1}, "state_dict": {"b": 1}, "epoch": 3}, "state_dict"),
        ({"model": {"a": 1}, "model_ema": {"b": 1}}, "model"),
        ({"network_weights": {"a": 1}, "optimizer_state": {"state": {0: {"m": 1}}}}, "network_weights"),
        ({"something": {"a": 1}}, "something"),
        ({"a": 1, "b": 2}, ""),
        ({"a": 1, "model": {"b": 1}}, "model"),
    ],
    ids=["state_dict", "model-and-ema", "nnunet", "only-group", "bare", "stray-tensor"],
)
def test_state_dict_chooses_the_weights(tmp_path, content, name):
    def tensors(node):
        return {k: tensors(v) if isinstance(v, dict) else torch.tensor(float(v)) for k, v in node.items()}

    torch.save(tensors(content), tmp_path / "file.pt")
    assert WeightFile(tmp_path / "file.pt").state_dict()[0] == name


def test_state_dict_with_two_unknown_groups_asks(tmp_path):
    torch.save({"x": {"a": torch.zeros(1)}, "y": {"a": torch.ones(1)}}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="say which weights to load, it holds: 'x', 'y'"):
        read_state_dict(tmp_path / "file.pt")
    assert read_state_dict(tmp_path / "file.pt", "y")["a"] == 1
    with pytest.raises(CheckpointError, match="no weights under 'z'"):
        read_state_dict(tmp_path / "file.pt", "z")


def test_read_file_with_configuration_objects_beside_the_weights(tmp_path):
    """Training programs store their configuration; it is skipped, not built (VMamba: a yacs node)."""
    script = """
        import argparse, pathlib, sys, types, torch, numpy
        yacs, config = types.ModuleType("yacs"), types.ModuleType("yacs.config")
        class CfgNode(dict): pass
        CfgNode.__module__, config.CfgNode, yacs.config = "yacs.config", CfgNode, config
        sys.modules.update({"yacs": yacs, "yacs.config": config})
        class PosixPath:  # as Python 3.13 names it
            __module__ = "pathlib._local"
            def __reduce__(self): return PosixPath, ("x",)
        if "pathlib._local" not in sys.modules:
            sys.modules["pathlib._local"] = types.ModuleType("pathlib._local")
        sys.modules["pathlib._local"].PosixPath = PosixPath
        node = CfgNode(MODEL=CfgNode(NAME="vssm", DEPTHS=[2, 2, 8, 2])); node.__dict__["frozen"] = True
        content = {"model": {"a": torch.ones(3)}, "config": node, "max_accuracy": numpy.float64(82.6),
                   "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x")), "history": numpy.arange(3),
                   "from": PosixPath()}
        torch.save(content, sys.argv[1])
    """
    path = tmp_path / "file.pth"
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=True)
    assert torch.equal(read_state_dict(path)["a"], torch.ones(3))
    assert "yacs" not in sys.modules


def test_safetensors_round_trip_is_bit_identical(tmp_path):
    tensors = corpus.weights()
    tensors["shared"] = tensors["stem.bias"]
    tensors["transposed"] = torch.randn(4, 5).t()
    write_safetensors(tmp_path / "file.safetensors", tensors, {"note": "kept"})
    file = WeightFile(tmp_path / "file.safetensors")
    assert content_digest(file.load("")) == content_digest(tensors)
    assert same(file.load(""), tensors)
    assert file.metadata["note"] == "kept"


def test_content_digest_sees_names_types_shapes_and_values():
    tensors = {"a": torch.zeros(4), "b": torch.ones(2)}
    variants = [
        tensors,
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.tensor([0.0, 0.0, 0.0, -0.0]), "b": torch.ones(2)},
    ]
    assert len({content_digest(v) for v in variants}) == len(variants)
    assert content_digest(dict(reversed(tensors.items()))) == content_digest(tensors)


def test_write_safetensors_existing_file_is_kept(tmp_path):
    path = tmp_path / "file.safetensors"
    write_safetensors(path, {"a": torch.zeros(2)})
    with pytest.raises(FileExistsError, match="exists"):
        write_safetensors(path, {"a": torch.ones(2)})
    assert read_state_dict(path)["a"].sum() == 0
    write_safetensors(path, {"a": torch.ones(2)}, overwrite=True)
    assert read_state_dict(path)["a"].sum() == 2


def test_write_safetensors_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        Path(arguments[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "file.safetensors", {"a": torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_load_reads_only_what_is_asked_for(tmp_path):
    torch.save({"a": torch.zeros(4), "b": torch.full((4,), float("nan"))}, tmp_path / "file.pt")
    file = WeightFile(tmp_path / "file.pt")
    assert list(file.load("", ["a"])) == ["a"]
    with pytest.raises(CheckpointError, match="'b' holds NaN"):
        file.load("")
    assert file.load("", check_finite=False)["b"].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite_sees_every_position(dtype):
    for value in (float("nan"), float("inf"), float("-inf")):
        for position in (0, 17, 32):
            tensor = torch.zeros(33, dtype=dtype)
            assert is_finite(tensor)
            tensor[position] = value
            assert not is_finite(tensor)


@pytest.mark.parametrize(
    "limits",
    [Limits(max_bytes=100), Limits(max_header_bytes=100), Limits(max_tensors=2)],
    ids=["bytes", "header", "tensors"],
)
@pytest.mark.parametrize("kind", ["zip", "safetensors"])
def test_limits_are_kept(tmp_path, kind, limits):
    path = tmp_path / "file"
    path.write_bytes(corpus.good_files(tmp_path)[kind])
    assert read_state_dict(path)
    with pytest.raises(CheckpointError, match="more than"):
        read_state_dict(path, limits=limits)


def test_missing_file_directory_and_pipe_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_state_dict(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_state_dict(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_state_dict(tmp_path / "pipe")


def test_error_names_file_and_reason(tmp_path):
    path = tmp_path / "bad.pt"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert caught.value.path == str(path)


def test_whole_pickled_module_is_refused_with_the_cure(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.linear.Linear.*save `model.state_dict\(\)`"):
        read_state_dict(tmp_path / "file.pt")


def test_corpus_is_refused_in_time_and_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "file.pt"
    good = corpus.weights()
    shapes = {k: (v.shape, v.dtype) for k, v in good.items()}
    modules = set(sys.modules)
    num_cases, wrong, slow = 0, [], []
    for case in corpus.cases(tmp_path, canary):
        path.write_bytes(case.data)
        num_cases += 1
        start = time.process_time()
        try:
            read = read_state_dict(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            assert len(str(error)) < 1000
        else:
            allowed = {
                corpus.MUST_FAIL: False,
                corpus.MUST_FAIL_OR_EQUAL: same(read, good),
                corpus.MUST_FAIL_OR_LOAD_SHAPES: {k: (v.shape, v.dtype) for k, v in read.items()} == shapes,
            }
            if not allowed[case.verdict]:
                wrong.append(case.name)
        seconds = time.process_time() - start
        if seconds > 3:
            slow.append((case.name, seconds))
    assert not wrong
    assert not slow
    assert num_cases == 332  # the number docs/weights.md gives
    assert not canary.exists()
    assert not {"pty", "code", "webbrowser", "numpy.f2py.crackfortran"} & (set(sys.modules) - modules)


def test_large_bad_files_stay_below_twice_their_size_in_memory(tmp_path):
    """Measured in a process of its own; the files are large so that the interpreter's own noise does not count."""
    script = """
        import resource, sys, torch
        from monai_mamba.errors import CheckpointError
        from monai_mamba.weights.io import read_state_dict
        torch.aminmax(torch.zeros(10**6))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sys.argv[1:]:
            try:
                read_state_dict(path)
            except CheckpointError:
                print("refused")
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    tensor = torch.zeros(24 * 2**20)
    tensor[-1] = float("nan")
    size_mb = tensor.numel() * 4 / 2**20
    paths = [tmp_path / name for name in ("nan.pt", "legacy.pt", "nan.safetensors", "truncated.pt", "views.pt")]
    torch.save({"a": tensor}, paths[0])
    torch.save({"a": tensor}, paths[1], _use_new_zipfile_serialization=False)
    write_safetensors(paths[2], {"a": tensor})
    paths[3].write_bytes(paths[0].read_bytes()[:-100_000])
    torch.save({str(i): tensor[: 16 * 2**20] for i in range(30)}, paths[4])
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, paths)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert output[:-1] == ["refused"] * len(paths)
    assert float(output[-1]) < 2 * size_mb
