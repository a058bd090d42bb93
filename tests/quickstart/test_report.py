from __future__ import annotations

import base64
import io
import re

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from monai_mamba.evaluation.report.page import COLORS
from monai_mamba.evaluation.segmentation import Labels, evaluate_folder
from monai_mamba.quickstart.report import ReportContent, render
from monai_mamba.quickstart.training_log import Epoch
from tests.html_reader import HtmlReader, check_self_contained

LABELS = Labels({"front": (1,), "<b>back</b>": (2,)})
AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])
FACTS = {
    "dataset": "Tiny",
    "num_training": 6,
    "held_out": ["a", "b", "c", "d"],
    "held_out_by": "drawing a quarter with seed 7",
    "cases_are_patients": True,
    "remarks": ["label 9 (ghost) occurs in no case"],
    "dataset_notice": None,
    "trainer": "nnMambaTrainerQuick",
    "configuration": "3d_fullres",
    "num_epochs": 2,
    "num_iterations": 100,
    "seed": 7,
    "device": "CPU, 2 threads",
    "seconds": {"train": 60.0, "predict": 30.0},
    "versions": {"torch": "2.15.0", "mamba-ssm": None},
}
EPOCHS = [Epoch(0, 0.5, 0.6, [0.1, float("nan")], 3.0), Epoch(1, 0.2, 0.4, [0.5, 0.4], 3.0)]


@pytest.fixture(scope="module")
def make_content(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    folders = [root / name for name in ("images", "references", "predictions")]
    for folder in folders:
        folder.mkdir()
    images, references, predictions = folders
    rng = np.random.default_rng(0)
    for shift, case in enumerate("abcd"):
        reference = np.zeros((12, 14, 8), np.uint8)
        reference[2:6, 3:9, 2:6] = 1
        reference[7:10, 3:9, 2:6] = 2
        nib.save(
            nib.Nifti1Image(rng.normal(size=reference.shape).astype(np.float32), AFFINE), images / f"{case}_0000.nii.gz"
        )
        nib.save(nib.Nifti1Image(reference, AFFINE), references / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(np.roll(reference, shift, axis=1), AFFINE), predictions / f"{case}.nii.gz")

    evaluation = evaluate_folder(predictions, references, LABELS)

    def make(epochs=EPOCHS, **facts) -> ReportContent:
        return ReportContent(
            FACTS | facts, evaluation, epochs, images, references, predictions, "nnUNetv2_train 123 <fold>", 250_000
        )

    return make


@pytest.fixture(scope="module")
def html(make_content) -> str:
    return render(make_content())


def test_report_needs_nothing_from_outside(html):
    assert check_self_contained(html).sources


def test_report_escapes_names(make_content):
    html = render(make_content(dataset="<script>alert(1)</script>"))
    assert "<script" not in html and "<b>back</b>" not in html and "&lt;b&gt;back" in html


def test_report_shows_scores_run_and_commands(html, make_content):
    assert f"{make_content().evaluation.mean_dice:.3f}" in html
    for text in (
        "nnMambaTrainerQuick",
        "seed 7",
        "torch 2.15.0",
        "nnUNetv2_train 123 &lt;fold&gt;",
        "ghost",
        "1.0 mm",
        "250,000",
    ):
        assert text in html
    assert "mamba-ssm" not in html
    for case in "abcd":
        assert f"<td>{case}</td>" in html


def test_report_pictures_are_best_middle_and_worst(html):
    assert re.findall(r"<figcaption>(\w) \((\w+)\)", html) == [("a", "best"), ("c", "middle"), ("d", "worst")]


def _has_color(pixels: np.ndarray, color: str) -> np.ndarray:
    """For every column of the picture, whether the color of a structure's line occurs in it."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return (np.abs(pixels - wanted).max(axis=-1) < 25).any(axis=0)


def _first_picture(html: str) -> np.ndarray:
    png = next(s for s in HtmlReader(html).sources if s.startswith("data:image/png"))
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png.split(",")[1]))).convert("RGB")).astype(int)


def test_report_overlay_shows_structures_on_three_planes(html):
    pixels = _first_picture(html)
    either = _has_color(pixels, COLORS[0]) | _has_color(pixels, COLORS[1])
    assert all(third.any() for third in np.array_split(either, 3))


def test_report_overlay_puts_the_patients_right_on_the_left(html):
    # Label 1 has the low indices i, and i runs to the patient's left here: so it is on the left of the axial slice.
    pixels = _first_picture(html)
    axial = pixels[:, : pixels.shape[1] // 3]
    front, back = (np.nonzero(_has_color(axial, color))[0].mean() for color in COLORS[:2])
    assert front < back


def test_report_without_epochs_has_no_training_section(html, make_content):
    assert "<h2>Training</h2>" not in render(make_content(epochs=[]))
    assert "<h2>Training</h2>" in html


def test_report_is_the_same_for_the_same_run(html, make_content):
    again = render(make_content())
    assert re.sub(r"data:image/svg[^\"]*", "", again) == re.sub(r"data:image/svg[^\"]*", "", html)
