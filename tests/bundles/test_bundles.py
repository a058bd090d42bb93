"""Every bundle: its configurations, a short training, interruption, evaluation, inference and export."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, verify_net_in_out

from monai_mamba.errors import CheckpointError, DatasetError

ROOT = Path(__file__).parents[2] / "bundles"
CONFIGS = ("train", "evaluate", "inference", "multi_gpu_train")
#: Overrides that make a bundle's training a matter of seconds.
SMALL = {
    "nnmamba_adni": {
        "network_def#init_filters": 4,
        "network_def#num_blocks": 1,
        "image_size": [16, 24, 16],
        "limit": 8,
    },
    "medmamba": {"network_def#depths": [1, 1], "network_def#dims": 8, "image_size": 32, "batch_size": 8, "limit": 24},
    "xfmamba": {"network_def#depths": [1, 1], "network_def#dims": 16, "image_size": 32, "batch_size": 8, "limit": 24},
}
BUNDLES = sorted(path.name for path in ROOT.iterdir() if (path / "configs").is_dir())
SAMPLE_CLASSES = {"nnmamba_adni": ("larger", "smaller")}
NETWORK = ("network_def#depths", "network_def#dims", "network_def#init_filters", "network_def#num_blocks")
#: What `_target_` may name: MONAI's own short names have no dot.
TARGETS = ("monai_mamba.", "monai.", "torch.", "ignite.")
#: Names that expressions may use besides references; no imports, no lambdas, no comprehensions.
EXPRESSION_NAMES = {"len", "REF"}
EXPRESSION_NODES = (
    ast.Expression, ast.Call, ast.Name, ast.Attribute, ast.Constant, ast.Load, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.IfExp, ast.Compare, ast.Eq, ast.NotEq, ast.Gt, ast.Lt, ast.Subscript, ast.Slice, ast.UnaryOp, ast.Not,
    ast.List,
)  # fmt: skip


def config_files():
    return [(name, config) for name in BUNDLES for config in CONFIGS]


def load(name: str, config: str) -> dict:
    return json.loads((ROOT / name / "configs" / f"{config}.json").read_text())


def values(config):
    if isinstance(config, dict):
        for key, value in config.items():
            yield key, value
            yield from values(value)
    elif isinstance(config, list):
        for value in config:
            yield None, value
            yield from values(value)


@pytest.mark.parametrize(("name", "config"), config_files(), ids=lambda value: value)
def test_config_holds_references_and_arithmetic_only(name, config):
    import re

    for key, value in values(load(name, config)):
        if key == "_target_":
            assert "." not in value or value.startswith(TARGETS), value
        if isinstance(value, str) and value.startswith("$"):
            tree = ast.parse(re.sub(r"@[\w#]+", "REF", value[1:]), mode="eval")
            for node in ast.walk(tree):
                assert isinstance(node, EXPRESSION_NODES), f"{value}: {type(node).__name__}"
                if isinstance(node, ast.Name):
                    assert node.id in EXPRESSION_NAMES, value
                if isinstance(node, ast.Attribute):
                    assert not node.attr.startswith("_"), value


@pytest.mark.parametrize("name", BUNDLES)
def test_copies_at_the_top_equal_the_files_in_configs(name):
    # `--config_file bundles/<name>/train.json` looks for the other two beside it.
    for file in ("train.json", "metadata.json", "logging.conf"):
        top, inner = ROOT / name / file, ROOT / name / "configs" / file
        assert top.read_bytes() == inner.read_bytes(), f"copy {inner} to {top}"
    assert (ROOT / name / "LICENSE").read_bytes() == (ROOT.parent / "LICENSE").read_bytes()
    assert (ROOT / name / "docs" / "README.md").is_file()


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_satisfies_the_schema(name):
    import jsonschema

    metadata = load(name, "metadata")
    jsonschema.validate(metadata, json.loads((Path(__file__).parent / "metadata_schema.json").read_text()))
    assert metadata["version"] in metadata["changelog"]
    assert "License" in metadata["data_source"]


@pytest.fixture
def bundle(request, tmp_path, monkeypatch):
    """A copy of the bundle, entered as a user does."""
    folder = tmp_path / request.param
    shutil.copytree(
        ROOT / request.param, folder, ignore=shutil.ignore_patterns("models", "eval", "sample_data", "predictions")
    )
    monkeypatch.chdir(folder)
    return folder


every_bundle = pytest.mark.parametrize("bundle", BUNDLES, indirect=True)


def run(bundle: Path, *configs: str, small: bool = True, **override) -> ConfigWorkflow:
    settings = {**(SMALL[bundle.name] if small else {}), **override}
    workflow = ConfigWorkflow(
        config_file=[str(bundle / "configs" / f"{config}.json") for config in configs],
        workflow_type="train",
        logging_file=False,
        **settings,
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


def only_network(bundle: Path) -> dict:
    return {key: value for key, value in SMALL[bundle.name].items() if key in NETWORK}


@every_bundle
def test_properties_are_complete(bundle):
    small = SMALL[bundle.name]
    train = ConfigWorkflow(config_file="configs/train.json", workflow_type="train", logging_file=False, **small)
    inference = ConfigWorkflow(
        config_file="configs/inference.json", workflow_type="infer", logging_file=False, **only_network(bundle)
    )
    train.initialize()
    inference.initialize()
    assert train.check_properties() == []
    assert inference.check_properties() == []


@every_bundle
def test_network_fits_the_metadata(bundle):
    verify_net_in_out(
        net_id="network_def",
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        device="cpu",
        **only_network(bundle),
    )


@every_bundle
def test_training_evaluation_inference_and_export(bundle):
    run(bundle, "train", max_epochs=1)
    assert {"model.pt", "model.json", "last.pt"} <= {f.name for f in (bundle / "models").iterdir()}
    assert list((bundle / "eval").glob("events.*"))

    run(bundle, "train", "evaluate", max_epochs=1, num_draws=20)
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert metrics["cases"] == SMALL[bundle.name]["limit"]
    assert 0 <= metrics["metrics"]["auc"]["low"] <= metrics["metrics"]["auc"]["high"] <= 1

    network = only_network(bundle)
    inference = ConfigWorkflow(
        config_file="configs/inference.json", workflow_type="infer", logging_file=False, limit=24, **network
    )
    inference.initialize()
    inference.run()
    rows = (bundle / "predictions" / "predictions.csv").read_text().splitlines()
    first, second = SAMPLE_CLASSES.get(bundle.name, ("malignant", "benign"))
    assert rows[0] == f"case,patient,label,prob_{first},prob_{second}"
    # The same cases get the same probabilities from both configurations.
    evaluated = (bundle / "eval" / "test.csv").read_text().splitlines()
    by_case = {row.split(",")[0]: row for row in rows}
    for row in evaluated[1:]:
        mine, theirs = (([float(v) for v in line.split(",")[3:]]) for line in (row, by_case[row.split(",")[0]]))
        assert mine == pytest.approx(theirs, abs=1e-5)

    ckpt_export(
        net_id="network_def",
        filepath=str(bundle / "models" / "model.ts"),
        ckpt_file=str(bundle / "models" / "model.pt"),
        meta_file="configs/metadata.json",
        config_file="configs/inference.json",
        use_trace=True,
        **network,
    )
    scripted = torch.jit.load(str(bundle / "models" / "model.ts"))
    inputs = load(bundle.name, "metadata")["network_data_format"]["inputs"]["image"]
    image = torch.randn(2, inputs["num_channels"], *inputs["spatial_shape"])
    eager = inference.network_def.eval()
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), eager(image), atol=1e-5, rtol=1e-5)


@every_bundle
def test_resumed_training_equals_an_uninterrupted_one(bundle):
    run(bundle, "train", max_epochs=3, ckpt_dir=str(bundle / "whole"))
    run(bundle, "train", max_epochs=2, ckpt_dir=str(bundle / "parts"))
    torch.rand(7)  # whatever else draws from the generators in between
    run(bundle, "train", max_epochs=3, ckpt_dir=str(bundle / "parts"), resume=True)
    whole, parts = (torch.load(bundle / name / "last.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 3
    assert (whole["best"], whole["best_epoch"], whole["waited"]) == (
        parts["best"],
        parts["best_epoch"],
        parts["waited"],
    )
    for name, tensor in whole["network"].items():
        assert torch.equal(tensor, parts["network"][name]), name
    for key, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg"], parts["optimizer"]["state"][key]["exp_avg"])
    assert whole["lr_scheduler"]["last_epoch"] == parts["lr_scheduler"]["last_epoch"]


def cause(error: BaseException | None, kind: type[BaseException]) -> BaseException:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    assert error is not None, f"no {kind.__name__} among the causes"
    return error


@pytest.mark.parametrize("bundle", ["medmamba"], indirect=True)
def test_refusals_name_what_is_wrong(bundle):
    with pytest.raises(Exception) as caught:
        run(bundle, "train", max_epochs=1, resume=True)
    assert "nothing to resume" in str(cause(caught.value, CheckpointError))
    (bundle / "empty").mkdir()
    with pytest.raises(Exception) as caught:
        run(bundle, "train", max_epochs=1, dataset_dir=str(bundle / "empty"))
    assert "datalist.json" in str(cause(caught.value, DatasetError))
    assert not (bundle / "models" / "model.pt").exists()
