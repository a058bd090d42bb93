"""What is installed here and whether it works: the facts behind ``monai-mamba doctor`` and the run reports."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from monai_mamba import __version__

PACKAGES = (
    "torch", "torchvision", "monai", "nnunetv2", "dynamic-network-architectures", "batchgeneratorsv2", "numpy",
    "nibabel", "SimpleITK", "pydicom", "safetensors", "triton", "mamba-ssm", "causal-conv1d",
)  # fmt: skip

#: Tolerance of the forward pass against the sequential definition in float64, relative to the largest value.
SELF_CHECK_TOLERANCE = 1e-5
#: The gradients sum over the sequence, hence one digit less.
SELF_CHECK_GRADIENT_TOLERANCE = 1e-4
_SEARCH_TIMEOUT_S = 180


def collect_versions() -> dict[str, str | None]:
    """Versions of Python, this package and what it builds on; ``None`` for what is not installed. Imports nothing."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "monai-mamba": __version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def collect_devices() -> dict[str, Any]:
    """Processor and accelerators that torch can use."""
    import torch

    devices: dict[str, Any] = {
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "cuda": [],
        "mps": bool(torch.backends.mps.is_available()),
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices["cuda"].append(
                {
                    "name": properties.name,
                    "memory_gb": round(properties.total_memory / 1e9, 1),
                    "capability": f"{properties.major}.{properties.minor}",
                }
            )
    return devices


def collect_backends() -> list[dict[str, Any]]:
    """Every registered backend of scan and convolution, the preferred ones first, with availability and reason."""
    from monai_mamba.ops import list_backends

    found = []
    for backend in list_backends():
        availability = backend.availability()
        found.append(
            {
                "name": backend.name,
                "available": availability.ok,
                "reason": availability.reason,
                "priority": backend.priority,
                "ops": sorted(backend.ops),
                "devices": sorted(backend.device_types) or ["all"],
            }
        )
    return found


def chosen_backends() -> dict[str, dict[str, str]]:
    """For CPU and CUDA tensors, which backend each operator would use, or why none would.

    The sizes are those of a small 3D network (512 tokens, 64 channels, 16 states).
    """
    import torch

    from monai_mamba.errors import BackendError
    from monai_mamba.ops.backends import Call, resolve

    calls = {
        "selective_scan": {"d_state": 16},
        "ss2d_scan": {"groups": 4, "d_state": 16},
        "causal_conv1d": {"width": 4},
    }
    chosen: dict[str, dict[str, str]] = {}
    for device_type in ("cpu", "cuda"):
        for op, sizes in calls.items():
            call = Call(op, device_type, torch.float32, batch=2, length=512, channels=64, **sizes)
            try:
                with warnings.catch_warnings():
                    # The choice is the answer here, not an event; resolving for real will warn again where it matters.
                    warnings.simplefilter("ignore")
                    name = resolve(call).name
            except BackendError as error:
                name = f"none: {error}"
            chosen.setdefault(device_type, {})[op] = name
    return chosen


def check_scan(device: str = "cpu") -> dict[str, Any]:
    """Compare the scan that would be used on ``device``, outputs and gradients, with the sequential definition.

    Returns:
        ``ok``, the largest relative errors, the seconds it took, and a reason if it failed.
    """
    import torch

    from monai_mamba.ops import selective_scan
    from monai_mamba.ops.reference import selective_scan_reference

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, length, channels, d_state = 2, 130, 6, 4  # three chunks of 64, the last one short
    inputs = [
        draw(batch, length, channels), draw(batch, length, channels), -draw(channels, d_state).abs(),
        draw(batch, length, 1, d_state), draw(batch, length, 1, d_state), draw(channels),
        draw(batch, length, channels), draw(channels),
    ]  # fmt: skip
    weight = draw(batch, length, channels)

    def run(function: Any, dtype: torch.dtype, place: str, **options: Any) -> list[torch.Tensor]:
        leaves = [t.to(device=place, dtype=dtype).detach().requires_grad_() for t in inputs]
        y = function(*leaves, delta_softplus=True, **options)
        gradients = torch.autograd.grad((y * weight.to(y)).sum(), leaves)
        return [t.detach().double().cpu() for t in (y, *gradients)]

    try:
        expected = run(selective_scan_reference, torch.float64, "cpu")
        found = run(selective_scan, torch.float32, device, channels_last=True)
    except Exception as error:  # whatever breaks is the finding
        return {"ok": False, "device": device, "reason": f"{type(error).__name__}: {error}"}
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in zip(found, expected, strict=True)]
    if not all(map(math.isfinite, errors)):
        return {"ok": False, "device": device, "reason": "the result holds NaN or infinite values"}
    result = {
        "ok": errors[0] <= SELF_CHECK_TOLERANCE and max(errors[1:]) <= SELF_CHECK_GRADIENT_TOLERANCE,
        "device": device,
        "forward_error": errors[0],
        "gradient_error": max(errors[1:]),
        "seconds": round(time.perf_counter() - start, 3),
    }
    if not result["ok"]:
        result["reason"] = (
            f"differs from the sequential definition by {errors[0]:.1e} (forward) and {max(errors[1:]):.1e} (gradients)"
        )
    return result


def check_trainers(trainer: str = "nnMambaTrainer") -> dict[str, Any]:
    """Ask a fresh interpreter, as nnU-Net's commands would be, whether nnU-Net finds our trainers.

    Returns:
        ``ok``, the route (``startup file``, or none), and a reason if the trainer is not found.
    """
    found_folder = next((p for p in map(Path, _external_folders()) if p.name == "nnunet_trainers"), None)
    result: dict[str, Any] = {
        "ok": False,
        "trainer": trainer,
        "external_folder": str(found_folder) if found_folder else None,
        "startup_disabled": bool(os.environ.get("MONAI_MAMBA_NO_STARTUP")),
    }
    code = (
        "import sys\n"
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
        "print('FOUND', find(sys.argv[1]).__name__)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, trainer],
            capture_output=True,
            text=True,
            timeout=_SEARCH_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {**result, "reason": f"the search took longer than {_SEARCH_TIMEOUT_S} s"}
    if f"FOUND {trainer}" in done.stdout:
        return {**result, "ok": True}
    last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
    return {**result, "reason": f"{last}; `monai-mamba nnunet train` and `predict` work without this search"}


def _external_folders() -> list[str]:
    return [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
