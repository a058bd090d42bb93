from __future__ import annotations

import json

import pytest

from monai_mamba.cli import main as cli


def test_summary_lists_all_names(capsys):
    assert cli.main(["summary", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"medmamba_t", "xfmamba_b", "nnmamba_seg", "vmamba_v0_s"} <= {row["name"] for row in rows}
    assert cli.main(["summary"]) == 0
    assert "15,221,608" in capsys.readouterr().out


def test_summary_of_a_network_as_json(capsys):
    assert (
        cli.main(
            ["summary", "MedMamba-T", "--input", "1x1x64x64", "-a", "num_classes=6", "-a", "in_channels=1", "--json"]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "medmamba_t"
    assert facts["arguments"]["num_classes"] == 6
    assert facts["input_shape"] == [1, 1, 64, 64]
    # The six-class network of the fixture, with a stem for one channel instead of three.
    assert facts["parameters"] == 14_457_222 - 2 * 16 * 96
    assert facts["flops"] == 2 * facts["macs"] + facts["scan_operations"]
    assert facts["published"]["parameters"] == "15.2 M"
    assert {part["path"] for part in facts["parts"]} >= {"patch_embed", "layers", "head"}


def test_summary_of_a_network_as_text(capsys):
    assert cli.main(["summary", "xfmamba_t", "--depth", "2"]) == 0
    text = capsys.readouterr().out
    assert "input 1x6x224x224" in text
    assert "38,831,810" in text and "36,471,170 trainable" in text
    assert "10.13 G" in text and "does not reproduce it" in text
    assert "backbone.layers" in text


def test_summary_takes_the_channels_of_the_network(capsys):
    assert cli.main(["summary", "xfmamba_t", "-a", "in_channels=1", "-a", "fusion=late", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [1, 2, 224, 224]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["medmamba_q"], "not a known network"),
        (["medmamba_t", "--input", "1x3xA"], "sizes joined by x"),
        (["medmamba_t", "--input", "1x3x0x8"], "at least 1"),
        (["medmamba_t", "--input", "1x3x16x16"], "at least 32 pixels"),
        (["medmamba_t", "-a", "num_classes"], "NAME=VALUE"),
        (["medmamba_t", "-a", "colour=3"], "no argument"),
    ],
)
def test_summary_wrong_usage_exits_2_and_says_why(args, message, capsys):
    assert cli.main(["summary", *args]) == 2
    words = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in words
