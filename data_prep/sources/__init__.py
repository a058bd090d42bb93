"""Sources: one module each, found by being in this folder. A module ends with ``SOURCE = TheSubclass``."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from data_prep.model import Source


def all_sources() -> dict[str, type[Source]]:
    """Every source by the name of its command, sorted."""
    found: dict[str, type[Source]] = {}
    for module in pkgutil.iter_modules(__path__):
        source = getattr(import_module(f"{__name__}.{module.name}"), "SOURCE", None)
        if source is not None:
            found[source.name] = source
    return dict(sorted(found.items()))
