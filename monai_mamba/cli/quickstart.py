"""``monai-mamba quickstart``: from data to a report in one command."""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run; give the same one again to resume.")
    ] = Path("monai-mamba-quickstart"),
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="Data set in the decathlon's layout; default: 24 hippocampus MRI that come with the package."
        ),
    ] = None,
    trainer: Annotated[
        str | None, typer.Option(help="Trainer class of this package or of nnU-Net; default: nnMambaTrainerQuick.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of the training; default: the trainer's.")] = None,
    device: Annotated[Device, typer.Option(help="auto takes CUDA if there is one, else the CPU.")] = Device.auto,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of training and held-out cases; default: 0.")
    ] = None,
) -> None:
    """Train, predict and score a Mamba network with nnU-Net and write a report.

    nnU-Net plans, preprocesses and trains; cases it has never seen are predicted and scored; report.html and
    metrics.json show the result. Ctrl-C at any moment leaves a run that the same command continues.
    """
    from monai_mamba.quickstart.pipeline import run_quickstart
    from monai_mamba.quickstart.progress import RunProgress

    try:
        with _ends_like_ctrl_c(), RunProgress() as progress:
            result = run_quickstart(output, progress, dataset, trainer, epochs, seed, device.value)
    except KeyboardInterrupt:
        sys.stdout.flush()
        typer.echo(f"Interrupted. To continue: monai-mamba quickstart --output {output}", err=True)
        raise typer.Exit(130) from None
    score = "none (no structure occurs)" if result.mean_dice is None else f"{result.mean_dice:.3f}"
    typer.echo(f"\nMean Dice of the held-out cases: {score}\nReport:  {result.report}\nMetrics: {result.metrics}")
    typer.echo(
        f"This run made {result.num_iterations:,} iterations. A training of nnU-Net's own length makes 250,000 "
        "in each of five folds and needs a GPU: the report has the commands."
    )


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """Let a closed terminal or a scheduler's SIGTERM end the run as Ctrl-C does: nnU-Net with its workers too."""

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Whoever started us with a signal ignored, as nohup does with SIGHUP, meant it.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
