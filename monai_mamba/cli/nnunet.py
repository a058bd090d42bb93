"""``monai-mamba nnunet ...``: nnU-Net's own commands with our trainers known, without the start-up file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Run nnU-Net's own commands with this package's trainers; all arguments are nnU-Net's. "
    "Needed only where the start-up file does not work (python -S, pip install --target, a broken torchvision)."
)

# Options are nnU-Net's, --help included.
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON, help="nnUNetv2_train: DATASET CONFIGURATION FOLD -tr nnMambaTrainer ...")
def train(
    context: typer.Context,
    epochs: Annotated[int | None, typer.Option(help="Number of epochs instead of the trainer's.", min=1)] = None,
    iterations: Annotated[int | None, typer.Option(help="Iterations per epoch.", min=1)] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of weights, sampling and augmentation (all of it only with nnUNet_n_proc_DA=0).", min=0
        ),
    ] = None,
) -> None:
    import os

    from monai_mamba.nnunet.lookup import patch_lookup

    patch_lookup()
    from nnunetv2.run.run_training import run_training_entry

    from monai_mamba.nnunet.trainer import EPOCHS_VARIABLE, ITERATIONS_VARIABLE

    for variable, value in ((EPOCHS_VARIABLE, epochs), (ITERATIONS_VARIABLE, iterations)):
        if value is not None:
            os.environ[variable] = str(value)
    if seed is not None:
        _seed_everything(seed)
    sys.argv = ["nnUNetv2_train", *context.args]
    run_training_entry()


@app.command(context_settings=_PASS_ON, help="nnUNetv2_predict: -i IN -o OUT -d DATASET -c CONFIGURATION ...")
def predict(context: typer.Context) -> None:
    from monai_mamba.nnunet.lookup import patch_lookup

    patch_lookup()
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point

    sys.argv = ["nnUNetv2_predict", *context.args]
    predict_entry_point()


@app.command(
    "predict-from-modelfolder", context_settings=_PASS_ON, help="nnUNetv2_predict_from_modelfolder: -i IN -o OUT -m DIR"
)
def predict_from_modelfolder(context: typer.Context) -> None:
    from monai_mamba.nnunet.lookup import patch_lookup

    patch_lookup()
    from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder

    sys.argv = ["nnUNetv2_predict_from_modelfolder", *context.args]
    predict_entry_point_modelfolder()


def _seed_everything(seed: int) -> None:
    """nnU-Net draws from the global generators of all three; it has no seed of its own."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
