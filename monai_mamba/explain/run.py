"""`monai-mamba explain`: pictures, checks and embeddings of a trained bundle on some data, in one folder."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation.report.volumes import CONVENTION
from monai_mamba.evaluation.results import provenance, write_figure, write_results
from monai_mamba.explain import pictures
from monai_mamba.explain.cams import ActivationMaps, check_choice
from monai_mamba.explain.embeddings import MIN_CASES, project
from monai_mamba.explain.sanity import DELETED_SHARES, SanityChecks, check_maps
from monai_mamba.explain.tasks import TASKS, ClassificationTask, Progress, Task
from monai_mamba.files import whole_folder
from monai_mamba.training.trained import data_source, fingerprints, load_trained

SUMMARY_FILE = "explain.json"
_METHOD_NAMES = {"gradcam": "Grad-CAM", "gradcam++": "Grad-CAM++"}


def explain(
    bundle: os.PathLike[str] | str,
    dataset_dir: os.PathLike[str] | str,
    output_dir: os.PathLike[str] | str,
    *,
    section: str = "test",
    method: str | None = None,
    layer: str | None = None,
    target: str | None = None,
    region: str = "predicted",
    chosen: Sequence[str] = (),
    num_pictures: int = 12,
    num_checks: int | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Explain a trained model on a data set or a folder of files: classes, structures of label maps, landmarks.

    The folder holds ``pictures/`` and ``pictures.csv``, ``sanity.png`` and ``explain.json``, for classifiers
    ``embeddings.csv`` and ``embeddings.png``, too; it appears whole or not at all.

    Args:
        bundle: a trained bundle.
        dataset_dir: folder with a ``datalist.json``, or with pictures or volumes.
        output_dir: new or empty folder.
        section: of the data set.
        method: ``"gradcam"`` or ``"gradcam++"``; None takes the first for classifiers, the second for label maps and
            landmarks, because a Grad-CAM is empty where the mean gradient is negative in every channel.
        layer: stage to look at; None takes the deepest whose map is not too coarse.
        target: class, structure or landmark to explain; None takes the predicted class of each case, every structure,
            every landmark.
        region: ``"predicted"`` explains a structure where it was found and a landmark around the place that was
            found, ``"all"`` all outputs of the structure or landmark.
        chosen: cases to draw; none takes the most wrong ones and, class by class, the surest.
        num_pictures: how many to draw if none are chosen.
        num_checks: maps for the sanity checks, each of which costs about 130 passes; 0 for no checks; None takes 16 for
            classifiers, 6 for label maps and landmarks.
        limit: use only this many cases, evenly spaced.
        batch_size: images per pass.
        seed: of shuffles, random maps, t-SNE and draws.
        device: where to compute; None takes the GPU if there is one.
        overrides: entries of the bundle's configuration.
        on_progress: gets step, done and total.

    Returns:
        The content of ``explain.json``.

    Raises:
        CheckpointError: if the bundle cannot be used.
        DatasetError: if the data does not fit the model, a file cannot be read, or nothing was found that could be
            explained.
        ValueError: if an option names something unknown.
        FileExistsError: if the output folder is not empty.

    References:
        Vinogradova et al., Towards Interpretable Semantic Segmentation via Gradient-Weighted Class Activation Mapping,
        AAAI 2020 (Seg-Grad-CAM).
    """
    trained = load_trained(bundle, device=device, overrides=overrides)
    method = TASKS[trained.task].method if method is None else method
    check_choice(trained.network, method, layer)  # before the predictions, which take long
    cases = trained.list_cases(dataset_dir, section, limit)
    task: Task = TASKS[trained.task](trained, cases, target, region)
    names = [str(case["case"]) for case in cases]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"`chosen` names the case {unknown[0]}, which is not among the {len(cases)} cases")
    with whole_folder(output_dir) as folder:
        task.predict(batch_size, on_progress)
        drawn = task.pick(num_pictures)
        if chosen:
            drawn = [row for name in chosen for row, e in enumerate(task.entries) if names[e.case] == name]
        if not drawn:
            raise DatasetError(
                f"case {', '.join(chosen)}: {', '.join(task.missing)} not found there, there is nothing to explain; "
                '`region` "all" explains the whole image'
            )
        first = task.subject(task.entries[drawn[0]])
        maps = ActivationMaps(trained.network, first.image, method, layer)
        entries = _draw(task, drawn, maps, folder, on_progress)
        checks = None
        num_checks = task.num_checks if num_checks is None else num_checks
        if num_checks:
            checks = _check(task, maps, num_checks, batch_size, seed, on_progress)
            write_figure(
                folder / "sanity.png",
                pictures.draw_sanity(DELETED_SHARES, checks.curves, checks.similarity, task.score),
                110,
            )
        size = " x ".join(map(str, maps.map_size))
        name = ("Seg-" if trained.task == "segmentation" else "") + _METHOD_NAMES[method]
        text = (
            f"{name} of {maps.layer} ({size}) for the {task.meaning}. Colored is where the layer speaks for it; the "
            "map is as coarse as the layer, and it is no proof of a finding."
        )
        summary = {
            "text": f"{text} {CONVENTION}" if first.image.ndim == 4 else text,
            "task": trained.task,
            "method": method,
            "layer": maps.layer,
            "map_size": list(maps.map_size),
            "target": target or ("predicted" if isinstance(task, ClassificationTask) else "all"),
            "region": region,
            "classes": task.names,
            "cases": len(cases),
            "pictures": entries,
            "not_found": {name: found for name, found in task.missing.items() if found},
            "sanity": checks.as_list() if checks else [],
            "sanity_figures": _sanity_figures(checks),
            "model": fingerprints(trained),
            "provenance": provenance({"Data": data_source(dataset_dir)}, seed),
        }
        texts: dict[str, Any] = {SUMMARY_FILE: summary, "pictures.csv": _as_csv(entries, task.columns)}
        if isinstance(task, ClassificationTask) and len(cases) >= MIN_CASES:
            on_progress("embeddings", 0, 1)
            coordinates = project(task.features, seed)
            _draw_embeddings(folder, coordinates, task)
            texts["embeddings.csv"] = _embeddings_csv(coordinates, task)
            on_progress("embeddings", 1, 1)
        write_results(folder, texts)
    return summary


def _draw(
    task: Task, drawn: Sequence[int], maps: ActivationMaps, folder: Path, on_progress: Progress
) -> list[dict[str, Any]]:
    (folder / "pictures").mkdir()
    rows = []
    for number, index in enumerate(drawn, start=1):
        entry = task.entries[index]
        case, target = str(task.cases[entry.case]["case"]), task.names[entry.target]
        stem = case if isinstance(task, ClassificationTask) else f"{case}_{target}"
        name = f"pictures/{number:03d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', stem)[:60]}.png"
        subject = task.subject(entry)
        found = maps(subject.image, subject.index, subject.region)
        if not found.any():
            entry = replace(entry, text=f"{entry.text}; EMPTY MAP, nothing in {maps.layer} speaks for it")
        write_figure(folder / name, task.draw(entry, found), 110)
        row = {"case": case, "file": name, **entry.row, "target": target, "is_empty": not found.any()}
        rows.append({**row, "text": entry.text})
        on_progress("pictures", number, len(drawn))
    return rows


def _check(
    task: Task, maps: ActivationMaps, number: int, batch_size: int, seed: int, on_progress: Progress
) -> SanityChecks:
    number = min(number, len(task.entries))
    done = [0]

    def count() -> None:
        done[0] += 1
        on_progress("sanity checks", done[0], number)

    subjects = [task.subject(task.entries[i * len(task.entries) // number]) for i in range(number)]
    is_volume = subjects[0].image.ndim == 4
    return check_maps(
        task.trained.network,
        subjects,
        maps,
        seed=seed,
        batch_size=1 if is_volume and not isinstance(task, ClassificationTask) else batch_size,
        on_map=count,
    )


def _sanity_figures(checks: SanityChecks | None) -> dict[str, Any] | None:
    if checks is None:
        return None
    return {
        "similarity": {str(share): asdict(interval) for share, interval in checks.similarity.items()},
        "deletion": asdict(checks.deletion),
        "deletion_curves": {"share": list(DELETED_SHARES), **checks.curves},
    }


def _draw_embeddings(folder: Path, coordinates: dict[str, np.ndarray], task: ClassificationTask) -> None:
    # With several labels per case there is no one color; the most probable class has to do.
    truth = task.labels if task.labels is not None and task.labels.ndim == 1 else None
    chosen = task.probs.argmax(1)
    right = None if truth is None else chosen == truth
    figure = pictures.draw_embeddings(coordinates, chosen if truth is None else truth, task.names, right)
    write_figure(folder / "embeddings.png", figure, 110)


def _embeddings_csv(coordinates: Mapping[str, np.ndarray], task: ClassificationTask) -> str:
    names = {"PCA": "pca", "t-SNE": "tsne"}
    rows = []
    for index, case in enumerate(task.cases):
        row: dict[str, Any] = {"case": case["case"], "predicted": task.names[int(task.probs[index].argmax())]}
        row["label"] = task.truth(index)
        for method, points in coordinates.items():
            row |= {f"{names[method]}_{axis}": f"{points[index, i]:.6g}" for i, axis in enumerate("xy")}
        rows.append(row)
    return _as_csv(rows, list(rows[0]))


def _as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
    return text.getvalue()
