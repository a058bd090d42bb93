"""Every bundle: its configurations, a short training, interruption, evaluation, inference and export."""

from __future__ import annotations

import ast
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow, ckpt_export, verify_net_in_out

from monai_mamba.errors import CheckpointError, DatasetError
from monai_mamba.export import export_network
from monai_mamba.training.datalist import load_cases
from monai_mamba.training.samples import sample_dataset

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
    "nnmamba_seg": {"network_def#num_blocks": 2, "patch_size": [16, 32, 16], "limit": 4, "lr": 0.01},
    "nnmamba_landmark": {"network_def#num_blocks": 2, "image_size": [16, 24, 16], "limit": 8},
    "medmamba": {"network_def#depths": [1, 1], "network_def#dims": 8, "image_size": 32, "batch_size": 8, "limit": 24},
    "xfmamba": {"network_def#depths": [1, 1], "network_def#dims": 16, "image_size": 32, "batch_size": 8, "limit": 24},
}
BUNDLES = sorted(path.name for path in ROOT.iterdir() if (path / "configs").is_dir())
CLASSIFIERS = ["medmamba", "nnmamba_adni", "xfmamba"]
SAMPLE_CLASSES = {"nnmamba_adni": ("larger", "smaller")}
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
    """The overrides of the network, by their ids in ``inference.json``."""
    small = {key: value for key, value in SMALL[bundle.name].items() if key.startswith("network_def#")}
    if bundle.name == "nnmamba_seg":
        return {key.replace("network_def#", "network_def#network#"): value for key, value in small.items()}
    return small


def infer(bundle: Path, **override) -> ConfigWorkflow:
    workflow = ConfigWorkflow(
        config_file="configs/inference.json",
        workflow_type="infer",
        logging_file=False,
        **{**only_network(bundle), **override},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow


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
    inference = infer(bundle)
    CHECKS.get(bundle.name, check_classifier)(bundle, metrics)
    check_export(bundle, inference.network_def.eval())


def check_classifier(bundle: Path, metrics: dict) -> None:
    assert 0 <= metrics["metrics"]["auc"]["low"] <= metrics["metrics"]["auc"]["high"] <= 1
    rows = (bundle / "predictions" / "predictions.csv").read_text().splitlines()
    first, second = SAMPLE_CLASSES.get(bundle.name, ("malignant", "benign"))
    assert rows[0] == f"case,patient,label,prob_{first},prob_{second}"
    # The same cases get the same probabilities from both configurations.
    evaluated = (bundle / "eval" / "test.csv").read_text().splitlines()
    by_case = {row.split(",")[0]: row for row in rows}
    for row in evaluated[1:]:
        mine, theirs = (([float(v) for v in line.split(",")[3:]]) for line in (row, by_case[row.split(",")[0]]))
        assert mine == pytest.approx(theirs, abs=1e-5)


def check_landmarks(bundle: Path, metrics: dict) -> None:
    assert metrics["landmarks"] == ["anterior center", "posterior center", "border center"]
    assert 0 < metrics["metrics"]["mre_mm"]["low"] <= metrics["metrics"]["mre_mm"]["high"]
    mine, theirs = (
        {(row["case"], row["landmark"]): [float(row[f"{axis}_mm"]) for axis in "xyz"] for row in csv.DictReader(file)}
        for file in (open(bundle / "eval" / "test.csv"), open(bundle / "predictions" / "landmarks.csv"))
    )
    assert len(theirs) == 3 * 16
    assert all(theirs[key] == position for key, position in mine.items())
    case, landmark = next(iter(mine))
    markups = json.loads((bundle / "predictions" / f"{case}.mrk.json").read_text())["markups"][0]
    assert markups["coordinateSystem"] == "RAS"
    points = {point["label"]: point["position"] for point in markups["controlPoints"]}
    assert points[landmark] == pytest.approx(mine[case, landmark], abs=1e-3)


def check_segmentation(bundle: Path, metrics: dict) -> None:
    assert set(metrics["per_structure"]) == {"anterior", "posterior"}
    report = (bundle / "eval" / "report.html").read_text()
    assert "Worst cases and the best" in report
    assert report.count("Three slices of") == min(metrics["cases"], 4)
    predictions = sorted((bundle / "predictions").glob("*.nii.gz"))
    assert len(predictions) == 8
    for path in predictions:
        image = nib.load(bundle / "sample_data" / "hippocampus" / "images" / path.name)
        found = nib.load(path)
        assert found.shape == image.shape
        np.testing.assert_array_equal(found.affine, image.affine)
        assert set(np.unique(found.dataobj)) <= {0, 1, 2}
    for path in (bundle / "eval" / "test").glob("*.nii.gz"):
        same = bundle / "predictions" / path.name
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), np.asarray(nib.load(same).dataobj))


CHECKS = {"nnmamba_landmark": check_landmarks, "nnmamba_seg": check_segmentation}


def check_export(bundle: Path, eager: torch.nn.Module) -> None:
    arguments = {
        "net_id": "network_def",
        "ckpt_file": str(bundle / "models" / "model.pt"),
        "meta_file": "configs/metadata.json",
        "config_file": "configs/inference.json",
        **only_network(bundle),
    }
    inputs = load(bundle.name, "metadata")["network_data_format"]["inputs"]["image"]
    image = torch.randn(2, inputs["num_channels"], *inputs["spatial_shape"])
    with torch.no_grad():
        expected = eager(image)
    ckpt_export(filepath=str(bundle / "models" / "model.ts"), use_trace=True, **arguments)
    scripted = torch.jit.load(str(bundle / "models" / "model.ts"))
    with torch.no_grad():
        torch.testing.assert_close(scripted(image), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # half a minute each; monai_mamba.export has its own quick tests
@every_bundle
def test_onnx_file_equals_the_network(bundle):
    # MONAI's own `onnx_export` knows no operator of ours; `export_network` brings their translation.
    import onnxruntime

    workflow = ConfigWorkflow(
        config_file="configs/inference.json", workflow_type="infer", logging_file=False, **only_network(bundle)
    )
    workflow.initialize()
    eager = workflow.network_def.eval()
    inputs = load(bundle.name, "metadata")["network_data_format"]["inputs"]["image"]
    image = torch.randn(2, inputs["num_channels"], *inputs["spatial_shape"])
    export_network(eager, bundle / "model.onnx", image[:1])
    session = onnxruntime.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), eager(image), atol=1e-4, rtol=1e-4)


@every_bundle
def test_resumed_training_equals_an_uninterrupted_one(bundle):
    run(bundle, "train", max_epochs=3, ckpt_dir=str(bundle / "whole"))
    # Schedules may depend on `max_epochs`, so the interrupted run is one of three epochs too.
    run(bundle, "train", max_epochs=3, ckpt_dir=str(bundle / "parts"), **{"train#trainer#max_epochs": 2})
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
    assert whole["optimizer"]["state"]
    for key, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg"], parts["optimizer"]["state"][key]["exp_avg"])
    assert whole["lr_scheduler"]["last_epoch"] == parts["lr_scheduler"]["last_epoch"]


def cause(error: BaseException | None, kind: type[BaseException]) -> BaseException:
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    assert error is not None, f"no {kind.__name__} among the causes"
    return error


@pytest.mark.parametrize("bundle", ["medmamba", "nnmamba_seg"], indirect=True)
def test_refusals_name_what_is_wrong(bundle):
    with pytest.raises(Exception) as caught:
        run(bundle, "train", max_epochs=1, resume=True)
    assert "nothing to resume" in str(cause(caught.value, CheckpointError))
    (bundle / "empty").mkdir()
    with pytest.raises(Exception) as caught:
        run(bundle, "train", max_epochs=1, dataset_dir=str(bundle / "empty"))
    assert "datalist.json" in str(cause(caught.value, DatasetError))
    assert not (bundle / "models" / "model.pt").exists()


def test_command_ends_with_the_reason_in_one_line(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "MONAI_MAMBA_TRACEBACK"}
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(ROOT / "medmamba" / "train.json")]
    done = subprocess.run(
        [*command, "--dataset_dir", str(tmp_path), "--ckpt_dir", "models", "--output_dir", "eval"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'datalist.json'}: no such file")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # half a minute; tests/training/test_loading.py has the quick ones
def test_cases_damaged_after_the_check_are_left_out_of_training_validation_and_test(tmp_path, monkeypatch, caplog):
    bundle = tmp_path / "nnmamba_seg"
    shutil.copytree(ROOT / bundle.name / "configs", bundle / "configs")
    monkeypatch.chdir(bundle)
    for configs, sections in ((["train"], ["train", "validate"]), (["train", "evaluate"], ["test"])):
        workflow = ConfigWorkflow(
            config_file=[str(bundle / "configs" / f"{config}.json") for config in configs],
            workflow_type="train",
            logging_file=False,
            **{**SMALL[bundle.name], "max_epochs": 1, "on_corrupt": "drop", "num_draws": 5},
            **{"validate#inferer#inferer#overlap": 0.0},
        )
        workflow.initialize()
        damaged = [workflow.parser.get_parsed_content(f"{section}#data")[1] for section in sections]
        for case in damaged:  # batches of one: a whole batch is lost
            Path(case["image"]).write_bytes(Path(case["image"]).read_bytes()[:200])
        workflow.run()
        for case in damaged:
            assert f"case {case['case']} left out: {case['image']}" in caplog.text
        assert "1 of 4 cases left out in this pass" in caplog.text
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert metrics["cases"] == 3
    assert damaged[0]["case"] not in (bundle / "eval" / "cases.csv").read_text()


def test_several_labels_at_once_with_unknown_ones_are_learned_and_scored(tmp_path, monkeypatch):
    bundle = tmp_path / "medmamba"
    shutil.copytree(ROOT / bundle.name / "configs", bundle / "configs")
    monkeypatch.chdir(bundle)
    data = Path(sample_dataset("breastmnist", tmp_path / "data"))
    manifest = json.loads((data / "datalist.json").read_text())
    for section in ("training", "validation", "test"):
        for number, case in enumerate(manifest[section]):
            case["label"] = [case["label"], 1 - case["label"], int(number % 3 == 0)]
            if number % 4 == 1:
                case["label_mask"] = [1, 0, 1]
    (data / "datalist.json").write_text(json.dumps({**manifest, "classes": ["benign", "malignant", "third"]}))
    settings = {"dataset_dir": str(data), "max_epochs": 1}
    run(bundle, "train", **settings)
    run(bundle, "train", "evaluate", num_draws=5, **settings)
    metrics = json.loads((bundle / "eval" / "metrics.json").read_text())
    assert metrics["task"] == "multi-label classification"
    limit = SMALL["medmamba"]["limit"]
    masked = sum(bool(np.isnan(case["label"]).any()) for case in load_cases(data, "test", limit=limit))
    assert 0 < masked and metrics["known_labels"] == {"benign": limit, "malignant": limit - masked, "third": limit}
    infer(bundle, dataset_dir=str(data))
    with open(bundle / "predictions" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    total = sum(float(rows[0][f"prob_{name}"]) for name in ("benign", "malignant", "third"))
    assert abs(total - 1) > 0.05  # no softmax
    for row in rows:
        assert (row["label_malignant"] == "") == ("label_mask" in manifest["test"][int(row["case"][-4:])])
