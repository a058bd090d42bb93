"""The C library for machines that are not at hand: compiled for them, and run where they can be emulated."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from monai_mamba.ops import cpu_build

HERE = Path(__file__).parent
ARM, WINDOWS = cpu_build.Target("linux", "aarch64"), cpu_build.Target("win32", "x86_64")
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
ZIG = shlex.join([sys.executable, "-m", "ziglang", "cc"])
#: Tests of `test_cpu.py` that are about this process and its memory, not about the library.
OF_THIS_PROCESS = (
    "child_processes",
    "children_forked",
    "huge_pages",
    "out_of_the_heap",
    "little_memory",
    "environment_variable",
)


def needs(*programs):
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def build(compiler, target, folder, monkeypatch):
    suffix = {"win32": ".dll", "darwin": ".dylib"}.get(target.system, ".so")
    with monkeypatch.context() as change:
        change.setenv("CC", compiler)
        return cpu_build.build(folder / f"library{suffix}", target=target)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "target", "emulator"),
    [
        pytest.param(
            *("aarch64-linux-gnu-gcc", ARM, QEMU), marks=needs("aarch64-linux-gnu-gcc", "qemu-aarch64"), id="arm-gcc"
        ),
        pytest.param(
            *("clang --target=aarch64-linux-gnu", ARM, QEMU),
            marks=needs("clang", "aarch64-linux-gnu-gcc", "qemu-aarch64"),
            id="arm-clang",
        ),
        pytest.param(
            *("x86_64-w64-mingw32-gcc", WINDOWS, ("wine",)), marks=needs("x86_64-w64-mingw32-gcc", "wine"), id="windows"
        ),
    ],
)
def test_operators_match_float64_on_an_emulated_machine(tmp_path, monkeypatch, compiler, target, emulator):
    """All of `test_cpu.py` that is not about this process, with the library of the other machine."""
    library = build(compiler, target, tmp_path, monkeypatch)
    program = tmp_path / "program.exe"
    source = HERE / "foreign_library.c"
    subprocess.run([*shlex.split(compiler), "-Wall", "-O1", str(source), "-o", str(program)], check=True)
    environment = {
        **os.environ,
        "FOREIGN_LIBRARY": json.dumps([*emulator, str(program), str(library)]),
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)]),
        "WINEPREFIX": str(tmp_path / "wine"),
        "WINEDEBUG": "-all",
    }
    for name in ("MONAI_MAMBA_CPU_VARIANT", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "foreign_library"),
            *(str(HERE / "test_cpu.py"), "-k", " and ".join(f"not {name}" for name in OF_THIS_PROCESS)),
        ],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    passed = re.search(r"(\d+) passed, (\d+) deselected", run.stdout)
    assert passed and int(passed[1]) > 100 and "skipped" not in run.stdout, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "target"),
    [
        pytest.param("x86_64-w64-mingw32-gcc", WINDOWS, marks=needs("x86_64-w64-mingw32-gcc"), id="mingw"),
        *(
            pytest.param(
                f"{ZIG} -target {name}",
                cpu_build.Target(*target),
                marks=pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason="not installed: ziglang"),
                id=name,
            )
            for name, target in (
                ("aarch64-macos", ("darwin", "aarch64")),
                ("x86_64-macos", ("darwin", "x86_64")),
                ("x86_64-windows-gnu", ("win32", "x86_64")),
                ("x86_64-linux-musl", ("linux", "x86_64")),
            )
        ),
    ],
)
def test_library_for_another_machine_needs_what_is_in_every_system(tmp_path, monkeypatch, compiler, target):
    library = build(compiler, target, tmp_path, monkeypatch).read_bytes()
    assert cpu_build.source_hash().encode() in library
    if target.system == "win32":
        assert library[:2] == b"MZ"
        needed = {name.lower() for name in re.findall(rb"[\w.-]+\.dll", library, re.IGNORECASE)}
        own = {name for name in needed if name.startswith((b"api-ms-win-crt-", b"kernel32.", b"msvcrt.", b"ntdll."))}
        assert own and needed - own <= {b"library.dll"}
    elif target.system == "darwin":
        processor = {"aarch64": 0x0100000C, "x86_64": 0x01000007}[target.machine]
        assert library[:8] == bytes.fromhex("cffaedfe") + processor.to_bytes(4, "little")
        needed = set(re.findall(rb"/[^\0]+\.dylib(?=\0)", library[:4096]))
        assert {name for name in needed if not name.endswith(b"/library.dylib")} == {b"/usr/lib/libSystem.B.dylib"}
    else:
        assert library[:4] == b"\x7fELF"
    names = [name for name in ("avx2", "avx512") if b"%s\0" % name.encode() in library]
    assert names == (["avx2", "avx512"] if target.machine == "x86_64" else [])
