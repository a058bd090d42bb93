"""Any folder of DICOM files: volumes with or without labels, or X-rays and mammograms."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import typer

from data_prep.book import Book
from data_prep.dicom import headers, labels
from data_prep.dicom.convert import same_pixel_data
from data_prep.dicom.stacks import (
    VOLUME_MODALITIES,
    Policy,
    Slice,
    Stack,
    build_stacks,
    check_agreement,
    is_projection,
    is_secondary_capture,
    num_orientations,
    refusal,
    split_series,
)
from data_prep.errors import DicomReadError, UsageError
from data_prep.geometry import Grid, grid_difference
from data_prep.model import Case, Description, Make, Ref, Source
from data_prep.options import Converter, CropBreast, MaxSide, Uneven
from data_prep.preparation import IntensityOptions, prepare
from data_prep.tree import Tree

_SEG, _RTSTRUCT = "SEG", "RTSTRUCT"
#: groups of several orientations in one series with fewer slices than this are localizers
_LOCALIZER_SLICES = 16


@dataclass(frozen=True)
class _Volume:
    """One accepted stack with what is needed to name it."""

    series: tuple[str, str]
    number: int
    stack: Stack
    make: Make
    ref: Ref
    patient: str
    study: str
    dropped: tuple[str, ...]

    @property
    def frame(self) -> str:
        """Hash of the frame of reference; millimeters of two frames cannot be compared."""
        return str(self.stack.slices[0].facts["frame_of_reference"])

    @property
    def inputs(self) -> list[Ref]:
        return [self.ref, *(Ref(path) for path in self.make.inputs)]


@dataclass(frozen=True)
class Dicom(IntensityOptions, Source):
    """Any folder of DICOM files: CT, MR and PET volumes, DICOM-SEG and RTSTRUCT labels, X-rays and mammograms."""

    name: ClassVar[str] = "dicom"
    identifiers: ClassVar[Literal["public", "personal"]] = "personal"
    layouts: ClassVar[tuple[str, ...]] = ("monai", "nnunet")

    kind: Annotated[Literal["volumes", "projections"], typer.Option(help="What to convert.")] = "volumes"
    channel: Annotated[
        list[str],
        typer.Option(help="NAME=REGEX on SeriesDescription; several make one case per study with these channels."),
    ] = ()  # type: ignore[assignment]
    labels: Annotated[
        Literal["auto", "seg", "rtstruct", "none"], typer.Option(help="Which objects give label maps.")
    ] = "auto"
    label: Annotated[
        list[str], typer.Option(help="Segment or region to take, in this order; all, alphabetically, if not given.")
    ] = ()  # type: ignore[assignment]
    overlap: Annotated[Literal["error", "last"], typer.Option(help="What to do where segments overlap.")] = "error"
    tilt: Annotated[
        Literal["error", "resample"], typer.Option(help="Gantry tilt: refuse, or resample upright (recorded).")
    ] = "error"
    uneven: Uneven = "error"
    time: Annotated[
        Literal["error", "first", "merge"],
        typer.Option(
            help="Several time points or acquisitions: refuse, take the first, or merge those whose slices alternate."
        ),
    ] = "error"
    other_frames: Annotated[
        bool,
        typer.Option("--other-frames", help="Take channels whose frames of reference differ; they are registered."),
    ] = False
    fraction: Annotated[
        float,
        typer.Option(help="Fractional segments: part from which a voxel belongs to one; 0 refuses them.", min=0, max=1),
    ] = 0.0
    regrid: Annotated[
        bool, typer.Option("--regrid", help="Resample further channels onto the grid of the first (recorded).")
    ] = False
    min_slices: Annotated[int, typer.Option(help="Smaller stacks are skipped.", min=2)] = 2
    converter: Converter = "dcm2niix"
    secondary_capture: Annotated[
        bool, typer.Option("--secondary-capture", help="Take X-rays stored as Secondary Capture, too.")
    ] = False
    window: Annotated[int, typer.Option(help="X-rays: number of the window or VOI LUT; -1 for none.")] = 0
    max_side: MaxSide = 0
    crop_breast: CropBreast = False

    def plan(self, tree: Tree, book: Book) -> Description:
        images, objects = self.read(tree, book, tree.match("**/*"))
        if not images and not objects and not book.verdicts:
            raise UsageError("the input holds no DICOM file; check that it is the right folder.")
        if self.kind == "projections":
            if self.steps():
                raise UsageError("--n4 and --zscore are for volumes, not for --kind projections.")
            return self._plan_projections(images, book)
        return self._plan_volumes(tree, images, objects, book)

    def read(
        self, tree: Tree, book: Book, paths: Sequence[str]
    ) -> tuple[dict[tuple[str, str], list[tuple[str, Any]]], list[Any]]:
        """Images by series, and label objects; everything else gets its verdict here."""
        images: dict[tuple[str, str], list[tuple[str, Any]]] = defaultdict(list)
        objects = []
        burned = 0
        tree.read_facts(paths, headers.FACTS_VERSION, headers.read_facts)
        for path in paths:
            facts = tree.facts(path, headers.FACTS_VERSION, headers.read_facts)
            if facts["kind"] == "none":
                # A DICOM file that lost its head: the ending says what it wants to be.
                if path.lower().endswith((".dcm", ".dicom", ".ima")):
                    book.fail(path, "unreadable-dicom", "the file has no DICOM preamble")
                continue
            if facts["kind"] == "damaged":
                book.fail(path, "unreadable-dicom", facts["detail"])
                continue
            if facts["modality"] in (_SEG, _RTSTRUCT):
                objects.append((path, facts))
                continue
            why = refusal(facts)
            if why:
                book.skip(path, *why)
                continue
            burned += facts["burned_in"]
            series = facts["series"] or "folder:" + str(PurePosixPath(path).parent)
            images[facts["study"], series].append((path, facts))
        if burned:
            book.note(f"{burned} images say that annotations are burned into their pixels; look at them before sharing")
        return images, objects

    # --- projections ---------------------------------------------------------------------------------------------

    def _plan_projections(self, images: dict[tuple[str, str], list[tuple[str, Any]]], book: Book) -> Description:
        contradicting = 0
        for members in images.values():
            for path, facts in members:
                if facts["modality"] in VOLUME_MODALITIES:
                    book.skip(path, "slice-of-volume", "use --kind volumes")
                elif is_secondary_capture(facts) and not self.secondary_capture:
                    book.skip(path, "secondary-capture", "taken with --secondary-capture")
                elif not is_projection(facts):
                    book.skip(path, "other-modality", facts["modality"] or "unknown")
                elif facts["frames"] != 1:
                    book.skip(path, "several-frames", f"{facts['frames']} frames")
                else:
                    notes = [f"{what} left out: the header contradicts itself" for what in facts["contradictions"]]
                    contradicting += bool(notes)
                    params = {"window": self.window, "max_side": self.max_side, "crop_breast": self.crop_breast}
                    meta = {name: facts[name] for name in ("modality", "view", "laterality")}
                    meta["view_modifiers"] = " ".join(facts["view_modifiers"])
                    key = facts["sop"] or headers.hash_uid(path)
                    if key in book.cases:
                        book.skip(path, "duplicate", "the same image is there twice")
                        continue
                    book.add(
                        Case(
                            key=key,
                            group=facts["patient"] or facts["study"] or key,
                            images=(Make("dicom.projection:projection", (path,), params | {"notes": notes}),),
                            meta=meta,
                            same_grid=False,
                        )
                    )
        if contradicting:
            book.note(f"{contradicting} images: view or side is left empty, because the header says two things")
        return Description("Projections", "images", ("xray",), file_ending=".png")

    # --- volumes -------------------------------------------------------------------------------------------------

    def _plan_volumes(
        self, tree: Tree, images: dict[tuple[str, str], list[tuple[str, Any]]], objects: list[Any], book: Book
    ) -> Description:
        volumes = []
        for series in sorted(images, key=lambda key: min(path for path, _ in images[key])):
            volumes += self.plan_series(tree, series, images[series], book)
        if self.channel:
            return self._plan_channels(tree, volumes, objects, book)
        self._check_steps(volumes)
        names = self._add_labelled(tree, volumes, objects, book)
        modalities = sorted({one.stack.slices[0].facts["modality"] for one in volumes})
        channel = modalities[0] if len(modalities) == 1 else "mixed"
        return self._describe((channel,), names)

    def _check_steps(self, volumes: Sequence[_Volume]) -> None:
        if self.n4 and any(one.stack.slices[0].facts["modality"] != "MR" for one in volumes):
            raise UsageError("--n4 corrects the coils of MR; the input has volumes of other modalities.")

    def _describe(self, channels: tuple[str, ...], names: list[str]) -> Description:
        values = {"background": 0, **{name: value for value, name in enumerate(names, 1)}}
        return Description("Dicom", "segmentation", channels, values)

    def plan_series(
        self, tree: Tree, series: tuple[str, str], members: list[tuple[str, Any]], book: Book
    ) -> list[_Volume]:
        slices: list[Slice] = []
        first = min(path for path, _ in members)
        is_mixed = not all(is_secondary_capture(facts) for _, facts in members)
        for path, facts in sorted(members, key=lambda member: member[0]):
            if facts["modality"] not in VOLUME_MODALITIES:
                book.skip(path, "projection" if is_projection(facts) else "other-modality", "use --kind projections"
                          if is_projection(facts) else facts["modality"] or "unknown")  # fmt: skip
                continue
            if is_secondary_capture(facts) and (is_mixed or not all(one["position"] for one in facts["slices"])):
                # A copy of a screen may have been given the place of the slice it shows.
                book.skip(path, "secondary-capture", "among slices, or without a position")
                continue
            if len(facts["slices"]) != facts["frames"]:
                book.fail(path, "frames-without-position", f"{facts['frames']} frames, and no position for each")
                continue
            slices += [Slice(path, frame, facts, plane) for frame, plane in enumerate(facts["slices"])]
        if not slices:
            return []
        groups = split_series(slices)
        if num_orientations(slices) > 1:
            ref, paths = Ref(first, "series", "1"), sorted({one.path for one in slices})
            if max(len(group) for group in groups) < _LOCALIZER_SLICES:
                book.skip([ref, *paths], "localizer", f"{num_orientations(slices)} orientations in one series")
            else:
                book.fail([ref, *paths], "mixed-orientations", f"{num_orientations(slices)} orientations in one series")
            return []
        volumes = []
        for number, group in enumerate(groups, 1):
            ref = Ref(min(one.path for one in group), "series", str(number))
            paths = sorted({one.path for one in group})
            try:
                if "MOSAIC" in group[0].facts["words"]:
                    one = self._plan_mosaic(series, number, group, ref)
                    book.skip(
                        [p for p in paths if p not in one.make.inputs], "not-taken", "another time point was taken"
                    )
                    volumes.append(one)
                    continue
                if len(group) == 1:
                    size = group[0].facts["rows"], group[0].facts["columns"]
                    if any(len(o) > 1 and (o[0].facts["rows"], o[0].facts["columns"]) == size for o in groups):
                        book.fail(
                            [ref, *paths], "stray-slice", "it differs from its series in contrast, kernel or kind"
                        )
                    else:
                        book.skip([ref, *paths], "single-slice", "one slice has no slice spacing")
                    continue
                policy = Policy(self.tilt, self.uneven, self.time, self.min_slices)
                stack = build_stacks(group, policy, lambda a, b: self._same_pixels(tree, a, b))[0]
            except DicomReadError as error:
                settle = book.skip if error.reason == "too-few-slices" else book.fail
                settle([ref, *paths], error.reason, error.detail)
                continue
            used = {one.path for one in stack.slices}
            left = [path for path in paths if path not in used]
            if left:
                copies = {one.path for one in stack.dropped}
                book.skip([p for p in left if p in copies], "duplicate", "the same slice is there twice")
                book.skip([p for p in left if p not in copies], "not-taken", "another time point or block was taken")
            volumes.append(self._volume(series, number, stack, ref, tuple(left)))
        return volumes

    def _volume(
        self, series: tuple[str, str], number: int, stack: Stack, ref: Ref, dropped: tuple[str, ...]
    ) -> _Volume:
        paths = list(dict.fromkeys(one.path for one in stack.slices))
        params: dict[str, Any] = {
            "slices": [[paths.index(one.path), one.frame] for one in stack.slices],
            "positions": [[float(x) for x in one.plane["position"]] for one in stack.slices],
            "affine": stack.affine.tolist(),
            "shape": list(stack.shape),
            "repair": stack.repair,
            "converter": self.converter,
            "notes": list(stack.notes),
        }
        facts = stack.slices[0].facts
        patient = facts["patient"] or facts["study"] or headers.hash_uid(series[1])
        make = Make("dicom.convert:volume", tuple(paths), params)
        return _Volume(series, number, stack, make, ref, patient, facts["study"], dropped)

    def _plan_mosaic(self, series: tuple[str, str], number: int, group: list[Slice], ref: Ref) -> _Volume:
        check_agreement(group)
        if len(group) > 1 and self.time != "first":
            raise DicomReadError("time-points", f"{len(group)} mosaics, one per time point; take one with --time first")
        ordered = sorted(group, key=lambda one: (one.facts["acquisition"] or 0.0, one.facts["sop"], one.path))
        notes = [f"time point 1 of {len(group)} was taken"] if len(group) > 1 else []
        import numpy as np

        stack = Stack((ordered[0],), np.eye(4), "mosaic", tuple(notes))
        facts = ordered[0].facts
        make = Make("dicom.convert:mosaic", (ordered[0].path,), {"notes": notes})
        patient = facts["patient"] or facts["study"] or headers.hash_uid(series[1])
        return _Volume(series, number, stack, make, ref, patient, facts["study"], ())

    @staticmethod
    def _same_pixels(tree: Tree, first: Slice, second: Slice) -> bool:
        if first.path == second.path:
            return False
        return same_pixel_data(tree.absolute(first.path), tree.absolute(second.path))

    # --- labels --------------------------------------------------------------------------------------------------

    def _label_objects(
        self, tree: Tree, volumes: Sequence[_Volume], objects: list[Any], book: Book
    ) -> tuple[dict[int, list[tuple[str, str, list[str]]]], list[str]]:
        """Number of the volume -> its label objects (path, modality, names); and all names in order of their values."""
        wanted = {"auto": (_SEG, _RTSTRUCT), "seg": (_SEG,), "rtstruct": (_RTSTRUCT,), "none": ()}[self.labels]
        found: dict[int, list[tuple[str, str, list[str]]]] = defaultdict(list)
        known: set[str] = set()
        chosen = [" ".join(name.split()).lower() for name in self.label]
        for path, facts in objects:
            if facts["modality"] not in wanted:
                book.skip(path, "label-not-wanted", f"--labels {self.labels}")
                continue
            if not facts["references"]:
                book.fail(path, "no-reference", "the label object does not say to which series it belongs")
                continue
            hosts = [n for n, one in enumerate(volumes) if one.series[1] in facts["references"]]
            if len(hosts) != 1:
                detail = f"{len(hosts)} volumes of the input fit the label object's reference"
                book.fail(path, "missing-image" if not hosts else "ambiguous-image", detail)
                continue
            if facts.get("segmentation") == "FRACTIONAL" and not self.fraction:
                book.fail(
                    path, "fractional-segments", "how much of a voxel makes it a part is yours to say: --fraction"
                )
                continue
            if volumes[hosts[0]].stack.repair:
                book.fail(path, "image-resampled", "the image of this label object had to be resampled")
                continue
            try:
                names = labels.segment_names(tree.absolute(path))
            except DicomReadError as error:
                book.fail(path, error.reason, error.detail)
                continue
            names = [name for name in names if not chosen or name in chosen]
            if not names:
                book.skip(path, "label-not-wanted", "it holds none of the segments given by --label")
                continue
            known.update(names)
            found[hosts[0]].append((path, facts["modality"], names))
        if known and not chosen:
            book.note(
                f"{len(known)} label names come from the label objects; look at them before sharing, or use --label"
            )
        return found, (list(dict.fromkeys(chosen)) if chosen else sorted(known))

    def _label_make(self, path: str, modality: str, volume: _Volume, names: list[str]) -> Make:
        function = "segmentation" if modality == _SEG else "structure_set"
        params = {
            "affine": volume.stack.affine.tolist(),
            "shape": list(volume.stack.shape),
            "values": [[name, value] for value, name in enumerate(names, 1)],
            "overlap": self.overlap,
            "fraction": self.fraction,
            "frame": volume.frame,
        }
        return Make(f"dicom.labels:{function}", (path,), params)

    def _add_labelled(self, tree: Tree, volumes: list[_Volume], objects: list[Any], book: Book) -> list[str]:
        found, names = self._label_objects(tree, volumes, objects, book)
        steps = self.steps()
        for number, one in enumerate(volumes):
            key = f"{one.study}/{one.series[1]}/{one.number}"
            meta = {"modality": one.stack.slices[0].facts["modality"]}
            image = prepare(one.make, steps)
            made = [
                (f"{key}/{headers.hash_uid(path)}", self._label_make(path, modality, one, names))
                for path, modality, _ in found.get(number, [])
            ]
            if not made:
                part: Any = "test" if found else None
                book.add(Case(key, one.patient, (image,), split=part, refs=(one.ref,), meta=meta))
            for label_key, label in made:
                book.add(Case(label_key, one.patient, (image,), label, refs=(one.ref,), meta=meta))
        return names

    # --- channels ------------------------------------------------------------------------------------------------

    def _plan_channels(self, tree: Tree, volumes: list[_Volume], objects: list[Any], book: Book) -> Description:
        patterns: dict[str, re.Pattern[str]] = {}
        for text in self.channel:
            name, equals, expression = text.partition("=")
            try:
                patterns[name.strip()] = re.compile(expression, re.IGNORECASE)
            except re.error as error:
                raise UsageError(f"--channel {name}: not a regular expression.") from error
            if not equals or not name.strip() or not expression:
                raise UsageError(f"--channel must be NAME=REGEX, got {text!r}.")
        studies: dict[str, dict[str, list[_Volume]]] = defaultdict(lambda: defaultdict(list))
        for one in volumes:
            described = headers.read_dataset(tree.absolute(one.make.inputs[0]), tags=["SeriesDescription"])
            description = str(described.get("SeriesDescription") or "")
            fits = [name for name, pattern in patterns.items() if pattern.search(description)]
            if len(fits) == 1:
                studies[one.study][fits[0]].append(one)
            else:
                what = "no-channel" if not fits else "ambiguous-channel"
                settle = book.skip if not fits else book.fail
                settle(one.inputs, what, f"SeriesDescription fits {len(fits)} of --channel")
        complete = []
        for _study, found in sorted(studies.items()):
            everything: list[Ref | str] = [ref for members in found.values() for one in members for ref in one.inputs]
            missing = [name for name in patterns if not found.get(name)]
            double = [name for name in patterns if len(found.get(name, [])) > 1]
            if missing or double:
                reason = "missing-channel" if missing else "ambiguous-channel"
                book.fail(everything, reason, ", ".join(missing or double))
                continue
            complete.append([found[name][0] for name in patterns])
        self._check_steps([one for members in complete for one in members])
        firsts = [members[0] for members in complete]
        label_objects, names = self._label_objects(tree, firsts, objects, book)
        for number, members in enumerate(complete):
            self._add_study(members, label_objects.get(number, []), names, bool(label_objects), book)
        return self._describe(tuple(patterns), names)

    def _add_study(
        self,
        members: list[_Volume],
        label_objects: list[tuple[str, str, list[str]]],
        names: list[str],
        has_labels: bool,
        book: Book,
    ) -> None:
        first, makes = members[0], []
        refs = tuple(one.ref for one in members)
        grid = Grid(first.stack.shape, first.stack.affine)
        for one in members:
            params = dict(one.make.params)
            if one.frame and first.frame and one.frame != first.frame and not self.other_frames:
                book.fail(
                    [ref for volume in members for ref in volume.inputs],
                    "mixed-frames-of-reference",
                    "channels have different ones; if they are registered all the same, see --other-frames",
                )
                return
            problem = grid_difference(grid, Grid(one.stack.shape, one.stack.affine))
            if problem and self.regrid and not first.stack.repair:
                params["onto"] = {"affine": first.stack.affine.tolist(), "shape": list(first.stack.shape)}
            elif problem:
                book.fail(
                    [ref for volume in members for ref in volume.inputs], "grids-differ", f"{problem}; see --regrid"
                )
                return
            makes.append(prepare(Make(one.make.operation, one.make.inputs, params), self.steps()))
        key = f"{first.study}/{first.series[1]}"
        if not label_objects:
            part: Any = "test" if has_labels else None
            book.add(Case(key, first.patient, tuple(makes), split=part, refs=refs))
        for path, modality, _ in label_objects:
            label = self._label_make(path, modality, first, names)
            book.add(Case(f"{key}/{headers.hash_uid(path)}", first.patient, tuple(makes), label, refs=refs))


SOURCE = Dicom
