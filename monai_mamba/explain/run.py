"""`monai-mamba explain`: pictures, checks and embeddings of a trained bundle on some data, in one folder."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.results import provenance, write_figure, write_results
from monai_mamba.explain import pictures
from monai_mamba.explain.cams import ActivationMaps
from monai_mamba.explain.embeddings import MIN_CASES, project
from monai_mamba.explain.sanity import DELETED_SHARES, SanityChecks, check_maps
from monai_mamba.files import whole_folder
from monai_mamba.layers.taps import extract_features
from monai_mamba.training.outputs import class_probabilities
from monai_mamba.training.trained import Trained, data_source, fingerprints, load_trained
from monai_mamba.training.transforms import read_picture

SUMMARY_FILE = "explain.json"
_METHOD_NAMES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}
Progress = Callable[[str, int, int], None]


def explain(
    bundle: os.PathLike[str] | str,
    dataset_dir: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    *,
    section: str = "test",
    method: str = "gradcam",
    layer: str | None = None,
    target: str | None = None,
    chosen: Sequence[str] = (),
    num_pictures: int = 12,
    num_checks: int = 16,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Explain a trained classifier on a data set or a folder of files.

    The folder holds ``pictures/`` and ``pictures.csv``, ``sanity.png``, ``embeddings.csv`` and ``embeddings.png``, and
    ``explain.json``; it appears whole or not at all.

    Args:
        bundle: a trained bundle.
        dataset_dir: folder with a ``datalist.json``, or with pictures or volumes.
        output_dir: new or empty folder.
        section: of the data set.
        method: ``"gradcam"`` or ``"gradcam++"``.
        layer: stage to look at; None takes the deepest whose map is not too coarse.
        target: class to explain; None takes the predicted one of each case.
        chosen: cases to draw; none takes the most wrong ones and, class by class, the surest.
        num_pictures: how many to draw if none are chosen.
        num_checks: cases for the sanity checks; 0 for no checks.
        limit: use only this many cases, evenly spaced.
        batch_size: cases per pass.
        seed: of shuffles, random maps, t-SNE and draws.
        device: where to compute; None takes the GPU if there is one.
        overrides: entries of the bundle's configuration.
        on_progress: gets step, done and total.

    Returns:
        The content of ``explain.json``.

    Raises:
        CheckpointError: if the bundle cannot be used or is of another task.
        DatasetError: if the data does not fit the model or a file cannot be read.
        ValueError: if an option names something unknown.
        FileExistsError: if the output folder is not empty.
    """
    trained = load_trained(bundle, device=device, overrides=overrides)
    trained.require_task("classification", "two-view classification")
    if target is not None and target not in trained.classes:
        raise ValueError(f"`target` must be one of {', '.join(trained.classes)}, got {target!r}")
    cases = trained.list_cases(dataset_dir, section, limit)
    by_name = {str(case["case"]): index for index, case in enumerate(cases)}
    unknown = [name for name in chosen if name not in by_name]
    if unknown:
        raise ValueError(f"`chosen` names the case {unknown[0]}, which is not among the {len(cases)} cases")
    with whole_folder(output_dir) as folder:
        probs, features = _predict(trained, cases, batch_size, on_progress)
        labels = _labels(cases, len(trained.classes))
        drawn = [by_name[n] for n in chosen] if chosen else pick_cases(probs, labels, num_pictures)
        maps = ActivationMaps(trained.network, _input(trained, cases[drawn[0]]), method, layer)
        targets = probs.argmax(1) if target is None else np.full(len(cases), trained.classes.index(target))
        entries = _draw(trained, cases, drawn, probs, labels, targets, maps, folder, on_progress)
        checks = None
        if num_checks:
            checks = _check(trained, cases, targets, maps, num_checks, batch_size, seed, on_progress)
            write_figure(
                folder / "sanity.png", pictures.draw_sanity(DELETED_SHARES, checks.curves, checks.similarity), 110
            )
        on_progress("embeddings", 0, 1)
        coordinates = project(features, seed) if len(cases) >= MIN_CASES else {}
        if coordinates:
            _draw_embeddings(folder, coordinates, probs, labels, trained.classes)
        what = f"class {target}" if target else "predicted class"
        size = " x ".join(map(str, maps.map_size))
        summary = {
            "text": f"{_METHOD_NAMES[method]} of {maps.layer} ({size}) for the {what}. Colored is where the layer "
            "speaks for the class; the map is as coarse as the layer, and it is no proof of a finding.",
            "method": method,
            "layer": maps.layer,
            "map_size": list(maps.map_size),
            "target": target or "predicted",
            "classes": trained.classes,
            "cases": len(cases),
            "pictures": entries,
            "sanity": checks.as_list() if checks else [],
            "sanity_figures": _sanity_figures(checks),
            "model": fingerprints(trained),
            "provenance": provenance({"Data": data_source(dataset_dir)}, seed),
        }
        texts: dict[str, Any] = {
            SUMMARY_FILE: summary,
            "pictures.csv": _as_csv(entries, ["case", "file", "label", "predicted", "probability", "target"]),
        }
        if coordinates:
            texts["embeddings.csv"] = _embeddings_csv(cases, coordinates, trained.classes, labels, probs)
        write_results(folder, texts)
    on_progress("embeddings", 1, 1)
    return summary


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
    picked = wrong[: number // 2].tolist()
    queues = [np.argsort(-column, kind="stable").tolist() for column in probs.T]
    while len(picked) < min(number, len(probs)):
        for queue in queues:
            while queue and queue[0] in picked:
                queue.pop(0)
            if queue and len(picked) < number:
                picked.append(queue.pop(0))
    return [int(index) for index in picked]


def _predict(
    trained: Trained, cases: Sequence[dict[str, Any]], batch_size: int, on_progress: Progress
) -> tuple[np.ndarray, np.ndarray]:
    probs, features = [], []
    for start in range(0, len(cases), batch_size):
        images = [_input(trained, case) for case in cases[start : start + batch_size]]
        kept: list[torch.Tensor] = []
        handle = trained.network.register_forward_hook(lambda _module, _inputs, output, kept=kept: kept.append(output))
        try:
            with torch.no_grad():
                batch = torch.stack(images).to(trained.device)
                features.append(
                    extract_features(trained.network, batch, names=["embedding"])["embedding"].float().cpu()
                )
        finally:
            handle.remove()
        probs.append(class_probabilities(kept[0], len(trained.classes), trained.multi_label))
        on_progress("predictions", start + len(images), len(cases))
    found = torch.cat(probs).numpy()
    if not np.isfinite(found).all():
        bad = cases[int(np.flatnonzero(~np.isfinite(found).all(1))[0])]["case"]
        raise DatasetError(
            f"case {bad}: the network gives probabilities that are no numbers; has the training diverged?"
        )
    return found, torch.cat(features).flatten(1).numpy()


def _input(trained: Trained, case: Mapping[str, Any]) -> torch.Tensor:
    image: torch.Tensor = trained.prepare(trained.read(case))["image"]
    return image


def _labels(cases: Sequence[Mapping[str, Any]], num_classes: int) -> np.ndarray | None:
    if any("label" not in case for case in cases):
        return None
    return np.array([np.asarray(case["label"]) for case in cases])


def _draw(
    trained: Trained,
    cases: Sequence[dict[str, Any]],
    drawn: Sequence[int],
    probs: np.ndarray,
    labels: np.ndarray | None,
    targets: np.ndarray,
    maps: ActivationMaps,
    folder: Path,
    on_progress: Progress,
) -> list[dict[str, Any]]:
    (folder / "pictures").mkdir()
    entries = []
    for number, index in enumerate(drawn, start=1):
        case, predicted = cases[index], int(probs[index].argmax())
        truth = None if labels is None else _truth(labels[index], trained.classes)
        text = "" if truth is None else f"{truth}, "
        text = f"{case['case']}: {text}predicted {trained.classes[predicted]} ({probs[index, predicted]:.2f})"
        if targets[index] != predicted:
            text += f"; map for {trained.classes[targets[index]]}"
        name = f"pictures/{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', str(case['case']))[:60]}.png"
        read = trained.read(case)
        image = trained.prepare(read)["image"]
        write_figure(folder / name, _picture(trained, case, read, image, maps(image, int(targets[index])), text), 110)
        entries.append(
            {
                "case": str(case["case"]),
                "file": name,
                "label": truth or "",
                "predicted": trained.classes[predicted],
                "probability": float(probs[index, predicted]),
                "target": trained.classes[targets[index]],
                "text": text,
            }
        )
        on_progress("pictures", number, len(drawn))
    return entries


def _truth(label: np.ndarray, classes: Sequence[str]) -> str:
    if label.ndim == 0:
        return classes[int(label)]
    return " + ".join(name for name, value in zip(classes, label, strict=True) if value == 1) or "none"


def _picture(
    trained: Trained,
    case: Mapping[str, Any],
    read: Mapping[str, Any],
    image: torch.Tensor,
    maps: torch.Tensor,
    title: str,
) -> Any:
    if image.ndim == 4:
        pixels = getattr(read[trained.image_keys[0]], "pixdim", torch.ones(3))
        spacing = [float(size) for size in pixels]
        return pictures.draw_volume_map(image[0].numpy(), maps[0].numpy(), spacing, title)
    files = [str(case[key]) for key in trained.image_keys]
    sizes = []
    for file in files:
        with Image.open(file) as picture:
            sizes.append(picture.size)
    images = [read_picture(file) for file in files]
    shown = maps.numpy() if len(maps) == len(images) else np.repeat(maps.numpy(), len(images), 0)
    return pictures.draw_image_maps(images, shown, [w / h for w, h in sizes], trained.image_keys, title)


def _check(
    trained: Trained,
    cases: Sequence[dict[str, Any]],
    targets: np.ndarray,
    maps: ActivationMaps,
    number: int,
    batch_size: int,
    seed: int,
    on_progress: Progress,
) -> SanityChecks:
    number = min(number, len(cases))
    rows = [i * len(cases) // number for i in range(number)]
    done = [0]

    def count() -> None:
        done[0] += 1
        on_progress("sanity checks", done[0], number)

    return check_maps(
        trained.network,
        lambda images: trained.probabilities(images).numpy(),
        [_input(trained, cases[i]) for i in rows],
        [int(targets[i]) for i in rows],
        [str(cases[i]["patient"]) for i in rows],
        maps,
        seed=seed,
        on_case=count,
    )


def _sanity_figures(checks: SanityChecks | None) -> dict[str, Any] | None:
    if checks is None:
        return None
    return {
        "similarity": {str(share): asdict(interval) for share, interval in checks.similarity.items()},
        "deletion": asdict(checks.deletion),
        "deletion_curves": {"share": list(DELETED_SHARES), **checks.curves},
    }


def _draw_embeddings(
    folder: Path,
    coordinates: dict[str, np.ndarray],
    probs: np.ndarray,
    labels: np.ndarray | None,
    classes: Sequence[str],
) -> None:
    # With several labels per case there is no one color; the most probable class has to do.
    truth = labels if labels is not None and labels.ndim == 1 else None
    chosen = probs.argmax(1)
    right = None if truth is None else chosen == truth
    figure = pictures.draw_embeddings(coordinates, chosen if truth is None else truth, classes, right)
    write_figure(folder / "embeddings.png", figure, 110)


def _embeddings_csv(
    cases: Sequence[Mapping[str, Any]],
    coordinates: Mapping[str, np.ndarray],
    classes: Sequence[str],
    labels: np.ndarray | None,
    probs: np.ndarray,
) -> str:
    names = {"PCA": "pca", "t-SNE": "tsne"}
    rows = []
    for index, case in enumerate(cases):
        row: dict[str, Any] = {"case": case["case"], "predicted": classes[int(probs[index].argmax())]}
        row["label"] = "" if labels is None else _truth(labels[index], classes)
        for method, points in coordinates.items():
            row |= {f"{names[method]}_{axis}": f"{points[index, i]:.6g}" for i, axis in enumerate("xy")}
        rows.append(row)
    return _as_csv(rows, list(rows[0]))


def _as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
