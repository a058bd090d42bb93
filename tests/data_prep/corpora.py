"""Damaged files by the hundred, converted in a process of their own whose time and memory are measured.

    python -m tests.data_prep.corpora dicom 2000 FOLDER
    python -m tests.data_prep.corpora nifti 300 FOLDER

Prints one line of JSON: counts of verdicts, the wall seconds of the slowest file and case, and the peak of resident
memory. Ends with an assertion when a case is lost, an error has no name, or a voxel is not where its header says.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from data_prep.engine.journal import read_journals
from tests.data_prep.dicom_factories import assert_every_voxel_is_where_its_header_says, make_slice, uid
from tests.data_prep.factories import decathlon_tree, report_lines, write_nifti_volume

SAMPLES = Path(__file__).parents[1] / "data" / "data_prep"
REAL = ("ts_implicit", "ts_j2k_lossless", "ts_jpegls", "ts_jpeg_lossless", "ts_rle", "enhanced_4d_siemens_xa10")
PER_RUN = 50


@dataclass
class Cost:
    """What the conversions took: wall seconds of the slowest case, peak of resident memory of command and workers.

    Other work on the machine counts in the seconds.
    """

    slowest_s: float = 0.0
    peak_mb: float = 0.0

    def convert(self, source: str, folder: Path, out: Path, *options: str) -> int:
        """Run the command and return its exit code; it must not show a traceback."""
        command = [sys.executable, "-m", "data_prep", source, str(folder), "--out", str(out), "--workers", "1"]
        with open(out.with_suffix(".log"), "wb") as log:
            process = subprocess.Popen([*command, "--case-timeout", "20", *options], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert b"Traceback" not in out.with_suffix(".log").read_bytes()
        self.peak_mb = max(self.peak_mb, usage.ru_maxrss / 1024)
        for record in read_journals(out.parent / f"private-{out.name}").values():
            assert record["reason"] != "timeout"
            self.slowest_s = max(self.slowest_s, record["seconds"])
        return process.returncode


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One damage: cut, bits flipped, a length of 2 GB, bytes deleted, inserted or overwritten."""
    kind, at = int(rng.integers(7)), int(rng.integers(132, len(data)))
    header_at = int(rng.integers(132, min(len(data) - 8, 2000)))
    changed = bytearray(data)
    if kind == 0:
        return data[:at]
    if kind == 1:
        for place in rng.integers(132, len(data), int(rng.integers(1, 40))):
            changed[place] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        changed[header_at : header_at + 4] = b"\xff\xff\xff\x7f"
    elif kind == 3:
        del changed[at : at + int(rng.integers(1, 64))]
    elif kind == 4:
        changed[at:at] = rng.bytes(int(rng.integers(1, 64)))
    elif kind == 5:
        changed[header_at : header_at + 8] = rng.bytes(8)
    else:  # a digit of a number, or a letter of a word, in the header
        places = [k for k in range(132, min(len(data), 2500)) if chr(data[k]).isalnum()]
        changed[places[int(rng.integers(len(places)))]] = rng.choice(list(b"0123456789.-\\ E"))
    return bytes(changed)


def series(number: int) -> list[bytes]:
    """Files of one good series: synthetic, or a real one in one of six transfer syntaxes."""
    kinds = [
        "",
        "ts_implicit",
        "ts_j2k_lossless",
        "ts_jpegls",
        "ts_jpeg_lossless",
        "ts_rle",
        "enhanced_4d_siemens_xa10",
    ]
    kind = kinds[number % len(kinds)] if number % 2 else ""
    if not kind:
        sets = [make_slice(k, series=f"s{number}", seed=number, step=2.5) for k in range(5)]
    else:
        sets = [pydicom.dcmread(path) for path in sorted((SAMPLES / kind).iterdir())]
    content = []
    for one in sets:
        one.SeriesInstanceUID = uid("corpus", number)
        buffer = pydicom.filebase.DicomBytesIO()
        one.save_as(buffer, enforce_file_format=True)
        content.append(buffer.getvalue())
    return content


def run_dicom(folder: Path, count: int, cost: Cost) -> Counter[str]:
    """Every mutant stands for one file of a series of its own."""
    rng, verdicts = np.random.default_rng(7), Counter[str]()
    for first in range(0, count, PER_RUN):
        here = folder / str(first)
        for number in range(first, min(first + PER_RUN, count)):
            target = here / "in" / f"s{number:05d}"
            target.mkdir(parents=True)
            files = series(number)
            mutant = int(rng.integers(len(files)))
            files[mutant] = mutate(files[mutant], rng)
            for place, content in enumerate(files):
                (target / f"{place}{'_mutant' if place == mutant else ''}.dcm").write_bytes(content)
        code = cost.convert("dicom", here / "in", here / "out", "--time", "first")
        lines = report_lines(here / "out")
        paths = sorted(path for path in (here / "in").rglob("*") if path.is_file())
        assert code in (0, 3)
        assert {name for kind, name, _ in lines if kind == "file"} == {str(p.relative_to(here / "in")) for p in paths}
        assert "unexpected-error" not in {reason for _, reason in lines.values()}, lines
        check_places(here)
        for (kind, name, _), (status, reason) in lines.items():
            if kind == "file" and "_mutant" in name:
                verdicts[f"{status}: {reason}" if reason else status] += 1
        shutil.rmtree(here)
    return verdicts


def check_places(here: Path) -> None:
    """Every volume holds exactly the files that its case names, each where its own header says."""
    cases: dict[str, list[Path]] = {}
    with open(here / "private-out" / "report.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["kind"] == "file" and row["status"] == "ok" and row["case"]:
                cases.setdefault(row["case"], []).append(here / "in" / row["input"])
    images = {path.name.removesuffix(".nii.gz"): path for path in (here / "out" / "images").glob("*.nii.gz")}
    assert set(images) == set(cases)
    for case, files in cases.items():
        if len(pydicom.dcmread(files[0], stop_before_pixels=True).get("PerFrameFunctionalGroupsSequence") or []):
            continue  # files of several time points, of which one was taken; the affine is proven in the conversion
        assert_every_voxel_is_where_its_header_says(images[case], files)


def attack_nifti(raw: bytes, rng: np.random.Generator) -> bytes:
    """One lie in the header of a single-file NIfTI image, or a cut."""
    data, kind = bytearray(raw), int(rng.integers(12))
    if kind == 0:
        struct.pack_into("<h", data, 40 + 2 * int(rng.integers(1, 4)), int(rng.choice([0, -5, 32767])))
    elif kind == 1:
        struct.pack_into("<8h", data, 40, 3, 32767, 32767, 32767, 1, 1, 1, 1)
    elif kind == 2:
        struct.pack_into("<f", data, 108, float(rng.choice([0, 100, np.nan, 1e30])))
    elif kind == 3:
        struct.pack_into("<f", data, 280 + 4 * int(rng.integers(12)), np.nan)
        struct.pack_into("<h", data, 252, 0)
    elif kind == 4:
        struct.pack_into("<12f", data, 280, *([0.0] * 12))
        struct.pack_into("<h", data, 252, 0)
    elif kind == 5:
        return bytes(data[: int(rng.integers(0, len(data) - 1))])
    elif kind == 6:
        data[344:348] = b"ni1\0"
    elif kind == 7:
        struct.pack_into("<f", data, 112, float(rng.choice([np.inf, 1e38, -1e36])))
    elif kind == 8:
        struct.pack_into("<2h", data, 252, 0, 0)
    elif kind == 9:
        struct.pack_into("<h", data, 70, int(rng.choice([0, 9999, 1536, 32, 128])))
    elif kind == 10:
        data[123] = int(rng.choice([1, 3]))  # meters, micrometers
    else:
        struct.pack_into("<f", data, 280 + 4 * int(rng.choice([1, 2, 4, 6, 8, 9])), 0.3)  # shears the sform
        struct.pack_into("<h", data, 252, 0)
    return bytes(data)


def run_nifti(folder: Path, count: int, cost: Cost) -> Counter[str]:
    """A decathlon task whose images are attacked, every second one packed, and some of them bombs of zeros."""
    root = decathlon_tree(folder, count)
    write_nifti_volume(folder / "good.nii", (12, 10, 8))
    raw, rng = (folder / "good.nii").read_bytes(), np.random.default_rng(1)
    for number in range(count):
        attacked = raw + bytes(100 << 20) if number % 100 == 99 else attack_nifti(raw, rng)
        path = root / f"imagesTr/toy_{number:03d}.nii.gz"
        path.write_bytes(gzip.compress(attacked, 1) if number % 2 else attacked)
    assert cost.convert("decathlon", root, folder / "out") == 3
    verdicts: Counter[str] = Counter()
    for (kind, name, _), (status, reason) in report_lines(folder / "out").items():
        if kind == "case" and name != "toy_900":
            assert status == "failed" and reason != "unexpected-error", (name, reason)
            verdicts[reason] += 1
    assert verdicts.total() == count
    return verdicts


def main() -> None:
    kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    os.environ["MONAI_MAMBA_KEY_FILE"] = str(folder / "key")
    folder.mkdir(parents=True, exist_ok=True)
    cost = Cost()
    verdicts = {"dicom": run_dicom, "nifti": run_nifti}[kind](folder, count, cost)
    print(json.dumps({"verdicts": verdicts, "slowest_s": cost.slowest_s, "peak_mb": round(cost.peak_mb)}))


if __name__ == "__main__":
    main()
