"""Copies, near copies and the split with the papers' counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.picture_sets import near_groups, near_hash, published_split


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([845, 730, 244, 235, 192, 52], (1384, 227, 687)),
        ([500] * 8, (2408, 392, 1200)),
        ([1626, 1802, 1800], (3140, 521, 1567)),
        ([711, 3092, 1040, 1718, 1626, 4213], (7446, 1237, 3717)),
    ],
    ids=["PAD-UFES-20", "Kvasir", "CPN", "Fetal-Planes"],
)
def test_published_split_has_the_counts_of_table_2(counts, wanted):
    members = [(f"{name}-{i}", str(name)) for name, count in enumerate(counts) for i in range(count)]
    found = published_split(members, 0)
    number = Counter(found.values())
    assert (number["train"], number["val"], number["test"]) == wanted
    assert found == published_split(members[::-1], 0) != published_split(members, 1)


def test_near_hash_survives_compression_and_brightness_and_tells_scenes_apart(tmp_path):
    generator = np.random.default_rng(0)
    hashes = []
    for scene in range(3):
        coarse = Image.fromarray(generator.integers(0, 200, (6, 6), dtype=np.uint8))
        picture = coarse.resize((120, 100), Image.Resampling.BICUBIC)
        picture.save(tmp_path / f"{scene}.png")
        Image.fromarray(np.asarray(picture) + np.uint8(20)).save(tmp_path / f"{scene}.jpg", quality=60)
        hashes += [near_hash(tmp_path / f"{scene}.png"), near_hash(tmp_path / f"{scene}.jpg")]
    groups = near_groups(hashes, 16)
    assert groups[0] == groups[1] and groups[2] == groups[3] and groups[4] == groups[5]
    assert len(set(groups)) == 3
    (tmp_path / "cut.png").write_bytes(b"no picture")
    assert near_hash(tmp_path / "cut.png") == ""


def test_near_groups_are_chains_and_leave_undecodable_pictures_alone():
    def text(ones):
        bits = np.zeros(256, np.uint8)
        bits[:ones] = 1
        return np.packbits(bits).tobytes().hex()

    groups = near_groups([text(0), "", text(10), text(20), text(31), ""], 10)
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups)) == 4
    assert len(set(near_groups([text(0), text(0), text(1)], 0))) == 2
    assert near_groups([], 5) == []
