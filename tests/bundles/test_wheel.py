"""Bundles for those who installed a wheel: in the package, copied by a command, trained as the documents say."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from monai_mamba.cli.main import main
from monai_mamba.packaged_bundles import copy_bundle, list_bundles

SOURCE = Path(__file__).parents[2]
NAMES = ["medmamba", "nnmamba_adni", "nnmamba_landmark", "nnmamba_seg", "xfmamba"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `pip install` makes of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(SOURCE)],
        check=True,
        capture_output=True,
        env={**os.environ, "MONAI_MAMBA_BUILD": "0"},  # no C library: another test's subject
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_bundle_of_an_installed_package_is_copied_and_trained(site, tmp_path):
    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "written: bundles/xfmamba" in run("monai_mamba", "bundle", "copy", "all")
    for name in NAMES:
        expected = {
            path: content
            for path, content in files_of(SOURCE / "bundles" / name).items()
            if path.split(os.sep)[0] not in ("models", "eval", "sample_data", "predictions")
        }
        assert files_of(tmp_path / "bundles" / name) == expected
    small = ["--network_def#depths", "[1,1]", "--network_def#dims", "16", "--limit", "8", "--max_epochs", "1"]
    run("monai.bundle", "run", "--config_file", "bundles/xfmamba/train.json", *small)
    assert (tmp_path / "bundles" / "xfmamba" / "models" / "model.pt").is_file()


def test_bundles_are_listed_and_copied_from_a_checkout(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(list_bundles()) == NAMES
    assert main(["bundle", "list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES
    assert main(["bundle", "copy", "medmamba", "-o", "mine"]) == 0
    assert "cd mine/medmamba && python -m monai.bundle run --config_file configs/train.json" in capsys.readouterr().out
    trained = tmp_path / "mine" / "medmamba" / "models"
    trained.mkdir()
    (trained / "model.pt").write_bytes(b"mine")
    assert main(["bundle", "copy", "medmamba", "-o", "mine"]) == 2
    assert "is not empty" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert (trained / "model.pt").read_bytes() == b"mine"
    assert main(["bundle", "copy", "resnet"]) == 2
    assert "medmamba" in capsys.readouterr().err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["mine"]
    with pytest.raises(ValueError, match="`name` must be one of medmamba"):
        copy_bundle("resnet", tmp_path)
