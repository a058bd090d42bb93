"""What Triton's compiler makes of our kernels, without a GPU: registers, spills, loads and exchanges between lanes.

    python benchmarks/triton_kernels.py --output benchmarks/results/triton_kernels

The backend is called with tensors that have shapes and strides but no data, and what it would launch is compiled for
each target as Triton's launcher would compile it: with its constants, its data types, and what is known of pointers
and strides (divisible by 16 or not). The code of the innermost loops, one round of which is one step of the sequence,
is read in the device's own assembly. Nothing is run or timed: the number of warps that fit a multiprocessor is worked
out from the registers and the shared memory, and says nothing about time.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from monai_mamba import __version__
from monai_mamba.ops import triton_backend
from monai_mamba.ops.routes import ROUTES
from monai_mamba.ops.triton_backend import TritonBackend

PROCESSORS = 132  # of an H100: decides whether the sequence is split


@dataclass(frozen=True)
class Target:
    """A device to compile for, and what its multiprocessors hold."""

    backend: str
    architecture: int | str
    lanes: int  # of a warp
    registers: int  # of a multiprocessor, for one lane
    warps: int
    programs: int
    shared_bytes: int
    reserved_bytes: int  # of the shared memory, for each program


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 65536 // 32, 64, 32, 164 * 1024, 1024),
    "sm_90": Target("cuda", 90, 32, 65536 // 32, 64, 32, 228 * 1024, 1024),
    # Four units with 512 registers a lane and 8 warps each.
    "gfx942": Target("hip", "gfx942", 64, 4 * 512, 32, 32, 64 * 1024, 0),
}


@dataclass(frozen=True)
class Scan:
    """A scan as a network calls it. B and C are parts of one projection, behind the ``dt_rank`` values of the steps."""

    batch: int
    size: tuple[int, ...]  # of a map, or of a sequence
    groups: int  # routes of a map
    channels: int  # of a group
    states: int
    dt_rank: int
    gate: bool = False

    def run(self, backend: TritonBackend, dtype: torch.dtype) -> None:
        """Inference, and a training step."""

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        projection = empty(self.batch, *self.size, self.groups, self.dt_rank + 2 * self.states, dtype=dtype)
        _, B, C = projection.split([self.dt_rank, self.states, self.states], -1)
        if len(self.size) == 2:
            x = empty(self.batch, *self.size, self.channels, dtype=dtype)
            delta = empty(self.batch, *self.size, self.groups, self.channels, dtype=dtype)
            A, vector = empty(self.groups, self.channels, self.states), empty(self.groups, self.channels)
            values = (x, delta, A, B, C, vector, vector, ROUTES[: self.groups])
            backend.ss2d_forward(*values, True, False)
            backend.ss2d_backward(x, backend.ss2d_forward(*values, True, True)[1], *values, True)
            return
        channels = self.groups * self.channels
        u = empty(self.batch, *self.size, channels, dtype=dtype)
        z = empty(self.batch, *self.size, 2 * channels, dtype=dtype)[..., channels:] if self.gate else None
        vector = empty(channels)
        values = (u, u, empty(channels, self.states), B, C, vector, z, vector)
        backend.scan_forward(*values, True, False)
        backend.scan_backward(u, backend.scan_forward(*values, True, True)[1], *values, True)


@dataclass(frozen=True)
class Convolution:
    """The causal convolution of the first half of a projection, with bias and SiLU."""

    batch: int
    length: int
    channels: int
    taps: int

    def run(self, backend: TritonBackend, dtype: torch.dtype) -> None:
        both = torch.empty(self.batch, self.length, 2 * self.channels, dtype=dtype, device="meta")
        x = both[..., : self.channels]
        weight = torch.empty(self.channels, self.taps, dtype=dtype, device="meta")
        backend.conv_forward(x, weight, weight[:, 0], True)
        backend.conv_backward(torch.empty_like(x), x, weight, weight[:, 0], True)


PROBLEMS: dict[str, Scan | Convolution] = {
    "MedMamba-T stage 1": Scan(1, (56, 56), 4, 96, 16, 3),
    "MedMamba-T stage 1, batch 32": Scan(32, (56, 56), 4, 96, 16, 3),
    "nnMamba 32^3": Scan(4, (32768,), 1, 128, 16, 4, gate=True),
    "VMamba-T stage 1": Scan(1, (56, 56), 4, 96, 1, 6),
    "ragged": Scan(1, (9, 71), 3, 5, 13, 1),
    "nnMamba 32^3, convolution": Convolution(4, 32768, 128, 4),
}


@dataclass(frozen=True)
class Launch:
    """A launch that did not take place."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # under the kernel's names
    options: dict[str, int]

    @property
    def label(self) -> str:
        """Kernel and what of its constants changes its work most."""
        constants = {"SAVE": "keeps states", "SPLIT": "split", "GATE": "gate", "BACKWARD": "backward"}
        return ", ".join([self.kernel, *(text for name, text in constants.items() if self.arguments.get(name))])


def record_launches(call: Callable[[], object]) -> list[Launch]:
    """What ``call`` would launch, on a device with ``PROCESSORS`` multiprocessors."""
    from triton.runtime.jit import JITFunction

    from monai_mamba.ops import triton_kernels

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, name: str, kernel: JITFunction) -> None:
            self.name, self.names = name, kernel.arg_names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*values: Any, **constants: Any) -> None:
                options = {k: constants.pop(k) for k in list(constants) if k not in self.names}
                arguments = dict(zip(self.names, values, strict=False)) | constants
                assert arguments.keys() == set(self.names), set(self.names) ^ arguments.keys()
                launches.append(Launch(self.name, grid, arguments, options))

            return launch

    kernels = {name: k for name, k in vars(triton_kernels).items() if isinstance(k, JITFunction) and name[0] != "_"}
    recorders = {name: Recorder(name, kernel) for name, kernel in kernels.items()}
    with (
        mock.patch.multiple(triton_kernels, **recorders),
        mock.patch.object(triton_backend, "_num_processors", lambda device: PROCESSORS),
    ):
        call()
    return launches


def problem_launches(name: str, dtype: torch.dtype) -> list[Launch]:
    """All different launches of a problem of ``PROBLEMS``."""
    launches = record_launches(lambda: PROBLEMS[name].run(TritonBackend(), dtype))
    return list({launch.label: launch for launch in launches}.values())


_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


def compile_launch(launch: Launch, target: str) -> Any:
    """Compile the kernel of a launch as Triton's launcher would on such a device."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from monai_mamba.ops import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    device = TARGETS[target]
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list] = {}
    for p in kernel.params:
        value = launch.arguments[p.name]
        if isinstance(value, Tensor):
            signature[p.name] = _TYPES[value.dtype]
            # Memory of its own begins at a multiple of far more than 16 bytes.
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif p.is_constexpr or (value == 1 and not p.do_not_specialize):
            signature[p.name], divisible = "constexpr", False
            constants[(p.num,)] = value
        else:
            signature[p.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        if p.do_not_specialize or not divisible:
            continue
        hints[(p.num,)] = [["tt.divisibility", 16]]
    gpu = GPUTarget(device.backend, device.architecture, device.lanes)
    return triton.compile(ASTSource(kernel, signature, constants, hints), target=gpu, options=launch.options)


@dataclass(frozen=True)
class Loop:
    """An innermost loop in the code for an NVIDIA device."""

    instructions: int
    exponentials: int
    exchanges: int  # between lanes, directly or by way of shared memory
    loads: dict[int, int]  # number of loads from global memory by bytes of a lane


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    exchanges: int  # anywhere in the kernel
    loops: list[Loop]  # the whole code where there is no loop; none for AMD


class NoDisassembler(RuntimeError):
    """There is no cuobjdump to read the code with."""


def read_code(compiled: Any, target: str) -> Code:
    if TARGETS[target].backend == "hip":
        return _read_amd(compiled)
    return _read_nvidia(compiled)


def _read_nvidia(compiled: Any) -> Code:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise NoDisassembler("no `cuobjdump` in triton or on PATH; install NVIDIA's CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", str(file)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", next(line for line in code.splitlines() if "REG:" in line)))
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([^;]*?)\s*;", code, re.M)
    instructions = [text for _, text in lines]
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    ends: dict[int, int] = {}  # of a loop by its begin
    for i, text in enumerate(instructions):
        if (match := re.match(r"BRA\b.*\b0x([0-9a-f]+)", text)) and (begin := places[int(match[1], 16)]) < i:
            ends[begin] = i
    inner = [(a, b) for a, b in ends.items() if not any(a < c < b or a <= c < d < b for c, d in ends.items())]
    bodies = [instructions[a : b + 1] for a, b in sorted(inner)] or [instructions]
    return Code(
        int(found["REG"]),
        int(found["STACK"]) + int(found["LOCAL"]),
        compiled.metadata.shared,
        _count(_EXCHANGE, instructions),
        [Loop(len(body), _count(r"MUFU\.EX2", body), _count(_EXCHANGE, body), _loads(body)) for body in bodies],
    )


_EXCHANGE = r"SHFL|REDUX|LDS|STS"


def _count(pattern: str, instructions: list[str]) -> int:
    return sum(bool(re.match(pattern, text)) for text in instructions)


def _loads(instructions: list[str]) -> dict[int, int]:
    """Number of loads from global memory by the bytes a lane gets."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    found: Counter[int] = Counter()
    for text in instructions:
        if match := re.match(r"LDG((?:\.\w+)*)", text):
            found[next((widths[part] for part in match[1].split(".") if part in widths), 4)] += 1
    return dict(sorted(found.items(), reverse=True))


def _read_amd(compiled: Any) -> Code:
    # The compiler makes several versions of a loop with masks, so its loops are no steps to count in.
    code = compiled.asm["amdgcn"]
    found = {k: int(v) for k, v in re.findall(r"^\s+\.(\w+):\s+(\d+)$", code, re.M)}
    exchanges = len(re.findall(r"^\t(?:ds_|v_permlane|v_readlane|.*\b(?:quad_perm|row_\w+|wave_\w+):)", code, re.M))
    return Code(found["vgpr_count"], found["private_segment_fixed_size"], compiled.metadata.shared, exchanges, [])


def warps_that_fit(code: Code, num_warps: int, target: str) -> int:
    """Warps of a multiprocessor that run at a time; registers are given out by eights."""
    device = TARGETS[target]
    by_registers = device.registers // (-(-code.registers // 8) * 8) // num_warps
    by_memory = device.shared_bytes // max(1, code.shared_bytes + device.reserved_bytes)
    return num_warps * min(by_registers, by_memory, device.programs, device.warps // num_warps)


def rows(problem: str, dtype: torch.dtype, target: str) -> list[dict]:
    """One row for every kernel of a problem."""
    found = []
    for launch in problem_launches(problem, dtype):
        compiled = compile_launch(launch, target)
        code = read_code(compiled, target)
        found.append(
            {
                "target": target,
                "problem": problem,
                "dtype": str(dtype).removeprefix("torch."),
                "kernel": launch.label,
                "num_warps": compiled.metadata.num_warps,
                "registers": code.registers,
                "spill_bytes": code.spill_bytes,
                "shared_bytes": code.shared_bytes,
                "exchanges": code.exchanges,
                "warps": warps_that_fit(code, compiled.metadata.num_warps, target),
                "loops": [vars(loop) for loop in code.loops],
            }
        )
    return found


def table(rows: list[dict]) -> str:
    columns: dict[str, Callable[[dict], object]] = {
        **{name: lambda row, name=name: row[name] for name in rows[0] if name not in _COMMON},
        "loop instructions": lambda row: " / ".join(str(loop["instructions"]) for loop in row["loops"]),
        "loop exponentials": lambda row: " / ".join(str(loop["exponentials"]) for loop in row["loops"]),
        "loop exchanges": lambda row: " / ".join(str(loop["exchanges"]) for loop in row["loops"]),
        "loop loads": lambda row: " / ".join(
            " + ".join(f"{number} x {size} B" for size, number in loop["loads"].items()) or "none"
            for loop in row["loops"]
        ),
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell(row)) for cell in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


_COMMON = ("target", "problem", "dtype", "loops")


LEGEND = """\
`registers` of a lane; `exchanges` between lanes, by shuffles or shared memory, in the whole kernel; `num_warps`: warps
of a program; `warps`: how many fit a multiprocessor. The columns that begin with `loop` are of one round of the
innermost loops, or of the whole code where there is no loop; two loops are parted by a stroke. A round is a step of the
sequence, or several of them where there are several times as many exponentials as states. For AMD the compiler makes
several versions of a loop, so they are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="name of the results without ending")
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument(
        "--dtypes", nargs="*", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    arguments = parser.parse_args()
    head = {
        "command": " ".join(["python", *(f'"{word}"' if " " in word else word for word in sys.argv)]),
        **{"monai-mamba": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "triton": metadata.version("triton"),
    }
    found: list[dict] = []
    text = ["# What the compiler makes of the Triton kernels", "\n".join(f"- {k}: {v}" for k, v in head.items())]
    text.append(LEGEND)
    for target in arguments.targets:
        for problem in arguments.problems:
            for dtype in arguments.dtypes:
                part = rows(problem, getattr(torch, dtype), target)
                found += part
                text.append(f"## {target}, {problem}, {dtype}\n\n{table(part)}")
                print(text[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
