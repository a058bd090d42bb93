"""How long does a bundle train on its sample? Run the command of the bundles' pages, one after the other.

    OMP_NUM_THREADS=2 python benchmarks/bundle_samples.py
    OMP_NUM_THREADS=2 python benchmarks/bundle_samples.py nnmamba_seg

Each run is ``python -m monai.bundle run --config_file configs/train.json`` in a copy of the bundle, with imports, the
sample, validation and checkpoints. CPU seconds are those of all threads: on free cores the clock shows no more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUNDLES = Path(__file__).parents[1] / "bundles"
NAMES = sorted(path.parent.name for path in BUNDLES.glob("*/metadata.json"))


def main() -> None:
    """Print a row per bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="bundles; all without")
    arguments = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS')}, "
        f"load before the first run {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| bundle | seconds | CPU seconds | epochs | best of validation |\n| --- | --- | --- | --- | --- |", flush=True
    )
    for name in arguments.names or NAMES:
        print(run_once(name), flush=True)


def run_once(name: str) -> str:
    """Train one bundle on its sample; return its row."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / name
        shutil.copytree(BUNDLES / name / "configs", root / "configs")
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.json"]
        with open(root / "log.txt", "w") as log:
            if subprocess.run(command, cwd=root, stdout=log, stderr=subprocess.STDOUT).returncode:
                sys.exit((root / "log.txt").read_text()[-3000:])
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        card = json.loads((root / "models" / "model.json").read_text())
        epochs = max(int(part.split("/")[0]) for part in (root / "log.txt").read_text().split("Epoch: ")[1:])
    return f"| {name} | {seconds:.0f} | {cpu_seconds:.0f} | {epochs} | {card['metric']} {card['value']:.3f} |"


if __name__ == "__main__":
    main()
