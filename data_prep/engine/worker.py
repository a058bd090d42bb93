"""Makes the files of one case; in this process, or in a process of its own that can be killed."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from data_prep.errors import CaseError
from data_prep.geometry import grid_difference, landmarks_in_voxels

#: one thread per worker: the engine scales by workers, and results must not depend on the number of threads
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1",
}
#: a worker starts anew after this many cases, so that leaks of decoders stay bounded
CASES_PER_WORKER = 500
#: seconds a worker may take to start before the first case
_START_SECONDS = 120.0


def execute(task: dict[str, Any]) -> dict[str, Any]:
    """Make one case: write to a temporary folder, check, rename.

    Args:
        task: JSON made by `data_prep.engine.run`: ``name``, ``out``, ``work``, ``makes``, ``link``, ``personal``,
            ``same_grid``, ``landmarks``.

    Returns:
        JSON: ``status``, ``reason``, ``detail``, ``notes``, ``files``, ``seconds``.
    """
    start = time.monotonic()
    work = Path(task["work"])
    result: dict[str, Any] = {"name": task["name"], "reason": "", "detail": "", "notes": [], "files": []}
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        tempfile.tempdir = str(work)  # nothing is written outside of the output
        result.update(_make(task, work))
    except CaseError as error:
        result.update(status="failed", reason=error.reason, detail=error.detail, files=[])
    except MemoryError:
        result.update(
            status="failed", reason="out-of-memory", detail="the case needs more memory than there is", files=[]
        )
    except OSError as error:
        reason = "no-space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "cannot-read-or-write"
        result.update(status="failed", reason=reason, detail=error.strerror or type(error).__name__, files=[])
    except Exception as error:
        # The text of a foreign exception may quote the file, and with it a name; class and place are enough to find it.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {os.path.basename(frame.filename)}:{frame.lineno}"
        result.update(status="failed", reason="unexpected-error", detail=place, files=[])
    finally:
        tempfile.tempdir = None
        shutil.rmtree(work, ignore_errors=True)
    return result | {"seconds": round(time.monotonic() - start, 3)}


def _make(task: dict[str, Any], work: Path) -> dict[str, Any]:
    from data_prep.engine.files import sha256, sync_folder
    from data_prep.operations import Job, Outcome, find_operation

    out = Path(task["out"])
    outcomes: list[tuple[Path, Path, Outcome]] = []
    for number, make in enumerate(task["makes"]):
        final = out / make["output"]
        (work / str(number)).mkdir()
        job = Job(
            inputs=tuple(Path(path) for path in make["inputs"]),
            output=work / str(number) / final.name,
            final=final,
            params=make["params"],
            link=task["link"],
            personal=task["personal"],
        )
        outcome = find_operation(make["operation"])(job)
        outcomes.append((job.output, final, outcome))
    grids = [outcome.grid for _, _, outcome in outcomes if outcome.grid is not None]
    if task["same_grid"]:
        for grid in grids[1:]:
            difference = grid_difference(grids[0], grid)
            if difference:
                raise CaseError("grids-differ", difference)
    voxels = landmarks_in_voxels(task.get("landmarks", []), grids[0] if grids else None)
    files = []
    for temporary, final, outcome in outcomes:
        record: dict[str, Any] = {"path": final.relative_to(out).as_posix()}
        if outcome.linked is not None:
            record["path"] = os.path.relpath(outcome.linked, out)
            content = outcome.linked
        else:
            # A relative link is right for its final place only.
            content = temporary
            if temporary.is_symlink():
                content = Path(os.path.normpath(os.path.join(os.path.realpath(final.parent), os.readlink(temporary))))
        record |= {"sha256": sha256(content), "bytes": content.stat().st_size}
        if outcome.grid is not None:
            record["grid"] = outcome.grid.to_json()
        if outcome.labels is not None:
            record["labels"] = list(outcome.labels)
        if outcome.record:
            record["processing"] = list(outcome.record)
        files.append(record)
    for temporary, final, outcome in outcomes:
        if outcome.linked is None:
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, final)
    for folder in {final.parent for _, final, outcome in outcomes if outcome.linked is None}:
        sync_folder(folder)
    notes = list(dict.fromkeys(note for _, _, outcome in outcomes for note in outcome.notes))
    status = "resampled" if any(outcome.is_resampled for _, _, outcome in outcomes) else "ok"
    return {"status": status, "notes": notes, "files": files, **({"landmarks_voxel": voxels} if voxels else {})}


class WorkerProcess:
    """A Python process that makes one case after the other and can be killed without harm to the others."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        code = f"import sys; sys.path[0] = {root!r}; from data_prep.engine.worker import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | _ONE_THREAD,
            # A group of its own, so that a converter it started is killed with it.
            start_new_session=True,
        )
        self.num_cases = 0
        self.converse({"hello": 1}, _START_SECONDS)

    def converse(self, message: dict[str, Any], timeout: float) -> dict[str, Any] | None:
        """Send a message and wait; ``None`` when the process died or was killed for taking too long."""
        assert self._process.stdin and self._process.stdout
        killer = threading.Timer(timeout, self._kill)
        killer.daemon = True
        killer.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            return json.loads(line) if line.endswith("\n") else None
        except (OSError, ValueError):
            return None
        finally:
            killer.cancel()

    def run(self, task: dict[str, Any], timeout: float) -> dict[str, Any]:
        start = time.monotonic()
        self.num_cases += 1
        answer = self.converse(task, timeout)
        if answer is not None:
            return answer
        seconds = time.monotonic() - start
        self.close()
        shutil.rmtree(task["work"], ignore_errors=True)
        if seconds >= timeout:
            reason, detail = "timeout", f"longer than {timeout:g} s"
        else:
            reason, detail = "worker-died", f"the process ended with code {self._process.returncode}"
        return {
            "name": task["name"],
            "status": "failed",
            "reason": reason,
            "detail": detail,
            "notes": [],
            "files": [],
        } | {"seconds": round(seconds, 3)}

    @property
    def is_usable(self) -> bool:
        return self._process.poll() is None and self.num_cases < CASES_PER_WORKER

    def _kill(self) -> None:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()

    def close(self) -> None:
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:
                    pass


_workers: list[WorkerProcess] = []
_of_thread = threading.local()


def run_isolated(task: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`execute` in the calling thread's own worker process; a crash or a time-out costs this case only."""
    return _worker().run(task, timeout)


def read_isolated(message: dict[str, Any], timeout: float) -> list[Any] | None:
    """`scan.read_values` in the calling thread's own worker; ``None`` when that died or took too long."""
    worker = _worker()
    answer = worker.converse(message, timeout)
    if answer is None:
        worker.close()
        return None
    return list(answer["values"])


def _worker() -> WorkerProcess:
    """The calling thread's worker, a new one where it has none that is usable."""
    worker: WorkerProcess | None = getattr(_of_thread, "worker", None)
    if worker is None or not worker.is_usable:
        if worker is not None:
            worker.close()
            _workers.remove(worker)
        worker = _of_thread.worker = WorkerProcess()
        _workers.append(worker)
    return worker


def close_workers() -> None:
    """Kill every worker process that `run_isolated` started in this process."""
    while _workers:
        _workers.pop().close()


def collect_rarely() -> None:
    """Headers are thousands of small objects without cycles; looking for some takes a tenth of the time."""
    gc.set_threshold(50_000, 20, 20)


def _die_with_parent(parent: int) -> None:
    """A worker whose parent was killed must not go on writing while the run is repeated, perhaps with other options."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def serve() -> None:
    """Answer tasks, one JSON line each, until standard input ends."""
    from data_prep.engine.scan import read_values

    collect_rarely()
    # Libraries print to both streams, sometimes with values from headers; only answers may leave this process.
    answers: TextIO = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        task = json.loads(line)
        answer: dict[str, Any]
        if "read" in task:
            answer = {"values": read_values(task)}
        else:
            answer = {"hello": 1} if "hello" in task else execute(task)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
