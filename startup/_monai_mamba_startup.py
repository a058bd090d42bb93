"""Tells nnU-Net at interpreter start where monai-mamba's trainers lie.

nnU-Net looks for foreign trainers in the folders named by the environment variable nnUNet_extTrainer. This file adds
the folder of the installed package nnunet_trainers to it, in this process and so in its children. It uses the standard
library, imports nothing of the package, and never raises. Opt out with MONAI_MAMBA_NO_STARTUP=1.
"""


def register() -> None:
    try:
        import os
        from importlib.machinery import PathFinder

        if os.environ.get("MONAI_MAMBA_NO_STARTUP"):
            return
        spec = PathFinder.find_spec("nnunet_trainers")  # finds wheel and editable installs, imports neither
        if spec is None or not spec.submodule_search_locations:
            return
        folder = next(iter(spec.submodule_search_locations))
        paths = [path for path in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if path]
        if folder not in paths:
            os.environ["nnUNet_extTrainer"] = os.pathsep.join([*paths, folder])
    except Exception:  # an interpreter that does not start would be worse than a trainer that is not found
        pass
