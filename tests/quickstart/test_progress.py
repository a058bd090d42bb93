from __future__ import annotations

import io

import pytest
from rich.console import Console

from monai_mamba.quickstart.progress import RunProgress


def _run(terminal: bool) -> str:
    stream = io.StringIO()
    with RunProgress(Console(file=stream, force_terminal=terminal, width=100)) as progress:
        progress.start("Train [bold]x[/bold]", 2)
        progress.update(1, 2, "loss 0.5 [red]")
        progress.update(1, 2, "loss 0.5 [red]")
        progress.finish("2 epochs")
        progress.start("Predict")
        progress.update(3)
        progress.finish()
    return stream.getvalue()


def test_log_file_gets_one_plain_line_per_event():
    lines = _run(terminal=False).splitlines()
    assert lines[0] == "Train [bold]x[/bold] ..."
    assert lines[1] == "  Train [bold]x[/bold]: 1/2 loss 0.5 [red]"
    assert lines[2].startswith("✓ Train [bold]x[/bold] (") and lines[2].endswith("2 epochs")
    assert len(lines) == 5


@pytest.mark.parametrize("text", ["Train [bold]x[/bold]", "loss 0.5 [red]", "✓ Predict"], ids=["step", "note", "end"])
def test_terminal_shows_names_as_they_are(text):
    assert text in _run(terminal=True)
