"""Time the data preparation against dcm2niix alone, count headers per second, and weigh a large plan.

    python benchmarks/data_prep.py --output benchmarks/results/data_prep [--series NAME=FOLDER ...]

Every series is first converted by both and must have the same voxels at the same places. Times are CPU seconds of one
core (command and everything it starts), minima of repetitions; compare ratios within one run only. Without --series,
synthetic CT and MR series are used; --series adds real ones. Figures by which the gzip levels were chosen are in
the part `gzip`. The part `workers` needs two free cores; all parts take some minutes.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this script is called like the package it measures

import dcm2niix
import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from data_prep.book import Book
from data_prep.dicom import headers
from data_prep.dicom.pixels import UNCOMPRESSED, decode
from data_prep.engine.plan import make_plan
from data_prep.engine.report import make_report
from data_prep.engine.worker import collect_rarely
from data_prep.errors import DicomReadError
from data_prep.geometry import max_distance_mm
from data_prep.identity import Pseudonyms
from data_prep.model import Case, Description, Make, Source
from data_prep.operations import Job, find_operation
from data_prep.sources.dicom import Dicom
from data_prep.tree import Tree

SAMPLES = Path(__file__).resolve().parents[1] / "tests" / "data" / "data_prep"
CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
PARTS = ["conversion", "headers", "gzip", "workers", "damage", "memory"]
GZIP = {"level 6": (6, 0), "level 3": (3, 0), "level 1": (1, 0), "runs": (1, zlib.Z_RLE)}


def write_series(folder: Path, modality: str, num_slices: int, size: int, seed: int = 0) -> Path:
    """A synthetic series: a noisy ellipsoid in air (CT, MR)."""
    rng, folder = np.random.default_rng(seed), folder
    folder.mkdir(parents=True)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    for number in range(num_slices):
        z = 2 * number / num_slices - 1
        body = (x / 0.8) ** 2 + (y / 0.6) ** 2 + (z / 1.2) ** 2 < 1
        texture = 40 * np.sin(9 * x + 5 * z) * np.cos(7 * y)
        if modality == "CT":
            pixels = np.where(body, 1064 + texture, 24) + rng.normal(0, 12, (size, size))
        else:
            # Rician noise, in air as well.
            pixels = np.hypot(
                np.where(body, 400 + 3 * texture, 0) + rng.normal(0, 12, (size, size)), rng.normal(0, 12, (size, size))
            )
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID = CT if modality == "CT" else MR
        one.SOPInstanceUID = generate_uid(entropy_srcs=[modality, str(seed), str(number)])
        one.StudyInstanceUID = generate_uid(entropy_srcs=["study", modality, str(seed)])
        one.SeriesInstanceUID = generate_uid(entropy_srcs=["series", modality, str(seed)])
        one.Modality, one.PatientID, one.PatientName = modality, f"P{seed}", f"P{seed}"
        one.ImageType, one.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], number + 1
        one.Rows, one.Columns, one.PixelSpacing, one.SliceThickness = size, size, [0.8, 0.8], 2
        one.ImageOrientationPatient, one.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [-200, -200, 2.0 * number]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 12, 11, 0
        one.RescaleSlope, one.RescaleIntercept = 1, -1024 if modality == "CT" else 0
        one.PixelData = np.clip(np.rint(pixels), 0, 4095).astype("<u2").tobytes()
        one.save_as(folder / f"IM{number:04d}", enforce_file_format=True)
    return folder


def cpu_seconds() -> float:
    """Of this process and of all that it has started and waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def least(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Minimum and maximum CPU seconds of the repetitions."""
    times = []
    for _ in range(repeats):
        start = cpu_seconds()
        function()
        times.append(cpu_seconds() - start)
    return min(times), max(times)


def run_dcm2niix(folder: Path, out: Path, packed: bool) -> list[Path]:
    for old in out.glob("*"):
        old.unlink()
    command = [dcm2niix.bin, "-b", "n", "-z", "y" if packed else "n", "-f", "%s_%d", "-o", str(out), str(folder)]
    subprocess.run(command, capture_output=True, check=True)
    return sorted(out.glob("*.nii*"))


def convert(folder: Path, out: Path) -> list[Path]:
    """Plan and make all volumes of a folder, without the engine."""
    for old in out.glob("*"):
        old.unlink()
    tree = Tree([folder])
    book = Book(tree)
    Dicom().plan(tree, book)
    made = []
    for number, case in enumerate(book.cases.values()):
        make = case.images[0]
        path = out / f"{number}.nii.gz"
        find_operation(make.operation)(Job(tuple(map(tree.absolute, make.inputs)), path, path, make.params))
        made.append(path)
    tree.close()
    return made


def gate(name: str, ours: list[Path], theirs: list[Path]) -> None:
    """Every volume of ours is one of dcm2niix, voxel by voxel and place by place."""
    references = [nibabel.as_closest_canonical(nibabel.load(path)) for path in theirs]
    for path in ours:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        if not any(
            image.shape == other.shape
            and max_distance_mm(image.shape, image.affine, other.affine) < 0.05
            and np.allclose(image.get_fdata(), other.get_fdata(), atol=1e-3)
            for other in references
        ):
            raise SystemExit(f"{name}: a volume differs from dcm2niix; no times are given")


def time_conversion(series: dict[str, Path], repeats: int, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, source in series.items():
        here, there = folder / f"{name}-ours", folder / f"{name}-dcm2niix"
        here.mkdir()
        there.mkdir()
        gate(name, convert(source, here), run_dcm2niix(source, there, packed=False))
        reference, reference_max = least(lambda s=source, t=there: run_dcm2niix(s, t, packed=True), repeats)  # type: ignore[misc]
        size = sum(path.stat().st_size for path in there.glob("*.nii.gz"))
        ours, ours_max = least(lambda s=source, h=here: convert(s, h), repeats)  # type: ignore[misc]
        rows.append(
            {
                "series": name,
                "files": sum(path.is_file() for path in source.rglob("*")),
                "dcm2niix_s": reference,
                "dcm2niix_max_s": reference_max,
                "ours_s": ours,
                "ours_max_s": ours_max,
                "speed_of_dcm2niix": reference / ours,
                "size_of_dcm2niix": sum(path.stat().st_size for path in here.glob("*.nii.gz")) / size,
            }
        )
    return rows


def time_headers(series: dict[str, Path], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for name, source in series.items():
        files = [path for path in source.rglob("*") if path.is_file()]
        seconds, seconds_max = least(lambda f=files: [headers.read_facts(path) for path in f], repeats)  # type: ignore[misc]
        rows.append(
            {
                "series": name,
                "files": len(files),
                "files_per_s": len(files) / seconds,
                "files_per_s_least": len(files) / seconds_max,
            }
        )
    return rows


def time_gzip(series: dict[str, Path], folder: Path) -> list[dict[str, Any]]:
    rows = []
    for name, source in series.items():
        out = folder / f"{name}-gzip"
        out.mkdir()
        data = np.asanyarray(nibabel.load(convert(source, out)[0]).dataobj).tobytes(order="F")
        sizes, times = {}, {}
        for label, (level, strategy) in GZIP.items():

            def pack(data: bytes = data, level: int = level, strategy: int = strategy) -> bytes:
                packer = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
                return packer.compress(data) + packer.flush()

            times[label], sizes[label] = least(pack, 2)[0], len(pack())
        row: dict[str, Any] = {"series": name, "mb": len(data) / 1e6}
        for label in GZIP:
            row[f"{label}: time"] = times[label] / times["level 6"]
            row[f"{label}: size"] = sizes[label] / sizes["level 6"]
        rows.append(row)
    return rows


def time_workers(folder: Path, num_cases: int) -> list[dict[str, Any]]:
    """Wall time of the whole command with one and two workers."""
    source = folder / "cases"
    for number in range(num_cases):
        write_series(source / str(number), "CT", 40, 384, seed=100 + number)
    rows, seconds = [], {}
    for workers in (1, 2):
        out = folder / f"out-{workers}"
        command = [sys.executable, "-m", "data_prep", "dicom", str(source), "--out", str(out)]
        start = time.perf_counter()
        subprocess.run([*command, "--workers", str(workers)], check=True, capture_output=True)
        seconds[workers] = time.perf_counter() - start
        rows.append({"workers": workers, "cases": num_cases, "wall_s": seconds[workers]})
    rows[1]["speed_up"] = seconds[1] / seconds[2]
    rows[0]["speed_up"] = 1.0
    return rows


@dataclass(frozen=True)
class Rows(Source):
    """A table with one image per row."""

    name: ClassVar[str] = "rows"
    identifiers = "personal"

    def plan(self, tree: Tree, book: Book) -> Description:
        book.use("table.csv")
        for row in tree.table("table.csv", required=["path", "label"]):
            make = Make("operations.pictures:picture", (row["path"],))
            patient = row["path"].split("/")[1]
            book.add(Case(row["path"], patient, (make,), target=int(row["label"]), refs=(row.ref,), same_grid=False))
        return Description("Rows", "classification", ("image",), {"no": 0, "yes": 1}, file_ending=".png")


def weigh_plan(count: int) -> dict[str, Any]:
    """Plan, its files, and the report of `count` rows; run in a process of its own, whose memory is measured."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "in"
        lines = ["path,label"]
        for number in range(count):
            folder, path = f"train/patient{number // 5:05d}", f"image{number % 5}.jpg"
            if number % 5 == 0:
                (root / folder).mkdir(parents=True)
            os.close(os.open(root / folder / path, os.O_CREAT))
            lines.append(f"{folder}/{path},{number % 2}")
        (root / "table.csv").write_text("\n".join(lines) + "\n")
        del lines
        start = cpu_seconds()
        tree = Tree([root])
        plan = make_plan(Rows(), tree, Pseudonyms(b"k" * 32, "personal"), "monai", 5, 0)
        tree.close()
        plan.save(Path(name))
        planned = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record: dict[str, Any] = {"status": "ok", "reason": "", "detail": "", "notes": [], "files": []}
        report = make_report(plan, {entry.name: record for entry in plan.entries})
        report.csv(plan.shown)
        return {
            "rows": count,
            "cpu_s": cpu_seconds() - start,
            "plan_mb": planned / 1024,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }


def weigh_plans(counts: list[int]) -> list[dict[str, Any]]:
    rows = []
    for count in counts:
        command = [sys.executable, __file__, "--weigh", str(count)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def damage_pixels(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One flipped bit in the pixel data of a file that is otherwise whole: refused, without effect, or other voxels."""
    rng, rows = np.random.default_rng(seed), []
    for name in ("implicit", "rle", "jpeg_lossless", "jpegls", "j2k_lossless"):
        dataset = headers.read_dataset(sorted((SAMPLES / f"ts_{name}").iterdir())[0], pixels=True)
        good, data = decode(dataset), dataset.PixelData
        is_encapsulated = str(dataset.file_meta.TransferSyntaxUID) not in UNCOMPRESSED
        frame = next(generate_frames(data, number_of_frames=1)) if is_encapsulated else data
        row: dict[str, Any] = {"syntax": name, "files": count, "refused": 0, "no_effect": 0, "other_voxels": 0}
        changed = []
        for _ in range(count):
            damaged = bytearray(frame)
            damaged[int(rng.integers(len(frame)))] ^= 1 << int(rng.integers(8))
            dataset.PixelData = encapsulate([bytes(damaged)]) if is_encapsulated else bytes(damaged)
            try:
                found = decode(dataset)
            except DicomReadError:
                row["refused"] += 1
                continue
            share = float((found != good).mean())
            row["other_voxels" if share else "no_effect"] += 1
            changed += [share] if share else []
        rows.append(row | {"median_share_of_voxels": float(np.median(changed)) if changed else 0.0})
    return rows


def as_markdown(result: dict[str, Any]) -> str:
    lines = ["# Data preparation benchmark", ""]
    lines += [f"- {key}: {value}" for key, value in result.items() if not isinstance(value, list)]
    for part, rows in result.items():
        if not isinstance(rows, list) or not rows:
            continue
        columns = list(rows[0])
        lines += [
            "",
            f"## {part}",
            "",
            "| " + " | ".join(columns) + " |",
            "| " + " | ".join("---" for _ in columns) + " |",
        ]
        for row in rows:
            cells = [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="path without ending; .json and .md are written")
    parser.add_argument("--series", action="append", default=[], help="NAME=FOLDER of a real series")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, default=24, help="cases for the comparison of one and two workers")
    parser.add_argument("--rows", type=int, nargs="*", default=[25_000, 250_000], help="rows of the plans to weigh")
    parser.add_argument("--flips", type=int, default=200, help="files per transfer syntax that are damaged")
    parser.add_argument(
        "--part", action="append", choices=["conversion", "headers", "gzip", "workers", "damage", "memory"]
    )
    parser.add_argument("--weigh", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.weigh:
        print(json.dumps(weigh_plan(arguments.weigh)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    collect_rarely()  # as the command and its workers do
    result: dict[str, Any] = {
        "command": "python benchmarks/data_prep.py"
        + "".join(f" --series {n.split('=')[0]}=..." for n in arguments.series),
        "machine": f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("dcm2niix", "pydicom", "numpy", "SimpleITK")),
        "repeats": arguments.repeats,
    }
    if arguments.output and arguments.output.with_suffix(".json").exists() and arguments.part:
        known = json.loads(arguments.output.with_suffix(".json").read_text())
        result = {**known, **result}
    parts = arguments.part or PARTS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MONAI_MAMBA_KEY_FILE"] = str(folder / "key")
        series = {
            "synthetic CT": write_series(folder / "ct", "CT", 60, 512),
            "synthetic MR": write_series(folder / "mr", "MR", 60, 256),
        }
        series |= {text.split("=", 1)[0]: Path(text.split("=", 1)[1]) for text in arguments.series}
        if "conversion" in parts:
            result["conversion"] = time_conversion(series, arguments.repeats, folder)
        if "headers" in parts:
            result["headers"] = time_headers(series, arguments.repeats)
        if "gzip" in parts:
            result["gzip"] = time_gzip(series, folder)
        if "workers" in parts:
            result["workers"] = time_workers(folder, arguments.cases)
        if "damage" in parts:
            result["damage"] = damage_pixels(arguments.flips)
        if "memory" in parts:
            result["memory"] = weigh_plans(arguments.rows)
    text = as_markdown(result)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
