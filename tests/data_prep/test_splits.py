"""Parts by patient in whole shares."""

from __future__ import annotations

from collections import Counter

import pytest

from data_prep.errors import UsageError
from data_prep.splits import partition

MEMBERS = [(f"case{i}", f"patient{i // 3}", str(i // 3 % 2)) for i in range(300)]


def test_partition_keeps_patients_together_and_shares_and_strata_even():
    parts = partition(MEMBERS, {"train": 6, "val": 1, "test": 3}, seed=0)
    sides = {group: {parts[key] for key, other, _ in MEMBERS if other == group} for _, group, _ in MEMBERS}
    assert all(len(found) == 1 for found in sides.values())
    assert Counter(parts.values()) == {"train": 180, "val": 30, "test": 90}
    positive = Counter(parts[key] for key, _, stratum in MEMBERS if stratum == "1")
    assert positive == {"train": 90, "val": 15, "test": 45}


def test_partition_depends_on_the_seed_and_not_on_the_order():
    shares = {"train": 3, "test": 1}
    assert partition(MEMBERS[::-1], shares, seed=1) == partition(MEMBERS, shares, seed=1)
    assert partition(MEMBERS, shares, seed=1) != partition(MEMBERS, shares, seed=2)


def test_partition_of_too_few_patients_is_refused():
    with pytest.raises(UsageError, match="3 patients cannot be divided 6:1:3"):
        partition(MEMBERS[:9], {"train": 6, "val": 1, "test": 3}, seed=0)
