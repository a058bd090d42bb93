from __future__ import annotations

import os
import sys
import threading
import time
from signal import SIGINT

import pytest

from monai_mamba.errors import RunError
from monai_mamba.quickstart.process import run_logged


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_come_one_by_one_and_are_logged(tmp_path):
    seen = []
    code = "import sys; print('one\\ntwo'); sys.stderr.write('half'); print('\\rbar 1/2\\rbar 2/2'); print('é', end='')"
    run_logged(_python(code), tmp_path / "logs" / "x.log", os.environ, seen.append)
    assert [line for line in seen if line != "half"] == ["one", "two", "bar 1/2", "bar 2/2", "é"]
    assert "bar 2/2" in (tmp_path / "logs" / "x.log").read_text()


def test_log_is_appended_to(tmp_path):
    for word in ("first", "second"):
        run_logged(_python(f"print('{word}')"), tmp_path / "x.log", os.environ)
    text = (tmp_path / "x.log").read_text()
    assert text.index("first") < text.index("second")


def test_lines_arrive_while_the_program_runs(tmp_path):
    times = []
    code = "import time; print('now'); time.sleep(1.0); print('later')"
    run_logged(_python(code), tmp_path / "x.log", os.environ, lambda _: times.append(time.perf_counter()))
    assert times[1] - times[0] > 0.7


def test_failure_tells_the_exception_and_the_log(tmp_path):
    code = "print('doing things'); raise ValueError('the patch does not fit')"
    with pytest.raises(RunError, match=r"exit code 1: ValueError: the patch does not fit .*x\.log"):
        run_logged(_python(code), tmp_path / "x.log", os.environ)


def test_killed_program_is_said_to_be_killed(tmp_path):
    with pytest.raises(RunError, match=r"SIGKILL, probably for want of memory"):
        run_logged(_python("import os; os.kill(os.getpid(), 9)"), tmp_path / "x.log", os.environ)


def test_program_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(RunError, match="could not be started"):
        run_logged(["/no/such/program"], tmp_path / "x.log", os.environ)


def test_environment_is_passed_on(tmp_path):
    seen = []
    code = "import os; print(os.environ['nnUNet_raw'])"
    run_logged(_python(code), tmp_path / "x.log", {**os.environ, "nnUNet_raw": "/data set"}, seen.append)
    assert seen == ["/data set"]


def test_ctrl_c_ends_the_program_and_its_workers(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)\n"
    )
    pids = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        threading.Timer(0.2, os.kill, [os.getpid(), SIGINT]).start()

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run_logged(_python(code), tmp_path / "x.log", os.environ, on_line)
    assert time.perf_counter() - start < 30
    assert not _is_running(pids[0])


def _is_running(pid: int) -> bool:
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return False
        except FileNotFoundError:
            return False
        time.sleep(0.1)
    return True
