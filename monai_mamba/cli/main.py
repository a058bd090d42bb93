"""Entry point of ``monai-mamba``: registration of the subcommands and the one place where errors become exit codes.

A subcommand is a file of its own in this folder. It defines a typed function (or a `typer.Typer` for a group) and is
registered below. Nothing but the standard library, typer and `monai_mamba.errors` may be imported at the top of such a
file: torch, MONAI and nnU-Net cost seconds, and ``monai-mamba --help`` has to answer at once.

Exit codes: 0 done; 1 something that was asked for could not be done; 2 wrong usage; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from monai_mamba import __version__
from monai_mamba.cli import (
    bundle,
    convert_weights,
    doctor,
    evaluate,
    explain,
    export,
    inspect_weights,
    nnunet,
    predict,
    quickstart,
    summary,
)
from monai_mamba.errors import MonaiMambaError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="monai-mamba",
    help="Mamba (selective state space) networks for medical imaging: MONAI networks and nnU-Net v2 trainers.",
    epilog="Set MONAI_MAMBA_TRACEBACK=1 to see the full traceback of an error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("quickstart")(quickstart.quickstart)
app.command("doctor")(doctor.doctor)
app.command("summary")(summary.summary)
app.command("inspect-weights")(inspect_weights.inspect_weights)
app.command("convert-weights")(convert_weights.convert_weights)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("explain")(explain.explain)
app.command("robustness")(explain.robustness)
app.command("export")(export.export)
app.add_typer(nnunet.app, name="nnunet")
app.add_typer(bundle.app, name="bundle")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"monai-mamba {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``monai-mamba`` and return its exit code.

    Args:
        argv: arguments without the program name; ``None`` takes those of the process.

    Returns:
        0 done, 1 failed with one line on standard error, 2 wrong usage, 130 interrupted.
    """
    try:
        app(args=None if argv is None else list(argv), prog_name="monai-mamba")
    except SystemExit as exit_request:
        code = exit_request.code
        return code if isinstance(code, int) else EXIT_DONE if code is None else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (MonaiMambaError, OSError) as error:
        # A full disk or a folder without write permission is not a mistake in this program either.
        if os.environ.get("MONAI_MAMBA_TRACEBACK") or (isinstance(error, OSError) and error.filename is None):
            raise
        typer.secho(f"error: {_one_line(error)}", fg=typer.colors.RED, err=True)
        return EXIT_FAILED
    return EXIT_DONE


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, MonaiMambaError):
        return f"{error.filename}: {error.strerror or type(error).__name__}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
