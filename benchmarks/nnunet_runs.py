"""What the benchmarks that run nnU-Net share: the hippocampus cases by person, nnU-Net's folders, its commands."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

TRAINERS = Path(__file__).resolve().parent / "trainers"


def cases_by_person(source: Path) -> dict[int, list[str]]:
    """Return the case names of a decathlon-style hippocampus folder by person.

    The numbers 2k - 1 and 2k are most likely one person's two sides (hippocampus_pairs.py).
    """
    persons: dict[int, list[str]] = {}
    for path in sorted((source / "labelsTr").glob("[!.]*.nii.gz")):
        persons.setdefault(person_of(path.name), []).append(path.name.removesuffix(".nii.gz"))
    if not persons:
        raise SystemExit(f"{source} holds no labelsTr/*.nii.gz")
    return persons


def person_of(case: str) -> int:
    """Number of the person a case shows one side of."""
    return (int(re.findall(r"\d+", case)[0]) + 1) // 2


def write_raw(source: Path, raw: Path, train: Iterable[str], test: Iterable[str] = ()) -> dict[str, int]:
    """Copy cases into nnU-Net's raw layout; return the structures, ``{name: label}``."""
    description = json.loads((source / "dataset.json").read_text())
    train = list(train)
    for split, names in (("Tr", train), ("Ts", list(test))):
        for kind in ("images", "labels"):
            (raw / f"{kind}{split}").mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(source / "imagesTr" / f"{name}.nii.gz", raw / f"images{split}" / f"{name}_0000.nii.gz")
            shutil.copy(source / "labelsTr" / f"{name}.nii.gz", raw / f"labels{split}" / f"{name}.nii.gz")
    labels = {name.lower(): int(value) for value, name in description["labels"].items()}
    (raw / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(train), "file_ending": ".nii.gz"}
        )
    )
    return {name: value for name, value in labels.items() if value}


@dataclass(frozen=True)
class Job:
    """nnU-Net's three folders under one, and its commands run there.

    Attributes:
        work: the folder.
        variables: further environment variables.
    """

    work: Path
    variables: Mapping[str, str]

    def environment(self) -> dict[str, str]:
        """Everything in this process but the user's command: no worker processes, which import torch anew."""
        return {
            **os.environ,
            "nnUNet_raw": str(self.work / "raw"),
            "nnUNet_preprocessed": str(self.work / "preprocessed"),
            "nnUNet_results": str(self.work / "results"),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            **self.variables,
        }

    def plan(self, dataset_id: int, configurations: str) -> None:
        """Plan and preprocess; the planner takes the number of augmenters for its number of threads: not 0."""
        self.run(
            f"nnUNetv2_plan_and_preprocess -d {dataset_id} -c {configurations} -np 1 -npfp 1", nnUNet_n_proc_DA="1"
        )

    def run(self, command: str, **variables: str) -> tuple[float, int]:
        """Run a command, its output into ``log.txt``; return its seconds and its peak resident memory in bytes."""
        name, *rest = command.split()
        began = time.monotonic()
        log = self.work / "log.txt"
        with log.open("a") as stream:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name(name)), *rest],
                env=self.environment() | variables,
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                process.kill()
                raise
        if status:
            raise SystemExit(f"{command!r} ended with {os.waitstatus_to_exitcode(status)}; see {log}")
        return time.monotonic() - began, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def provenance(device: str) -> dict[str, Any]:
    """Command, versions and machine of a result."""
    import torch

    from monai_mamba import __version__

    # Where a folder lies on one computer says nothing to others.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
    return {
        "command": " ".join(["python", *(f'"{word}"' if " " in word else word for word in words)]),
        "versions": {
            "monai-mamba": __version__,
            "nnunetv2": version("nnunetv2"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        },
    }
