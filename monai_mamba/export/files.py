"""Write a network as an ONNX, torch.export or TorchScript file and check the file against the network."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from monai_mamba.errors import ExportError
from monai_mamba.ops.backends import use_backend
from monai_mamba.weights.io import atomic_path

#: What can be written, and the usual suffix.
FORMATS = {"onnx": ".onnx", "program": ".pt2", "torchscript": ".ts"}

#: Largest difference from the network that a file may have, in units of the largest output.
TOLERANCE = 1e-4

_BATCH_SIZES = (1, 2, 3)


@dataclass(frozen=True)
class ExportReport:
    """A written file and how close it is to the network.

    Attributes:
        path: the file.
        format: one of `FORMATS`.
        inputs: name and shape of each input, the batch as ``"batch"``.
        num_nodes: operators in the graph, inside of loops included.
        difference: largest difference from the network over its largest output, over all batch sizes tried.
        batch_sizes: the batch sizes tried.
    """

    path: Path
    format: str
    inputs: dict[str, tuple[int | str, ...]]
    num_nodes: int
    difference: float
    batch_sizes: tuple[int, ...]


def export_network(
    network: nn.Module,
    path: os.PathLike[str] | str,
    example: Tensor | Sequence[Tensor],
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a network for inference, with any batch size, and compare the file with the network.

    The file takes images of the size of ``example``. The scan is one operator of this package in the formats of
    PyTorch, so a program that loads them imports ``monai_mamba.ops`` first; in ONNX it is made of standard operators
    whose number does not depend on the size of the image.

    Args:
        network: the network; a copy of it on the CPU in float32 and eval mode is written, deep supervision off.
        path: the file.
        example: images for the forward pass, ``(B, C, *spatial)``, one tensor for each argument.
        format: ``"onnx"``, ``"program"`` (torch.export) or ``"torchscript"``; default by the suffix of ``path``.
        overwrite: replace an existing file.

    Returns:
        The file and its difference from the network.

    Raises:
        ValueError: if the format is unknown or an example is not a batch of images.
        FileExistsError: if the file is there and ``overwrite`` is False.
        ExportError: if the network cannot be written in this format, a package for it is missing, or the file gives
            other results than the network; nothing is left then.
    """
    target = Path(path)
    format = format or next((name for name, suffix in FORMATS.items() if target.suffix == suffix), "")
    if format not in FORMATS:
        known = ", ".join(f"{name!r} ({suffix})" for name, suffix in FORMATS.items())
        raise ValueError(f"`format` must be one of {known}, got {format or target.suffix!r}")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name or allow it to be overwritten")
    examples = (example,) if isinstance(example, Tensor) else tuple(example)
    if not examples or any(image.ndim < 3 or image.shape[0] < 1 for image in examples):
        shapes = ", ".join(str(tuple(image.shape)) for image in examples)
        raise ValueError(f"`example` must be batches of images (B, C, *spatial), got {shapes or 'none'}")
    # A batch of one would be taken for a constant.
    examples = tuple(image[:1].float().cpu().repeat(2, *[1] * (image.ndim - 1)) for image in examples)
    network = _for_inference(network)
    write = {"onnx": _write_onnx, "program": _write_program, "torchscript": _write_torchscript}[format]
    names = _input_names(len(examples))
    # A backend that was forced is the choice of this process, not of the file; the definition would be unrolled.
    with torch.no_grad(), use_backend(None), atomic_path(target) as temporary:
        try:
            run, num_nodes = write(network, examples, names, temporary)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if isinstance(error, ExportError):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(f"{type(network).__name__} cannot be written as {format}: {reason[0][:300]}") from error
        difference = _compare(network, run, examples)
        if not difference <= TOLERANCE:
            raise ExportError(
                f"the {format} file of {type(network).__name__} differs from the network by {difference:.1e} of its "
                f"largest output, more than {TOLERANCE:.0e}; it was not kept"
            )
    inputs: dict[str, tuple[int | str, ...]] = {
        name: ("batch", *image.shape[1:]) for name, image in zip(names, examples, strict=True)
    }
    return ExportReport(target, format, inputs, num_nodes, difference, _BATCH_SIZES)


def _for_inference(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network).cpu().float().eval()
    network.requires_grad_(False)
    decoder = getattr(network, "decoder", None)
    if getattr(decoder, "deep_supervision", False):
        decoder.deep_supervision = False  # type: ignore[union-attr]
    return network


def _input_names(number: int) -> list[str]:
    return ["image"] if number == 1 else [f"image_{i}" for i in range(number)]


def _trace(network: nn.Module, examples: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(network, examples, dynamic_shapes=tuple({0: batch} for _ in examples))


def _write_onnx(
    network: nn.Module, examples: tuple[Tensor, ...], names: list[str], path: Path
) -> tuple[Callable[..., Any], int]:
    try:
        import onnx
        import onnxruntime

        from monai_mamba.export.onnx_scan import translation_table
    except ImportError as error:
        raise ExportError(f"ONNX needs {error.name}: pip install 'monai-mamba[export]'") from error
    with _quiet():
        # Not the network: the ONNX exporter of torch 2.8 would trace it in a mode in which every convolution of a
        # channels-last map refuses batches of one.
        program = torch.onnx.export(
            _trace(network, examples),
            dynamo=True,
            dynamic_shapes=tuple({0: "batch"} for _ in examples),  # names the axis, no more
            input_names=names,
            custom_translation_table=translation_table(),
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=False)
    graph = onnx.load(path).graph
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*images: Tensor) -> list[Tensor]:
        feeds = {name: image.numpy() for name, image in zip(names, images, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feeds)]

    return run, _count_nodes(graph)


def _count_nodes(graph: Any) -> int:
    inner = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return len(graph.node) + sum(_count_nodes(body) for body in inner)


def _write_program(
    network: nn.Module, examples: tuple[Tensor, ...], names: list[str], path: Path
) -> tuple[Callable[..., Any], int]:
    with _quiet():
        program = _trace(network, examples)
        # By handle: torch insists on the suffix .pt2, which the temporary file does not have.
        with open(path, "wb") as file:
            torch.export.save(program, file)
        with open(path, "rb") as file:
            loaded = torch.export.load(file)
    num_nodes = sum(node.op == "call_function" for node in loaded.graph.nodes)
    return loaded.module(), num_nodes


def _write_torchscript(
    network: nn.Module, examples: tuple[Tensor, ...], names: list[str], path: Path
) -> tuple[Callable[..., Any], int]:
    with _quiet():
        # Tracing keeps the operators of this package; scripting stops at the checks of the arguments.
        traced = torch.jit.trace(network, examples, check_trace=False)
        traced.save(str(path))
        loaded = torch.jit.load(str(path))
    return loaded, sum(1 for _ in loaded.inlined_graph.nodes())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters from talking; what matters is checked with numbers afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _compare(network: nn.Module, run: Callable[..., Any], examples: tuple[Tensor, ...]) -> float:
    """Largest difference over the largest output, for images other than those the file was made with."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch_size in _BATCH_SIZES:
        images = [torch.randn(batch_size, *image.shape[1:], generator=generator) for image in examples]
        expected, found = _as_list(network(*images)), _as_list(run(*images))
        if [tuple(value.shape) for value in expected] != [tuple(value.shape) for value in found]:
            return float("inf")
        if not any(value.any() for value in expected):
            warnings.warn(
                f"{type(network).__name__} gives nothing but zeros for random images, so that comparing the file with "
                "it says little; this is so for untrained networks that end in a ReLU",
                stacklevel=3,
            )
        for left, right in zip(expected, found, strict=True):
            scale = left.abs().max().clamp(min=1e-12)
            worst = max(worst, float((left - right).abs().max() / scale))
    return worst


def _as_list(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]
