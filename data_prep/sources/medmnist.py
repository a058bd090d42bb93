"""MedMNIST v2: the 2D and 3D sets in all sizes, out of their ``.npz`` files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import typer

from data_prep.book import Book
from data_prep.errors import CaseError, DatasetError, UsageError
from data_prep.geometry import Grid
from data_prep.model import Case, Description, Make, OfficialSplit, Ref, Source
from data_prep.npz import ArrayHeader, check_names, first_damaged, read_headers, read_small, shared_reader
from data_prep.operations import Job, Outcome, operation
from data_prep.tree import Tree

PARTS: tuple[OfficialSplit, ...] = ("train", "val", "test")
_MAX_LABEL_BYTES = 64 << 20
_ORGANS = ("bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left",
           "lung-right", "pancreas", "spleen")  # fmt: skip


@dataclass(frozen=True)
class Info:
    """Facts of one set.

    Args:
        kind: task as the publisher calls it.
        classes: names in the order of the labels.
        counts: pictures in train, val and test of the present files; older ones differ a little.
        channels: 1 or 3.
        license: of the data.
    """

    kind: Literal["multi-class", "binary-class", "multi-label", "ordinal-regression"]
    classes: tuple[str, ...]
    counts: tuple[int, int, int]
    channels: int = 1
    license: str = "CC BY 4.0"


#: from the publisher's package (Yang et al., Scientific Data 10:41, 2023)
SETS: Mapping[str, Info] = {
    "pathmnist": Info("multi-class", (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium"), (89996, 10004, 7180), 3),
    "chestmnist": Info("multi-label", (
        "atelectasis", "cardiomegaly", "effusion", "infiltration", "mass", "nodule", "pneumonia", "pneumothorax",
        "consolidation", "edema", "emphysema", "fibrosis", "pleural", "hernia"), (78468, 11219, 22433)),
    "dermamnist": Info("multi-class", (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions"), (7007, 1003, 2005), 3, "CC BY-NC 4.0"),
    "octmnist": Info("multi-class", (
        "choroidal neovascularization", "diabetic macular edema", "drusen", "normal"), (97477, 10832, 1000)),
    "pneumoniamnist": Info("binary-class", ("normal", "pneumonia"), (4708, 524, 624)),
    "retinamnist": Info("ordinal-regression", ("0", "1", "2", "3", "4"), (1080, 120, 400), 3),
    "breastmnist": Info("binary-class", ("malignant", "normal, benign"), (546, 78, 156)),
    "bloodmnist": Info("multi-class", (
        "basophil", "eosinophil", "erythroblast", "immature granulocytes", "lymphocyte", "monocyte", "neutrophil",
        "platelet"), (11959, 1712, 3421), 3),
    "tissuemnist": Info("multi-class", (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb"), (165466, 23640, 47280)),
    "organamnist": Info("multi-class", _ORGANS, (34561, 6491, 17778)),
    "organcmnist": Info("multi-class", _ORGANS, (12975, 2392, 8216)),
    "organsmnist": Info("multi-class", _ORGANS, (13932, 2452, 8827)),
    "organmnist3d": Info("multi-class", (
        "liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder", "heart", "lung-right",
        "lung-left", "spleen", "pancreas"), (971, 161, 610)),
    "nodulemnist3d": Info("binary-class", ("benign", "malignant"), (1158, 165, 310)),
    "adrenalmnist3d": Info("binary-class", ("normal", "hyperplasia"), (1188, 98, 298)),
    "fracturemnist3d": Info("multi-class", (
        "buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"), (1027, 103, 240)),
    "vesselmnist3d": Info("binary-class", ("vessel", "aneurysm"), (1335, 191, 382)),
    "synapsemnist3d": Info("binary-class", ("inhibitory synapse", "excitatory synapse"), (1230, 177, 352)),
}  # fmt: skip


@dataclass(frozen=True)
class MedMnist(Source):
    """MedMNIST v2: NAME.npz or NAME_64.npz (128, 224), 2D sets as PNG and 3D sets as NIfTI, in the official parts."""

    name: ClassVar[str] = "medmnist"
    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    set: Annotated[
        str, typer.Option(help="Name of the set, such as bloodmnist; needed if the files' names do not say it.")
    ] = ""
    size: Annotated[int, typer.Option(help="28, 64, 128 or 224, if there are files of several sizes; 0: any.")] = 0

    def plan(self, tree: Tree, book: Book) -> Description:
        if self.set and self.set not in SETS:
            raise UsageError(f"--set {self.set} is not a set of MedMNIST; choose one of {', '.join(SETS)}.")
        path, name = self._choose(tree, book)
        info = SETS[name]
        try:
            headers = read_headers(tree.absolute(path))
            check_names(list(headers), [f"{part}_{what}" for part in PARTS for what in ("images", "labels")])
            is_3d = _check_shapes(headers, info, name.endswith("3d"))
            if tree.facts(path, "npz-1", first_damaged):
                raise CaseError("damaged-archive", "a checksum in the archive does not fit; download it again")
            labels = {
                part: read_small(
                    tree.absolute(path), f"{part}_labels", headers[f"{part}_labels"], _MAX_LABEL_BYTES
                ).reshape(headers[f"{part}_labels"].shape[0], -1)
                for part in PARTS
            }
        except CaseError as error:
            raise DatasetError(f"{PurePosixPath(path).name}: {error}.") from error
        counts = tuple(len(labels[part]) for part in PARTS)
        if counts != info.counts:
            book.note(
                f"{name} has {counts} pictures in train, val and test; the present official file has {info.counts}"
            )
        if is_3d:
            book.note("the publisher gives no voxel size or direction; the affine of the volumes is the identity")
        for part in PARTS:
            for index, label in enumerate(labels[part]):
                ref = Ref(path, "item", f"{part}/{index}")
                target = _target(label, info)
                if target is None:
                    book.fail(ref, "unknown-class", f"label {label[:3].tolist()} with {len(info.classes)} classes")
                    continue
                make = Make("sources.medmnist:item", (path,), {"array": f"{part}_images", "index": index})
                key = f"{part}_{index:06d}"
                book.add(Case(key, key, (make,), target=target, split=part, refs=(ref,), same_grid=False))
        return Description(
            name,
            "multilabel" if info.kind == "multi-label" else "classification",
            (name,),
            {label: number for number, label in enumerate(info.classes)},
            file_ending=".nii.gz" if is_3d else ".png",
            license=info.license,
            reference="Yang et al., MedMNIST v2, Scientific Data 10:41, 2023",
            extra={"task_type": info.kind},
        )

    def _choose(self, tree: Tree, book: Book) -> tuple[str, str]:
        """Path and set of the one file that is wanted; the others are skipped."""
        found = []
        for path in tree.match("**/*.npz"):
            match = re.fullmatch(r"([a-z]+mnist(?:3d)?)(?:_(64|128|224))?\.npz", PurePosixPath(path).name.lower())
            name, size = (match[1], int(match[2] or 28)) if match else ("", 0)
            found.append((path, name if name in SETS else "", size))
        fitting = [
            one for one in found if one[1] in ((self.set,) if self.set else tuple(SETS)) and self.size in (0, one[2])
        ]
        if not fitting and self.set:  # a renamed file
            fitting = [one for one in found if not one[1]]
        if len(fitting) != 1:
            names = ", ".join(PurePosixPath(path).name for path, _, _ in found[:8]) or "none"
            raise UsageError(
                f"{len(fitting)} npz files fit (there: {names}); choose one with --set and --size, or name the file."
            )
        path, name, _ = fitting[0]
        book.skip([one[0] for one in found if one[0] != path], "other-set", "chosen by --set and --size")
        return path, name or self.set


def _check_shapes(headers: Mapping[str, ArrayHeader], info: Info, is_3d: bool) -> bool:
    for part in PARTS:
        images, labels = headers[f"{part}_images"], headers[f"{part}_labels"]
        if images.dtype != np.uint8 or labels.dtype.kind not in "ui":
            raise CaseError("wrong-type", f"{part}: images of {images.dtype} and labels of {labels.dtype}")
        wanted = 4 if is_3d or info.channels == 3 else 3
        if len(images.shape) != wanted or (info.channels == 3 and images.shape[-1] != 3) or 0 in images.shape[1:]:
            raise CaseError("wrong-shape", f"{part}: images of shape {list(images.shape)}")
        width = len(info.classes) if info.kind == "multi-label" else 1
        if labels.shape[0] != images.shape[0] or labels.shape not in (
            (labels.shape[0], width),
            *(((labels.shape[0],),) if width == 1 else ()),
        ):
            raise CaseError("counts-differ", f"{part}: {list(images.shape)} images, {list(labels.shape)} labels")
    return is_3d


def _target(label: np.ndarray, info: Info) -> Any:
    """Index of the class, or one 0 or 1 per finding; ``None`` when the values are not possible."""
    values = [int(value) for value in label]
    if info.kind == "multi-label":
        return values if set(values) <= {0, 1} else None
    return values[0] if 0 <= values[0] < len(info.classes) else None


@operation(version=1)
def item(job: Job) -> Outcome:
    """One picture or volume of an array.

    Params:
        array: name in the archive.
        index: along the first axis.
    """
    from PIL import Image

    from data_prep.nifti import write_nifti
    from data_prep.operations.pictures import write_png

    data = shared_reader(job.inputs[0], job.params["array"]).read(int(job.params["index"]))
    if job.output.name.endswith(".png"):
        image = Image.fromarray(np.ascontiguousarray(data))
        write_png(job.output, image)
        return Outcome(Grid(image.size, None))
    affine = np.eye(4)
    write_nifti(job.output, data, affine)
    return Outcome(Grid(tuple(data.shape), affine))


SOURCE = MedMnist
