"""The pages on the networks: their examples run, their figures are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from monai_mamba.networks import create_model, list_models, model_entry
from monai_mamba.networks.counting import count

PAGES = sorted((Path(__file__).parents[2] / "docs" / "networks").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_of_the_page_run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert blocks
    for block in blocks:
        with torch.no_grad():
            exec(compile(block, str(page), "exec"), {})  # our own page


def rows():
    text = (PAGES[0].parent / "README.md").read_text()
    return dict(re.findall(r"^\| `(\w+)` \| (\d.*) \|$", text, re.M))


def test_table_names_every_network_with_its_exact_parameters():
    table = rows()
    assert sorted(table) == list_models()
    for name, cells in table.items():
        entry = model_entry(name)
        shape, parameters = cells.split(" | ")[:2]
        assert shape == "x".join(map(str, entry.input_shape))
        assert parameters == f"{entry.parameters:,}", name


@pytest.mark.parametrize("name", ["nnmamba_seg", "medmamba_t", "vmamba_v0_t", "xfmamba_t", "xfmamba_t_seg"])
def test_table_has_the_counted_operations(name):
    with torch.device("meta"):
        network = create_model(name)
    counts = count(network, model_entry(name).input_shape)
    found = rows()[name].split(" | ")[2:5]
    assert found == [f"{value / 1e9:.3f}" for value in (counts.macs, counts.scan_operations, counts.flops)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_parameter_counts_on_the_page_are_the_registry_s(page):
    for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", page.read_text(), re.M):
        counts = re.findall(r"\b\d{1,3}(?:,\d{3}){2,}\b", cells)
        if name in list_models() and counts:
            assert counts[0] == f"{model_entry(name).parameters:,}", name
