"""Folds: by group (patient), stratified, seeded, and independent of the order of the cases."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from data_prep.errors import UsageError
from data_prep.model import Case, OfficialSplit


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
    return _deal([(case.key, case.group, stratum(case)) for case in train], num_folds, seed)


def partition(
    members: Iterable[tuple[str, str, str]], shares: Mapping[OfficialSplit, int], seed: int
) -> dict[str, OfficialSplit]:
    """Divide by group into parts of given shares, stratified, independent of the order of `members`.

    Args:
        members: ``(key, group, stratum)`` of every case.
        shares: whole shares, for example ``{"train": 6, "val": 1, "test": 3}`` for 60, 10 and 30 %.
        seed: of the shuffle.

    Returns:
        Key to part.

    Raises:
        UsageError: fewer groups than shares.
    """
    members = sorted(members)
    parts = [part for part, share in shares.items() for _ in range(share)]
    num_groups = len({group for _, group, _ in members})
    if num_groups < len(parts):
        raise UsageError(
            f"{num_groups} patients cannot be divided {':'.join(str(share) for share in shares.values())}; "
            f"at least {len(parts)} are needed."
        )
    return {key: parts[fold] for key, fold in _deal(members, len(parts), seed).items()}


def torch_permutation(count: int, seed: int) -> list[int]:
    """The permutation that ``torch.randperm(count, generator=torch.Generator().manual_seed(seed))`` draws on a CPU.

    Published splits were drawn with it; this package does not import torch.
    """
    import numpy as np

    # Both seed the same Mersenne twister in the same way; torch takes 32 bits per place of a Fisher-Yates shuffle.
    draws = np.random.RandomState(seed).randint(0, 2**32, size=max(count - 1, 0), dtype=np.uint32)
    order = list(range(count))
    for place, draw in enumerate(draws):
        other = place + int(draw) % (count - place)
        order[place], order[other] = order[other], order[place]
    return order


def stratified_group_folds(strata: Sequence[str], groups: Sequence[str], num_folds: int, seed: int) -> list[int]:
    """Fold of every case: groups whole, strata as even as that allows.

    The same for every version of scikit-learn, whose own shuffle was another before 1.8, and dealt strata unevenly.

    Args:
        strata: of every case.
        groups: of every case.
        num_folds: at most the number of groups.
        seed: of the order in which groups that are alike are dealt.
    """
    import warnings

    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    y = np.unique(strata, return_inverse=True)[1]
    names, number = np.unique(groups, return_inverse=True)
    shuffled = np.random.RandomState(seed).permutation(len(names))[number]
    if np.bincount(y).max() < num_folds:
        y = np.zeros_like(y)
    folds = np.empty(len(y), dtype=int)
    with warnings.catch_warnings():
        # A stratum with fewer members than folds cannot be in all of them; that is no reason to warn.
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, validation) in enumerate(StratifiedGroupKFold(num_folds).split(np.zeros(len(y)), y, shuffled)):
            folds[validation] = fold
    found: list[int] = folds.tolist()
    return found


def _deal(members: Sequence[tuple[str, str, str]], num_folds: int, seed: int) -> dict[str, int]:
    keys, groups, strata = zip(*members, strict=True)
    return dict(zip(keys, stratified_group_folds(strata, groups, num_folds, seed), strict=True))
