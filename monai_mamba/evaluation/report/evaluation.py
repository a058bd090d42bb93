"""The report of an evaluation: what ``metrics.json`` says, with curves, pictures and the cases that went worst."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monai_mamba.errors import DatasetError
from monai_mamba.evaluation import calibration
from monai_mamba.evaluation.report import charts
from monai_mamba.evaluation.report.page import (
    color_of,
    figure_source,
    format_number,
    picture_source,
    render_page,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from monai_mamba.evaluation.landmarks import Landmarks
    from monai_mamba.evaluation.segmentation import Evaluation, Labels
    from monai_mamba.evaluation.tables import Predictions

TEMPLATE = Path(__file__).parent / "evaluation.html.j2"
#: Cases in the table of the worst, and pictures of segmentations.
NUM_WORST = 10
NUM_PICTURES = 4
#: More classes than this make curves unreadable; the classes with the most positives are drawn.
MAX_CURVES = 7
NAMES = {
    "accuracy": "accuracy",
    "precision": "precision",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1",
    "auc": "AUC",
    "dice": "Dice",
    "hd95_mm": "HD95 (mm)",
    "surface_dice": "surface Dice",
    "mre_mm": "mean radial error (mm)",
}


@dataclass(frozen=True)
class Picture:
    """A picture inside the report."""

    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts; on a narrow screen each row becomes a block headed by its first cell.

    Attributes:
        columns: headings.
        rows: texts.
        left: numbers of the columns that are set flush left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)


@dataclass(frozen=True)
class Section:
    """A part of the report, top down: warnings, text, charts, wide charts, legend, pictures, tables, notes.

    A gallery puts pictures side by side; pictures of three planes get the whole width and scroll sideways on a phone.
    """

    title: str
    text: str = ""
    warnings: Sequence[str] = ()
    charts: Sequence[Picture] = ()
    wide: Sequence[Picture] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    gallery: Sequence[Picture] = ()
    planes: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    more: Table | None = None
    more_title: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """A figure at the top."""

    name: str
    value: str
    range: str = field(default="")


def render_classification(
    metrics: Mapping[str, Any],
    test: Predictions,
    validation: Predictions | None = None,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
) -> str:
    """Return the report of a classification as HTML.

    Args:
        metrics: content of ``metrics.json``.
        test, validation: the predictions that were evaluated.
        explanations, robustness: folders that ``monai-mamba explain`` and ``monai-mamba robustness`` wrote.

    Raises:
        DatasetError: if one of the folders is none, or is about other cases.
    """
    names = ("auc", "accuracy", "sensitivity", "specificity", "f1")
    sections = [_scores(metrics), _curves(metrics, test)]
    if "confusion_matrix" in metrics:
        sections.append(_classes(metrics))
        sections.append(_calibration(metrics, test))
    if "by" in metrics:
        sections.append(_strata(metrics["by"]))
    sections.append(_worst_cases(test))
    if explanations is not None:
        sections += _explanations(Path(explanations), "classification", set(test.case.tolist()))
    if robustness is not None:
        sections.append(_robustness(Path(robustness), metrics["classes"]))
    group = {"case": "cases", "study": "studies", "patient": "patients"}[str(metrics.get("group", "case"))]
    return _render(
        f"Classification: {', '.join(metrics['classes'][:4])}{' ...' if len(metrics['classes']) > 4 else ''}",
        f"{metrics['cases']} {group} of {metrics['patients']} patients, {len(metrics['classes'])} classes.",
        [_card(NAMES[name], metrics["metrics"][name]) for name in names],
        sections,
        metrics,
    )


def render_segmentation(
    metrics: Mapping[str, Any],
    evaluation: Evaluation,
    predictions: os.PathLike[str] | str,
    references: os.PathLike[str] | str,
    images: os.PathLike[str] | str | Mapping[str, str] | None,
    labels: Labels,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
) -> str:
    """Return the report of a segmentation as HTML.

    Args:
        metrics: content of ``metrics.json``.
        evaluation: scores of all cases.
        predictions, references: folders with the label maps.
        images: folder with ``<case>_0000`` images for the pictures, or case to file; None for none.
        labels: structures and file ending.
        explanations, robustness: folders that ``monai-mamba explain`` and ``monai-mamba robustness`` wrote.

    Raises:
        DatasetError: if ``images`` lacks the image of a case that is drawn, or one of the folders is about others.
    """
    figures = list(metrics["metrics"])
    structures = Table(
        ["Structure", *(NAMES[name] for name in figures), "cases"],
        [
            [name, *(_interval(row[figure], _digits(figure)) for figure in figures), str(int((~np.isnan(dice)).sum()))]
            for (name, row), dice in zip(metrics["per_structure"].items(), evaluation.array("dice").T, strict=True)
        ],
    )
    arrays = {figure: evaluation.array(figure) for figure in figures}
    drawn = [
        _chart(
            charts.draw_cases(dict(zip(evaluation.structures, array.T, strict=True)), NAMES[figure]),
            f"{upper_first(NAMES[figure])} of every case",
        )
        for figure, array in arrays.items()
    ]
    order = sorted(evaluation.cases, key=lambda case: evaluation.case_dice(case) or 0.0)
    every = Table(
        ["Case", "Structure", *(NAMES[figure] for figure in figures)],
        [
            [case, name, *(format_number(getattr(score, figure), _digits(figure)) for figure in figures)]
            for case in order
            for name, score in evaluation.cases[case].items()
        ],
        left=(0, 1),
    )
    warnings = []
    if extra := metrics["predictions_without_reference"]:
        warnings.append(f"{len(extra)} predictions have no reference and are not scored, first {extra[0]}.")
    tolerance = f"{evaluation.tolerance_mm:g} mm"
    sections = [
        Section(
            "Scores per structure",
            warnings=warnings,
            tables=[structures],
            notes=[
                "Means over the cases. HD95: 95 % Hausdorff distance. Surface Dice (NSD): part of both surfaces that "
                f"lies within {tolerance} of the other. {metrics['empty_structures']}"
            ],
        ),
        Section("Cases", charts=drawn, more=every, more_title="Every case, worst first"),
    ]
    if "comparison" in metrics:
        sections.insert(1, _structure_comparison(metrics["comparison"]))
    if images is not None:
        sections.append(_overlays(order, evaluation, Path(predictions), Path(references), images, labels.file_ending))
    if explanations is not None:
        sections += _explanations(Path(explanations), "segmentation", set(evaluation.cases))
    if robustness is not None:
        sections.append(_robustness(Path(robustness), list(evaluation.structures)))
    return _render(
        f"Segmentation: {', '.join(list(evaluation.structures)[:4])}",
        f"{metrics['cases']} cases of {metrics['patients']} patients, {len(evaluation.structures)} structures.",
        [_card(f"mean {NAMES[name]}", value, _digits(name)) for name, value in metrics["metrics"].items()],
        sections,
        metrics,
    )


def render_landmarks(
    metrics: Mapping[str, Any],
    landmarks: Landmarks,
    explanations: os.PathLike[str] | str | None = None,
    robustness: os.PathLike[str] | str | None = None,
) -> str:
    """Return the report of landmarks as HTML.

    Args:
        metrics: content of ``metrics.json``.
        landmarks: what was evaluated.
        explanations, robustness: folders that ``monai-mamba explain`` and ``monai-mamba robustness`` wrote.

    Raises:
        DatasetError: if one of the folders is about others.
    """
    errors = landmarks.errors_mm
    by_landmark = Table(
        ["Landmark", NAMES["mre_mm"], "cases"],
        [
            [name, _interval(value, 2), str(int((~np.isnan(errors[:, index])).sum()))]
            for index, (name, value) in enumerate(metrics["per_landmark"].items())
        ],
    )
    worst = sorted(
        ((errors[i, j], case, name) for i, case in enumerate(landmarks.case) for j, name in enumerate(landmarks.names)),
        key=lambda entry: -entry[0] if not np.isnan(entry[0]) else np.inf,
    )
    rates = Table(
        ["Figure", "all landmarks"],
        [[metric_name(name), _interval(value, _digits(name))] for name, value in metrics["metrics"].items()],
    )
    sections = [
        Section(
            "Scores",
            tables=[rates, by_landmark],
            notes=["Success detection rate (SDR): share of the landmarks that are at most so far from the reference."],
        ),
        Section(
            "Cases",
            charts=[
                _chart(charts.draw_success(**metrics["sdr_curve"]), "Success detection rate over the radius"),
                _chart(
                    charts.draw_cases(dict(zip(landmarks.names, errors.T, strict=True)), "radial error (mm)"),
                    "Radial error of every case",
                ),
            ],
            tables=[
                Table(
                    ["Case", "Landmark", "error (mm)"],
                    [[case, name, f"{e:.2f}"] for e, case, name in worst[:NUM_WORST] if not np.isnan(e)],
                    left=(0, 1),
                )
            ],
            notes=["The largest errors."],
        ),
    ]
    if "comparison" in metrics:
        rows = [[metric_name(n), _interval(v, signed=True)] for n, v in metrics["comparison"]["difference"].items()]
        sections.insert(1, Section("Difference to the other model", tables=[Table(["Figure", "this - other"], rows)]))
    if explanations is not None:
        sections += _explanations(Path(explanations), "landmarks", set(landmarks.case.tolist()))
    if robustness is not None:
        sections.append(_robustness(Path(robustness), landmarks.names))
    return _render(
        "Landmarks",
        f"{metrics['cases']} cases of {metrics['patients']} patients, {len(landmarks.names)} landmarks.",
        [_card(metric_name(name), value, 2) for name, value in metrics["metrics"].items()],
        sections,
        metrics,
    )


def _render(
    title: str, summary: str, cards: Sequence[Card], sections: Sequence[Section], metrics: Mapping[str, Any]
) -> str:
    interval = metrics["interval"]
    return render_page(
        TEMPLATE,
        title=title,
        summary=summary,
        cards=cards,
        sections=sections,
        provenance=metrics["provenance"],
        interval=f"{interval['level']:.0%}, {interval['method']}, {interval['draws']} draws, seed {interval['seed']}",
    )


def _scores(metrics: Mapping[str, Any]) -> Section:
    columns = {"most probable class" if metrics["task"] == "classification" else "threshold 0.5": metrics["metrics"]}
    if "youden" in metrics:
        threshold = metrics["youden"]["threshold"]
        name = "thresholds" if isinstance(threshold, Mapping) else f"threshold {threshold:.3f}"
        columns[f"{name} from validation"] = metrics["youden"]["metrics"]
    if "metrics" in metrics.get("by_study", {}):
        columns[f"{metrics['by_study']['cases']} studies"] = metrics["by_study"]["metrics"]
    shown = [name for name in NAMES if name in metrics["metrics"]]
    rows = [[NAMES[name], *(_interval(column[name]) for column in columns.values())] for name in shown]
    tables = [Table(["Metric", *columns], rows)]
    notes = []
    if "delong" in metrics:
        d = metrics["delong"]
        notes.append(
            f"AUC by DeLong: {d['auc']:.3f} ({d['low']:.3f} to {d['high']:.3f}); it takes cases as independent, the "
            "bootstrap does not."
        )
    if len(metrics["classes"]) == 2 and metrics["task"] == "classification":
        notes.append(
            "By the papers' convention these are means over both classes, which makes sensitivity and specificity "
            "equal when there are two. What a reader calls sensitivity is that of the class in question, below."
        )
    warnings = [
        f"{what}: {', '.join(metrics[key])}."
        for key, what in (
            ("classes_without_cases", "Without a case, hence without AUC"),
            ("classes_without_both_labels", "Not measurable, one label only"),
        )
        if metrics.get(key)
    ]
    if "confusion_matrix" in metrics:
        predicted = np.asarray(metrics["confusion_matrix"]["counts"]).sum(0)
        never = [name for name, count in zip(metrics["classes"], predicted, strict=True) if count == 0]
        if never:
            warnings.append(f"Never the most probable class: {', '.join(never)}. Look at the AUC and the curves.")
    if "refused" in metrics.get("by_study", {}):
        warnings.append(f"No scores by study: {metrics['by_study']['refused']}.")
    if "comparison" in metrics:
        comparison = metrics["comparison"]
        rows = [[NAMES[n], _interval(v, signed=True)] for n, v in comparison["difference"].items() if n in NAMES]
        tables.append(Table(["Difference to the other model", "this - other"], rows))
        if "delong" in comparison:
            d = comparison["delong"]
            notes.append(f"AUC difference by DeLong: {d['auc_difference']:+.3f}, p = {d['p_value']:.2g}.")
    return Section("Scores", warnings=warnings, tables=tables, notes=notes)


def _curves(metrics: Mapping[str, Any], test: Predictions) -> Section:
    truths, scores = _one_against_rest(test)
    note = ""
    if len(truths) > MAX_CURVES:
        kept = sorted(truths, key=lambda name: -int(truths[name].sum()))[:MAX_CURVES]
        truths = {name: truths[name] for name in truths if name in kept}
        note = f"The {MAX_CURVES} classes with the most positives of {len(metrics['classes'])}."
    drawn = [
        _chart(charts.draw_roc(truths, scores), "ROC"),
        _chart(charts.draw_precision_recall(truths, scores), "Precision and recall; dotted: share of the positives"),
    ]
    more = None
    if test.is_multi_label:
        rows = [
            [name, str(metrics["positives"][name]), str(metrics["known_labels"][name]),
             _interval(metrics["metrics"][f"auc_{name}"])]
            for name in test.classes
        ]  # fmt: skip
        more = Table(["Class", "positives", "known", "AUC"], rows)
    return Section(
        "ROC and precision-recall curves",
        charts=drawn,
        tables=[more] if more else [],
        notes=[note] if note else [],
    )


def _one_against_rest(test: Predictions) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    indices = [1] if not test.is_multi_label and len(test.classes) == 2 else range(len(test.classes))
    truths, scores = {}, {}
    for index in indices:
        known = ~np.isnan(test.label[:, index]) if test.is_multi_label else np.full(len(test.case), True)
        truth = (test.label[:, index] == 1 if test.is_multi_label else test.label == index)[known]
        if 0 < truth.sum() < len(truth):
            truths[test.classes[index]], scores[test.classes[index]] = truth, test.probs[known, index]
    return truths, scores


def _classes(metrics: Mapping[str, Any]) -> Section:
    counts = metrics["confusion_matrix"]["counts"]
    figures = ("sensitivity", "specificity", "precision", "f1")
    rows = [
        [name, *(_interval(row[figure]) for figure in figures), str(sum(counts[index]))]
        for index, (name, row) in enumerate(metrics["per_class"].items())
    ]
    return Section(
        "Classes",
        charts=[
            _chart(charts.draw_confusion(counts, metrics["classes"]), "Confusion matrix, with the share of each row")
        ],
        tables=[Table(["Class", *(NAMES[figure] for figure in figures), "cases"], rows)],
        notes=["Each class against the rest."],
    )


def _calibration(metrics: Mapping[str, Any], test: Predictions) -> Section:
    found = metrics["calibration"]
    scaled, notes = None, []
    if "temperature" in found:
        scaled = calibration.scale_temperature(test.probs, found["temperature"])
        notes.append(
            f"Temperature from the validation cases: {found['temperature']:.3f}; above 1 the model was too sure."
        )
    return Section(
        "Calibration",
        charts=[
            _chart(charts.draw_reliability(test.label, test.probs, scaled), "Reliability diagram; below, cases per bin")
        ],
        notes=["ECE: expected calibration error of the most probable class, 15 bins.", *notes],
    )


def _strata(by: Mapping[str, Any]) -> Section:
    figures = ("auc", "accuracy", "sensitivity", "specificity")
    rows = [
        [value or "(empty)", *(_interval(entry["metrics"][figure]) for figure in figures), str(entry["cases"])]
        for value, entry in by["values"].items()
    ]
    return Section(
        f"By {by['column']}",
        tables=[Table([by["column"], *(NAMES[figure] for figure in figures), "cases"], rows)],
        notes=[f"Mean of the AUCs that can be measured: {format_number(by['mean_auc'])}."],
    )


def _worst_cases(test: Predictions) -> Section:
    if test.is_multi_label:
        known = ~np.isnan(test.label)
        right = np.where(known, np.where(test.label == 1, test.probs, 1 - test.probs), 1.0)
        loss = -np.log(np.clip(right, 1e-12, None)).sum(1) / np.maximum(known.sum(1), 1)
        rows = []
        for index in np.argsort(-loss, kind="stable")[:NUM_WORST]:
            if not known[index].any():
                break
            worst = int(right[index].argmin())
            said = "present" if test.label[index, worst] else "absent"
            rows.append([test.case[index], f"{test.classes[worst]} ({said})", f"{test.probs[index, worst]:.3f}"])
        table = Table(["Case", "worst class (truth)", "its probability"], rows, left=(0, 1))
    else:
        chosen = test.probs.argmax(1)
        right = test.probs[np.arange(len(test.case)), test.label]
        rows = [
            [test.case[i], test.classes[test.label[i]], test.classes[chosen[i]], f"{right[i]:.3f}"]
            for i in np.argsort(right, kind="stable")[:NUM_WORST]
        ]
        table = Table(["Case", "true", "predicted", "probability of the true class"], rows, left=(0, 1, 2))
    return Section("Worst cases", tables=[table], notes=["The cases the model was most wrong about, worst first."])


def _explanations(folder: Path, task: str, cases: Container[str]) -> list[Section]:
    content = _read_json(folder / "explain.json", "monai-mamba explain")
    explained = str(content.get("task", "classification"))
    if not explained.endswith(task):  # two views are a classification
        raise DatasetError(f"{folder}: is about {explained}, not about {task}")
    shown = [entry for entry in content["pictures"] if entry["case"] in cases]
    if not shown:
        raise DatasetError(f"{folder}: explains none of the cases that are evaluated")
    gallery = [
        Picture(
            picture_source(folder / entry["file"]), f"Where the network looked, case {entry['case']}", entry["text"]
        )
        for entry in shown
    ]
    warnings = [
        f"{name}: found nowhere in {len(missing)} of {content['cases']} cases, hence not shown there."
        for name, missing in content.get("not_found", {}).items()
    ]
    place = "planes" if len(content["map_size"]) == 3 else "gallery"
    shown_there: dict[str, Any] = {place: gallery}
    sections = [Section("Where the network looked", text=content["text"], warnings=warnings, **shown_there)]
    if content.get("sanity"):
        rows = [
            [check["name"], check["figure"], "passed" if check["passed"] else "not passed"]
            for check in content["sanity"]
        ]
        failed = [check["name"] for check in content["sanity"] if not check["passed"]]
        sections.append(
            Section(
                "May these maps be believed?",
                warnings=[f"Not passed: {name}. Do not read the maps as evidence." for name in failed],
                tables=[Table(["Check", "measured", "result"], rows, left=(0, 1))],
                wide=_optional_picture(folder / "sanity.png", "Sanity checks of the maps"),
            )
        )
    sections += [
        Section("How the network orders the cases", wide=pictures)
        for pictures in [
            _optional_picture(folder / "embeddings.png", "PCA and t-SNE of the features; crosses are wrong")
        ]
        if pictures
    ]
    return sections


def _robustness(folder: Path, targets: Sequence[str]) -> Section:
    content = _read_json(folder / "robustness.json", "monai-mamba robustness")
    if content["targets"] != list(targets):
        raise DatasetError(f"{folder}: is about {', '.join(content['targets'])}, not about {', '.join(targets)}")
    metric = content["primary"]
    rows = [
        [
            _severities(name, entry),
            *(format_number(level["metrics"][metric]["value"]) for level in entry["levels"]),
        ]
        for name, entry in content["perturbations"].items()
    ]
    severities = [f"severity {level}" for level in range(1, 1 + max(len(row) - 1 for row in rows))]
    return Section(
        "Robustness",
        text=f"{upper_first(metric_name(metric))} of {content['cases']} cases as they are: "
        f"{_interval(content['unchanged'][metric])}.",
        wide=_optional_picture(folder / "curves.png", "Metrics over the severity"),
        tables=[Table([f"{upper_first(metric_name(metric))} with", *severities], rows)],
        notes=["In brackets: what the severities 1 to 5 mean. Intervals and the other figures are in robustness.csv."],
    )


def _structure_comparison(comparison: Mapping[str, Any]) -> Section:
    figures = list(comparison["difference"])
    rows = [
        [name, *(_interval(row[figure], _digits(figure), signed=True) for figure in figures)]
        for name, row in (("mean", comparison["difference"]), *comparison["per_structure"].items())
    ]
    return Section(
        "Difference to the other model",
        tables=[Table(["Structure", *(NAMES[figure] for figure in figures)], rows)],
        notes=["This model - the other one, on the same cases, with paired intervals."],
    )


def _overlays(
    order: Sequence[str],
    evaluation: Evaluation,
    predictions: Path,
    references: Path,
    images: os.PathLike[str] | str | Mapping[str, str],
    ending: str,
) -> Section:
    from monai_mamba.evaluation.report.volumes import CONVENTION, draw_segmentation, load_ras

    if ending not in (".nii.gz", ".nii"):
        raise DatasetError(f"pictures are drawn of NIfTI images only, the data set has {ending}; leave `images` out")
    colors = {name: color_of(index) for index, name in enumerate(evaluation.structures)}
    # The worst, and the best to see what to compare with.
    shown = list(dict.fromkeys([*order[: NUM_PICTURES - 1], order[-1]]))
    gallery = []
    for case in shown:
        path = _image_of(case, images, ending)
        image, grid = load_ras(path)
        masks = []
        for folder in (references, predictions):
            labels, _ = load_ras(folder / f"{case}{ending}")
            masks.append({name: np.isin(labels, values) for name, values in evaluation.structures.items()})
        if masks[0] and image.shape != next(iter(masks[0].values())).shape:
            raise DatasetError(f"{path}: lies on another grid than the reference of the case")
        source = figure_source(draw_segmentation(image, grid, masks[0], masks[1], colors), "png")
        dice = format_number(evaluation.case_dice(case))
        best = ", the best" if case == order[-1] and len(order) > 1 else ""
        gallery.append(Picture(source, f"Three slices of {case}", f"{case}, mean Dice {dice}{best}"))
    return Section(
        "Worst cases and the best",
        legend=colors,
        planes=gallery,
        notes=[f"Tint: predicted; line: reference; the slices with the largest reference area. {CONVENTION}"],
    )


def _image_of(case: str, images: os.PathLike[str] | str | Mapping[str, str], ending: str) -> Path:
    if isinstance(images, Mapping):
        return Path(images[case])
    folder = Path(images)
    for name in (f"{case}_0000{ending}", f"{case}{ending}"):
        if (folder / name).is_file():
            return folder / name
    raise DatasetError(f"{folder}: has no image {case}_0000{ending}")


def _severities(name: str, entry: Mapping[str, Any]) -> str:
    levels = ", ".join(f"{level['level']:g}" for level in entry["levels"])
    return f"{name.replace('_', ' ')} ({levels} {entry['unit']})"


def upper_first(text: str) -> str:
    """``text`` as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def _read_json(path: Path, command: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read; is the folder one that {command} wrote? {error}") from error
    return content


def _optional_picture(path: Path, caption: str) -> list[Picture]:
    return [Picture(picture_source(path), caption, caption)] if path.is_file() else []


def _chart(figure: Figure, caption: str) -> Picture:
    return Picture(figure_source(figure), caption, caption)


def _card(name: str, interval: Mapping[str, float], digits: int = 3) -> Card:
    return Card(name, format_number(interval["value"], digits), _range(interval, digits))


def _interval(interval: Mapping[str, float], digits: int = 3, signed: bool = False) -> str:
    value = format_number(interval["value"], digits)
    sign = "+" if signed and interval["value"] > 0 else ""
    limits = _range(interval, digits)
    return f"{sign}{value} ({limits})" if limits else value


def _range(interval: Mapping[str, float], digits: int) -> str:
    if interval["low"] is None or interval["low"] != interval["low"]:
        return ""
    return f"{format_number(interval['low'], digits)} to {format_number(interval['high'], digits)}"


def _digits(figure: str) -> int:
    return 2 if figure.endswith("_mm") else 3


def metric_name(name: str) -> str:
    """Return a figure's name for readers; figures of one structure or landmark end in its name."""
    if name.startswith("sdr_"):
        return f"SDR within {name.removeprefix('sdr_').removesuffix('mm')} mm"
    for known in ("mre_mm", "dice"):
        if name.startswith(f"{known}_"):
            return f"{NAMES[known]}, {name.removeprefix(f'{known}_')}"
    return NAMES.get(name, name)
