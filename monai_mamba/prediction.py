"""Predictions of a trained bundle for files as users have them: pictures, NIfTI, DICOM, tables, data lists.

    find_inputs -> cases with the user's own names -> make_readable (DICOM to files the bundle reads, geometry checked)
                -> the bundle's preprocessing, inferer and postprocessing -> classes, landmarks or label maps

Nothing of a DICOM header but pixels and geometry is used; outputs carry no name but those of the user's files.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_mamba.errors import DatasetError, RunError
from monai_mamba.files import case_file, whole_file, write_text
from monai_mamba.training.datalist import MANIFEST, PICTURES, VOLUMES, list_inputs
from monai_mamba.training.label_maps import write_label_map
from monai_mamba.training.landmark_files import FoundLandmarks, write_landmark_table, write_markups
from monai_mamba.training.outputs import class_probabilities
from monai_mamba.training.trained import Trained, fingerprints
from monai_mamba.training.transforms import ReadPictured

FORMATS = ("csv", "json")


@dataclass(frozen=True)
class Prediction:
    """What a network says about one case; one of the three results is there.

    Attributes:
        case: the user's own name of it.
        patient: as the user's table says, else empty.
        probabilities: ``(classes,)``.
        landmarks: positions in mm.
        label_map: ``(1, *spatial)`` on the grid of the file.
    """

    case: str
    patient: str = ""
    probabilities: np.ndarray | None = None
    landmarks: FoundLandmarks | None = None
    label_map: Any = None


@dataclass
class Summary:
    """How a run of predictions went: names of the cases that were done, and the reason for each that was not."""

    done: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def find_inputs(source: os.PathLike[str] | str, trained: Trained) -> list[dict[str, Any]]:
    """Return the cases of a file, a folder, a table or a data list; DICOM is found by content, not by name.

    Args:
        source: a picture, a volume or a DICOM file; a folder of them (each file is a case; for volumes each folder of
            DICOM slices is one; for two views each folder with two images); a folder with a ``datalist.json`` (its test
            section); or a CSV table with ``image`` (or ``image1`` and ``image2``), and optionally ``case`` and
            ``patient``. Files of a table are relative to it; several channels are joined by ``;``.
        trained: the model, which decides what is looked for.

    Raises:
        DatasetError: if there is nothing that the model could take.
    """
    source = Path(source)
    if not source.exists():
        raise DatasetError(f"{source}: there is no such file or folder")
    if source.is_file():
        if source.suffix.lower() == ".csv":
            return _read_table(source, trained)
        if len(trained.image_keys) > 1:
            raise DatasetError(
                f"{source}: is one image; the model needs {' and '.join(trained.image_keys)}: give a folder with both, "
                "or a table"
            )
        return [{"case": source.name, "image": str(source)}]
    if (source / MANIFEST).is_file():
        return list_inputs(source)
    cases = _two_views(source) if len(trained.image_keys) > 1 else _single_images(source, _takes_pictures(trained))
    if not cases:
        kind = f"pictures ({', '.join(PICTURES)})" if _takes_pictures(trained) else f"volumes ({', '.join(VOLUMES)})"
        views = ", two in each folder," if len(trained.image_keys) > 1 else ""
        raise DatasetError(f"{source}: holds no {kind}{views} and no DICOM file that this model could take")
    return cases


def predict(
    trained: Trained,
    cases: Sequence[dict[str, Any]],
    output_dir: os.PathLike[str] | str,
    *,
    formats: Sequence[str] = ("csv",),
    on_case: Callable[[str, str | None], None] | None = None,
) -> Summary:
    """Predict cases and write what was found.

    A case that cannot be read is left out and named; the others are done. Tables appear when all cases are done.

    Args:
        trained: the model.
        cases: of :func:`find_inputs`.
        output_dir: for classification ``predictions.csv`` or ``.json``; for landmarks ``landmarks.csv`` or ``.json``
            and ``<case>.mrk.json`` for 3D Slicer; for segmentation ``<case>.nii.gz``.
        formats: ``"csv"``, ``"json"`` or both.
        on_case: called after each case with its name and the reason why it was refused, if it was.

    Raises:
        ValueError: if a format is unknown.
        DatasetError: if a case appears twice.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"`formats` must be of {', '.join(FORMATS)}, got {list(formats)}")
    names = [str(case["case"]) for case in cases]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(f"the case {twice[0]} appears twice; name the cases in a table")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    tools = _Tools(trained)
    summary, found = Summary(), []
    for case in cases:
        name, reason = str(case["case"]), None
        try:
            with make_readable(case, trained) as readable:
                prediction = tools.predict(readable)
            if trained.task == "segmentation":
                write_label_map(case_file(folder, name, ".nii.gz"), prediction.label_map)
            else:
                found.append(prediction)
            if prediction.landmarks is not None:
                write_markups(
                    case_file(folder, name, ".mrk.json"), trained.get("landmarks"), prediction.landmarks.position_mm
                )
            summary.done.append(name)
        except DatasetError as error:
            reason = str(error)
            summary.refused[name] = reason
        if on_case is not None:
            on_case(name, reason)
    if found:
        _write_tables(trained, found, summary, folder, formats)
    return summary


@contextlib.contextmanager
def make_readable(case: dict[str, Any], trained: Trained) -> Iterator[dict[str, Any]]:
    """Yield the case with files that the bundle reads: DICOM is converted aside, NIfTI headers are checked.

    Raises:
        DatasetError: if a file cannot be used; the text names it and gives the reason.
    """
    with tempfile.TemporaryDirectory(prefix="monai-mamba-") as work:
        readable = dict(case)
        missing = [key for key in trained.image_keys if key not in case]
        if missing:
            raise DatasetError(f"case {case['case']}: has no {' nor '.join(missing)}, which the model needs")
        for number, key in enumerate(trained.image_keys):
            files = case[key] if isinstance(case[key], list) else [case[key]]
            paths = [
                str(_readable_file(Path(file), Path(work) / f"{number}-{index}", _takes_pictures(trained)))
                for index, file in enumerate(files)
            ]
            readable[key] = paths if isinstance(case[key], list) else paths[0]
        yield readable


class _Tools:
    """What a bundle's configuration says about inference, made once."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.postprocessing = (
            None if trained.classes and trained.task != "segmentation" else trained.get("postprocessing")
        )

    @torch.no_grad()
    def predict(self, case: dict[str, Any]) -> Prediction:
        trained = self.trained
        data = trained.prepare(trained.read(case))
        image = data["image"]
        try:
            output = trained.infer(image)
        except ValueError as error:  # a size or number of channels that the network refuses
            raise DatasetError(f"case {case['case']}: the network cannot take it: {error}") from error
        name, patient = str(case["case"]), str(case.get("patient", ""))
        if self.postprocessing is None:
            probabilities = class_probabilities(output[None], len(trained.classes), trained.multi_label)
            return Prediction(name, patient, probabilities=probabilities[0].numpy())
        post = self.postprocessing({**data, "pred": output.cpu()})
        if trained.task == "segmentation":
            return Prediction(name, patient, label_map=post["pred"])
        position, peak = post["pred_mm"].numpy(), post["peak"].numpy()
        if len(position) != len(trained.get("landmarks")):
            raise RunError(
                f"the network has {len(position)} outputs, the model {len(trained.get('landmarks'))} landmarks"
            )
        return Prediction(name, patient, landmarks=FoundLandmarks(name, patient, position, peak))


def _takes_pictures(trained: Trained) -> bool:
    return isinstance(trained.reading.transforms[0], ReadPictured)


def _single_images(folder: Path, pictures: bool) -> list[dict[str, Any]]:
    files, dicom = _sort_files(folder, PICTURES if pictures else VOLUMES)
    paths = [*files, *(dicom if pictures else sorted({file.parent for file in dicom}))]
    return [
        {"case": str(path.relative_to(folder)) if path != folder else folder.resolve().name, "image": str(path)}
        for path in sorted(paths)
    ]


def _two_views(folder: Path) -> list[dict[str, Any]]:
    files, dicom = _sort_files(folder, PICTURES)
    by_folder: dict[Path, list[Path]] = {}
    for file in sorted([*files, *dicom]):
        by_folder.setdefault(file.parent, []).append(file)
    cases = []
    for study, views in sorted(by_folder.items()):
        name = str(study.relative_to(folder)) if study != folder else folder.resolve().name
        if len(views) != 2:
            raise DatasetError(
                f"{study}: holds {len(views)} images; a study is a folder with two (the first by name is the first "
                "view), or give a table with image1 and image2"
            )
        cases.append({"case": name, "image1": str(views[0]), "image2": str(views[1])})
    return cases


def _sort_files(folder: Path, endings: tuple[str, ...]) -> tuple[list[Path], list[Path]]:
    """Files with one of the endings, and DICOM files."""
    from data_prep.dicom.headers import is_dicom

    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    named = [file for file in files if file.name.lower().endswith(endings)]
    others = [file for file in files if not file.name.lower().endswith((*PICTURES, *VOLUMES, ".csv", ".json", ".txt"))]
    return named, [file for file in others if is_dicom(file)]


def _read_table(path: Path, trained: Trained) -> list[dict[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read as a table: {error}") from error
    if not rows:
        raise DatasetError(f"{path}: has no rows")
    missing = [key for key in trained.image_keys if key not in rows[0]]
    if missing:
        raise DatasetError(f"{path}: needs the column {', '.join(missing)}; has {', '.join(map(str, rows[0]))}")
    cases = []
    for row in rows:
        case: dict[str, Any] = {"case": row.get("case") or row[trained.image_keys[0]]}
        if row.get("patient"):
            case["patient"] = row["patient"]
        for key in trained.image_keys:
            files = [str(path.parent / name.strip()) for name in (row[key] or "").split(";") if name.strip()]
            if not files:
                raise DatasetError(f"{path}: case {case['case']}: `{key}` is empty")
            case[key] = files if len(files) > 1 else files[0]
        cases.append(case)
    return cases


def _readable_file(path: Path, work: Path, pictures: bool) -> Path:
    from data_prep.dicom.headers import is_dicom, read_dataset
    from data_prep.errors import DataPrepError
    from data_prep.nifti import open_nifti

    if not path.exists():
        raise DatasetError(f"{path}: there is no such file")
    try:
        if path.is_dir() or (not path.name.lower().endswith((*PICTURES, *VOLUMES)) and is_dicom(path)):
            if not pictures:
                return _dicom_volume(path, work)
            from PIL import Image

            from data_prep.dicom.projection import render

            pixels, _ = render(read_dataset(path, pixels=True))
            work.mkdir()
            Image.fromarray(pixels).save(work / "image.png")
            return work / "image.png"
        if path.name.lower().endswith(VOLUMES):
            open_nifti(path)
        return path
    except DataPrepError as error:
        raise DatasetError(f"{path}: {error}") from error


def _dicom_volume(path: Path, work: Path) -> Path:
    """Convert the one volume of a folder (or of a multi-frame file) with `data_prep`, geometry proven."""
    from data_prep.cli import convert
    from data_prep.sources.dicom import Dicom

    (work / "in").mkdir(parents=True)
    for number, file in enumerate([path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())):
        (work / "in" / f"{number:06d}{file.suffix}").symlink_to(file.resolve())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert(Dicom(labels="none"), [work / "in"], work / "out", format="monai", engine="serial", folds=0)
    volumes = sorted((work / "out" / "images").glob("*.nii.gz"))
    if len(volumes) == 1:
        return volumes[0]
    if volumes:
        raise DatasetError(f"{path}: holds {len(volumes)} volumes; give one folder for each series")
    with open(work / "private-out" / "report.csv", newline="", encoding="utf-8") as table:
        reasons = sorted(
            {f"{row['reason']}" for row in csv.DictReader(table) if row["status"] != "ok" and row["reason"]}
        )
    raise DatasetError(f"{path}: gives no volume: {', '.join(reasons) or 'no image in it'} (docs/data_prep/dicom.md)")


def _write_tables(
    trained: Trained, found: list[Prediction], summary: Summary, folder: Path, formats: Sequence[str]
) -> None:
    is_landmarks = trained.task == "landmarks"
    stem = "landmarks" if is_landmarks else "predictions"
    if "csv" in formats and is_landmarks:
        write_landmark_table(
            folder / "landmarks.csv", trained.get("landmarks"), [one.landmarks for one in found if one.landmarks]
        )
    elif "csv" in formats:
        with (
            whole_file(folder / "predictions.csv") as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["case", "patient", "predicted", *(f"prob_{name}" for name in trained.classes)])
            for one in found:
                assert one.probabilities is not None
                row = [one.case, one.patient, _predicted(one.probabilities, trained)]
                writer.writerow([*row, *(f"{p:.6g}" for p in one.probabilities)])
    if "json" in formats:
        from monai_mamba.evaluation.results import to_json

        content = {
            "task": trained.task,
            "model": fingerprints(trained),
            "cases": [_as_json(one, trained) for one in found],
            "refused": summary.refused,
        }
        write_text(folder / f"{stem}.json", to_json(content))


def _predicted(probabilities: np.ndarray, trained: Trained) -> str:
    if trained.multi_label:
        return ";".join(name for name, p in zip(trained.classes, probabilities, strict=True) if p >= 0.5)
    return trained.classes[int(probabilities.argmax())]


def _as_json(one: Prediction, trained: Trained) -> dict[str, Any]:
    entry: dict[str, Any] = {"case": one.case} | ({"patient": one.patient} if one.patient else {})
    if one.landmarks is not None:
        points = zip(trained.get("landmarks"), one.landmarks.position_mm, one.landmarks.peak, strict=True)
        return entry | {
            "coordinates": "world, mm, RAS+",
            "landmarks": {
                name: {"position_mm": [round(float(x), 4) for x in position], "peak": float(peak)}
                for name, position, peak in points
            },
        }
    assert one.probabilities is not None
    probabilities = dict(zip(trained.classes, map(float, one.probabilities), strict=True))
    return entry | {"predicted": _predicted(one.probabilities, trained), "probabilities": probabilities}
