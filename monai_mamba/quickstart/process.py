"""Run a program, hand over its output line by line as it comes, and never leave it behind."""

from __future__ import annotations

import codecs
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from monai_mamba.errors import RunError

_GRACE_S = 10.0
_KEPT_LINES = 200


def run_logged(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Run a program to its end, append its output to ``log`` and hand every line to ``on_line`` as it comes.

    Progress bars that rewrite their line count as lines. The program gets a process group of its own, so that Ctrl-C
    reaches this process alone, which then ends the program together with its workers.

    Args:
        command: program and arguments; no shell is involved.
        log: file that standard output and error are appended to.
        environment: the whole environment of the program.
        on_line: called with every line, without its end.

    Raises:
        RunError: if the program cannot be started or ends with another exit code than 0.
    """
    tail: deque[str] = deque(maxlen=_KEPT_LINES)

    def take(line: str) -> None:
        if line.strip():
            tail.append(line)
            if on_line:
                on_line(line)

    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab", buffering=0) as log_file:
        log_file.write(f"$ {' '.join(command)}\n".encode())
        try:
            process = subprocess.Popen(
                command,
                env={**environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise RunError(f"{command[0]} could not be started: {error.strerror or error}") from error
        assert process.stdout is not None
        try:
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            pending = ""
            while chunk := os.read(process.stdout.fileno(), 1 << 16):
                log_file.write(chunk)
                *lines, pending = re.split(r"[\r\n]", pending + decoder.decode(chunk))
                for line in lines:
                    take(line)
            take(pending)
            code = process.wait()
        except BaseException:
            _end_group(process)
            raise
        finally:
            process.stdout.close()
    if code != 0:
        raise RunError(f"{_describe_end(code)}: {_last_error(tail)} (log: {log})")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the program and all its workers: ask first, insist after a while or at the second Ctrl-C."""
    try:
        _signal_group(process, signal.SIGTERM)
        process.wait(_GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        # Workers may have outlived the program itself, so this is sent even if the program is gone.
        _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if os.name != "posix":
        process.terminate()
        return
    for _ in range(2):
        try:
            os.killpg(process.pid, number)
            return
        except ProcessLookupError:
            return
        except PermissionError:  # macOS: a member of the group is just being reaped
            time.sleep(0.05)


def _describe_end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
    hint = ", probably for want of memory" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _last_error(lines: Sequence[str]) -> str:
    """The line that tells most: the last one that looks like a Python exception, else the last one."""
    errors = [line.strip() for line in lines if re.match(r"\s*[\w.]*(Error|Exception|Interrupt)\b", line)]
    # Of a chain of exceptions in worker processes the first is the cause; "Some background workers ..." is its echo.
    telling = [line for line in errors if "background worker" not in line]
    return (telling or errors or [line.strip() for line in lines] or ["it printed nothing"])[-1][:300]
