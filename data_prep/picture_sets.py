"""What sources of classified pictures share: copies, near copies, and the split by patient or as the papers made it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import typer

from data_prep.book import Book
from data_prep.errors import CaseError, UsageError
from data_prep.identity import fit_name
from data_prep.model import Case, Json, Make, OfficialSplit, Ref, Source
from data_prep.options import MaxSide
from data_prep.splits import partition
from data_prep.tree import Tree

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ARCHIVES = ("**/*.zip", "**/*.tar", "**/*.tar.gz", "**/*.tgz")
#: names of folders that hold a publisher's part
PARTS: Mapping[str, OfficialSplit] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
#: 60, 10 and 30 %, the shares of MedMamba's data sets
SHARES: Mapping[OfficialSplit, int] = {"train": 6, "val": 1, "test": 3}
#: sides of the picture that is compared; one bit per pair of neighbours
_HASH_SIZE = (17, 16)
Split = Literal["auto", "official", "patient", "published", "folds"]


@dataclass(frozen=True)
class Picture:
    """A picture with its class, before it is decided whether and where it is used.

    Args:
        path: tree path.
        target: class index.
        key: name of the case.
        group: patient; empty when the download names none.
        split: the publisher's part.
        refs: rows that belong to it.
        meta: for ``cases.csv``.
    """

    path: str
    target: int
    key: str
    group: str = ""
    split: OfficialSplit | None = None
    refs: tuple[Ref, ...] = ()
    meta: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Ref | str]:
        return [self.path, *self.refs]


@dataclass(frozen=True)
class PictureSource(Source):
    """Base of the sources of published, classified pictures."""

    identifiers = "public"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    split: Annotated[
        Split,
        typer.Option(
            help="official: the publisher's parts; patient: 60/10/30 % by patient; published: counts of MedMamba's "
            "Table 2, patients on both sides; folds: no test part; auto: official if there is one, else patient."
        ),
    ] = "auto"
    max_side: MaxSide = 0
    mode: Annotated[
        Literal["keep", "L", "RGB"], typer.Option(help="Channels of the result: as they are, grey, or three.")
    ] = "keep"

    def add(self, tree: Tree, book: Book, pictures: Sequence[Picture]) -> None:
        """Plan the pictures of a whole download.

        Args:
            tree: the download.
            book: takes cases and verdicts.
            pictures: all of them.

        Raises:
            UsageError: ``--split official`` without parts, or too few patients for the split.
        """
        has_parts = any(one.split is not None for one in pictures)
        if self.split == "official" and not has_parts:
            raise UsageError("--split official: this download has no parts of its own; use patient or folds.")
        how = ("official" if has_parts else "patient") if self.split == "auto" else self.split
        kept = settle_copies(tree, book, pictures, keep_copies=how == "published", by_part=how == "official")
        groups = self._groups(tree, kept)
        members = [(one.path, groups[one.path], str(one.target)) for one in kept]
        parts: Mapping[str, OfficialSplit | None]
        if how == "official":
            parts = {one.path: one.split for one in kept}
        elif how == "published":
            parts = published_split([(path, target) for path, _, target in members], book.seed)
            crossing = _crossing(groups, parts)
            book.note(
                "--split published has the counts of MedMamba's Table 2, not its draw, which was not published; "
                f"{crossing} patients or copies are on more than one side, so test scores are too good"
            )
        elif how == "patient" and members:
            try:
                parts = partition(members, SHARES, book.seed)
            except UsageError as error:
                raise UsageError(f"{error} Use --split folds for folds without a test part.") from error
        else:
            parts = dict.fromkeys((path for path, _, _ in members), None)
        params: dict[str, Any] = {"mode": self.mode} if self.mode != "keep" else {}
        params |= {"max_side": self.max_side} if self.max_side else {}
        names: set[str] = set()
        for one in kept:
            key = one.key
            if fit_name(key).lower() in names:  # "a(1)" and "a-1", or one name with two endings
                key = f"{key}-{hashlib.sha256(one.path.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
            names.add(fit_name(key).lower())
            make = Make("operations.pictures:picture", (one.path,), params)
            book.add(
                Case(
                    key,
                    groups[one.path],
                    (make,),
                    target=one.target,
                    split=parts[one.path],
                    refs=one.refs,
                    meta=one.meta,
                    same_grid=False,
                )
            )

    def _groups(self, tree: Tree, pictures: Sequence[Picture]) -> dict[str, str]:
        """Path to what must stay on one side: the patient."""
        return {one.path: one.group for one in pictures}


@dataclass(frozen=True)
class SceneSource(PictureSource):
    """Base of those whose download names no patients: near copies are kept on one side instead."""

    near_bits: Annotated[
        int,
        typer.Option(
            help="Keep pictures together that differ in at most so many of 256 bits; 0: only equal bits.", min=0, max=64
        ),
    ] = 8

    def _groups(self, tree: Tree, pictures: Sequence[Picture]) -> dict[str, str]:
        tree.read_facts([one.path for one in pictures], "picture-near-1", _facts_with_hash)
        hashes = [tree.facts(one.path, "picture-near-1", _facts_with_hash)["near"] for one in pictures]
        numbers = near_groups(hashes, self.near_bits)
        return {one.path: f"scene-{number:05d}" for one, number in zip(pictures, numbers, strict=True)}


def settle_copies(
    tree: Tree, book: Book, pictures: Sequence[Picture], *, keep_copies: bool, by_part: bool
) -> list[Picture]:
    """Sort out identical pictures: those in several classes fail, of other copies one is kept.

    Args:
        tree: the download.
        book: takes the verdicts.
        pictures: all of them.
        keep_copies: copies of one class are all kept.
        by_part: a copy in the test part wins over one in training, which must not see it.

    Returns:
        The pictures that are left, in their order.
    """
    copies: dict[str, list[Picture]] = defaultdict(list)
    tree.read_facts([one.path for one in pictures], "picture-1", _facts)
    for one in pictures:
        copies[digest(tree, one.path)].append(one)
    kept: set[str] = set()
    for members in copies.values():
        if len({one.target for one in members}) > 1:
            for one in members:
                book.fail(one.inputs, "contradicting-classes", "one picture in several classes")
            continue
        if by_part:
            members = sorted(members, key=lambda one: ("test", "val", "train", None).index(one.split))
        for one in members[1:] if not keep_copies else []:
            book.skip(one.inputs, "duplicate", "the same picture is there already")
        kept.update(one.path for one in (members if keep_copies else members[:1]))
    return [one for one in pictures if one.path in kept]


def digest(tree: Tree, path: str) -> str:
    """Checksum of a file, kept between runs."""
    return tree.facts(path, "picture-1", _facts)["sha256"]


def _facts(path: Path) -> Json:
    return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _facts_with_hash(path: Path) -> Json:
    return _facts(path) | {"near": near_hash(path)}


def published_split(members: Sequence[tuple[str, str]], seed: int) -> dict[str, OfficialSplit]:
    """Per class ``int(0.3 n)`` pictures for the test, ``int(0.1428 (n - test))`` for validation, the rest for training.

    The rule was found from the counts of MedMamba's Table 2 and gives all of them; who is in which part is not known.

    Args:
        members: ``(key, class)`` of every picture.
        seed: of the draw.
    """
    classes: dict[str, list[str]] = defaultdict(list)
    for key, name in members:
        classes[name].append(key)
    parts: dict[str, OfficialSplit] = {}
    for keys in classes.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogateescape")).digest())
        num_test = int(0.3 * len(keys))
        num_val = int(0.1428 * (len(keys) - num_test))
        for number, key in enumerate(keys):
            parts[key] = "test" if number < num_test else "val" if number < num_test + num_val else "train"
    return parts


def near_hash(path: Path) -> str:
    """256 bits that say where a small grey version of the picture gets brighter from left to right, as hexadecimal.

    Empty when the picture cannot be decoded; its case will fail by itself.
    """
    from PIL import Image

    from data_prep.operations.pictures import open_picture

    try:
        image = open_picture(path)[0]
    except CaseError:
        return ""
    small = np.asarray(image.convert("L").resize(_HASH_SIZE, Image.Resampling.BOX), dtype=np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes().hex()


def near_groups(hashes: Sequence[str], max_bits: int) -> list[int]:
    """Numbers that are the same for pictures connected by steps of at most `max_bits` differing bits."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    usable = [number for number, text in enumerate(hashes) if text]
    rows, columns = [np.arange(len(hashes))], [np.arange(len(hashes))]
    if usable:
        packed = np.array([list(bytes.fromhex(hashes[number])) for number in usable], dtype=np.uint8)
        signs = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
        # A product of signs is the number of equal bits minus that of differing ones.
        least = signs.shape[1] - 2 * max_bits
        index = np.array(usable)
        for start in range(0, len(signs), 1024):
            first, second = np.nonzero(signs[start : start + 1024] @ signs.T >= least)
            rows.append(index[first + start])
            columns.append(index[second])
    i, j = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(i), np.uint8), (i, j)), shape=(len(hashes), len(hashes)))
    return [int(number) for number in connected_components(graph, directed=False)[1]]


def class_pictures(
    tree: Tree, book: Book, classes: Mapping[str, int], aliases: Mapping[str, str] | None = None
) -> list[Picture]:
    """Pictures below folders that have the name of a class; parts (``train``, ``test``) above these are noted.

    Pictures elsewhere are skipped as ``no-class``.

    Args:
        tree: the download.
        book: takes the verdicts.
        classes: class name, in lower case, to index.
        aliases: other names of folders, in lower case, to class names.
    """
    found = []
    for path in tree.match("**/*"):
        if not path.lower().endswith(ENDINGS):
            continue
        folders = [part.strip().lower() for part in PurePosixPath(path).parts[:-1]]
        named = [(aliases or {}).get(folder, folder) for folder in folders]
        name = next((folder for folder in reversed(named) if folder in classes), None)
        if name is None:
            book.skip(path, "no-class", "no folder above the picture has the name of a class")
            continue
        part = next((PARTS[folder] for folder in reversed(folders) if folder in PARTS), None)
        stem = PurePosixPath(path).stem
        key = f"{name}_{stem}" if part is None else f"{part}_{name}_{stem}"
        found.append(Picture(path, classes[name], key, split=part))
    return found


def skip_archives(tree: Tree, book: Book, is_complete: bool) -> None:
    """Archives inside the input: of no use when their content is there, too.

    Raises:
        UsageError: it is not.
    """
    packed = tree.match(*ARCHIVES)
    if packed and not is_complete:
        names = ", ".join(PurePosixPath(path).name for path in packed[:5])
        raise UsageError(f"the pictures are still packed in {names}; name these archives as inputs, too.")
    book.skip(packed, "archive", "its files are there unpacked")


def _crossing(groups: Mapping[str, str], parts: Mapping[str, OfficialSplit | None]) -> int:
    sides: dict[str, set[OfficialSplit | None]] = defaultdict(set)
    for path, group in groups.items():
        sides[group].add(parts[path])
    return sum(len(found) > 1 for found in sides.values())
