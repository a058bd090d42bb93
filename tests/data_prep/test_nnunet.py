"""What is converted passes nnU-Net's own integrity check and can be planned."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.data_prep.dicom.test_samples import MORE
from tests.data_prep.factories import nnunet_plans


def _plan(folder: Path, name: str, *convert: str) -> dict:
    """Convert with the command, then verify and plan with nnU-Net's own one; returns the plans."""
    out = folder / "raw" / name
    done = subprocess.run(["monai-mamba-data", *convert, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return nnunet_plans(out)


@pytest.mark.slow
@pytest.mark.skipif(not MORE.is_dir(), reason="MONAI_MAMBA_SAMPLES is not set")
def test_hippocampus_passes_nnunet_and_is_planned(tmp_path):
    source = MORE.parent / "msd_hippocampus"
    plans = _plan(tmp_path, "Dataset004_Hippocampus", "decathlon", str(source))
    assert plans["original_median_spacing_after_transp"] == [1.0, 1.0, 1.0]
    assert plans["configurations"]["3d_fullres"]["patch_size"]


@pytest.mark.slow
@pytest.mark.skipif(not MORE.is_dir(), reason="MONAI_MAMBA_SAMPLES is not set")
def test_tumor_study_with_a_label_passes_nnunet_and_is_planned(tmp_path):
    """Four DICOM series of one study, and a DICOM-SEG object that was made from a label map of ours."""
    study = tmp_path / "study"
    study.mkdir()
    files = [path for path in sorted((MORE.parent / "brain_tumor_progression_dicom").rglob("*")) if path.is_file()]
    for number, path in enumerate(path for path in files if path.suffix != ".md"):
        (study / f"{number:04d}").symlink_to(path)
    channels = ["--channel", "t1c=T1post", "--channel", "t1n=T1pre", "--channel", "flair=FLAIR", "--channel", "t2=T2"]
    first = tmp_path / "first"
    command = ["monai-mamba-data", "dicom", str(study), "--out", str(first), *channels]
    assert subprocess.run(command, capture_output=True).returncode == 0
    image = nibabel.load(sorted((first / "images").iterdir())[0])
    labels = np.zeros(image.shape, np.uint8)
    labels[100:140, 100:150, 5:15], labels[110:125, 110:130, 7:12] = 1, 2
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), tmp_path / "labels.nii.gz")
    series = next(path.parent for path in files if "T1post" in str(path))
    command = ["monai-mamba-data", "to-dicom-seg", str(tmp_path / "labels.nii.gz"), "--series", str(series)]
    command += ["--out", str(study / "seg.dcm"), "--segment", "1=edema", "--segment", "2=core"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plans = _plan(tmp_path, "Dataset100_Tumor", "dicom", str(study), "--format", "nnunet", *channels)
    (out,) = (tmp_path / "raw").glob("Dataset100_*")
    assert len(list((out / "imagesTr").iterdir())) == 4
    (label,) = (out / "labelsTr").iterdir()
    found = np.asanyarray(nibabel.load(label).dataobj)
    names = json.loads((out / "dataset.json").read_text())["labels"]
    assert (found == names["core"]).sum() == (labels == 2).sum()
    assert len(plans["foreground_intensity_properties_per_channel"]) == 4
