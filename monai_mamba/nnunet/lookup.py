"""Finding our trainers: what the start-up file does, and the route that needs no start-up file."""

from __future__ import annotations

import importlib
import os
import pkgutil
from importlib.machinery import PathFinder
from pathlib import Path

ENVIRONMENT_VARIABLE = "nnUNet_extTrainer"


def trainer_folder() -> Path | None:
    """Folder of the installed package ``nnunet_trainers``, without importing it; None if it is not installed."""
    spec = PathFinder.find_spec("nnunet_trainers")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def is_registered() -> bool:
    """Tell whether nnU-Net started now would look into our folder."""
    folder = trainer_folder()
    return folder is not None and str(folder) in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep)


def register_for_children() -> None:
    """Do what the start-up file does, for child processes of an interpreter that runs without it."""
    folder = trainer_folder()
    if folder is not None and not is_registered():
        paths = [path for path in os.environ.get(ENVIRONMENT_VARIABLE, "").split(os.pathsep) if path]
        os.environ[ENVIRONMENT_VARIABLE] = os.pathsep.join([*paths, str(folder)])


def find_trainer(name: str) -> type | None:
    """Return our trainer class of that name, or None."""
    import nnunet_trainers

    for module_info in pkgutil.iter_modules(nnunet_trainers.__path__):
        module = importlib.import_module(f"nnunet_trainers.{module_info.name}")
        trainer = getattr(module, name, None)
        if isinstance(trainer, type):
            return trainer
    return None


def patch_lookup() -> None:
    """Make nnU-Net's look-up in this process ask :func:`find_trainer` first.

    Call it before any module of nnU-Net that looks up trainers is imported: they copy the function. It spares nnU-Net's
    own search, which imports all of nnU-Net's trainers and with them timm and torchvision, and fails where those do not
    fit torch.
    """
    from nnunetv2.utilities import find_objects

    original = find_objects.recursive_find_trainer_class_by_name
    if getattr(original, "knows_monai_mamba", False):
        return

    def recursive_find_trainer_class_by_name(trainer_name: str) -> type:
        return find_trainer(trainer_name) or original(trainer_name)

    recursive_find_trainer_class_by_name.knows_monai_mamba = True  # type: ignore[attr-defined]
    find_objects.recursive_find_trainer_class_by_name = recursive_find_trainer_class_by_name
    register_for_children()
