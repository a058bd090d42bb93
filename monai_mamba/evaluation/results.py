"""What an evaluation leaves: files that are whole, and how they came about."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monai_mamba import diagnostics
from monai_mamba.files import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"


def write_results(output_dir: os.PathLike[str] | str, contents: Mapping[str, Any]) -> None:
    """Write results into a folder, each file whole or not at all.

    Args:
        output_dir: made if it is not there.
        contents: file name to text, matplotlib figure, or anything JSON can hold; NaN becomes null.
    """
    from matplotlib.figure import Figure

    folder = Path(output_dir)
    # Everything becomes text before anything is written: what fails here leaves nothing behind.
    texts = {
        name: content if isinstance(content, str | Figure) else to_json(content) for name, content in contents.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        if isinstance(content, str):
            write_text(folder / name, content)
        else:
            write_figure(folder / name, content)


def write_figure(path: os.PathLike[str] | str, figure: Figure, dpi: int = 150) -> None:
    """Write a figure as a picture, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, facecolor=figure.get_facecolor())


def to_json(content: Any) -> str:
    """Return JSON in which null stands for what could not be measured: NaN is not JSON."""
    return json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n"


def provenance(
    inputs: Mapping[str, os.PathLike[str] | str | None], seed: int, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return how results came about: command, versions, seed, and the SHA-256 of what went in.

    Folders of files are only named, not their path: a path can hold more than should leave the house.

    Args:
        inputs: role to file or folder; None is left out.
        seed: of everything that was drawn.
        command: the command line; None takes that of the process.
    """
    return {
        "command": describe_command(["monai-mamba", *sys.argv[1:]] if command is None else command),
        "seed": seed,
        "inputs": {
            role: {"name": Path(path).name, "sha256": digest(path)} for role, path in inputs.items() if path is not None
        },
        "versions": {name: version for name, version in diagnostics.collect_versions().items() if version},
    }


def describe_command(arguments: Sequence[str]) -> str:
    """Return a command line with the last part of every path only."""
    return shlex.join(Path(a).name if os.sep in a else a for a in arguments)


def digest(path: os.PathLike[str] | str) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a folder, in hexadecimal."""
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as file:
            state = hashlib.sha256()
            while block := file.read(1 << 20):
                state.update(block)
            return state.hexdigest()
    total = hashlib.sha256()
    for file_path in sorted(f for f in path.rglob("*") if f.is_file()):
        total.update(f"{file_path.relative_to(path).as_posix()}\0{digest(file_path)}\n".encode())
    return total.hexdigest()


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
