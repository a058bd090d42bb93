"""Mutated tables, markups, transforms and archives: a verdict or one error, never a traceback and never a hang."""

from __future__ import annotations

import random
import time

import pytest

from data_prep.sources import adni, feta, fetal_planes, lfc, medmnist, pad_ufes_20
from monai_mamba.errors import MonaiMambaError
from tests.data_prep.factories import convert_tree
from tests.data_prep.sources import (
    test_adni,
    test_feta,
    test_fetal_planes,
    test_lfc,
    test_medmnist,
    test_pad_ufes_20,
)

BIOMETRY = "derivatives/biometry"
CASES = [
    (lfc.Lfc(), test_lfc.lfc_tree, "train_label/1/line_9.mrk.json"),
    (lfc.Lfc(), test_lfc.lfc_tree, "gestational_age_samples.csv"),
    (adni.Adni(task="all"), test_adni.adni_tree, "ADNIMERGE_23Dec2025.csv"),
    (adni.Adni(task="all"), test_adni.adni_tree, "idaSearch_1_2_2026.csv"),
    (feta.Feta(), test_feta.feta_tree, f"{BIOMETRY}/sub-001/anat/sub-001_rec-mial_trf.txt"),
    (feta.Feta(), test_feta.feta_tree, f"{BIOMETRY}/sub-001/anat/sub-001_rec-mial_meas.nii.gz"),
    (feta.Feta(), test_feta.feta_tree, f"{BIOMETRY}/biometry.tsv"),
    (medmnist.MedMnist(), lambda root: test_medmnist.write_npz(
        root / "breastmnist.npz", test_medmnist.arrays_of("breastmnist")), "breastmnist.npz"),
    (pad_ufes_20.PadUfes20(split="folds"), lambda root: test_pad_ufes_20.pad_tree(root, 3), "metadata.csv"),
    (fetal_planes.FetalPlanes(), lambda root: test_fetal_planes.fetal_tree(root, num_patients=3),
     "FETAL_PLANES_DB_data.csv"),
]  # fmt: skip


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Cut, change bytes, repeat a piece, or put values that parsers trip over into the text."""
    data, kind = bytearray(content), generator.random()
    if kind < 0.2:
        return bytes(data[: generator.randrange(len(data) + 1)])
    if kind < 0.7:
        for _ in range(generator.choice([1, 1, 3, 20])):
            data[generator.randrange(len(data))] = generator.randrange(256)
        return bytes(data)
    if kind < 0.85:
        start = generator.randrange(len(data))
        data[start:start] = data[start : start + generator.randrange(1, 40)]
        return bytes(data)
    text = data.decode("latin-1")
    for _ in range(3):
        new = generator.choice(["", "NaN", "1e999", "-1", '"', "\n", "null", "[]", "\x00", "9" * 5000])
        text = text.replace(generator.choice("0123456789.,;\"'-{}[]"), new, generator.choice([1, 5]))
    return text.encode("latin-1")


@pytest.mark.slow
@pytest.mark.parametrize(("source", "make", "name"), CASES, ids=[f"{s.name}-{n.split('/')[-1]}" for s, _, n in CASES])
def test_mutated_input_ends_in_verdicts_or_one_error(tmp_path, source, make, name):
    make(tmp_path / "in")
    path, generator = tmp_path / "in" / name, random.Random(name)
    original = path.read_bytes()
    for _ in range(100):
        path.write_bytes(mutate(original, generator))
        start = time.process_time()
        try:
            convert_tree(source, tmp_path / "in", tmp_path / "out", dry_run=True)
        except MonaiMambaError:
            pass
        assert time.process_time() - start < 2
