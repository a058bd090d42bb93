"""What a source decided: cases, and a verdict for every input that does not become one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from data_prep.errors import AccountingError, DatasetError
from data_prep.model import Case, Ref, Status
from data_prep.tree import Tree, is_junk


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one input, and why. `case` is the key of the case it went into, if any."""

    status: Status
    reason: str
    detail: str = ""
    case: str = ""


class Book:
    """Filled by `Source.plan`; closed by the engine, which gives a verdict to whatever the source did not mention.

    Args:
        tree: the input.
        seed: of the folds; also for what a source draws.
    """

    def __init__(self, tree: Tree, seed: int = 0) -> None:
        self._tree = tree
        self.seed = seed
        self.cases: dict[str, Case] = {}
        self.verdicts: dict[Ref, Verdict] = {}
        self.notes: list[str] = []

    def add(self, case: Case) -> None:
        """Plan a case.

        Raises:
            DatasetError: the key is taken, there is no image, or a file is not part of the input.
        """
        if case.key in self.cases:
            raise DatasetError(f"two cases have the same name (case {len(self.cases) + 1}); names must be unique.")
        if not case.images:
            raise DatasetError(f"case {len(self.cases) + 1} has no image.")
        if not case.group:
            raise DatasetError(f"case {len(self.cases) + 1} has no group; give the patient, or the case itself.")
        for make in case.makes:
            for path in make.inputs:
                if path not in self._tree:
                    raise DatasetError(f"case {len(self.cases) + 1} needs a file that is not part of the input.")
        self.cases[case.key] = case

    def skip(self, what: Ref | str | Iterable[Ref | str], reason: str, detail: str = "") -> None:
        """Leave out inputs on purpose: by rule, by option, or because they are not data.

        Args:
            what: a file path, a `Ref`, or several of them.
            reason: short fixed code with dashes.
            detail: numbers that help; no identity.
        """
        self._set(what, Verdict("skipped", reason, detail))

    def fail(self, what: Ref | str | Iterable[Ref | str], reason: str, detail: str = "") -> None:
        """Inputs that should have become a case and cannot: damaged, incomplete, contradicting. Exit code 3."""
        self._set(what, Verdict("failed", reason, detail))

    def use(self, what: Ref | str | Iterable[Ref | str], reason: str = "metadata") -> None:
        """Inputs that served the plan but belong to no single case, for example a table."""
        self._set(what, Verdict("ok", reason))

    def note(self, text: str) -> None:
        """A remark on the whole data set, shown to the user and kept in the report; no identity."""
        self.notes.append(text)

    def _set(self, what: Ref | str | Iterable[Ref | str], verdict: Verdict) -> None:
        for one in [what] if isinstance(what, (Ref, str)) else what:
            ref = Ref(one) if isinstance(one, str) else one
            known = self.verdicts.get(ref)
            if known is None or known.status != "failed":
                self.verdicts[ref] = verdict

    def close(self) -> None:
        """Give a verdict to every input that has none; cases keep theirs open until they have run.

        Raises:
            AccountingError: a row of a table was read and neither used nor given a verdict.
        """
        used = {ref for case in self.cases.values() for ref in case.inputs}
        linked, unreadable = set(self._tree.linked_folders), set(self._tree.unreadable)
        for ref in self._tree.expected:
            if ref in used or ref in self.verdicts:
                continue
            if ref.path in linked:
                self.skip(ref, "linked-folder", "links to folders are not followed; name the folder as an input")
            elif ref.path in unreadable:
                self.fail(ref, "unreadable", "the file or folder cannot be opened")
            elif ref.kind == "row":
                raise AccountingError(f"row {ref.item} of a table got no verdict; this is a mistake in the source.")
            elif is_junk(ref.path):
                self.skip(ref, "junk", "litter of an operating system")
            else:
                self.skip(ref, "unrecognized", "not part of the layout of this source")

    def inputs(self) -> list[Ref]:
        """Every input that must have a line in the report, sorted."""
        used = {ref for case in self.cases.values() for ref in case.inputs}
        return sorted(used | set(self.verdicts) | set(self._tree.expected))
