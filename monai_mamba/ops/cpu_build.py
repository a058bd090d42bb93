"""Compile the C library of the backend ``cpu``.

Standard library only and imported by its path from ``hatch_build.py``, so that a wheel can be built where neither
PyTorch nor this package is installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
LIBRARY_NAME = "libmonai_mamba_ops" + {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

#: Set to 0 to keep the package from ever calling a compiler.
BUILD_VARIABLE = "MONAI_MAMBA_BUILD"

_TIMEOUT = 300  # seconds for one compiler call; a loaded machine needs about ten
_X86 = ("x86_64", "amd64")
# Added to the variant that every processor of the architecture can run.
_VARIANT_FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": (
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ),
}
# No -ffast-math: NaN and infinity must come through, and the rounding trick of exp2_ must not be "simplified".
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-Wno-psabi"),
)


class BuildError(Exception):
    """The library could not be compiled; the text says why in one line."""


def source_hash() -> str:
    """Return the fingerprint of the C sources, which the library carries too."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_allowed() -> bool:
    """Tell whether the user lets the package call a compiler."""
    return os.environ.get(BUILD_VARIABLE, "1") not in ("0", "false", "no")


def find_compiler() -> str | None:
    """Return the C compiler: the one in ``CC``, else the first of cc, gcc and clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path:
            return path
    return None


def build(target: Path, *, extra_flags: Sequence[str] = (), variants: Sequence[str] | None = None) -> Path:
    """Compile the library to ``target``, which appears whole or not at all.

    Args:
        target: file to write; its folder must exist.
        extra_flags: added to every compiler call, for sanitizer builds.
        variants: instruction sets beside the baseline; default all of this architecture. One that the compiler does
            not know is left out.

    Raises:
        BuildError: if there is no compiler or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C compiler found (looked for $CC, cc, gcc, clang)")
    if variants is None:
        variants = tuple(_VARIANT_FLAGS) if platform.machine().lower() in _X86 else ()
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            work = Path(folder)
            flags = (*_FLAGS, *extra_flags, f'-DMM_SOURCE_HASH="{source_hash()}"')
            runs = {
                name: _start(compiler, "kernels.c", work / f"{name}.o", (*flags, f"-DMM_VARIANT={name}", *more))
                for name, more in (("baseline", ()), *((v, _VARIANT_FLAGS[v]) for v in variants))
            }
            errors = {name: _finish(run) for name, run in runs.items()}
            if errors["baseline"]:
                raise BuildError(f"{compiler} failed: {errors['baseline']}")
            compiled = [name for name, error in errors.items() if not error]
            have = tuple(f"-DMM_HAVE_{name.upper()}" for name in compiled if name != "baseline")
            objects = [str(work / f"{name}.o") for name in compiled]
            linked = work / target.name
            more_link = ("-shared", *have, *objects) + (() if sys.platform == "win32" else ("-pthread",))
            error = _finish(_start(compiler, "library.c", linked, (*flags, *more_link), link=True))
            if error:
                raise BuildError(f"{compiler} failed to link: {error}")
            with open(linked, "rb") as file:
                os.fsync(file.fileno())
            os.replace(linked, target)
    except OSError as error:
        raise BuildError(f"cannot build in {target.parent}: {error}") from error
    return target


def _start(
    compiler: str, source: str, output: Path, flags: Sequence[str], *, link: bool = False
) -> subprocess.Popen[str]:
    command = [compiler, str(SOURCES / source), *flags, *(() if link else ("-c",)), "-o", str(output)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def _finish(run: subprocess.Popen[str]) -> str:
    """Wait for a compiler; return its first error line, or an empty text."""
    try:
        _, stderr = run.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()
        return f"no answer within {_TIMEOUT} s"
    if run.returncode == 0:
        return ""
    lines = [line for line in stderr.splitlines() if "error" in line.lower()] or stderr.splitlines()
    return lines[0].strip() if lines else f"exit code {run.returncode}"
