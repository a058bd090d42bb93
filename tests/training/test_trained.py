"""Loading a trained bundle, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from monai_mamba.errors import CheckpointError, DatasetError
from monai_mamba.training.datalist import list_inputs
from monai_mamba.training.samples import sample_dataset
from monai_mamba.training.trained import fingerprints, load_trained
from tests.trained_bundles import SMALL, make_trained

SAMPLES = {"medmamba": "breastmnist", "xfmamba": "breastmnist_two_view", "nnmamba_adni": "hippocampus_size"}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_trained_bundle_predicts_as_its_network(tmp_path, name):
    trained = load_trained(make_trained(name, tmp_path, image_size=SMALL[name]["default_card#image_size"]))
    cases = list_inputs(sample_dataset(SAMPLES[name], tmp_path / "data"))[:2]
    read = [trained.read(case) for case in cases]
    assert all(torch.is_tensor(read[0][key]) for key in trained.image_keys)
    images = [trained.prepare(case)["image"] for case in read]
    assert torch.equal(images[0], trained.preprocessing(cases[0])["image"])
    probs = trained.probabilities(images)
    with torch.no_grad():
        logits = trained.network(torch.stack(images)).double()
    expected = logits.sigmoid()[:, 0] if name == "nnmamba_adni" else logits.softmax(1)[:, 1]
    torch.testing.assert_close(probs[:, 1], expected)
    torch.testing.assert_close(probs.sum(1), torch.ones(2, dtype=torch.float64))
    assert not trained.network.training
    assert set(fingerprints(trained)) == {"model.pt", "model.json", "inference.json"}


def test_card_overrides_and_folder_of_the_weights_are_followed(tmp_path):
    bundle = make_trained("medmamba", tmp_path, image_size=48, classes=["no", "yes"])
    trained = load_trained(bundle / "models")
    assert (trained.classes, trained.card["image_size"], trained.folder) == (["no", "yes"], 48, bundle)
    (bundle / "models").rename(tmp_path / "runs")
    assert load_trained(bundle, overrides={"ckpt_dir": str(tmp_path / "runs")}).classes == ["no", "yes"]
    with pytest.raises(CheckpointError, match="does not exist; train"):
        load_trained(bundle)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no bundle"):
        load_trained(tmp_path)
    bundle = make_trained("medmamba", tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit the network .*(--argument).*size mismatch"):
        load_trained(bundle, overrides={"network_def#dims": 16})
    with pytest.raises(CheckpointError, match=r"cannot be used: .*nonsense"):
        load_trained(bundle, overrides={"network_def#nonsense": 16})
    trained = load_trained(bundle)
    with pytest.raises(CheckpointError, match="is a model for classification; this needs one for landmarks"):
        trained.require_task("landmarks")
    with pytest.raises(DatasetError, match="has no `image`; the model"):
        trained.read({"case": "1", "image1": "a.png", "image2": "b.png"})
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"bad\.png: cannot be read as a picture"):
        trained.read({"case": "1", "image": str(tmp_path / "bad.png")})
    config = bundle / "configs" / "inference.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task": "poetry"}))
    with pytest.raises(CheckpointError, match="`task` must be one of"):
        load_trained(bundle)


def test_unreadable_volume_is_named(tmp_path):
    trained = load_trained(make_trained("nnmamba_adni", tmp_path))
    (tmp_path / "bad.nii.gz").write_bytes(b"no volume")
    with pytest.raises(DatasetError, match=r"bad\.nii\.gz: cannot be read: ImageFileError: .* is not a gzip file"):
        trained.read({"case": "1", "image": str(tmp_path / "bad.nii.gz")})
