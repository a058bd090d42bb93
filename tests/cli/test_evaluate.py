"""``monai-mamba evaluate``."""

from __future__ import annotations

import json

from monai_mamba.cli.main import main

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


def test_command_refuses_a_bad_table_in_one_line(tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("case,label\n1,0\n")
    assert main(["evaluate", str(tmp_path / "bad.csv"), "-o", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_command_refuses_an_unknown_group(tmp_path):
    (tmp_path / "t.csv").write_text(TABLE)
    assert main(["evaluate", str(tmp_path / "t.csv"), "-o", str(tmp_path / "out"), "--group", "ward"]) == 2
