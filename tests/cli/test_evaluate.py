"""``monai-mamba evaluate``."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np

from monai_mamba.cli.main import main
from tests.html_reader import check_self_contained

TABLE = "case,label,prob_a,prob_b\n1,0,0.8,0.2\n2,1,0.4,0.6\n3,1,0.1,0.9\n4,0,0.45,0.55\n5,0,0.7,0.3\n"


def test_command_writes_and_shows_the_figures(tmp_path, capsys):
    table = tmp_path / "test.csv"
    table.write_text(TABLE)
    arguments = ["evaluate", str(table), "-o", str(tmp_path / "out"), "--validation", str(table), "--draws", "20"]
    assert main([*arguments, "--compare", str(table)]) == 0
    output = capsys.readouterr().out
    assert "AUC by DeLong: 1.000" in output
    assert "p = 1" in output
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["metrics"]["accuracy"]["value"] == 0.8
    assert "Never the most probable class" not in (tmp_path / "out" / "report.html").read_text()
    table.write_text("case,label,prob_a,prob_b\n1,0,0.4,0.6\n2,1,0.3,0.7\n")
    assert main(arguments) == 0
    assert "Never the most probable class: a." in (tmp_path / "out" / "report.html").read_text()


def test_command_refuses_a_bad_table_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("case,label\n1,0\n")
    assert main(["evaluate", str(tmp_path / "bad.csv"), "-o", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_command_refuses_an_unknown_group(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    assert main(["evaluate", str(tmp_path / "t.csv"), "-o", str(tmp_path / "out"), "--group", "ward"]) == 2


def test_report_escapes_names_and_holds_no_path(tmp_path):
    table = tmp_path / "secret_name" / "t.csv"
    table.parent.mkdir()
    table.write_text(TABLE.replace("prob_a", "prob_<script>alert(1)</script>").replace("prob_b", "prob_$x^$"))
    arguments = ["evaluate", str(table), "-o", str(tmp_path / "out"), "--draws", "20", "--compare", str(table)]
    assert main(arguments) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    reader = check_self_contained(html)
    assert "<script>alert(1)</script>" in reader.text
    assert "secret_name" not in html
    assert "secret_name" not in (tmp_path / "out" / "metrics.json").read_text()
    again = tmp_path / "again"
    assert main([*arguments[:3], str(again), *arguments[4:]]) == 0
    assert reader.text == check_self_contained((again / "report.html").read_text()).text


def test_command_scores_label_maps_with_pictures(tmp_path, capsys):
    for part in ("pred", "labels", "images"):
        (tmp_path / part).mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        label = np.zeros((16, 18, 12), np.uint8)
        label[4:10, 5:12, 3:8] = 1
        affine = np.diag([-1, 1, 2, 1])
        nib.save(nib.Nifti1Image(label, affine), tmp_path / "labels" / f"c{number}.nii.gz")
        nib.save(nib.Nifti1Image(np.roll(label, number, 0), affine), tmp_path / "pred" / f"c{number}.nii.gz")
        image = (label + generator.normal(0, 0.2, label.shape)).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), tmp_path / "images" / f"c{number}_0000.nii.gz")
    arguments = ["evaluate", str(tmp_path / "pred"), "-o", str(tmp_path / "out"), "--draws", "20"]
    assert main(arguments) == 2
    assert "--reference" in capsys.readouterr().err
    arguments += ["--reference", str(tmp_path / "labels")]
    assert main(arguments) == 1
    assert "dataset.json: does not exist" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1}}))
    assert main([*arguments, "--group", "study"]) == 2
    assert main([*arguments, "--images", str(tmp_path / "images")]) == 0
    assert "organ" in capsys.readouterr().out
    reader = check_self_contained((tmp_path / "out" / "report.html").read_text())
    assert len(reader.sources) == 3 + 3  # a chart per metric, three cases
    assert reader.text.index("c2, mean Dice") < reader.text.index("c0, mean Dice 1.000")
    (tmp_path / "images" / "c2_0000.nii.gz").unlink()
    other = [str(tmp_path / "other") if a == str(tmp_path / "out") else a for a in arguments]
    assert main([*other, "--images", str(tmp_path / "images")]) == 1
    assert not (tmp_path / "other").exists()


def test_command_scores_a_table_of_landmarks(tmp_path, capsys):
    table = tmp_path / "l.csv"
    table.write_text("case,landmark,x_mm,y_mm,reference_x_mm,reference_y_mm\n1,a,0,0,3,4\n2,a,1,1,1,1\n")
    assert main(["evaluate", str(table), "-o", str(tmp_path / "out"), "--draws", "20"]) == 0
    assert "sdr_2mm" in capsys.readouterr().out
    check_self_contained((tmp_path / "out" / "report.html").read_text())
    assert main(["evaluate", str(table), "-o", str(tmp_path / "out"), "--validation", str(table)]) == 2
    assert main(["evaluate", str(tmp_path / "none.csv"), "-o", str(tmp_path / "out")]) == 1


def test_reports_of_many_classes_and_of_several_labels_at_once(tmp_path):
    generator = np.random.default_rng(0)
    names = [f"c{i}" for i in range(9)]
    lines = ["case,study,label," + ",".join(f"prob_{n}" for n in names)]
    several = ["case," + ",".join(f"label_{n}" for n in names) + "," + ",".join(f"prob_{n}" for n in names)]
    for case in range(40):
        probs = generator.dirichlet(np.ones(9))
        lines.append(f"{case},s{case // 2},{case % 8}," + ",".join(map(str, probs)))
        label = [int(i != 8 and generator.random() < 0.4) for i in range(9)]
        several.append(f"{case}," + ",".join(map(str, [*label, *generator.random(9)])))
    for name, table, texts in (
        ("many", lines, ["Without a case, hence without AUC: c8", "No scores by study: cases of one study have"]),
        ("several", several, ["Not measurable, one label only: c8", "threshold 0.5", "positives"]),
    ):
        (tmp_path / f"{name}.csv").write_text("\n".join(table) + "\n")
        arguments = ["evaluate", str(tmp_path / f"{name}.csv"), "-o", str(tmp_path / name), "--draws", "20"]
        arguments += ["--validation", str(tmp_path / f"{name}.csv"), "--compare", str(tmp_path / f"{name}.csv")]
        assert main(arguments) == 0
        text = check_self_contained((tmp_path / name / "report.html").read_text()).text
        for wanted in texts:
            assert wanted in text, wanted
