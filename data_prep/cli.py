"""``monai-mamba-data``: one command per source, and ``merge`` and ``check``.

Exit codes: 0 everything fine; 1 the command could not be carried out; 2 wrong usage; 3 some inputs failed, the report
names them; 4 the report does not add up (a mistake in this package); 130 interrupted.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import sys
import tempfile
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.errors import AccountingError, DataPrepError, MonaiMambaError, UsageError
from data_prep.model import Source
from data_prep.sources import all_sources

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_SOME_FAILED, EXIT_ACCOUNTING, EXIT_INTERRUPTED = 0, 1, 2, 3, 4, 130

app = typer.Typer(
    name="monai-mamba-data",
    help="Turn hospital and challenge downloads into nnU-Net and MONAI data sets. "
    "Every input gets a verdict, no geometry is guessed.",
    epilog="Exit codes: 0 all fine, 3 some inputs failed (see report.csv), 2 wrong usage, 1 other error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Input = Annotated[
    list[Path],
    typer.Argument(help="Folder or archive (zip, tar) of the download; several are read as one.", show_default=False),
]
Out = Annotated[
    Path, typer.Option("--out", help="Folder of the data set; for nnU-Net: .../DatasetNNN_Name.", show_default=False)
]
Private = Annotated[
    Path | None,
    typer.Option(help="Folder for plan, journal and full report; default: private-NAME beside the data set."),
]


def _common(
    inputs: Input,
    out: Out,
    format: Annotated[str | None, typer.Option(help="Layout: nnunet or monai; default: the source's first.")] = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds; default 5, or none with fewer than 5 patients.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is written to --out.")
    ] = False,
    engine: Annotated[Literal["process", "serial", "dask"], typer.Option(help="Where cases are made.")] = "process",
    workers: Annotated[int, typer.Option(help="Worker processes; 0 takes the number of usable cores.", min=0)] = 0,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler, tcp://host:8786.")] = None,
    shard: Annotated[
        str, typer.Option(help="i/n: make the i-th of n parts, then merge; auto reads the Slurm array.")
    ] = "1/1",
    link: Annotated[
        Literal["copy", "hardlink", "symlink", "dataset-json"],
        typer.Option(help="How files that need no change come into the data set."),
    ] = "copy",
    case_timeout: Annotated[float, typer.Option(help="Seconds after which a case is given up.", min=0.1)] = 1800.0,
    resume: Annotated[
        Literal["sizes", "sha256", "no"], typer.Option(help="How finished cases are recognized in a second run.")
    ] = "sizes",
    key_file: Annotated[
        Path | None, typer.Option(help="Key of the pseudonyms; default: in the user's configuration.")
    ] = None,
    private: Private = None,
) -> None:
    """Signature of the options that every source has."""


def _command(source_class: type[Source]) -> Callable[..., None]:
    names = [item.name for item in fields(source_class)]

    def command(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in names}
        raise typer.Exit(convert(source_class(**options), **arguments))

    hints = typing.get_type_hints(source_class, include_extras=True)
    own = [
        inspect.Parameter(
            item.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[item.name],
            default=item.default if item.default is not MISSING else inspect.Parameter.empty,
        )
        for item in fields(source_class)
    ]
    shared = inspect.signature(_common, eval_str=True).parameters.values()
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shared] + own
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


for _name, _source in all_sources().items():
    app.command(_name, help=inspect.cleandoc(_source.__doc__ or ""))(_command(_source))


def convert(
    source: Source,
    inputs: Sequence[Path],
    out: Path,
    format: str | None = None,
    folds: int | None = None,
    seed: int = 0,
    dry_run: bool = False,
    engine: Literal["process", "serial", "dask"] = "process",
    workers: int = 0,
    scheduler: str | None = None,
    shard: str = "1/1",
    link: Literal["copy", "hardlink", "symlink", "dataset-json"] = "copy",
    case_timeout: float = 1800.0,
    resume: Literal["sizes", "sha256", "no"] = "sizes",
    key_file: Path | None = None,
    private: Path | None = None,
) -> int:
    """Scan, plan and run; what every source's command does.

    Returns:
        Exit code 0 or 3.
    """
    from data_prep.engine.files import printable
    from data_prep.engine.plan import make_plan
    from data_prep.engine.run import RunOptions, make_private, private_folder, run_plan
    from data_prep.engine.scan import Scanner
    from data_prep.engine.worker import collect_rarely
    from data_prep.identity import Pseudonyms, read_secret
    from data_prep.tree import Tree

    collect_rarely()
    layout = format or source.layouts[0]
    if layout not in source.layouts:
        raise UsageError(f"--format {layout} is not possible for {source.name}; choose one of {list(source.layouts)}.")
    if scheduler and engine != "dask":
        raise UsageError("--scheduler goes with --engine dask.")
    part = parse_shard(shard)
    out = out.absolute()
    _check_folders(inputs, out)
    private = private or private_folder(out)
    pseudonyms = Pseudonyms(read_secret(key_file), source.identifiers)
    is_new = not private.exists()
    if not dry_run:
        make_private(private)
    with _unpacked(inputs, None if dry_run else private / f"unpacked-{part[0]}-of-{part[1]}") as folders:
        if list(folders) != list(inputs) and link != "copy":
            raise UsageError(f"--link {link} does not go with an archive, whose files are gone after the run.")
        num_workers = workers or usable_cores()
        scanner = Scanner(num_workers if engine == "process" else 1)
        tree = Tree(folders, private / f"index-{part[0]}-of-{part[1]}.sqlite", scanner)
        try:
            plan = make_plan(source, tree, pseudonyms, layout, folds, seed)
        except MonaiMambaError:
            # A refused input leaves nothing behind but facts that took time to read.
            if is_new and not tree.num_facts:
                shutil.rmtree(private, ignore_errors=True)
            raise
        finally:
            tree.close()
        if dry_run:
            typer.echo(printable(plan.table()), nl=False)
            _tell_plan(plan)
            if is_new and private.exists():
                typer.echo(f"note: what was read of the files is kept for the run in {private}", err=True)
            return EXIT_DONE
        options = RunOptions(engine, num_workers, scheduler, part, link, case_timeout, resume)
        report = run_plan(plan, out, private, options)
    if report is None:
        typer.echo(f"shard {shard} is done; run 'monai-mamba-data merge' when all are.")
        return EXIT_DONE
    return _tell(report, private)


@contextlib.contextmanager
def _unpacked(inputs: Sequence[Path], folder: Path | None) -> Iterator[Sequence[Path]]:
    """Inputs with every archive replaced by the folder it was unpacked into, which is removed at the end.

    Archives are read in the order of their names.
    """
    from data_prep.archives import is_archive, unpack

    packed = [path for path in inputs if path.is_file() and is_archive(path)]
    if not packed:
        yield inputs
        return
    place = Path(tempfile.mkdtemp(prefix="monai-mamba-data-")) if folder is None else folder
    shutil.rmtree(place, ignore_errors=True)
    try:
        folders = []
        for number, path in enumerate(sorted(packed)):
            unpack(path, place / f"{number:03d}")
            folders.append(place / f"{number:03d}")
        yield [*(path for path in inputs if path not in packed), *folders]
    finally:
        shutil.rmtree(place, ignore_errors=True)


@app.command("merge", help="Write dataset.json, folds and report after all shards of a run have finished.")
def merge(out: Annotated[Path, typer.Argument(help="Folder of the data set.")], private: Private = None) -> None:
    from data_prep.engine.plan import Plan
    from data_prep.engine.run import finish, private_folder

    out = out.absolute()
    folder = private or private_folder(out)
    raise typer.Exit(_tell(finish(Plan.load(folder), out, folder), folder))


@app.command("check", help="Verify checksums, geometry, labels, descriptions and folds of a finished data set.")
def check(out: Annotated[Path, typer.Argument(help="Folder of the data set.")]) -> None:
    from data_prep.check import check_data_set

    findings = check_data_set(out)
    for problem in findings.problems:
        typer.echo(problem)
    number = len(findings.problems)
    typer.echo(f"{findings.num_cases} cases, {findings.num_files} files, {number} problem{'' if number == 1 else 's'}")
    raise typer.Exit(EXIT_SOME_FAILED if number else EXIT_DONE)


@app.command("to-dicom-seg", help="Write a label map as a DICOM-SEG object of the series it was predicted from.")
def to_dicom_seg(
    label_map: Annotated[Path, typer.Argument(help="NIfTI label map on the grid of the series.")],
    series: Annotated[Path, typer.Option(help="Folder with the DICOM files of the series.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write, .dcm.", show_default=False)],
    segment: Annotated[list[str], typer.Option(help="VALUE=NAME of a segment; one for each value in the map.")],
    description: Annotated[str, typer.Option(help="SeriesDescription of the new object.")] = "Segmentation",
) -> None:
    from data_prep.dicom.headers import is_dicom
    from data_prep.dicom.labels import write_dicom_seg

    segments: dict[int, str] = {}
    for text in segment:
        value, equals, name = text.partition("=")
        if not equals or not value.isdigit() or not 0 < int(value) < 65536 or not name.strip():
            raise UsageError(f"--segment must be VALUE=NAME with a value above 0, got {text!r}.")
        segments[int(value)] = name.strip()
    if not label_map.is_file() or not series.is_dir():
        raise UsageError("the label map must be a file and --series a folder; check both paths.")
    files = [path for path in sorted(series.iterdir()) if path.is_file() and is_dicom(path)]
    count = write_dicom_seg(label_map, files, out.absolute(), segments, series_description=description)
    typer.echo(f"{count} segments written")


def parse_shard(text: str) -> tuple[int, int]:
    """``"3/16"`` as ``(3, 16)``; ``"auto"`` from the variables of a Slurm array.

    Raises:
        UsageError: not of that form, or out of range.
    """
    if text == "auto":
        try:
            first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
            number, count = (
                int(os.environ["SLURM_ARRAY_TASK_ID"]) - first + 1,
                int(os.environ["SLURM_ARRAY_TASK_COUNT"]),
            )
        except (KeyError, ValueError) as error:
            raise UsageError("--shard auto works inside a Slurm array; elsewhere give --shard i/n.") from error
    else:
        try:
            number, count = (int(part) for part in text.split("/"))
        except ValueError as error:
            raise UsageError(f"--shard must be i/n or auto, got {text!r}.") from error
    if not 1 <= number <= count:
        raise UsageError(f"--shard {text}: the part must lie between 1 and the number of parts.")
    return number, count


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_folders(inputs: Sequence[Path], out: Path) -> None:
    for folder in inputs:
        folder = folder.absolute()
        if out == folder or out in folder.parents or folder in out.parents:
            raise UsageError(f"--out {out} and the input {folder} must not contain each other; choose another --out.")


def _tell_plan(plan: Any) -> None:
    """What a dry run found besides the cases; to standard error, because the plan itself goes to standard output."""
    settled = Counter((v.status, v.reason) for v in plan.verdicts.values() if v.status in ("skipped", "failed"))
    typer.echo(f"{len(plan.entries)} cases", err=True)
    for (status, reason), number in sorted(settled.items()):
        typer.echo(f"{status}: {reason}: {number}", err=True)
    for note in plan.notes:
        typer.echo(f"note: {note}", err=True)


def _tell(report: Any, private: Path) -> int:
    for kind, counts in report.counts.items():
        total = counts["total"]
        typer.echo(f"{kind}: {total} = " + " + ".join(f"{counts[s]} {s}" for s in counts if s != "total"))
    for note in report.notes:
        typer.echo(f"note: {note}")
    if not report.counts.get("case"):
        typer.secho(f"nothing was converted; {private / 'report.csv'} says why", fg=typer.colors.RED, err=True)
        return EXIT_SOME_FAILED if report.num_failed else EXIT_FAILED
    if report.num_failed:
        typer.secho(f"{report.num_failed} lines failed; see {private / 'report.csv'}", fg=typer.colors.RED, err=True)
        return EXIT_SOME_FAILED
    return EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``monai-mamba-data`` and return its exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="monai-mamba-data")
    except SystemExit as exit_request:
        code = exit_request.code
        return code if isinstance(code, int) else EXIT_DONE if code is None else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (MonaiMambaError, OSError) as error:
        if os.environ.get("MONAI_MAMBA_TRACEBACK"):
            raise
        from data_prep.engine.files import printable

        typer.secho(printable(f"error: {_one_line(error)}"), fg=typer.colors.RED, err=True)
        if isinstance(error, UsageError):
            return EXIT_USAGE
        return EXIT_ACCOUNTING if isinstance(error, AccountingError) else EXIT_FAILED
    return EXIT_DONE


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, DataPrepError):
        return f"{error.filename or 'input or output'}: {error.strerror or type(error).__name__}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
