"""What bundle configurations import: where the bundle lies, seeds, class weights and samplers."""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

from monai_mamba.errors import CheckpointError, DatasetError, MonaiMambaError

BALANCE = ("none", "weights", "sampler")
PRECISIONS = ("fp32", "bf16", "fp16")
#: What the best network was trained for; beside its weights.
MODEL_CARD = "model.json"


def find_root(name: str) -> str:
    """Return the folder of the bundle ``name``: the working directory, or ``bundles/<name>`` below it, else the former.

    A command thus works from the root of the repository and from inside the bundle.
    """
    for folder in (Path("."), Path("bundles") / name):
        if (folder / "configs" / "metadata.json").is_file():
            return str(folder)
    return "."


def model_card(ckpt_dir: os.PathLike[str] | str, default: dict[str, Any]) -> dict[str, Any]:
    """Return what the network in ``ckpt_dir`` was trained for, completed by ``default``."""
    card = Path(ckpt_dir) / MODEL_CARD
    return {**default, **(json.loads(card.read_text(encoding="utf-8")) if card.is_file() else {})}


def show_errors_in_one_line() -> None:
    """Let ``python -m monai.bundle`` end with an error of this package in one line, as ``monai-mamba`` does.

    MONAI wraps what a component raises, several times, so that the reason stands in the middle of many lines and the
    last one asks for a debugger. ``MONAI_MAMBA_TRACEBACK=1`` shows all of it. Programs of others are left alone.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or not spec.name.startswith("monai.bundle") or os.environ.get("MONAI_MAMBA_TRACEBACK"):
        return

    def show(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        own: BaseException | None = error
        while own is not None and not isinstance(own, MonaiMambaError):
            own = own.__cause__ or own.__context__
        if own is None:
            sys.__excepthook__(kind, error, traceback)
        else:
            print(f"error: {' '.join(str(own).split())}", file=sys.stderr)

    sys.excepthook = show


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed Python, NumPy and torch for one epoch of one process."""
    value = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - MONAI and torchvision draw from the global generator
    torch.manual_seed(value)


def class_counts(cases: Sequence[dict[str, Any]], num_classes: int) -> np.ndarray:
    """Return the number of cases per class, ``(num_classes,)``.

    Raises:
        DatasetError: if a class is empty.
    """
    counts = np.bincount([int(case["label"]) for case in cases], minlength=num_classes)
    if (counts == 0).any():
        raise DatasetError(f"balancing needs every class; the class counts are {counts.tolist()}")
    return counts


def class_weights(cases: Sequence[dict[str, Any]], num_classes: int, balance: str) -> torch.Tensor | None:
    """Return weights for the cross entropy that are inverse to the class counts, with mean 1 over the cases.

    Args:
        cases: the training cases.
        num_classes: number of classes.
        balance: ``"weights"``, else None is returned (published: no balancing).
    """
    _check_balance(balance)
    if balance != "weights":
        return None
    counts = class_counts(cases, num_classes)
    return torch.tensor(counts.sum() / (num_classes * counts), dtype=torch.float32)


def train_sampler(
    cases: Sequence[dict[str, Any]], num_classes: int, balance: str, distributed: bool = False
) -> Sampler:
    """Return the sampler of the training cases.

    Args:
        cases: the training cases.
        num_classes: number of classes.
        balance: ``"sampler"`` draws with replacement so that all classes are equally frequent, else a shuffle.
        distributed: give every process its share.
    """
    _check_balance(balance)
    if distributed:
        if balance == "sampler":
            raise ValueError("`balance='sampler'` works in one process only; use balance='weights'")
        return DistributedSampler(cases)  # type: ignore[arg-type]
    if balance == "sampler":
        counts = class_counts(cases, num_classes)
        return WeightedRandomSampler([1.0 / counts[int(case["label"])] for case in cases], len(cases))
    return RandomSampler(cases)


def amp_options(precision: str) -> dict[str, Any]:
    """Return ``amp`` and ``amp_kwargs`` of MONAI's engines for ``"fp32"``, ``"bf16"`` or ``"fp16"`` (CUDA only)."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return {"amp": precision != "fp32" and torch.cuda.is_available(), "amp_kwargs": {"dtype": dtype}}


def local_device() -> torch.device:
    """Return the device of this process under torchrun: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return torch.device("cpu")


def start_processes(device: torch.device) -> None:
    """Join the process group of torchrun: NCCL on GPUs, gloo on CPUs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend="nccl" if device.type == "cuda" else "gloo")


def stop_processes() -> None:
    """Leave the process group, and give its threads time to free the tensors of the last exchange.

    DistributedDataParallel keeps gloo's threads alive. One that frees a tensor needs Python's lock, and asking for it
    while the interpreter shuts down aborts the process, rarely, after everything is done (pytorch/pytorch#179291).
    """
    torch.distributed.destroy_process_group()
    time.sleep(0.2)


def rank() -> int:
    """Return the number of this process; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def num_processes() -> int:
    """Return the number of processes that train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def distributed_network(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Wrap a network for several processes; on GPUs batch statistics are taken over all of them.

    On CPUs torch has no synchronised batch normalisation: every process normalises by its own share of the batch.
    """
    if device.type == "cuda":
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return torch.nn.parallel.DistributedDataParallel(network.to(device), device_ids=[device.index])
    return torch.nn.parallel.DistributedDataParallel(network)


def start_from(network: torch.nn.Module, checkpoint: os.PathLike[str] | str | None) -> torch.nn.Module:
    """Load the weights of ``checkpoint`` into ``network``, all of them, to fine-tune it; None leaves it as it is.

    Raises:
        CheckpointError: if the file cannot be read or does not fit the network.
    """
    if checkpoint is not None:
        try:
            network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{checkpoint}: cannot be used as a start: {error}") from error
    return network


def single_output(network: torch.nn.Module) -> torch.nn.Module:
    """Switch the deep supervision of a network off; it keeps its heads, so that the weights of a training fit."""
    decoder: Any = network.decoder
    decoder.deep_supervision = False
    return network


def warmup_polynomial(
    optimizer: torch.optim.Optimizer, max_epochs: int, warmup_epochs: int = 5, hold_epochs: int = 10, power: float = 2.0
) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the schedule of the landmark network: a linear warm-up, then a polynomial in steps down to the end.

    In epoch e (from 0) the rate is ``lr * (e + 1) / warmup_epochs`` while warming up, then
    ``lr * (1 - s / (max_epochs - warmup_epochs)) ** power`` where s counts the epochs after the warm-up, held for
    ``hold_epochs``.

    Args:
        optimizer: its learning rate is the highest one.
        max_epochs: length of the training. The published code fixes it at 50 in the formula but trains for 80 epochs,
            so that the base turns negative and the rate rises again from epoch 55 on; here it is the real length.
        warmup_epochs: epochs of the warm-up; shortened to a quarter of a short training.
        hold_epochs: the rate is constant for this many epochs; 1 for none, shortened like the warm-up.
        power: of the polynomial.

    References:
        Training code of the LFC data set, used by nnMamba, arXiv:2402.03526, section 3.3.
    """
    if max_epochs < 1 or warmup_epochs < 0 or hold_epochs < 1:
        raise ValueError(
            "`max_epochs` and `hold_epochs` must be at least 1 and `warmup_epochs` at least 0, got "
            f"{max_epochs}, {hold_epochs} and {warmup_epochs}"
        )
    warmup = min(warmup_epochs, max_epochs // 4)
    hold = max(1, min(hold_epochs, (max_epochs - warmup) // 4))

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / warmup
        step = (epoch - warmup) // hold * hold
        return max(0.0, 1 - step / (max_epochs - warmup)) ** power

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _check_balance(balance: str) -> None:
    if balance not in BALANCE:
        raise ValueError(f"`balance` must be one of {', '.join(BALANCE)}, got {balance!r}")
