from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import typer

from monai_mamba import __version__
from monai_mamba.cli import main as cli
from monai_mamba.errors import DatasetError, MonaiMambaError


def _run(*args: str, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monai_mamba", *args], capture_output=True, text=True, timeout=60, **kwargs
    )


@pytest.fixture
def command():
    """Register a throw-away subcommand named ``probe`` and take it away again."""

    def register(function) -> None:
        cli.app.command("probe")(function)

    before = list(cli.app.registered_commands)
    yield register
    cli.app.registered_commands[:] = before


def test_version_option_prints_package_version():
    done = _run("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"monai-mamba {__version__}")


def test_no_arguments_shows_help_as_wrong_usage():
    done = _run()
    assert done.returncode == 2
    assert "Usage" in done.stdout + done.stderr


@pytest.mark.parametrize("args", [["no-such-command"], ["--no-such-option"]], ids=["command", "option"])
def test_wrong_usage_exits_2(args, capsys):
    assert cli.main(args) == 2
    assert args[0] in capsys.readouterr().err


def test_help_answers_within_half_a_second():
    best = min(_timed_help() for _ in range(5))
    assert best < 0.5, f"`monai-mamba --help` took {best:.2f} s"


def _timed_help() -> float:
    """Processor seconds, which on an idle machine is what a user waits, and on a busy one does not measure others."""
    before = os.times()
    assert _run("--help").returncode == 0
    after = os.times()
    return after.children_user - before.children_user + after.children_system - before.children_system


def test_help_loads_no_heavy_package():
    code = (
        "import sys; from monai_mamba.cli.main import main; main(['--help'])\n"
        "heavy = {'torch', 'monai', 'nnunetv2', 'numpy', 'scipy', 'matplotlib', 'nibabel'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_package_error_becomes_one_line_and_exit_1(command, capsys):
    @command
    def probe() -> None:
        raise DatasetError("case_007.nii.gz: label is missing;\n  add it")

    assert cli.main(["probe"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: case_007.nii.gz: label is missing; add it\n"
    assert captured.out == ""


def test_package_error_with_traceback_variable_is_raised(command, monkeypatch):
    @command
    def probe() -> None:
        raise MonaiMambaError("boom")

    monkeypatch.setenv("MONAI_MAMBA_TRACEBACK", "1")
    with pytest.raises(MonaiMambaError, match="boom"):
        cli.main(["probe"])


def test_operating_system_error_names_the_file(command, capsys, tmp_path):
    @command
    def probe() -> None:
        (tmp_path / "absent").read_text()

    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: No such file or directory\n"


def test_programming_error_is_not_swallowed(command):
    @command
    def probe() -> None:
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


def test_exit_code_of_a_command_is_kept(command):
    @command
    def probe() -> None:
        raise typer.Exit(7)

    assert cli.main(["probe"]) == 7


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_exits_130():
    code = (
        "import sys, time; from monai_mamba.cli import main as cli\n"
        "def probe() -> None:\n    print('ready', flush=True); time.sleep(30)\n"
        "cli.app.command('probe')(probe); sys.exit(cli.main(['probe']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
