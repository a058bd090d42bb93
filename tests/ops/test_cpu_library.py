"""Building, finding and refusing the C library, and the library itself under sanitizers."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monai_mamba.ops import cpu_build, cpu_library

needs_compiler = pytest.mark.skipif(cpu_build.find_compiler() is None, reason="no C compiler")
ROOT = Path(__file__).resolve().parents[2]
SHOW = """
from monai_mamba.ops import cpu_library
try:
    print(True, cpu_library.load().path)
except cpu_library.LibraryError as error:
    print(False, error)
"""
SCAN = """
import torch, warnings
from monai_mamba.ops import selective_scan
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    u, matrix = torch.ones(1, 8, 4), torch.ones(1, 2, 4)
    selective_scan(u, u, -torch.ones(8, 2), matrix, matrix)
print([str(w.message) for w in caught])
"""


@pytest.fixture(scope="module")
def library_file(tmp_path_factory):
    return cpu_build.build(tmp_path_factory.mktemp("library") / cpu_build.LIBRARY_NAME)


@pytest.fixture(scope="module", autouse=True)
def light_path(tmp_path_factory):
    """A copy of the two modules without the packages around them, which import PyTorch: seconds for every process."""
    path = tmp_path_factory.mktemp("path")
    package = path / "monai_mamba" / "ops"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    for module in (cpu_build, cpu_library):
        shutil.copy(str(module.__file__), package)
    shutil.copytree(cpu_build.SOURCES, package / "csrc")
    python.path = path
    return path


def python(code, cache, **environment):
    """Run code in a fresh interpreter with its own cache folder."""
    variables = {**os.environ, cpu_library.CACHE_VARIABLE: str(cache), "PYTHONPATH": str(python.path), **environment}
    # In a folder without packages, as the current one comes before PYTHONPATH.
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=python.path.parent, env=variables, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@needs_compiler
def test_first_use_compiles_once_into_the_cache(tmp_path):
    cache = tmp_path / "new" / "cache"
    assert python(SHOW, cache).startswith("True")
    (library,) = cache.iterdir()
    assert cpu_build.source_hash() in library.name
    built = library.stat().st_mtime_ns
    assert python(SHOW, cache, CC="/nonexistent", PATH="/nonexistent").startswith("True")
    assert library.stat().st_mtime_ns == built
    assert [p.name for p in cache.iterdir()] == [library.name]


@needs_compiler
@pytest.mark.parametrize("content", [b"", b"not a library", None], ids=["empty", "text", "truncated"])
def test_damaged_library_in_the_cache_is_compiled_again(tmp_path, content):
    assert python(SHOW, tmp_path).startswith("True")
    (library,) = tmp_path.iterdir()
    whole = library.read_bytes()
    library.write_bytes(whole[:1000] if content is None else content)
    assert python(SHOW, tmp_path).startswith("True")
    assert any(path.read_bytes() == whole for path in tmp_path.iterdir())


@needs_compiler
def test_library_of_other_sources_is_refused(tmp_path, library_file, monkeypatch):
    monkeypatch.setattr(cpu_build, "source_hash", lambda: "0123456789abcdef")
    with pytest.raises(cpu_library.LibraryError, match="another version of the sources"):
        cpu_library.Library(library_file)


@needs_compiler
def test_library_of_other_sources_in_the_cache_is_not_used(tmp_path, library_file):
    """Under the name of this version, undamaged, but compiled from other sources."""
    own, other = cpu_build.source_hash().encode(), b"0123456789abcdef"
    content = library_file.read_bytes()
    assert own in content
    content = content.replace(own, other)
    stem, suffix = os.path.splitext(cpu_build.LIBRARY_NAME)
    digest = hashlib.sha256(content).hexdigest()[:16]
    name = f"{stem}-{own.decode()}-{sys.platform}-{platform.machine()}-{digest}{suffix}"
    (tmp_path / name).write_bytes(content)
    (tmp_path / name).chmod(0o644)
    shown = python(SHOW, tmp_path, CC="/nonexistent", PATH="/nonexistent")
    assert shown.startswith("False") and "another version of the sources (0123456789abcdef)" in shown
    assert "no C compiler found" in shown


def test_broken_library_in_the_package_is_a_reason_too(tmp_path, light_path):
    """As a wheel for another machine, unpacked by hand."""
    package = shutil.copytree(light_path, tmp_path / "path")
    (package / "monai_mamba" / "ops" / cpu_build.LIBRARY_NAME).write_text("not a library")
    shown = python(SHOW, tmp_path, MONAI_MAMBA_BUILD="0", PYTHONPATH=str(package))
    assert shown.startswith("False") and "cannot be loaded" in shown and "forbids to compile it" in shown


def test_without_compiler_the_scan_falls_to_torch_and_says_so(tmp_path):
    message = python(SCAN, tmp_path, CC="/nonexistent", PATH="/nonexistent", PYTHONPATH=str(ROOT))
    assert "slower backend 'torch'" in message and "no C compiler found" in message


def test_switched_off_build_is_a_reason_not_an_error(tmp_path):
    shown = python(SHOW, tmp_path, MONAI_MAMBA_BUILD="0")
    assert shown.startswith("False") and "MONAI_MAMBA_BUILD forbids to compile it; unset it" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "allowed"), [("0", False), ("False", False), ("off", False), ("1", True), ("", True)]
)
def test_switch_of_the_build_is_read_as_people_write_it(monkeypatch, value, allowed):
    monkeypatch.setenv(cpu_build.BUILD_VARIABLE, value)
    assert cpu_build.is_allowed() is allowed


FORK = """
import os, signal, threading
from monai_mamba.ops import cpu_library
parent, begun, end = os.getpid(), threading.Event(), threading.Event()
def find_or_build():
    if os.getpid() == parent:
        begun.set()
        end.wait()
    return "library"
cpu_library._find_or_build = find_or_build
builder = threading.Thread(target=cpu_library.load)
builder.start()
begun.wait()
child = os.fork()
if not child:
    signal.alarm(20)  # ends it if it waits for the builder
    os._exit(cpu_library.load() != "library")
print(os.waitpid(child, 0)[1])
end.set()
builder.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_child_that_was_forked_while_a_thread_compiled_does_not_wait_for_it(tmp_path):
    assert python(FORK, tmp_path) == "0"


def script(path, text):
    """A program for the shell; its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


needs_shell = pytest.mark.skipif(os.name != "posix", reason="the compiler of the test is a shell script")


@needs_shell
@pytest.mark.parametrize(
    "says",
    [
        "from y.h:\nx.c:1: error: this compiler is broken",
        "ld: this compiler is broken\ncollect2: error: ld returned 1 exit status",
    ],
    ids=["compiler", "linker"],
)
@pytest.mark.parametrize("answer", ["", 'test "$1" = -dumpmachine && exec cc -dumpmachine'], ids=["at once", "later"])
def test_failing_compiler_is_a_reason_with_its_first_error(tmp_path, answer, says):
    compiler = script(tmp_path / "cc", f"{answer}\ncat >&2 <<END\n{says}\nEND\nexit 1")
    shown = python(SHOW, tmp_path / "cache", CC=compiler)
    assert shown.startswith("False") and "this compiler is broken" in shown


@needs_shell
@pytest.mark.parametrize("answer", ["", 'test "$1" = -dumpmachine && exec cc -dumpmachine'], ids=["at once", "later"])
def test_compiler_that_hangs_is_given_up_with_what_it_has_started(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(cpu_build, "_TIMEOUT", 0.3)
    monkeypatch.setenv("CC", script(tmp_path / "cc", f"{answer}\nsleep 20"))
    begin = time.monotonic()
    with pytest.raises(cpu_build.BuildError, match=r"no answer within 0\.3 s"):
        cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME)
    assert time.monotonic() - begin < 10


@needs_shell
@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        ("x86_64-linux-gnu", ("linux", "x86_64")),
        ("aarch64-unknown-linux-musl", ("linux", "aarch64")),
        ("arm64-apple-darwin23.6.0", ("darwin", "aarch64")),
        ("x86_64-unknown-macos", ("darwin", "x86_64")),
        ("x86_64-w64-mingw32", ("win32", "x86_64")),
        ("aarch64-pc-windows-msvc", ("win32", "aarch64")),
        ("x86_64-pc-cygwin", ("cygwin", "x86_64")),
    ],
)
def test_target_is_what_the_compiler_says(tmp_path, triple, expected):
    assert (
        cpu_build.target_of([script(tmp_path / "cc", f'test "$*" = "-x -dumpmachine" && echo {triple}'), "-x"])
        == expected
    )


def test_compilers_of_this_machine_make_code_for_it():
    compiler = cpu_build.find_compiler()
    if compiler is None:
        pytest.skip("no C compiler")
    assert cpu_build.target_of(compiler) == cpu_build.host()


@needs_shell
def test_compiler_for_another_machine_is_a_reason_with_the_cure(tmp_path):
    compiler = script(tmp_path / "cc", "echo i686-w64-mingw32")
    shown = python(SHOW, tmp_path / "cache", CC=compiler)
    wanted = " ".join(cpu_build.host())
    assert shown == f"False {compiler} makes code for win32 i686, needed is {wanted}; set CC to one for that"


@needs_shell
def test_compiler_may_have_arguments(tmp_path, monkeypatch):
    program = script(tmp_path / "the compiler", "")
    monkeypatch.setenv("CC", program)
    assert cpu_build.find_compiler() == (program,)
    monkeypatch.setenv("CC", f"'{program}' -target x")
    assert cpu_build.find_compiler() == (program, "-target", "x")


def test_package_ziglang_is_the_last_resort(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang")
    assert cpu_build.find_compiler() == (sys.executable, "-m", "ziglang", "cc")


def test_compiler_that_is_named_but_not_there_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -O3")
    with pytest.raises(cpu_build.BuildError, match=r"CC is 'no-such-compiler -O3', which is not there"):
        cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME)
    monkeypatch.setenv("CC", "'gcc")
    with pytest.raises(cpu_build.BuildError, match=r"CC is \"'gcc\", which is not there; correct or unset it"):
        cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME)


@pytest.mark.parametrize("platform", ["linux", "win32", "darwin"])
def test_without_compiler_the_message_says_how_to_get_one(tmp_path, monkeypatch, platform):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cpu_build, "find_compiler", lambda: None)
    cure = {"linux": "gcc", "win32": "Visual C\\+\\+ cannot", "darwin": "xcode-select"}[platform]
    with pytest.raises(cpu_build.BuildError, match=f"no C compiler found.*install one:.*{cure}"):
        cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME)


@needs_shell
def test_visual_cpp_is_refused_by_name(tmp_path):
    with pytest.raises(cpu_build.BuildError, match="needs GCC or Clang"):
        cpu_build.target_of([script(tmp_path / "cl.exe", "exit 1")])


@pytest.mark.parametrize(
    ("target", "python_platform", "expected"),
    [
        (("darwin", "aarch64"), "macosx-10.13-universal2", "macosx_11_0_arm64"),
        (("darwin", "aarch64"), "macosx-14-arm64", "macosx_11_0_arm64"),
        (("darwin", "x86_64"), "macosx-10.13-universal2", "macosx_11_0_x86_64"),
        (("win32", "x86_64"), "win-amd64", "win_amd64"),
        (("linux", "aarch64"), "linux-aarch64", "linux_aarch64"),
    ],
)
def test_wheels_are_tagged_for_what_the_library_runs_on(monkeypatch, target, python_platform, expected):
    """On macOS Python may be for two processors or write its platform in a way that no installer accepts."""
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setattr(hook.sysconfig, "get_platform", lambda: python_platform)
    assert hook.platform_tag(cpu_build.Target(*target), cpu_build.MACOS_VERSION) == expected


def test_cache_that_is_a_file_is_a_reason_with_the_cure(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    shown = python(SHOW, file / "cache")
    assert shown.startswith("False") and cpu_library.CACHE_VARIABLE in shown


def test_cache_that_cannot_be_looked_into_is_a_reason_with_the_cure(tmp_path, monkeypatch):
    """As below the home folder of another user, which containers often leave in HOME."""

    def refuse(folder, pattern):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setenv(cpu_library.CACHE_VARIABLE, str(tmp_path / "hidden" / "x"))
    monkeypatch.setattr(cpu_build, "LIBRARY_NAME", "not-in-the-package.so")
    monkeypatch.setattr(Path, "glob", refuse)
    monkeypatch.setattr(cpu_build, "source_hash", lambda: "0" * 16)
    with pytest.raises(cpu_library.LibraryError, match=r"cannot look into .*hidden.*; set MONAI_MAMBA_CACHE"):
        cpu_library._find_or_build()


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody may write is /proc")
def test_cache_where_nobody_may_write_is_a_reason_with_the_cure():
    shown = python(SHOW, Path("/proc/monai-mamba"))
    assert shown.startswith("False") and "cannot write to /proc/monai-mamba" in shown
    assert cpu_library.CACHE_VARIABLE in shown


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_cache_is_a_reason_with_the_cure(tmp_path):
    tmp_path.chmod(0o500)
    shown = python(SHOW, tmp_path)
    assert shown.startswith("False") and "cannot" in shown


@needs_compiler
@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_cache_that_others_can_write_is_not_trusted(tmp_path):
    tmp_path.chmod(0o777)
    shown = python(SHOW, tmp_path)
    assert shown.startswith("False") and "written by others" in shown


@needs_compiler
def test_processes_that_compile_at_the_same_time_all_succeed(tmp_path, light_path):
    variables = {**os.environ, cpu_library.CACHE_VARIABLE: str(tmp_path), "PYTHONPATH": str(light_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", SHOW], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert all(run.communicate(timeout=300)[0].startswith("True") for run in runs)
    assert len(list(tmp_path.iterdir())) == 1


@needs_compiler
def test_wide_vectors_on_narrow_hardware_compute_the_same(tmp_path, library_file):
    """The code of 16 lanes, which AVX-512 uses, compiled for the baseline: its shuffles are checked anywhere."""
    wide = cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME, extra_flags=["-DMM_LANES=16"], variants=())
    results = []
    for path in (library_file, wide):
        library = cpu_library.Library(path)
        results.append(_scan_by_hand(library))
    for found, expected in zip(results[1], results[0], strict=True):
        scale = max(abs(v) for v in expected)
        assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-5 * scale


def _scan_by_hand(library):
    """Forward and backward of a small job without PyTorch; all outputs as lists."""
    batch, length, groups, channels, states = 2, 70, 2, 19, 6
    rows = groups * channels

    def array(count, scale=0.0, shift=0.0):
        values = [shift + scale * ((7919 * i + 31) % 1000 / 500 - 1) for i in range(count)]
        return (ctypes.c_float * count)(*values)

    def view(a, last):
        return cpu_library.View(ctypes.addressof(a), length * groups * last, groups * last, last, 0)

    tall, flat = batch * length * rows, batch * length * groups * states
    a = {name: array(tall, 1.0) for name in ("u", "delta", "z", "grad_y")}
    a |= {name: array(flat, 1.0) for name in ("B", "C")}
    a |= {name: array(tall) for name in ("y", "grad_u", "grad_delta", "grad_z")}
    a |= {"A": array(rows * states, 1.0, -2.0), "D": array(rows, 1.0), "delta_bias": array(rows, 1.0, -1.0)}
    a |= {"grad_A": array(rows * states), "grad_D": array(rows), "grad_delta_bias": array(rows)}
    a |= {"grad_B": array(flat), "grad_C": array(flat), "states": array(batch * rows * states)}
    job = cpu_library.ScanJob(batch, length, groups, channels, states, 1, length, 1, 0)
    for name, values in a.items():
        if name in ("B", "C"):
            setattr(job, name, view(values, states))
        elif len(values) == tall:
            setattr(job, name, view(values, channels))
        else:
            setattr(job, name, ctypes.addressof(values))
    variant = library.choose_variant("baseline")
    library.call("scan_forward", bytes(job), variant, 1)
    library.call("scan_backward", bytes(job), variant, 1)
    return [list(a[name]) for name in a if name.startswith("grad_") and name != "grad_y"] + [list(a["y"])]


def _fuzz(tmp_path, count, seed, variants):
    compiler = cpu_build.find_compiler()
    assert compiler is not None
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.isabs(found):
            pytest.skip(f"the compiler has no {name}")
        runtimes.append(found)
    # Not the whole of "undefined": its checks of every pointer make the unrolled loops take minutes to compile.
    flags = ["-fsanitize=address,bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all", "-g", "-O1"]
    library = cpu_build.build(tmp_path / cpu_build.LIBRARY_NAME, extra_flags=flags, variants=variants)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(python.path),
    }
    script = Path(__file__).with_name("fuzz_cpu_library.py")
    run = subprocess.run(
        [sys.executable, str(script), str(library), str(count), str(seed)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith(f"done {count} refused"), run.stdout


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded the Linux way")
def test_random_jobs_under_sanitizers(tmp_path):
    _fuzz(tmp_path, 300, seed=0, variants=())


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded the Linux way")
def test_ten_thousand_random_jobs_under_sanitizers(tmp_path):
    _fuzz(tmp_path, 10_000, seed=1, variants=None)
