"""Build hook: puts the MONAI bundles and the compiled C library of the CPU scan into wheels.

With a C compiler the wheel is ``py3-none-<platform>`` (any Python, any PyTorch); without one, or with
``MONAI_MAMBA_BUILD=0``, it is the pure ``py3-none-any`` and the library is compiled on first use. A build never fails
for want of a compiler. Editable installs always compile on first use.
"""

from __future__ import annotations

import importlib.util
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Adds bundles and library to standard wheels; editable installs use those of the checkout."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "standard":
            return
        for bundle in sorted(Path(self.root, "bundles").iterdir()):
            # Not what was trained or predicted in it; an option of pyproject.toml that rewrites paths would forbid
            # editable installs.
            files = [*bundle.glob("*"), *bundle.glob("configs/*"), *bundle.glob("docs/*")]
            for file in (file for file in files if file.is_file()):
                build_data["force_include"][str(file)] = f"monai_mamba/{file.relative_to(self.root).as_posix()}"
        cpu_build = _load(Path(self.root, "monai_mamba", "ops", "cpu_build.py"))
        if not cpu_build.is_allowed():
            self.app.display_info(f"{cpu_build.BUILD_VARIABLE} is 0: building a pure wheel without the C library")
            return
        self._folder = tempfile.TemporaryDirectory(prefix="monai-mamba-build-")
        try:
            library = cpu_build.build(Path(self._folder.name, cpu_build.LIBRARY_NAME))
        except cpu_build.BuildError as error:
            self.app.display_warning(f"building a pure wheel, the C library cannot be compiled here: {error}")
            return
        build_data["force_include"][str(library)] = f"monai_mamba/ops/{cpu_build.LIBRARY_NAME}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(cpu_build.host(), cpu_build.MACOS_VERSION)}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_folder"):
            self._folder.cleanup()


def platform_tag(target: tuple[str, str], macos_version: str) -> str:
    """Return the platform of a wheel with a library for ``target``, a pair of system and machine."""
    system, machine = target
    if system == "darwin":
        # Not in the words of Python, which may be made for two processors (universal2) where the library is made for
        # one, or leave out the ".0" of the version.
        machine = {"aarch64": "arm64"}.get(machine, machine)
        return f"macosx_{macos_version}_{machine}".replace(".", "_")
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _load(path: Path) -> ModuleType:
    # By its path: neither PyTorch nor the package itself is there while it is being built.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
