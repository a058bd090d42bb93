from __future__ import annotations

import json

import pytest

from monai_mamba import diagnostics
from monai_mamba.cli.main import main
from monai_mamba.ops import mamba_ssm_backend


def test_doctor_json_is_one_object_with_every_section(capsys):
    assert main(["doctor", "--json", "--no-trainers"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"versions", "devices", "backends", "chosen", "self_check", "nnunet_trainers"}
    assert facts["self_check"][0]["ok"] is True
    assert set(facts["chosen"]) == {"cpu", "cuda"}
    assert facts["nnunet_trainers"] is None


def test_doctor_table_names_backends_and_verdict(capsys):
    assert main(["doctor", "--no-trainers"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "cpu tensors" in out and "ok (cpu)" in out


def test_doctor_reports_trainers_that_are_not_found_without_failing(capsys, monkeypatch):
    answer = {"ok": False, "trainer": "T", "external_folder": None, "startup_disabled": True, "reason": "not there"}
    monkeypatch.setattr(diagnostics, "check_trainers", lambda: answer)
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not found" in out and "MONAI_MAMBA_NO_STARTUP" in out


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_doctor_exits_1_if_the_self_check_fails(form, capsys, monkeypatch):
    monkeypatch.setattr(diagnostics, "check_scan", lambda device: {"ok": False, "device": device, "reason": "wrong"})
    assert main(["doctor", "--no-trainers", *form]) == 1
    assert "wrong" in capsys.readouterr().out


def test_doctor_says_that_mamba_ssm_is_there_without_its_kernel(capsys, monkeypatch, tmp_path):
    """What `pip install mamba-ssm` leaves today: the package imports, its first kernel does not exist."""
    installed = tmp_path / "mamba_ssm-9.9.9.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: mamba-ssm\nVersion: 9.9.9\n")
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    mamba_ssm_backend.load_kernel.cache_clear()
    try:
        assert main(["doctor", "--json", "--no-trainers"]) == 0
    finally:
        mamba_ssm_backend.load_kernel.cache_clear()
    facts = json.loads(capsys.readouterr().out)
    (found,) = (b for b in facts["backends"] if b["name"] == "mamba_ssm")
    assert facts["versions"]["mamba-ssm"] == "9.9.9" and not found["available"]
    assert "mamba-ssm 9.9.9 is installed without the kernel selective_scan_cuda; build it:" in found["reason"]
