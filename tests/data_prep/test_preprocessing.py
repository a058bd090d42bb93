"""Optional steps: what N4, registration, masks, z-score and grids do to a known head, and what the report keeps."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import affine_transform, gaussian_filter

from data_prep.errors import UsageError
from data_prep.model import Case, Description, Make, Source
from data_prep.preparation import VolumeOptions, prepare
from tests.data_prep.factories import convert_tree, report_lines, tree_bytes

SHAPE = (40, 44, 36)
#: world positions (RAS mm) of bright blobs of the head
BLOBS = np.array([[-20.0, 10, 5], [18, -12, 12], [5, 25, -15], [-8, -26, -6]])


@dataclass(frozen=True)
class Heads(VolumeOptions, Source):
    """Every NIfTI file but masks; for these tests only."""

    name: ClassVar[str] = "heads"
    layouts: ClassVar[tuple[str, ...]] = ("monai",)

    def plan(self, tree, book):
        steps = self.steps()
        for path in tree.match("**/head*.nii.gz"):
            mask = path.replace(".nii.gz", f"{self.mask_suffix}.nii.gz") if self.mask_suffix else None
            if mask != path and path.replace(".nii.gz", "").endswith("_mask"):
                continue
            make = prepare(Make("operations.volumes:image", (path,), {}), steps, mask)
            book.add(Case(path, path, (make,)))
        return Description("Heads", "images", ("T1",))


def head(shape=SHAPE, spacing=2.5, move=None, seed=0):
    """A smooth ellipsoid with blobs around the world's origin, seen through a rigid or affine `move` (4, 4)."""
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    if move is not None:
        affine = move @ affine
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = nib.affines.apply_affine(affine if move is None else np.linalg.inv(move) @ affine, grid)
    radius = np.linalg.norm(world / [38, 45, 34], axis=-1)
    data = 80.0 / (1 + np.exp((radius - 1) * 25)) * (1 + 0.3 * np.cos(world[..., 0] / 9) * np.sin(world[..., 1] / 11))
    for number, blob in enumerate(BLOBS):
        data += (60 + 10 * number) * np.exp(-(np.linalg.norm(world - blob, axis=-1) ** 2) / (2 * 5.0**2))
    noise = np.random.default_rng(seed).normal(0, 0.5, shape)
    return np.maximum(data + noise * (radius < 1.05), 0).astype(np.float32), affine


def save(path, data, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    nib.save(image, path)
    return path


def turned(degrees, shift):
    """A rotation about two axes and a shift in world mm."""
    a, b = np.radians(degrees)
    turn = np.eye(4)
    turn[:3, :3] = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    turn[:3, 3] = shift
    return turn


def result(out):
    (line,) = [json.loads(text) for text in (out / "manifest.jsonl").read_text().splitlines()]
    image = nib.load(out / line["files"][0]["path"])
    return image.get_fdata(), image.affine, line["files"][0].get("processing")


def blob_positions(data, affine):
    """Centers of the blobs near where they should be, by their brightness above the surroundings."""
    peaks = data - gaussian_filter(data, 4)
    places = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, data.shape), indexing="ij"), -1))
    found = []
    for blob in BLOBS:
        weight = np.where(np.linalg.norm(places - blob, axis=-1) < 12, np.maximum(peaks, 0) ** 2, 0)
        found.append((places * weight[..., None]).sum((0, 1, 2)) / weight.sum())
    return np.array(found)


def test_affine_registration_brings_a_moved_head_back_to_the_template_and_says_so(tmp_path):
    template, affine = head()
    save(tmp_path / "template.nii.gz", template, affine)
    move = turned((12, -9), (11, -7, 6)) @ np.diag([1.06, 0.95, 1.04, 1])
    data, moved = head((44, 40, 38), 2.3, move, seed=1)
    save(tmp_path / "in/head.nii.gz", data * 1.7 + 3 * (data > 5), moved)
    out = tmp_path / "out"
    assert convert_tree(Heads(template=tmp_path / "template.nii.gz"), tmp_path / "in", out) == 0
    found, grid, (record,) = result(out)
    assert found.shape == SHAPE
    np.testing.assert_allclose(grid, affine, atol=1e-4)
    np.testing.assert_allclose(blob_positions(found, grid), blob_positions(template, affine), atol=1.2)
    # The recorded matrix is that of the move: template world to image world, RAS+.
    expected = nib.affines.apply_affine(move, BLOBS)
    np.testing.assert_allclose(nib.affines.apply_affine(np.array(record["template_to_image_ras"]), BLOBS), expected,
                               atol=1.5)  # fmt: skip
    assert report_lines(out)["file", "head.nii.gz", ""][0] == "resampled"
    assert record["step"] == "register" and record["metric"] < -0.3


def test_registration_is_the_same_in_any_process(tmp_path):
    template, affine = head((24, 26, 22), 4.0)
    save(tmp_path / "template.nii.gz", template, affine)
    for number in range(2):
        data, moved = head((24, 26, 22), 4.0, turned((5 + number, 4), (4, 3, -2)), seed=number)
        save(tmp_path / f"in/head{number}.nii.gz", data, moved)
    source = Heads(template=tmp_path / "template.nii.gz", zscore=True, spacing=5.0)
    assert convert_tree(source, tmp_path / "in", tmp_path / "one") == 0
    assert convert_tree(source, tmp_path / "in", tmp_path / "two") == 0
    assert tree_bytes(tmp_path / "one") == tree_bytes(tmp_path / "two")


def test_n4_takes_away_a_known_bias(tmp_path):
    _, affine = head()
    world = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1))
    radius = np.linalg.norm(world / [38, 45, 34], axis=-1)
    pattern = np.sin(world[..., 0] / 6) * np.sin(world[..., 1] / 7) * np.sin(world[..., 2] / 8)
    tissues = np.where(radius < 1, np.where(radius > 0.8, 60.0, np.where(pattern > 0, 100.0, 140.0)), 0)
    tissues = np.maximum(tissues + np.random.default_rng(0).normal(0, 2, SHAPE) * (radius < 1), 0)
    bias = 1 + 0.3 * np.linspace(-1, 1, SHAPE[0])[:, None, None] + 0.2 * np.linspace(-1, 1, SHAPE[1])[None, :, None]
    save(tmp_path / "in/head.nii.gz", (tissues * bias).astype(np.float32), affine)
    out = tmp_path / "out"
    assert convert_tree(Heads(n4=True), tmp_path / "in", out) == 0
    found, grid, (record,) = result(out)
    np.testing.assert_array_equal(grid, nib.load(tmp_path / "in/head.nii.gz").affine)
    inside = tissues > 30
    before, after = np.broadcast_to(bias, SHAPE)[inside], found[inside] / tissues[inside]
    # Measured: 12.9 % before, 1.1 % after.
    assert before.std() / before.mean() > 0.12 and after.std() / after.mean() < 0.03
    assert record["step"] == "n4" and record["field"][0] < 0.9 < 1.1 < record["field"][1]
    assert report_lines(out)["file", "head.nii.gz", ""] == ("ok", "")


def test_spacing_keeps_places_and_does_not_alias(tmp_path):
    data, affine = head()
    affine[:3, 3] += [3, -8, 100]
    save(tmp_path / "in/head.nii.gz", data, affine)
    assert convert_tree(Heads(spacing=4.0), tmp_path / "in", tmp_path / "out") == 0
    found, grid, _ = result(tmp_path / "out")
    np.testing.assert_allclose(np.linalg.norm(grid[:3, :3], axis=0), 4.0, atol=1e-5)
    middle = [(np.array(shape) - 1) / 2 for shape in (SHAPE, found.shape)]
    np.testing.assert_allclose(
        nib.affines.apply_affine(affine, middle[0]), nib.affines.apply_affine(grid, middle[1]), atol=1e-3
    )
    smooth = gaussian_filter(data, np.sqrt(4.0**2 - 2.5**2) / 2.355 / 2.5)
    wanted = affine_transform(smooth, (np.linalg.inv(affine) @ grid)[:3, :3], (np.linalg.inv(affine) @ grid)[:3, 3],
                              found.shape, order=1)  # fmt: skip
    core = (slice(2, -2),) * 3
    assert np.abs(found[core] - wanted[core]).max() < 2.0


@pytest.mark.parametrize("wanted", [(30, 50, 36), (60, 10, 37)])
def test_grid_crops_and_pads_without_moving_a_voxel(tmp_path, wanted):
    data, affine = head()
    save(tmp_path / "in/head.nii.gz", data, affine)
    assert convert_tree(Heads(grid=",".join(map(str, wanted))), tmp_path / "in", tmp_path / "out") == 0
    found, grid, _ = result(tmp_path / "out")
    assert found.shape == wanted
    relation = np.linalg.inv(affine) @ grid
    np.testing.assert_allclose(relation[:3, :3], np.eye(3), atol=1e-5)
    start = np.rint(relation[:3, 3]).astype(int)
    padded = np.pad(data, 30)
    source = tuple(slice(30 + s, 30 + s + w) for s, w in zip(start, wanted, strict=True))
    np.testing.assert_allclose(found, padded[source], rtol=1e-6, atol=1e-9)


def test_mask_of_the_template_strips_and_scales(tmp_path):
    template, affine = head((24, 26, 22), 4.0)
    save(tmp_path / "template.nii.gz", template, affine)
    save(tmp_path / "mask.nii.gz", (template > 60).astype(np.uint8), affine)
    data, moved = head((24, 26, 22), 4.0, turned((6, 5), (4, 3, -2)), seed=3)
    save(tmp_path / "in/head.nii.gz", data, moved)
    source = Heads(template=tmp_path / "template.nii.gz", brain_mask=tmp_path / "mask.nii.gz", strip=True, zscore=True)
    assert convert_tree(source, tmp_path / "in", tmp_path / "out") == 0
    found, _, records = result(tmp_path / "out")
    inside = template > 60
    assert not found[~inside].any()
    np.testing.assert_allclose([found[inside].mean(), found[inside].std()], [0, 1], atol=1e-4)
    assert [record["step"] for record in records] == ["register", "mask", "strip", "zscore"]


def test_mask_elsewhere_and_constant_image_are_refused_and_a_turned_mask_is_understood(tmp_path):
    data, affine = head()
    mask = (data > 60).astype(np.uint8)
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = SHAPE[0] - 1
    save(tmp_path / "in/head1.nii.gz", data, affine)
    save(tmp_path / "in/head1_mask.nii.gz", mask[::-1], affine @ flip)
    far = affine.copy()
    far[:3, 3] += 60
    save(tmp_path / "in/head2.nii.gz", data, affine)
    save(tmp_path / "in/head2_mask.nii.gz", mask, far)
    save(tmp_path / "in/head3.nii.gz", np.full(SHAPE, 7, np.float32), affine)
    save(tmp_path / "in/head3_mask.nii.gz", mask, affine)
    assert convert_tree(Heads(mask_suffix="_mask", zscore=True, strip=True), tmp_path / "in", tmp_path / "out") == 3
    lines = report_lines(tmp_path / "out")
    reasons = [lines["file", f"head{n}.nii.gz", ""] for n in (1, 2, 3)]
    assert reasons == [("ok", ""), ("failed", "grids-differ"), ("failed", "constant-image")]
    np.testing.assert_array_equal(result(tmp_path / "out")[0] != 0, mask > 0)


def test_template_that_changed_after_the_plan_is_refused(tmp_path):
    from data_prep.operations import Job
    from data_prep.operations.preprocessing import prepared

    data, affine = head((16, 16, 16), 6.0)
    path = save(tmp_path / "template.nii.gz", data, affine)
    make = prepare(Make("operations.volumes:image", ("x",), {}), Heads(template=path).steps())
    save(path, data + 1, affine)
    job = Job((path,), tmp_path / "out.nii.gz", tmp_path / "final.nii.gz", make.params)
    with pytest.raises(Exception, match="changed-file"):
        prepared(job)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"brain_mask": "x.nii.gz"}, "--template"),
        ({"strip": True}, "--strip needs"),
        ({"mask_suffix": "_m"}, "no use"),
        ({"grid": "1,2"}, "--grid"),
        ({"grid": "0,2,3"}, "--grid"),
        ({"spacing": 0.01}, "--spacing"),
        ({"template": "absent.nii.gz"}, "--template"),
        ({"mask_suffix": "_m", "strip": True, "brain_mask": "m.nii.gz", "template": "t.nii.gz"}, "two brain masks"),
    ],
)
def test_options_that_contradict_each_other_are_one_error(tmp_path, options, match):
    options = {k: tmp_path / v if k in ("template", "brain_mask") else v for k, v in options.items()}
    with pytest.raises(UsageError, match=match):
        Heads(**options).steps()


def test_no_step_leaves_the_make_alone():
    make = Make("operations.volumes:image", ("x",), {})
    assert prepare(make, Heads().steps()) is make
    assert dataclasses.replace(make) == make


def test_decathlon_takes_the_steps_that_leave_the_grid_alone(tmp_path):
    from data_prep.sources.decathlon import Decathlon
    from tests.data_prep.factories import decathlon_tree

    root = decathlon_tree(tmp_path, 2, 2)
    out = tmp_path / "Dataset004_Toy"
    assert convert_tree(Decathlon(zscore=True), root, out) == 0
    for channel in range(2):
        data = nib.load(out / f"imagesTr/toy_000_{channel:04d}.nii.gz").get_fdata()
        np.testing.assert_allclose([data.mean(), data.std()], [0, 1], atol=1e-4)
    description = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(description | {"modality": {"0": "CT", "1": "MR"}}))
    with pytest.raises(UsageError, match="--n4"):
        convert_tree(Decathlon(n4=True), root, tmp_path / "ct")


def test_dicom_takes_the_steps_and_refuses_n4_for_ct(tmp_path):
    from data_prep.sources.dicom import Dicom
    from tests.data_prep.dicom_factories import oracle_distance, write_series

    slices = write_series(tmp_path / "mr", modality="MR", angle=0.3)
    assert convert_tree(Dicom(), tmp_path / "mr", tmp_path / "plain") == 0
    assert convert_tree(Dicom(zscore=True), tmp_path / "mr", tmp_path / "out") == 0
    data, affine, (record,) = result(tmp_path / "out")
    plain, wanted, _ = result(tmp_path / "plain")
    np.testing.assert_array_equal(affine, wanted)
    np.testing.assert_allclose(data * record["std"] + record["mean"], plain, rtol=1e-3, atol=0.1)
    (path,) = (tmp_path / "plain/images").iterdir()
    assert oracle_distance(path, slices) <= 0.01
    write_series(tmp_path / "ct")
    with pytest.raises(UsageError, match="--n4"):
        convert_tree(Dicom(n4=True), tmp_path / "ct", tmp_path / "refused")
