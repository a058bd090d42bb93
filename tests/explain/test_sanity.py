"""The checks of the maps: passed by honest maps, not by others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from monai_mamba.explain import sanity
from monai_mamba.explain.cams import ActivationMaps
from monai_mamba.explain.embeddings import project
from monai_mamba.explain.tasks import pick_cases
from tests.blobs import draw_blobs


@pytest.fixture(scope="module")
def positives():
    images, label, _ = draw_blobs(12, seed=3)
    return list((torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) * 2 - 1)[label == 1])


def check(network, positives, explainer):
    def score(images):
        with torch.no_grad():
            return network(torch.stack(list(images))).softmax(1)[:, 1].numpy()

    subjects = [sanity.Subject(image, 1, str(number), score) for number, image in enumerate(positives)]
    return sanity.check_maps(network, subjects, explainer, num_draws=100)


def test_honest_maps_pass_both_checks(blob_network, positives):
    checks = check(blob_network, positives, ActivationMaps(blob_network, positives[0]))
    assert checks.depends_on_weights
    assert checks.shows_what_matters
    assert checks.similarity[1.0].value < 0.5
    assert checks.curves["map"][0] == pytest.approx(checks.curves["random"][0])
    assert [entry["passed"] for entry in checks.as_list()] == [True, True]


class Brightness:
    """A map of the image alone, which looks convincing here and knows nothing of the network."""

    method, layer, map_size = "gradcam", "stage2", (4, 4)
    sign = 1

    def __init__(self, *_):
        pass

    def __call__(self, image, class_index, region):
        return self.sign * image[:1]


class Darkness(Brightness):
    sign = -1


def test_maps_of_the_image_alone_do_not_pass(blob_network, positives, monkeypatch):
    monkeypatch.setattr(sanity, "ActivationMaps", Brightness)
    checks = check(blob_network, positives, Brightness())
    assert checks.similarity[1.0].value == pytest.approx(1)
    assert not checks.depends_on_weights


def test_maps_of_what_does_not_matter_do_not_pass(blob_network, positives, monkeypatch):
    monkeypatch.setattr(sanity, "ActivationMaps", Darkness)
    assert not check(blob_network, positives, Darkness()).shows_what_matters


def test_shuffle_starts_at_the_output_and_keeps_the_values(blob_network):
    names = [name for name, _ in blob_network.named_parameters()]
    before = {name: value.clone() for name, value in blob_network.named_parameters()}
    some = dict(sanity.shuffle_weights(blob_network, 0.1, seed=0).named_parameters())
    changed = [name for name in names if not torch.equal(some[name], before[name])]
    assert changed
    assert set(changed) <= set(names[-round(0.1 * len(names)) :])
    for name in changed:
        assert torch.equal(some[name].flatten().sort().values, before[name].flatten().sort().values)
    assert all(torch.equal(value, before[name]) for name, value in blob_network.named_parameters())


def test_delete_takes_the_highest_over_both_views():
    image = torch.arange(16.0).reshape(2, 2, 4)
    maps = torch.zeros(2, 2, 4)
    maps[1, 0, 1] = 1
    maps[0, 1, 3] = 0.5
    changed = sanity.delete(image, maps, 1 / 16)
    assert (changed != image).nonzero().tolist() == [[1, 0, 1]]
    assert changed[1, 0, 1] == image[1].mean()
    assert (sanity.delete(image, maps, 2 / 16) != image).sum() == 2
    assert torch.equal(sanity.delete(image, maps, 0), image)


def test_picked_cases_are_wrong_ones_and_sure_ones_of_every_class():
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.1, 0.9], [0.05, 0.95], [0.8, 0.2], [0.45, 0.55]])
    label = np.array([0, 0, 1, 0, 0, 1])
    assert pick_cases(probs, label, 4) == [3, 1, 0, 2]
    assert pick_cases(probs, None, 2) == [0, 3]
    assert sorted(pick_cases(probs, label, 99)) == list(range(6))


def test_embeddings_keep_groups_apart_and_few_cases_get_no_tsne():
    generator = np.random.default_rng(0)
    label = np.repeat([0, 1], 12)
    points = project(generator.normal(size=(24, 6)) + 20 * label[:, None], seed=0)
    assert set(points) == {"PCA", "t-SNE"}
    for name, plane in points.items():
        inside = [np.linalg.norm(plane[label == c] - plane[label == c].mean(0), axis=1).mean() for c in (0, 1)]
        assert np.linalg.norm(plane[label == 0].mean(0) - plane[label == 1].mean(0)) > 2 * max(inside), name
    assert set(project(generator.normal(size=(5, 6)), seed=0)) == {"PCA"}
    with pytest.raises(ValueError, match="3 cases at least"):
        project(np.zeros((2, 6)), seed=0)
