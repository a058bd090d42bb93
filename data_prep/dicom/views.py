"""Which view an X-ray or mammogram shows, and which side, from every place of a header that says so.

Nothing is guessed: what is said twice must be said alike, and what is contradicted is left empty and reported.
PatientOrientation names directions of the picture, not a view (a film turned over has others), so it can contradict
a view but gives none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydicom.dataset import Dataset

#: SNOMED CT codes of DICOM's context groups 4010 and 4014 -> ViewPosition
_VIEW_CODES = {
    "399162004": "CC", "399196006": "FB", "399192008": "XCCL", "399101009": "XCCM", "399368009": "MLO",
    "399260004": "ML", "399352003": "LM", "399099002": "LMO", "399188001": "SIO", "441555000": "ISO",
    "399348003": "AP", "272479007": "PA", "399067008": "LATERAL", "399173006": "LL", "399198007": "RL",
    "399135007": "LAO", "399356000": "RAO", "399006002": "LPO", "399038007": "RPO",
}  # fmt: skip
#: context group 4015: what was done besides
_MODIFIER_CODES = {
    "441752004": "anterior-compression", "399011000": "axillary-tail", "442580003": "axillary-tissue",
    "399161006": "cleavage", "399209000": "implant-displaced", "442593008": "infra-mammary-fold",
    "399163009": "magnification", "442581004": "nipple-in-profile", "414493004": "rolled-inferior",
    "399197002": "rolled-lateral", "399226006": "rolled-medial", "415670009": "rolled-superior",
    "399055006": "spot-compression", "399110001": "tangential",
}  # fmt: skip
#: names of SNOMED before 2003, which have the same codes as SRT
_OLD_SCHEMES = {"SNM3": "SRT", "99SDM": "SRT"}
_VIEW_POSITIONS = frozenset(_VIEW_CODES.values()) | {"RLD", "LLD", "RLO", "LLO"}
_SYNONYMS = {"LAT": "LATERAL"}
#: a view and what it may also be called: a left lateral is a lateral
_BROADER = {"LL": "LATERAL", "RL": "LATERAL"}
_SIDES = ("L", "R", "B")
#: first letters that PatientOrientation may have in the columns of a mammogram
_COLUMNS = {"CC": "LR", "FB": "LR", "XCCL": "LR", "XCCM": "LR", "ML": "FH", "LM": "FH"}
#: the same for the rows of other X-rays
_ROWS = {"AP": "LR", "PA": "LR", "LATERAL": "AP", "LL": "AP", "RL": "AP"}


def view_facts(dataset: Dataset) -> dict[str, Any]:
    """``view``, ``laterality`` (``L``, ``R``, ``B`` or empty), ``view_modifiers`` and ``contradictions`` of a header.

    A view comes from ViewPosition and ViewCodeSequence, a side from ImageLaterality, Laterality and FrameLaterality.
    """
    said = {view for view in (_position(dataset), _coded(dataset, "ViewCodeSequence", _VIEW_CODES)) if view}
    said -= {_BROADER[view] for view in said if view in _BROADER}
    view = min(said) if len(said) == 1 else ""
    sides = {side for side in _sides(dataset) if side in _SIDES}
    contradictions = []
    if len(said) > 1 or (view and not _fits(view, dataset)):
        contradictions.append("view")
        view = ""
    if len(sides) > 1:
        contradictions.append("laterality")
    codes = dataset.get("ViewCodeSequence") or []
    modifiers = [
        _meaning(item, _MODIFIER_CODES) for code in codes for item in code.get("ViewModifierCodeSequence") or []
    ]
    return {
        "view": view,
        "laterality": min(sides) if len(sides) == 1 else "",
        "view_modifiers": sorted({modifier for modifier in modifiers if modifier}),
        "contradictions": contradictions,
    }


def _text(item: Dataset, name: str) -> str:
    return str(item.get(name) or "").strip().upper()


def _position(dataset: Dataset) -> str:
    text = _text(dataset, "ViewPosition")
    text = _SYNONYMS.get(text, text)
    return text if text in _VIEW_POSITIONS else ""


def _coded(dataset: Dataset, sequence: str, known: dict[str, str]) -> str:
    items = dataset.get(sequence) or []
    return _meaning(items[0], known) if len(items) == 1 else ""


def _meaning(item: Dataset, known: dict[str, str]) -> str:
    from pydicom.sr.coding import Code  # tables of codes, of which most X-rays need none

    scheme = _text(item, "CodingSchemeDesignator")
    said = Code(str(item.get("CodeValue") or "").strip(), _OLD_SCHEMES.get(scheme, scheme), "")
    return next((name for value, name in known.items() if said == Code(value, "SCT", "")), "")


def _sides(dataset: Dataset) -> Iterator[str]:
    yield _text(dataset, "ImageLaterality")
    yield _text(dataset, "Laterality")
    for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in dataset.get(name) or []:
            for anatomy in group.get("FrameAnatomySequence") or []:
                yield _text(anatomy, "FrameLaterality")


def _fits(view: str, dataset: Dataset) -> bool:
    """Whether PatientOrientation, where it is given, allows a view."""
    directions = dataset.get("PatientOrientation")
    if not directions or isinstance(directions, str) or len(directions) != 2:
        return True
    rows, columns = (str(direction).strip().upper() for direction in directions)
    if view in ("MLO", "LMO", "SIO", "ISO"):
        return not columns or bool(set(columns) & set("FH"))
    allowed, found = (_COLUMNS.get(view), columns) if view in _COLUMNS else (_ROWS.get(view), rows)
    return not allowed or not found or found[0] in allowed
