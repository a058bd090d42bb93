"""The MONAI bundles that come with the package: their names, and copies to work with.

A wheel has them in ``monai_mamba/bundles`` (`hatch_build.py` puts them there), a checkout in ``bundles`` at its top.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from monai_mamba.errors import RunError
from monai_mamba.files import whole_folder

_PACKAGE = Path(__file__).parent
#: What a bundle consists of; trainings put more into its folder.
_PARTS = ("LICENSE", "train.json", "metadata.json", "logging.conf", "configs", "docs")


def list_bundles() -> dict[str, str]:
    """Return the names of the bundles and what each is for.

    Raises:
        RunError: if the installation holds none.
    """
    root = _root()
    found = {}
    for file in sorted(root.glob("*/configs/metadata.json")):
        found[file.parts[-3]] = str(json.loads(file.read_text(encoding="utf-8"))["task"])
    return found


def copy_bundle(name: str, folder: os.PathLike[str] | str) -> Path:
    """Copy a bundle below ``folder`` and return the folder of the copy, which appears whole or not at all.

    Args:
        name: out of :func:`list_bundles`.
        folder: gets a folder ``name``.

    Raises:
        ValueError: if there is no such bundle.
        FileExistsError: if the folder is there and not empty; what was trained in it stays as it is.
    """
    known = list_bundles()
    if name not in known:
        raise ValueError(f"`name` must be one of {', '.join(known)}, got {name!r}")
    target = Path(folder) / name
    with whole_folder(target) as temporary:
        for part in _PARTS:
            source = _root() / name / part
            if source.is_dir():
                shutil.copytree(source, temporary / part)
            else:
                shutil.copyfile(source, temporary / part)
    return target


def _root() -> Path:
    for root in (_PACKAGE / "bundles", _PACKAGE.parent / "bundles"):
        if any(root.glob("*/configs/metadata.json")):
            return root
    raise RunError("this installation of monai-mamba holds no bundles; install it anew, or take them from a checkout")
