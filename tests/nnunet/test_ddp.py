"""Our trainers under a process group, as with ``-num_gpus 2``.

nnU-Net starts its processes with NCCL on CUDA devices only. Here two processes on the CPU run the trainer under gloo;
what is replaced for that is said in :class:`_OnCpu`.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATCH = (16, 32, 32)


def _trainer(root: str, output: str):
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock_module
    from torch.nn.parallel import DistributedDataParallel

    from monai_mamba.nnunet.trainer import MambaTrainer

    class _OnCpu(MambaTrainer):
        """Instance norm, as SyncBatchNorm needs CUDA; SGD, as its steps are proportional to the gradients; float64,

        as norms over the few voxels at 1/16 turn rounding into per cents.
        """

        network_arguments = {"init_filters": 16, "norm": "instance"}  # noqa: RUF012
        optimizer_name = "sgd"
        learning_rate = 1e-2

        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.device = torch.device("cpu")  # nnU-Net takes a CUDA device for every rank
            self.grad_scaler = None

        @classmethod
        def build_network_architecture(cls, plans_manager, *others):  # nnU-Net looks for the first name
            return super().build_network_architecture(plans_manager, *others).double()

    stock_module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    plans = json.loads((Path(root) / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    plans["configurations"]["3d_fullres"] |= {"patch_size": list(PATCH), "batch_size": 2, "batch_dice": True}
    torch.manual_seed(0)
    trainer = _OnCpu(plans, "3d_fullres", 0, json.loads((Path(root) / "dataset.json").read_text()))
    trainer.output_folder, trainer.log_file = output, os.path.join(output, f"log_{trainer.local_rank}.txt")
    trainer.initialize()
    return trainer


def _batch() -> dict:
    generator = torch.Generator().manual_seed(1)
    targets = [
        torch.randint(0, 3, (2, 1, *(n // 2**level for n in PATCH)), generator=generator).float() for level in range(4)
    ]
    return {"data": torch.randn(2, 1, *PATCH, generator=generator, dtype=torch.float64), "target": targets}


def _part(batch: dict, rank: int) -> dict:
    return {"data": batch["data"][rank : rank + 1], "target": [t[rank : rank + 1] for t in batch["target"]]}


def _work(rank: int, port: int, root: str, output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), nnUNet_compile="measure")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    trainer = _trainer(root, output)
    assert trainer.is_ddp and trainer.local_rank == rank and trainer.batch_size == 1
    losses = [trainer.train_step(_part(_batch(), rank))["loss"] for _ in range(2)]
    assert trainer._compilation is None
    # A loss that is not finite on one of the processes only must not stop the others.
    outputs = [{"loss": np.array(np.nan if rank == 1 and i == 0 else loss)} for i, loss in enumerate(losses)]
    trainer.on_train_epoch_end(outputs)
    weights = {key: value.clone() for key, value in trainer._plain_network().state_dict().items()}
    torch.save(
        {"losses": losses, "weights": weights, "epoch_loss": trainer.logger.get_value("train_losses", step=-1)},
        os.path.join(output, f"rank_{rank}.pt"),
    )
    trainer.save_checkpoint(os.path.join(output, f"checkpoint_of_rank_{rank}.pth"))
    trainer.set_deep_supervision_enabled(False)
    assert torch.is_tensor(trainer.network(_part(_batch(), rank)["data"]))
    if rank == 0:
        trainer.load_checkpoint(os.path.join(output, "checkpoint_of_rank_0.pth"))
    dist.destroy_process_group()


def test_two_processes_train_as_one(planned, tmp_path, monkeypatch):
    environment = {f"nnUNet_{name}": str(planned.root / name) for name in ("raw", "preprocessed", "results")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(planned.preprocessed)
    mp.spawn(_work, (port, root, str(tmp_path), environment), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1))
    for key, value in first["weights"].items():
        assert torch.equal(value, second["weights"][key]), key
    assert (tmp_path / "checkpoint_of_rank_0.pth").exists()
    assert not (tmp_path / "checkpoint_of_rank_1.pth").exists()
    assert first["epoch_loss"] == pytest.approx(second["epoch_loss"])
    assert np.isfinite(first["epoch_loss"])
    log = (tmp_path / "log_0.txt").read_text()
    assert (
        "nnUNet_compile=measure: not with several processes, where it has not been tried; training stays plain" in log
    )

    alone = _trainer(root, str(tmp_path))
    assert not alone.is_ddp and alone.batch_size == 2
    losses = [alone.train_step(_batch())["loss"] for _ in range(2)]
    # The batch's Dice is gathered over the processes, the cross entropy is the mean of theirs.
    np.testing.assert_allclose(np.mean([first["losses"], second["losses"]], axis=0), losses, rtol=1e-5)
    start = {key: value.clone() for key, value in _trainer(root, str(tmp_path)).network.state_dict().items()}
    for key, value in alone.network.state_dict().items():
        moved = (value - start[key]).abs().max()
        assert (value - first["weights"][key]).abs().max() <= 1e-3 * moved + 1e-7, key
