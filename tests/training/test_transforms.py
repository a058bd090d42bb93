"""Pictures: depth, colours, size, damage; colours, and balancing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from monai_mamba.errors import DatasetError
from monai_mamba.training.bundle import class_weights, train_sampler
from monai_mamba.training.losses import SingleLogitLoss
from monai_mamba.training.transforms import AutoAugmentd, OneHotLabeld, ReadPictured, read_picture


@pytest.mark.parametrize(
    ("pixels", "value"),
    [
        (np.full((3, 4), 51, np.uint8), [0.2]),
        (np.full((3, 4), 13107, np.uint16), [0.2]),
        (np.dstack([np.full((3, 4), v, np.uint8) for v in (0, 51, 255)]), [0.0, 0.2, 1.0]),
        (np.dstack([np.full((3, 4), v, np.uint8) for v in (0, 51, 255, 7)]), [0.0, 0.2, 1.0]),
    ],
    ids=["grey8", "grey16", "rgb", "rgba"],
)
def test_picture_is_scaled_by_its_depth(tmp_path, pixels, value):
    Image.fromarray(pixels).save(tmp_path / "p.png")
    array = read_picture(tmp_path / "p.png")
    assert array.shape == (len(value), 3, 4)
    np.testing.assert_allclose(array[:, 0, 0], value, atol=1e-6)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"hello"], ids=["empty", "header", "text"])
def test_damaged_picture_is_refused_by_name(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DatasetError, match=r"bad\.png"):
        ReadPictured("image")({"image": str(tmp_path / "bad.png")})


def test_resize_equals_torchvision_on_pil(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (50, 37), np.uint8)).save(tmp_path / "p.png")
    mine = ReadPictured("image", image_size=24)({"image": str(tmp_path / "p.png")})["image"]
    resize = torchvision.transforms.Resize((24, 24))
    theirs = torch.from_numpy(np.asarray(resize(Image.open(tmp_path / "p.png"))).copy()).float() / 255
    assert mine.shape == (3, 24, 24)
    assert (mine[0] - theirs).abs().max() <= 1 / 255  # theirs is rounded to whole grey values twice


def test_auto_augment_keeps_range_and_needs_a_known_policy():
    pytest.importorskip("torchvision")
    image = torch.rand(3, 16, 16)
    augmented = [AutoAugmentd("image")({"image": image})["image"] for _ in range(5)]
    assert all(a.shape == image.shape and 0 <= a.min() and a.max() <= 1 for a in augmented)
    assert any((a - image).abs().max() > 0.05 for a in augmented)
    assert AutoAugmentd("image", "none")({"image": image})["image"] is image
    with pytest.raises(ValueError, match="policy"):
        AutoAugmentd("image", "best")


def test_one_hot_label():
    assert OneHotLabeld(num_classes=3)({"label": 1})["label"].tolist() == [0, 1, 0]
    assert OneHotLabeld(multi_label=True)({"label": np.array([1, 1])})["label"].tolist() == [1, 1]


def test_balancing_by_weights_and_by_sampler():
    cases = [{"label": 0}] * 30 + [{"label": 1}] * 10
    assert class_weights(cases, 2, "none") is None
    torch.testing.assert_close(class_weights(cases, 2, "weights"), torch.tensor([2 / 3, 2.0]))
    balanced = SingleLogitLoss(cases, "weights")(torch.zeros(1, 1), torch.tensor([1]))
    torch.testing.assert_close(balanced, 3 * SingleLogitLoss()(torch.zeros(1, 1), torch.tensor([1])))
    torch.manual_seed(0)
    drawn = [cases[i]["label"] for _ in range(25) for i in train_sampler(cases, 2, "sampler")]
    assert 0.45 < np.mean(drawn) < 0.55
    assert sorted(train_sampler(cases, 2, "none")) == list(range(40))
    with pytest.raises(DatasetError, match="every class"):
        class_weights(cases, 3, "weights")
    with pytest.raises(ValueError, match="balance"):
        train_sampler(cases, 2, "both")
