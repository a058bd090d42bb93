"""``monai-mamba-data check``: does a data set still hold what its manifest says, and does nobody leak between folds?"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.engine.files import sha256
from data_prep.engine.run import MANIFEST
from data_prep.errors import CaseError, UsageError
from data_prep.geometry import Grid, grid_difference, landmarks_in_voxels

#: files of the data set that no manifest line names
_DOCUMENTS = {MANIFEST, "dataset.json", "datalist.json", "cases.csv", "report.csv", "report.json", "splits_final.json",
              "landmarks.json"}  # fmt: skip


@dataclass
class Findings:
    """What `check_data_set` found: lines ``reason: where: detail``, and how much it looked at."""

    problems: list[str] = field(default_factory=list)
    num_cases: int = 0
    num_files: int = 0
    contents: dict[str, str] = field(default_factory=dict)
    """Path of an image to the hash of its pixels or voxels."""

    def add(self, reason: str, where: str, detail: str = "") -> None:
        self.problems.append(f"{reason}: {where}" + (f": {detail}" if detail else ""))


def check_data_set(out: Path) -> Findings:
    """Verify every file, the descriptions, and the folds of a data set.

    Checked: checksum and size of every file; that it opens and has the grid of the manifest; that the files of a case
    share one grid; label values against the manifest and ``dataset.json``; that ``dataset.json`` or ``datalist.json``
    and ``splits_final.json`` name exactly the files, parts and folds that are there; that no patient and no image with
    identical pixels is on two sides of a split.

    Raises:
        UsageError: `out` is no data set of this package.
    """
    lines = _read_manifest(out)
    findings = Findings(num_cases=len(lines))
    allowed = _allowed_labels(out)
    for line in lines:
        grids: list[Grid] = []
        for number, file in enumerate(line["files"]):
            findings.num_files += 1
            grid = _check_file(out, file, number >= line["images"], allowed, findings)
            if grid is not None:
                grids.append(grid)
        try:
            landmarks_in_voxels(line.get("landmarks", []), grids[0] if grids else None)
        except CaseError as error:
            findings.add(error.reason, line["case"], error.detail)
        if line["same_grid"]:
            for grid in grids[1:]:
                difference = grid_difference(grids[0], grid)
                if difference:
                    findings.add("grids-differ", line["case"], difference)
    _check_strays(out, lines, findings)
    _check_landmarks(out, lines, findings)
    _check_documents(out, lines, findings)
    _check_leakage(out, lines, findings)
    return findings


def _read_manifest(out: Path) -> list[dict[str, Any]]:
    try:
        with open(out / MANIFEST, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        for line in lines:
            line["case"], line["patient"], line["part"], line["files"], line["images"], line["same_grid"]
    except OSError as error:
        raise UsageError(f"{out} has no {MANIFEST}; it is not a finished data set of this command.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{MANIFEST} is damaged; make the data set again.") from error
    return lines


def _allowed_labels(out: Path) -> set[int] | None:
    try:
        labels = json.loads((out / "dataset.json").read_text())["labels"]
        return {v for value in labels.values() for v in ([value] if isinstance(value, int) else value)} | {0}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_file(
    out: Path, file: dict[str, Any], is_label: bool, allowed: set[int] | None, findings: Findings
) -> Grid | None:
    path = out / file["path"]
    try:
        if path.stat().st_size != file["bytes"] or sha256(path) != file["sha256"]:
            findings.add("checksum", file["path"], "the file has changed")
    except OSError:
        findings.add("missing-file", file["path"])
        return None
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            return _check_nifti(path, file, is_label, allowed, findings)
        if path.suffix in (".png", ".jpg"):
            from data_prep.operations.pictures import open_picture

            picture = open_picture(path)[0]
            size = list(picture.size)
            findings.contents[file["path"]] = hashlib.sha256(
                f"{size}{picture.mode}".encode() + picture.tobytes()
            ).hexdigest()
            if "grid" in file and size != file["grid"]["shape"]:
                findings.add("size-differs", file["path"], f"{size} against {file['grid']['shape']} in the manifest")
    except CaseError as error:
        findings.add(error.reason, file["path"], error.detail)
    return None


def _check_nifti(
    path: Path, file: dict[str, Any], is_label: bool, allowed: set[int] | None, findings: Findings
) -> Grid:
    from data_prep.nifti import open_nifti, verify_stream
    from data_prep.operations.volumes import to_integers

    nifti = open_nifti(path)
    if "grid" in file:
        difference = grid_difference(Grid.from_json(file["grid"]), nifti.grid)
        if difference:
            findings.add("geometry", file["path"], difference)
    if is_label:
        found = [int(value) for value in np.unique(to_integers(nifti.read()))]
        if "labels" in file and found != file["labels"]:
            findings.add("label-values", file["path"], f"{found} against {file['labels']} in the manifest")
        if allowed is not None and set(found) - allowed:
            findings.add("label-values", file["path"], f"{sorted(set(found) - allowed)} are not in dataset.json")
    else:
        findings.contents[file["path"]] = verify_stream(nifti)
    return nifti.grid


def _check_strays(out: Path, lines: list[dict[str, Any]], findings: Findings) -> None:
    known = {file["path"] for line in lines for file in line["files"]} | _DOCUMENTS
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if name.split("/")[0].startswith(".tmp-"):
            if path.parent == out:
                findings.add("leftover", name, "of a run that was stopped; run it again to its end")
        elif not path.is_dir() and name not in known:
            findings.add("unknown-file", name, "not in the manifest")


def _check_documents(out: Path, lines: list[dict[str, Any]], findings: Findings) -> None:
    checks = {"dataset.json": _check_dataset_json, "datalist.json": _check_datalist, "splits_final.json": _check_splits}
    for name, check in checks.items():
        content = _json(out / name, findings) if (out / name).exists() else None
        if content is not None:
            try:
                check(content, lines, findings)
            except (TypeError, ValueError, KeyError, AttributeError, IndexError):
                findings.add("damaged-document", name, "its parts are not what they should be")


def _check_dataset_json(content: Any, lines: list[dict[str, Any]], findings: Findings) -> None:
    training = [line for line in lines if line["part"] != "test" and _in_training(line)]
    if content.get("numTraining") != len(training):
        findings.add("dataset.json", "numTraining", f"{content.get('numTraining')} against {len(training)} cases")
    channels = len(content.get("channel_names", {}))
    for line in lines:
        if line["images"] != channels:
            findings.add("dataset.json", line["case"], f"{line['images']} images, {channels} channels")
    ending = content.get("file_ending")
    for path in (file["path"] for line in lines for file in line["files"]):
        if not path.endswith(str(ending)):
            findings.add("dataset.json", path, f"does not end with the file_ending {ending!r}")
    if "dataset" in content:
        wanted = {line["case"]: [file["path"] for file in line["files"]] for line in training}
        named = {case: [*entry["images"], entry["label"]] for case, entry in content["dataset"].items()}
        for case in sorted(wanted.keys() | named.keys()):
            if wanted.get(case) != named.get(case):
                findings.add("dataset.json", case, "its key `dataset` and the manifest name different files")


def _check_datalist(content: Any, lines: list[dict[str, Any]], findings: Findings) -> None:
    parts = {"training": "train", "validation": "val", "test": "test", "testing": "test"}
    owners = {file["path"]: line for line in lines for file in line["files"]}
    named: set[str] = set()
    for key, part in parts.items():
        for entry in content.get(key, []):
            paths = [
                str(PurePosixPath(value))
                for name, values in entry.items()
                if name.startswith(("image", "label", "mask"))
                for value in (values if isinstance(values, list) else [values])
                if isinstance(value, str)
            ]
            named.update(paths)
            cases = {owners[path]["case"] for path in paths if path in owners}
            if len(cases) > 1:
                findings.add("datalist.json", " and ".join(sorted(cases)), "one entry has files of several cases")
            for line in {owners[path]["case"]: owners[path] for path in paths if path in owners}.values():
                if line["part"] != part or line["fold"] != entry.get("fold"):
                    findings.add(
                        "datalist.json", line["case"],
                        f"is in {key}, fold {entry.get('fold')}; the manifest says {line['part']}, fold {line['fold']}",
                    )  # fmt: skip
    for path in sorted(named ^ owners.keys()):
        findings.add("datalist.json", path, "is in only one of datalist and manifest")


def _check_splits(content: Any, lines: list[dict[str, Any]], findings: Findings) -> None:
    training = {line["case"] for line in lines if line["part"] != "test"}
    for number, split in enumerate(content):
        train, held_out = set(split["train"]), set(split["val"])
        for case in sorted((train | held_out) - training):
            findings.add("splits_final.json", case, "is not a training case")
        for case in sorted(training - train - held_out):
            findings.add("splits_final.json", case, f"is in neither part of fold {number}")
        _compare_sides(f"fold {number}", train, held_out, lines, findings)


def _check_landmarks(out: Path, lines: list[dict[str, Any]], findings: Findings) -> None:
    """Landmarks of datalist.json and landmarks.json are those of the manifest, in world and in voxels alike."""
    named: dict[str, dict[str, Any]] = {}
    if (out / "landmarks.json").exists():
        named |= (_json(out / "landmarks.json", findings) or {}).get("cases", {})
    if (out / "datalist.json").exists():
        content = _json(out / "datalist.json", findings) or {}
        for part in ("training", "validation", "test"):
            for entry in content.get(part, []):
                if "landmarks" in entry:
                    named[str(entry.get("case"))] = entry
    for line in lines:
        wanted, found = line.get("landmarks"), named.get(line["case"], {})
        if wanted != found.get("landmarks"):
            findings.add("landmarks", line["case"], "are not those of the manifest")
        elif wanted and "grid" in line["files"][0]:
            try:
                voxels = np.array(landmarks_in_voxels(wanted, Grid.from_json(line["files"][0]["grid"])))
                is_same = np.allclose(voxels, np.array(found["landmarks_voxel"]), rtol=0, atol=1e-3)
            except (CaseError, KeyError, ValueError, TypeError):
                is_same = False
            if not is_same:
                findings.add("landmarks", line["case"], "voxel and world coordinates are different places")


def _in_training(line: dict[str, Any]) -> bool:
    return not any(file["path"].startswith("imagesTs/") for file in line["files"])


def _json(path: Path, findings: Findings) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        findings.add("damaged-document", path.name)
        return None


def _check_leakage(out: Path, lines: list[dict[str, Any]], findings: Findings) -> None:
    """Parts and folds of the manifest, which the documents must agree with; splits_final.json is compared as it is."""
    parts = {part: {line["case"] for line in lines if line["part"] == part} for part in ("train", "val", "test")}
    for held_out in ("val", "test"):
        others = set().union(*(cases for part, cases in parts.items() if part not in (held_out, "test")))
        _compare_sides(f"the part {held_out}", others, parts[held_out], lines, findings)
    for fold in sorted({line["fold"] for line in lines if line["fold"] is not None}):
        inside = {line["case"] for line in lines if line["fold"] == fold}
        _compare_sides(f"fold {fold}", parts["train"] - inside, inside, lines, findings)
    _check_cases_table(out, lines, findings)


def _compare_sides(
    where: str, train: set[str], held_out: set[str], lines: list[dict[str, Any]], findings: Findings
) -> None:
    """No case, patient or image may be on both sides."""
    by_kind: dict[str, tuple[dict[str, set[str]], dict[str, set[str]]]] = {}
    for line in lines:
        contents = {
            digest
            for file in line["files"][: line["images"]]
            for digest in (file["sha256"], findings.contents.get(file["path"], ""))
            if digest
        }
        for side, cases in enumerate((train, held_out)):
            if line["case"] in cases:
                for kind, values in (("case", {line["case"]}), ("patient", {line["patient"]}), ("image", contents)):
                    for value in values:
                        sides = by_kind.setdefault(kind, (defaultdict(set), defaultdict(set)))
                        sides[side][value].add(line["case"])
    for kind, (first, second) in by_kind.items():
        seen = set()
        for value in sorted(first.keys() & second.keys()):
            named = " and ".join(sorted(first[value] | second[value]))
            if named not in seen:  # two hashes of one image
                findings.add("leakage", named, f"the same {kind} on both sides of {where}")
            seen.add(named)


def _check_cases_table(out: Path, lines: list[dict[str, Any]], findings: Findings) -> None:
    try:
        with open(out / "cases.csv", newline="", encoding="utf-8") as file:
            rows = {row["case"]: (row["patient"], row["part"], row["fold"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError, csv.Error):
        findings.add("damaged-document", "cases.csv")
        return
    wanted = {
        line["case"]: (line["patient"], line["part"], "" if line["fold"] is None else str(line["fold"]))
        for line in lines
    }
    if rows != wanted:
        findings.add("cases.csv", "cases", "the table and the manifest name different cases, patients, parts or folds")
