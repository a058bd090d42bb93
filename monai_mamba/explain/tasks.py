"""What is explained, by the task of a model: the class of an image, a structure of a label map, a landmark.

A task predicts its cases and lists what can be explained in them; of each entry it gives the input, the output that is
meant, the score that deletion is to lower, and the picture.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.report.volumes import Grid
from monai_mamba.evaluation.segmentation import dice
from monai_mamba.explain import pictures
from monai_mamba.explain.sanity import Subject
from monai_mamba.explain.windows import Window
from monai_mamba.heat_maps import world_to_voxel
from monai_mamba.layers.taps import extract_features
from monai_mamba.training.inferers import window_size
from monai_mamba.training.label_maps import read_reference
from monai_mamba.training.outputs import class_probabilities
from monai_mamba.training.trained import Trained
from monai_mamba.training.transforms import read_picture

Progress = Callable[[str, int, int], None]
#: Which outputs of a structure or landmark a map explains: those where it was found, or all of them.
REGIONS = ("predicted", "all")
#: A landmark's region reaches so many voxels from the place that was found.
LANDMARK_REACH_VOX = 1


@dataclass(frozen=True)
class Entry:
    """Something that can be explained.

    Attributes:
        case: number of the case.
        target: number of the class, structure or landmark.
        text: caption.
        row: its row of ``pictures.csv``.
        details: what the task needs to draw it.
    """

    case: int
    target: int
    text: str
    row: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)


class Task(ABC):
    """A model and the cases it is explained on.

    Args:
        trained: the model.
        cases: from :meth:`Trained.list_cases`.
        target: name of what is to be explained; None for the task's default.
        region: one of ``REGIONS``.

    Attributes:
        names: of the targets.
        meaning: what a map is about, for texts.
        score: name of the score that deletion lowers.
        columns: of ``pictures.csv``.
        num_checks: maps that are checked by default.
        method: of the maps by default.
        entries: what can be explained; filled by :meth:`predict`.
        missing: target to the cases in which nothing of it was found.

    Raises:
        ValueError: if target or region is unknown.
    """

    columns: ClassVar[tuple[str, ...]]
    score: ClassVar[str]
    num_checks: ClassVar[int] = 16
    method: ClassVar[str] = "gradcam"

    def __init__(
        self, trained: Trained, cases: Sequence[dict[str, Any]], names: Sequence[str], target: str | None, region: str
    ) -> None:
        if target is not None and target not in names:
            raise ValueError(f"`target` must be one of {', '.join(names)}, got {target!r}")
        if region not in REGIONS:
            raise ValueError(f"`region` must be one of {', '.join(REGIONS)}, got {region!r}")
        self.trained = trained
        self.cases = list(cases)
        self.names = list(names)
        self.target = target
        self.region = region
        self.entries: list[Entry] = []
        self.missing: dict[str, list[str]] = {}

    @property
    @abstractmethod
    def meaning(self) -> str: ...

    @abstractmethod
    def predict(self, batch_size: int, on_progress: Progress) -> None:
        """Fill ``entries``.

        Raises:
            DatasetError: if a file cannot be read, the network gives what is no number, or nothing can be explained.
        """

    @abstractmethod
    def pick(self, number: int) -> list[int]:
        """Return the entries to draw if none are named: half of them the most wrong ones, the others sure ones."""

    @abstractmethod
    def subject(self, entry: Entry) -> Subject:
        """Return what the map of an entry is to explain."""

    @abstractmethod
    def draw(self, entry: Entry, maps: Tensor) -> Figure:
        """Return the picture of an entry with its maps."""

    def _image(self, case: int) -> Tensor:
        image: Tensor = self.trained.prepare(self.trained.read(self.cases[case]))["image"]
        return image

    def _name(self, case: int) -> str:
        return str(self.cases[case]["case"])

    def _draw_pictures(self, case: int, maps: Tensor, title: str, marks: pictures.Marks | None = None) -> Figure:
        """The picture of a case whose files are pictures, as they are and not as the network gets them."""
        keys = self.trained.image_keys
        images = [read_picture(self.cases[case][key]) for key in keys]
        sizes = []
        for key in keys:
            with Image.open(self.cases[case][key]) as picture:
                sizes.append(picture.size)
        shown = maps.numpy() if len(maps) == len(images) else np.repeat(maps.numpy(), len(images), 0)
        return pictures.draw_image_maps(images, shown, [w / h for w, h in sizes], keys, title, marks)


class ClassificationTask(Task):
    """The predicted class of every case, or one class in all of them.

    Attributes:
        probs: ``(cases, classes)``.
        features: before the head, ``(cases, channels)``.
        labels: class numbers, or zeros and ones (NaN where not known) per class; None if the truth is not known.
    """

    columns = ("case", "file", "label", "predicted", "probability", "target", "is_empty")
    score = "probability of the class"

    def __init__(
        self, trained: Trained, cases: Sequence[dict[str, Any]], target: str | None, region: str = "predicted"
    ) -> None:
        super().__init__(trained, cases, trained.classes, target, region)
        if region != "predicted":
            raise ValueError(f"`region` belongs to label maps and landmarks; this is a model for {trained.task}")
        self.probs = np.empty((0, len(self.names)))
        self.features = np.empty((0, 0))
        self.labels: np.ndarray | None = None
        if all("label" in case for case in cases):
            self.labels = np.array([np.asarray(case["label"]) for case in cases])

    @property
    def meaning(self) -> str:
        return f"class {self.target}" if self.target else "predicted class"

    def predict(self, batch_size: int, on_progress: Progress) -> None:
        probs, features = [], []
        for start in range(0, len(self.cases), batch_size):
            images = [self._image(case) for case in range(start, min(start + batch_size, len(self.cases)))]
            kept: list[Tensor] = []
            handle = self.trained.network.register_forward_hook(lambda _m, _i, output, kept=kept: kept.append(output))
            try:
                with torch.no_grad():
                    batch = torch.stack(images).to(self.trained.device)
                    found = extract_features(self.trained.network, batch, names=["embedding"])["embedding"]
            finally:
                handle.remove()
            features.append(found.float().cpu())
            probs.append(class_probabilities(kept[0], len(self.names), self.trained.multi_label))
            on_progress("predictions", start + len(images), len(self.cases))
        self.probs, self.features = torch.cat(probs).numpy(), torch.cat(features).flatten(1).numpy()
        finite = np.isfinite(self.probs).all(1)
        if not finite.all():
            raise _no_numbers(self._name(int(np.flatnonzero(~finite)[0])))
        self.entries = [self._entry(case) for case in range(len(self.cases))]

    def pick(self, number: int) -> list[int]:
        return pick_cases(self.probs, self.labels, number)

    def subject(self, entry: Entry) -> Subject:
        def score(images: Sequence[Tensor]) -> np.ndarray:
            return self.trained.probabilities(images).numpy()[:, entry.target]

        return Subject(self._image(entry.case), entry.target, str(self.cases[entry.case]["patient"]), score)

    def draw(self, entry: Entry, maps: Tensor) -> Figure:
        read = self.trained.read(self.cases[entry.case])
        prepared = self.trained.prepare(read)
        image = prepared["image"]
        if image.ndim == 4:
            grid = _grid(read[self.trained.image_keys[0]], prepared)
            return pictures.draw_volume_map(image[0].numpy(), maps[0].numpy(), grid, entry.text)
        return self._draw_pictures(entry.case, maps, entry.text)

    def truth(self, case: int) -> str:
        """Return the true class or classes of a case; empty if it is not known."""
        if self.labels is None:
            return ""
        label = self.labels[case]
        if label.ndim == 0:
            return self.names[int(label)]
        return " + ".join(name for name, value in zip(self.names, label, strict=True) if value == 1) or "none"

    def _entry(self, case: int) -> Entry:
        predicted = int(self.probs[case].argmax())
        target = predicted if self.target is None else self.names.index(self.target)
        truth, probability = self.truth(case), float(self.probs[case, predicted])
        text = f"{truth}, " if truth else ""
        text = f"{self._name(case)}: {text}predicted {self.names[predicted]} ({probability:.2f})"
        if target != predicted:
            text += f"; map for {self.names[target]}"
        row = {"label": truth, "predicted": self.names[predicted], "probability": probability}
        return Entry(case, target, text, row)


class _DenseTask(Task):
    """What segmentation and landmarks share: an entry per case and target, windows, marks."""

    num_checks = 6
    method = "gradcam++"

    def predict(self, batch_size: int, on_progress: Progress) -> None:
        targets = self._targets()
        self.missing = {self.names[target]: [] for target in targets}
        for case in range(len(self.cases)):
            read = self.trained.read(self.cases[case])
            prepared = self.trained.prepare(read)
            outputs = self.trained.infer(prepared["image"]).float().cpu()
            if not torch.isfinite(outputs).all():
                raise _no_numbers(self._name(case))
            self._add(case, targets, read, prepared, outputs)
            on_progress("predictions", case + 1, len(self.cases))
        if not self.entries:
            raise DatasetError(
                f"{', '.join(self.missing)}: found in none of the {len(self.cases)} cases, there is nothing to "
                'explain; `region` "all" explains the whole image'
            )

    def pick(self, number: int) -> list[int]:
        def order(name: str, sign: int, among: Sequence[int]) -> list[int]:
            return sorted(among, key=lambda index: sign * self.entries[index].details[name])

        rows = range(len(self.entries))
        wrong = order("wrong", -1, [i for i in rows if self.entries[i].details["wrong"] is not None])
        queues = [
            order("sure", -1, [i for i in rows if self.entries[i].target == target]) for target in self._targets()
        ]
        return interleave(wrong, queues, number)

    def subject(self, entry: Entry) -> Subject:
        window: Window = entry.details["window"]
        image = torch.as_tensor(self._image(entry.case)).as_subclass(Tensor)
        region = window.cut(torch.from_numpy(self._region(entry)))
        patient = str(self.cases[entry.case]["patient"])
        cut = window.cut(image)
        return Subject(cut, entry.target, patient, self._score(entry, cut, region), region)

    def draw(self, entry: Entry, maps: Tensor) -> Figure:
        window: Window = entry.details["window"]
        read = self.trained.read(self.cases[entry.case])
        prepared = self.trained.prepare(read)
        image = prepared["image"]
        whole = window.spread(maps)
        marks = self._marks(entry, window)
        if image.ndim == 4:
            grid = _grid(read[self.trained.image_keys[0]], prepared)
            return pictures.draw_volume_map(image[0].numpy(), whole[0].numpy(), grid, entry.text, marks)
        return self._draw_pictures(entry.case, whole, entry.text, marks)

    def _window(self, weight: np.ndarray) -> Window:
        return Window.around(weight, window_size(self.trained.get("inferer"), weight.shape))

    @abstractmethod
    def _targets(self) -> list[int]:
        """Numbers of what is explained."""

    @abstractmethod
    def _add(
        self,
        case: int,
        targets: Sequence[int],
        read: Mapping[str, Any],
        prepared: Mapping[str, Any],
        outputs: Tensor,
    ) -> None:
        """Append the entries of a case with the outputs ``(C, *spatial)``, and note what was not found."""

    @abstractmethod
    def _region(self, entry: Entry) -> np.ndarray:
        """Return the mask ``(*spatial)`` of the outputs that are meant."""

    @abstractmethod
    def _score(self, entry: Entry, image: Tensor, region: Tensor) -> Callable[[Sequence[Tensor]], np.ndarray]:
        """Return the score of the region, on windows like ``image``."""

    @abstractmethod
    def _marks(self, entry: Entry, window: Window) -> pictures.Marks:
        """Return what is drawn over the image."""


class SegmentationTask(_DenseTask):
    """Every structure of every case in which it was found, or one of them."""

    columns = ("case", "file", "target", "is_empty", "dice", "probability", "voxels", "share_in_window")
    score = "mean probability in the region"

    def __init__(
        self, trained: Trained, cases: Sequence[dict[str, Any]], target: str | None, region: str = "predicted"
    ) -> None:
        super().__init__(trained, cases, trained.classes, target, region)
        self._found: dict[int, np.ndarray] = {}
        self._references: dict[int, np.ndarray] = {}

    @property
    def meaning(self) -> str:
        where = "region in which it was found" if self.region == "predicted" else "whole image"
        return f"{f'structure {self.target}' if self.target else 'structure'}, over the {where}"

    def _targets(self) -> list[int]:
        # The background is what is left over; it is explained if it is asked for.
        return list(range(1, len(self.names))) if self.target is None else [self.names.index(self.target)]

    def _add(
        self,
        case: int,
        targets: Sequence[int],
        read: Mapping[str, Any],
        prepared: Mapping[str, Any],
        outputs: Tensor,
    ) -> None:
        (key,) = self.trained.image_keys
        if len(outputs) != len(self.names):
            raise DatasetError(f"the network has {len(outputs)} outputs, the model {len(self.names)} structures")
        probs, found = outputs.softmax(0).numpy(), outputs.argmax(0).numpy().astype(np.uint8)
        self._found[case] = found
        if isinstance(self.cases[case].get("label"), str):
            reference = read_reference(self.cases[case], key, len(self.names), read[key])[0].numpy()
            if reference.shape == found.shape:  # a preprocessing may change the grid
                self._references[case] = reference
        for target in targets:
            mask = found == target
            name = self.names[target]
            if not mask.any():
                self.missing[name].append(self._name(case))
                if self.region == "predicted":
                    continue
            window = self._window(mask if mask.any() else probs[target])
            share = window.cut(torch.from_numpy(mask)).sum().item() / mask.sum() if mask.any() else np.nan
            sure = float(probs[target][mask].mean()) if mask.any() else float(probs[target].max())
            measured = np.nan
            if case in self._references:
                measured = dice(mask, self._references[case] == target)
            text = f"{self._name(case)}: {name}"
            text += f", Dice {measured:.2f}" if measured == measured else f", probability {sure:.2f}"
            if not mask.any():
                text += ", found nowhere"
            elif share < 0.995:
                text += f"; {share:.0%} of it in the part that was looked at"
            row = {"dice": measured, "probability": sure, "voxels": int(mask.sum()), "share_in_window": share}
            wrong = None if measured != measured else 1 - measured
            self.entries.append(Entry(case, target, text, row, {"window": window, "sure": sure, "wrong": wrong}))

    def _region(self, entry: Entry) -> np.ndarray:
        found = self._found[entry.case]
        return np.full(found.shape, True) if self.region == "all" else found == entry.target

    def _score(self, entry: Entry, image: Tensor, region: Tensor) -> Callable[[Sequence[Tensor]], np.ndarray]:
        def score(images: Sequence[Tensor]) -> np.ndarray:
            probs = self.trained.logits(images).float().softmax(1)[:, entry.target].cpu()
            return probs[:, region].mean(1).numpy()

        return score

    def _marks(self, entry: Entry, window: Window) -> pictures.Marks:
        reference = self._references.get(entry.case)
        return pictures.Marks(
            found=self._found[entry.case] == entry.target,
            reference=None if reference is None else reference == entry.target,
            window=window.limits,
        )


class LandmarkTask(_DenseTask):
    """Every landmark of every case, or one of them: its heat map around the place that was found."""

    columns = ("case", "file", "target", "is_empty", "error_mm", "peak", "x_mm", "y_mm", "z_mm")
    score = "heat map where it was found (relative)"

    def __init__(
        self, trained: Trained, cases: Sequence[dict[str, Any]], target: str | None, region: str = "predicted"
    ) -> None:
        super().__init__(trained, cases, [str(name) for name in trained.get("landmarks")], target, region)
        self._decode = trained.get("postprocessing")

    @property
    def meaning(self) -> str:
        where = "around the place that was found" if self.region == "predicted" else "as a whole"
        return f"heat map of {self.target or 'the landmark'} {where}"

    def _targets(self) -> list[int]:
        return list(range(len(self.names))) if self.target is None else [self.names.index(self.target)]

    def _add(
        self,
        case: int,
        targets: Sequence[int],
        read: Mapping[str, Any],
        prepared: Mapping[str, Any],
        outputs: Tensor,
    ) -> None:
        if len(outputs) != len(self.names):
            raise DatasetError(f"the network has {len(outputs)} outputs, the model {len(self.names)} landmarks")
        decoded = self._decode({**prepared, "pred": outputs})
        affine = np.asarray(_affine(read[self.trained.image_keys[0]], prepared))
        position = np.asarray(decoded["pred_mm"])
        places = world_to_voxel(position, affine)
        known = "landmarks" in self.cases[case]
        for target in targets:
            name, peak = self.names[target], float(decoded["peak"][target])
            if float(outputs[target].min()) == float(outputs[target].max()) or peak <= 0:
                self.missing[name].append(self._name(case))
                continue
            error = float(decoded["error_mm"][target]) if known else np.nan
            text = f"{self._name(case)}: {name}"
            text += f", error {error:.1f} mm" if error == error else f", peak {peak:.3g}"
            row = {"error_mm": error, "peak": peak}
            row |= {f"{axis}_mm": float(value) for axis, value in zip("xyz", position[target], strict=True)}
            region = _neighborhood(places[target], outputs.shape[1:])
            reference = None
            if error == error:
                reference = world_to_voxel(np.asarray(self.cases[case]["landmarks"][target]), affine)
            details = {
                "window": self._window(region),
                "sure": peak,
                "wrong": None if error != error else error,
                "place": places[target],
                "reference": reference,
                "shape": tuple(outputs.shape[1:]),
            }
            self.entries.append(Entry(case, target, text, row, details))

    def _region(self, entry: Entry) -> np.ndarray:
        shape = entry.details["shape"]
        return np.full(shape, True) if self.region == "all" else _neighborhood(entry.details["place"], shape)

    def _score(self, entry: Entry, image: Tensor, region: Tensor) -> Callable[[Sequence[Tensor]], np.ndarray]:
        def height(images: Sequence[Tensor]) -> np.ndarray:
            heat: np.ndarray = self.trained.logits(images).float()[:, entry.target].cpu()[:, region].mean(1).numpy()
            return heat

        before = max(float(height([image])[0]), 1e-6)
        return lambda images: height(images) / before

    def _marks(self, entry: Entry, window: Window) -> pictures.Marks:
        return pictures.Marks(
            found_point=entry.details["place"], reference_point=entry.details["reference"], window=window.limits
        )


TASKS: dict[str, type[ClassificationTask] | type[SegmentationTask] | type[LandmarkTask]] = {
    "classification": ClassificationTask,
    "two-view classification": ClassificationTask,
    "segmentation": SegmentationTask,
    "landmarks": LandmarkTask,
}


def pick_cases(probs: np.ndarray, labels: np.ndarray | None, number: int) -> list[int]:
    """Return the cases to draw: half of them the most wrong ones, the others class by class the surest.

    Args:
        probs: ``(cases, classes)``.
        labels: class numbers, zeros and ones per class (NaN where not known), or None if the truth is not known.
        number: how many.
    """
    if labels is None:
        wrong = np.array([], dtype=int)
    elif labels.ndim == 2:
        wrong = np.argsort(-np.nan_to_num(np.abs(labels - probs)).max(1), kind="stable")
    else:
        right = probs[np.arange(len(probs)), labels]
        wrong = np.argsort(right, kind="stable")
        wrong = wrong[probs.argmax(1)[wrong] != labels[wrong]]
    return interleave(wrong.tolist(), [np.argsort(-column, kind="stable").tolist() for column in probs.T], number)


def interleave(wrong: Sequence[int], queues: Sequence[Sequence[int]], number: int) -> list[int]:
    """Return up to ``number`` entries, each once: half of them from ``wrong``, the others from the queues in turn."""
    picked = list(wrong[: number // 2])
    waiting = [list(queue) for queue in queues]
    while len(picked) < number and any(waiting):
        for queue in waiting:
            while queue and queue[0] in picked:
                queue.pop(0)
            if queue and len(picked) < number:
                picked.append(queue.pop(0))
    return picked


def _neighborhood(place: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The voxels around a place."""
    mask = np.full(tuple(shape), False)
    center = np.round(place).astype(int).clip(0, np.array(shape) - 1)
    mask[tuple(slice(max(0, c - LANDMARK_REACH_VOX), c + LANDMARK_REACH_VOX + 1) for c in center)] = True
    return mask


def _affine(read_image: Any, prepared: Mapping[str, Any]) -> Any:
    """Voxels of the network's input to RAS+ in mm: what the preprocessing kept, else that of the image as read."""
    if "affine" in prepared:
        return prepared["affine"]
    return getattr(prepared["image"], "affine", getattr(read_image, "affine", np.eye(4)))


def _grid(read_image: Any, prepared: Mapping[str, Any]) -> Grid:
    meta = getattr(read_image, "meta", {})
    codes = [int(meta.get(key, 1)) for key in ("qform_code", "sform_code")]
    has_sides = hasattr(read_image, "affine") and any(codes)
    affine = np.asarray(torch.as_tensor(_affine(read_image, prepared)).cpu(), dtype=np.float64)
    return Grid(tuple(prepared["image"].shape[1:]), affine, has_sides)


def _no_numbers(case: str) -> DatasetError:
    return DatasetError(f"case {case}: the network gives what is no number; has the training diverged?")
