"""The words in which sources, engine and layouts speak to each other.

A `Source` reads a `data_prep.tree.Tree` and fills a `data_prep.book.Book` with `Case` objects and with verdicts for
everything that does not become a case. A case says *what* to make (`Make`), never does it: the plan is data that can be
printed, reviewed and sent to a worker, and nothing is decided inside a worker.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from data_prep.book import Book
    from data_prep.tree import Tree

Json = Any
Status = Literal["ok", "resampled", "skipped", "failed"]
Kind = Literal["file", "row", "series", "item"]
Task = Literal["segmentation", "classification", "multilabel", "regression", "landmarks", "images"]
#: which of a NIfTI header's geometries counts when qform and sform disagree or neither is set
Form = Literal["strict", "sform", "qform", "spacing"]
OfficialSplit = Literal["train", "val", "test"]

STATUSES: tuple[Status, ...] = ("ok", "resampled", "skipped", "failed")


@dataclass(frozen=True, order=True, slots=True)
class Ref:
    """One input that gets a line in the report.

    Args:
        path: path as `data_prep.tree.Tree` gives it: relative to the input folder, with forward slashes.
        kind: ``"file"``; ``"row"`` of a table; ``"series"`` of DICOM files; ``"item"`` of an array or archive.
        item: number or name of the row, series or item inside `path`.
    """

    path: str
    kind: Kind = "file"
    item: str = ""


@dataclass(frozen=True, slots=True)
class Make:
    """How one output file is made.

    Args:
        operation: ``"module:function"`` below ``data_prep``, decorated with `data_prep.operations.operation`,
            for example ``"operations.volumes:image"``.
        inputs: tree paths of the files the operation reads.
        params: JSON values handed to the operation; they are part of the fingerprint that decides about resuming.
    """

    operation: str
    inputs: tuple[str, ...]
    params: Mapping[str, Json] = field(default_factory=dict)


#: Columns that ``cases.csv`` has for every case.
CASE_COLUMNS = ("case", "patient", "part", "fold", "target")


@dataclass(frozen=True, slots=True)
class Case:
    """One training example: some image files, and a label map or a target or neither.

    Args:
        key: name of the case in the download, unique in the data set. Becomes the file name when the source's
            identifiers are public, and the input of a keyed hash when they are personal.
        group: the patient (or whatever else must never be on both sides of a split). Never shown when personal.
        images: one `Make` per channel, or per view when `views` is given.
        label_map: the segmentation, on the grid of the images.
        target: class index, list of 0/1 or floats, or ``{"values": [...], "mask": [...]}`` where a loss shall leave out
            some of the values; for the datalist.
        landmarks: world coordinates ``(x, y, z)`` in mm, RAS+, in the order of `Description.landmark_names`, none
            missing. The worker proves that each lies inside the first image.
        views: names of the images when they are separate pictures (``("cc", "mlo")``), else empty: channels.
        masks: one `Make` per image or view: a mask on the pixels of that picture.
        samples: which images make one training example, as positions in `images`, when a case gives several
            (the pairs of images of a study); empty: all images are one example.
        split: the official part this case belongs to; ``None`` leaves the choice to the split.
        stratum: cases of one stratum are spread evenly over the folds; empty takes the target.
        refs: further inputs that this case accounts for, for example the row of a table or a series.
        meta: values for further columns of ``cases.csv``. Nothing that identifies a person: white-list, do not copy.
        same_grid: all volumes of the case must share one voxel grid; checked after making them.

    Raises:
        ValueError: if a value of `meta` has the name of a column that every case has.
    """

    key: str
    group: str
    images: tuple[Make, ...]
    label_map: Make | None = None
    target: Json = None
    landmarks: tuple[tuple[float, float, float], ...] = ()
    views: tuple[str, ...] = ()
    split: OfficialSplit | None = None
    stratum: str = ""
    refs: tuple[Ref, ...] = ()
    meta: Mapping[str, str | int | float] = field(default_factory=dict)
    same_grid: bool = True
    masks: tuple[Make, ...] = ()
    samples: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        taken = sorted(self.meta.keys() & set(CASE_COLUMNS))
        if taken:
            raise ValueError(
                f"`meta` of case {self.key!r} must not hold {', '.join(taken)}: columns of every case; rename"
            )

    @property
    def makes(self) -> tuple[Make, ...]:
        """Images and then, if any, the label map or the masks."""
        return self.images + ((self.label_map,) if self.label_map else ()) + self.masks

    @property
    def inputs(self) -> list[Ref]:
        """Everything this case accounts for, without repetition."""
        files = (Ref(path) for make in self.makes for path in make.inputs)
        return list(dict.fromkeys([*files, *self.refs]))


@dataclass(frozen=True, slots=True)
class Description:
    """What is true of the whole data set; returned by `Source.plan`.

    Args:
        name: short name without blanks, ``Hippocampus``.
        task: decides which layouts are possible.
        channels: names of the channels (nnU-Net: ``"CT"`` switches to CT normalization) or of the views.
        labels: segmentation: name to integer, or to a list of integers for regions, in the order nnU-Net shall keep;
            classification: class name to index; multilabel: finding to position in the vector.
        landmark_names: of the task ``"landmarks"``, in the order of `Case.landmarks`.
        regions_class_order: nnU-Net's key of that name; required exactly when `labels` holds regions.
        file_ending: of every image and label map: ``".nii.gz"`` or ``".png"``.
        license: of the data, as the publisher names it.
        reference: citation or address of the publisher.
        text: one sentence for ``dataset.json``.
        extra: further top-level keys for ``dataset.json`` or the datalist, for example
            ``{"overwrite_image_reader_writer": "SimpleITKIO"}``.
    """

    name: str
    task: Task
    channels: tuple[str, ...]
    labels: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    landmark_names: tuple[str, ...] = ()
    regions_class_order: tuple[int, ...] | None = None
    file_ending: str = ".nii.gz"
    license: str = ""
    reference: str = ""
    text: str = ""
    extra: Mapping[str, Json] = field(default_factory=dict)

    @property
    def label_values(self) -> list[int] | None:
        """The integers a label map may hold, or ``None`` when the data set has no label maps."""
        if self.task not in ("segmentation", "landmarks") or not self.labels:
            return None
        values: set[int] = set()
        for value in self.labels.values():
            values.update([value] if isinstance(value, int) else value)
        return sorted(values | {0})


@dataclass(frozen=True)
class Source(ABC):
    """A kind of download. A subclass is a frozen dataclass; its fields are the options of its command.

    Fields are annotated ``Annotated[type, typer.Option(help=...)]`` and have defaults; their names become option names.
    The docstring's first line is the command's help. See docs/design.md, section data_prep, for a worked example.
    """

    #: name of the command
    name: ClassVar[str]
    #: ``"public"``: case keys are published names and become file names. ``"personal"``: keys, groups and input
    #: paths may identify a person; file names are keyed hashes and links to the input are refused.
    identifiers: ClassVar[Literal["public", "personal"]] = "personal"
    #: layouts that make sense; the first is the default
    layouts: ClassVar[tuple[str, ...]] = ("nnunet", "monai")

    @abstractmethod
    def plan(self, tree: Tree, book: Book) -> Description:
        """Read headers and tables of `tree`, fill `book`, and describe the data set.

        Must not write, must not read pixels when headers do, and must not depend on the order of files.

        Raises:
            UsageError: the options do not fit this download (nothing is written then).
        """

    def to_json(self) -> dict[str, Json]:
        """The options, for the record of the run."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
