"""What docs/weights.md and docs/export.md show is run as shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from monai_mamba.cli import main as cli
from monai_mamba.networks import MedMamba
from monai_mamba.weights import to_published
from tests.parity import load_table

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the pages name."""
    monkeypatch.chdir(tmp_path)
    torch.save(to_published(MedMamba(num_classes=4, depths=(1,), dims=16, d_state=4)), "medmamba.pth")
    vmamba = {key: torch.zeros(shape) for key, shape in load_table("vmamba", "v2_tiny_s1l8")["keys"].items()}
    torch.save({"model": vmamba}, "vssm1_tiny_0230s_ckpt_epoch_264.pth")
    return tmp_path


@pytest.mark.parametrize("page", ["weights.md", "export.md"])
def test_page_runs_as_shown(folder, page, capsys):
    text = (DOCS / page).read_text()
    shown = re.findall(r"^    monai-mamba ([^\n]+)$|^```python\n(.*?)^```", text, re.M | re.S)
    assert shown
    for command, code in shown:
        if command:
            assert cli.main(command.split()) == 0, capsys.readouterr().err
        else:
            exec(compile(code, page, "exec"), {})


def test_weights_page_names_every_published_backbone():
    from monai_mamba.weights import CATALOGUE

    text = (DOCS / "weights.md").read_text()
    for entry in CATALOGUE:
        if "the backbone of XFMamba" in entry.note:
            assert f"`{entry.file}`" in text
        elif "first generation" in entry.note:
            assert entry.file.split("_ckpt")[0] in text
