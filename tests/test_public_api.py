"""What importing costs, and that the files a user reads first are there and true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import monai_mamba") & {"torch", "numpy", "monai", "nnunetv2", "typer"}


def test_importing_the_command_loads_nothing_heavy():
    loaded = modules_after("import monai_mamba.cli.main")
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "monai", "nnunetv2"}


def test_networks_need_torch_alone():
    loaded = modules_after("import monai_mamba; monai_mamba.networks.NNMambaSeg")
    assert "torch" in loaded
    assert not loaded & {"monai", "timm", "torchvision", "nnunetv2", "einops", "mamba_ssm", "SimpleITK"}


def test_annotations_can_be_evaluated_by_the_oldest_python():
    """Typer and dataclasses evaluate them; Python 3.10 refuses a ClassVar that does not say of what."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("monai_mamba", "data_prep", "nnunet_trainers", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).split(".")[-1] == "ClassVar"
    ]
    assert not bare


def test_unknown_attribute_is_an_attribute_error():
    import monai_mamba

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        monai_mamba.nonsense  # noqa: B018


def test_version_is_the_same_everywhere():
    import monai_mamba

    citation = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert citation and citation.group(1) == monai_mamba.__version__


def test_every_link_between_our_documents_leads_somewhere():
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    broken = []
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)} -> {target}")
    assert not broken
