"""Folds: by group (patient), stratified, seeded, and independent of the order of the cases."""

from __future__ import annotations

import json
from collections.abc import Sequence

from data_prep.errors import UsageError
from data_prep.model import Case


def stratum(case: Case) -> str:
    """What is spread evenly: the case's stratum, else its target."""
    return case.stratum or json.dumps(case.target, sort_keys=True)


def official_conflict(cases: Sequence[Case]) -> list[str]:
    """Groups that the publisher's own split puts on more than one side."""
    sides: dict[str, set[str]] = {}
    for case in cases:
        if case.split is not None:
            sides.setdefault(case.group, set()).add(case.split)
    return sorted(group for group, found in sides.items() if len(found) > 1)


def assign_folds(cases: Sequence[Case], num_folds: int | None, seed: int) -> dict[str, int]:
    """Give every training case the fold in which it validates.

    Cases of an official part ``val`` or ``test`` get no fold. Where there is an official ``val``, training cases get
    none either: the split is the publisher's.

    Args:
        cases: all cases.
        num_folds: number of folds; ``None`` takes 5, or none at all when there are fewer than 5 groups; 0 makes none.
        seed: of the shuffle.

    Returns:
        Case key to fold.

    Raises:
        UsageError: fewer groups than folds, or one fold.
    """
    if any(case.split == "val" for case in cases):
        return {}
    train = sorted((case for case in cases if case.split in (None, "train")), key=lambda case: case.key)
    num_groups = len({case.group for case in train})
    if num_folds is None:
        num_folds = 5 if num_groups >= 5 else 0
    if num_folds == 0:
        return {}
    if num_folds < 2 or num_folds > num_groups:
        raise UsageError(f"--folds {num_folds} with {num_groups} patients: needs 2 to {num_groups}, or 0 for no folds.")
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    strata = {name: i for i, name in enumerate(sorted({stratum(case) for case in train}))}
    y = np.array([strata[stratum(case)] for case in train])
    groups = np.unique([case.group for case in train], return_inverse=True)[1]
    folds: dict[str, int] = {}
    with warnings.catch_warnings():
        # A stratum with fewer members than folds cannot be in all of them; that is no reason to warn.
        warnings.simplefilter("ignore", UserWarning)
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        if np.bincount(y).max() < num_folds:
            y = np.zeros_like(y)
        for fold, (_, validation) in enumerate(splitter.split(np.zeros(len(y)), y, groups)):
            folds.update({train[i].key: fold for i in validation})
    return folds
