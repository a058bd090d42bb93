"""Names of output files."""

from __future__ import annotations

import pytest

from monai_mamba.files import case_file


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("a.nii.gz", "a.csv"),
        ("ward/b.PNG", "ward/b.csv"),
        ("../../etc/passwd", "etc/passwd.csv"),
        ("/abs/x.dcm", "abs/x.csv"),
        ("v1.2", "v1.2.csv"),
        ("a:b*c", "a_b_c.csv"),
        ("..", "case.csv"),
    ],
)
def test_output_of_a_case_stays_in_its_folder(tmp_path, case, name):
    path = case_file(tmp_path / "out", case, ".csv")
    assert path == tmp_path / "out" / name
    assert path.parent.is_dir()
