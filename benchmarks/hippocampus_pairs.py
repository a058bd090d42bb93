"""Which cases of the decathlon's hippocampus set come from one person? Compare intensities by distance of case numbers.

    python benchmarks/hippocampus_pairs.py Task04_Hippocampus

The sample in ``monai_mamba/quickstart/data`` was chosen by what this prints.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import nibabel as nib
import numpy as np


def main() -> None:
    """Print the median and the quartiles of the difference in log mean intensity between cases of near numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with imagesTr/hippocampus_XXX.nii.gz")
    folder = parser.parse_args().folder
    level = {
        int(re.findall(r"\d+", file.name)[0]): float(np.log(np.mean(nib.load(file).dataobj) + 1))
        for file in sorted(folder.glob("imagesTr/hippocampus_*.nii.gz"))
    }
    print(f"{len(level)} cases\n{'numbers':>24} {'pairs':>6} {'quartile':>9} {'median':>7} {'quartile':>9}")

    def show(name: str, step: int, parity: tuple[int, ...] = (0, 1)) -> None:
        pairs = [abs(level[n] - level[n + step]) for n in level if n + step in level and n % 2 in parity]
        low, middle, high = np.percentile(pairs, (25, 50, 75))
        print(f"{name:>24} {len(pairs):6} {low:9.3f} {middle:7.3f} {high:9.3f}")

    show("2k - 1 and 2k", 1, (1,))
    show("2k and 2k + 1", 1, (0,))
    for step in (2, 3, 4, 5, 8, 16):
        show(f"n and n + {step}", step)


if __name__ == "__main__":
    main()
