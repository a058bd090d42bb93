"""Commands that the documentation shows are commands that there are, with options that they have."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import typer

from monai_mamba.cli.main import app

ROOT = Path(__file__).parents[2]
COMMANDS = ("evaluate", "explain", "robustness")


def shown_commands():
    for page in ("docs/evaluation.md", "docs/bundles.md"):
        for line in (ROOT / page).read_text().splitlines():
            words = shlex.split(line) if line.startswith("    monai-mamba ") else []
            if words and words[1] in COMMANDS:
                yield pytest.param(words[1], words[2:], id=f"{Path(page).stem}: {' '.join(words[1:])}")


@pytest.mark.parametrize(("name", "arguments"), shown_commands())
def test_shown_command_is_understood(name, arguments):
    command = typer.main.get_command(app).commands[name]
    context = command.make_context(name, list(arguments))
    assert context.params["output"]


def test_pages_show_every_command():
    assert {param.values[0] for param in shown_commands()} == set(COMMANDS)
