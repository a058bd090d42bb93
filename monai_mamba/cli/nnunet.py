"""``monai-mamba nnunet ...``: nnU-Net's own commands with our trainers known, without the start-up file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="nnU-Net with this package's trainers. plan fits patch and batch size to the memory of this package's "
    "networks. prepare, predict-landmarks and predict-classes serve the trainers for landmarks and classes. train, "
    "predict and predict-from-modelfolder are nnU-Net's own commands, needed only where the start-up file does not "
    "work (python -S, pip install --target, a broken torchvision)."
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


@app.command()
def prepare(
    dataset: Annotated[str, typer.Argument(help="Number or name of a raw data set.")],
    radius: Annotated[float, typer.Option(help="Radius in mm of a landmark's ball.", min=0.1)] = 3.0,
) -> None:
    """Check landmarks or classes of a raw data set, and write the label maps it lacks.

    nnU-Net cannot plan without labelsTr. Call this before nnUNetv2_plan_and_preprocess.
    """
    from pathlib import Path

    from nnunetv2.paths import nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

    from monai_mamba.nnunet.prepare import prepare

    name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    written = prepare(Path(str(nnUNet_raw)) / name, radius)
    print(f"{name}: annotations checked, {len(written)} files written")


@app.command(
    "predict-landmarks",
    context_settings=_PASS_ON,
    help="Landmarks in mm: -i IN -o OUT -d DATASET -c CONFIGURATION -f FOLDS -tr nnMambaLandmarkTrainer",
)
def predict_landmarks(context: typer.Context) -> None:
    from monai_mamba.nnunet.lookup import patch_lookup

    patch_lookup()
    from monai_mamba.nnunet.prediction import predict_landmarks

    raise typer.Exit(predict_landmarks(context.args))


@app.command(
    "predict-classes",
    context_settings=_PASS_ON,
    help="Class probabilities: -i IN -o OUT -d DATASET -c CONFIGURATION -f FOLDS -tr nnMambaClassifierTrainer",
)
def predict_classes(context: typer.Context) -> None:
    from monai_mamba.nnunet.lookup import patch_lookup

    patch_lookup()
    from monai_mamba.nnunet.prediction import predict_classes

    raise typer.Exit(predict_classes(context.args))


@app.command()
def plan(
    dataset: Annotated[str, typer.Option("-d", help="Number or name of the data set, as in nnU-Net.")],
    network: Annotated[
        str, typer.Option(help="nnmamba, or for slices medmamba_t/s/b, vmamba_t/s/b, xfmamba_t/s/b.")
    ] = "nnmamba",
    gpu_memory: Annotated[float, typer.Option(help="Memory of the device in GiB.", min=0.1)] = 8,
    configurations: Annotated[
        list[str] | None, typer.Option("-c", help="Configuration to plan; repeat for more. Default: all that fit.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="autocast (CUDA) or float32 (CPU, and trainers without autocast).")
    ] = "autocast",
    plans_name: Annotated[str | None, typer.Option(help="Name of the plans; default NETWORKPlans.")] = None,
) -> None:
    """Write a plans file with patch and batch size for the memory of one of this package's networks.

    Needs nnU-Net's fingerprint of the data set (nnUNetv2_extract_fingerprint). Train with the plans by nnU-Net's own
    trainer, nnUNetv2_train ID CONFIGURATION FOLD -p NAME, or by the network's trainer here (-tr nnMambaTrainer).
    """
    from monai_mamba.nnunet.planner import GIB, plan_dataset

    planned = plan_dataset(
        dataset, network, gpu_memory, precision, plans_name, configurations, report=lambda line: typer.echo(line)
    )
    name, data = planned["plans_name"], planned["dataset_name"]
    for configuration, values in planned["configurations"].items():
        if "planned_for" in values:
            patch = " x ".join(map(str, values["patch_size"]))
            peak = values["planned_for"]["predicted_peak_bytes"] / GIB
            typer.echo(f"{configuration}: {values['batch_size']} patches of {patch}, {peak:.2f} GiB")
    typer.echo(f"Written: {name}.json of {data}. Next (images that are there already are kept):")
    typer.echo(f"  nnUNetv2_preprocess -d {dataset} -plans_name {name} -c {' '.join(planned['configurations'])}")
    typer.echo(f"  nnUNetv2_train {dataset} {next(reversed(planned['configurations']))} 0 -p {name}")


def _seed_everything(seed: int) -> None:
    """nnU-Net draws from the global generators of all three; it has no seed of its own."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
