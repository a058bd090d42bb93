"""Every command that the pages show has options that exist, and every page that is linked is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from data_prep.cli import app

PAGES = sorted((Path(__file__).parents[2] / "docs" / "data_prep").glob("*.md"))
COMMANDS = [
    (page.stem, line)
    for page in PAGES
    for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("monai-mamba-data ")
]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(COMMANDS)])
def test_docs_command_is_parsed(page, line):
    _, name, *arguments = shlex.split(line)
    command = typer.main.get_command(app).commands[name]
    command.make_context(name, arguments, resilient_parsing=False)


def test_docs_links_lead_to_pages():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_docs_name_every_source():
    from data_prep.sources import all_sources

    names = {page.stem for page in PAGES}
    assert set(all_sources()) <= names
