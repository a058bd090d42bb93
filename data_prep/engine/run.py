"""Running a plan: resume, workers, journal, documents, report."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from data_prep.engine.files import remove_leftovers, write_whole
from data_prep.engine.journal import Journal, read_journals
from data_prep.engine.plan import Plan, in_shard
from data_prep.engine.progress import progress
from data_prep.engine.report import Report, make_report
from data_prep.engine.worker import close_workers, execute, run_isolated
from data_prep.errors import DataPrepError, UsageError
from data_prep.layouts import Made
from data_prep.operations import Link

Engine = Literal["process", "serial", "dask"]
MANIFEST = "manifest.jsonl"
#: how long a Dask scheduler may take to answer
SCHEDULER_SECONDS = 30
REPORTED_PACKAGES = ("monai-mamba", "numpy", "nibabel", "pydicom", "SimpleITK", "dcm2niix", "highdicom", "pillow")


@dataclass(frozen=True)
class RunOptions:
    """How a plan is run; nothing here changes what comes out, except `link`.

    Args:
        engine: ``process``: worker processes; ``serial``: in this process, for debugging, without time-outs;
            ``dask``: workers of a Dask cluster.
        workers: number of worker processes.
        scheduler: address of a Dask scheduler; without one a local cluster is started.
        shard: ``(number, count)`` from 1; with more than one shard the documents are left to `finish`.
        link: how unchanged files come into the data set.
        case_timeout: seconds after which a case is given up.
        resume: ``sizes`` keeps finished cases whose files have the right size, ``sha256`` the right content, ``no``
            makes everything anew.
    """

    engine: Engine = "process"
    workers: int = 1
    scheduler: str | None = None
    shard: tuple[int, int] = (1, 1)
    link: Link = "copy"
    case_timeout: float = 1800.0
    resume: Literal["sizes", "sha256", "no"] = "sizes"


def private_folder(out: Path) -> Path:
    """Folder beside the data set for what must not be shared: journal, plan with input paths, full report."""
    return out.parent / f"private-{out.name}"


def run_plan(plan: Plan, out: Path, private: Path, options: RunOptions) -> Report | None:
    """Make every case of the plan (of this shard) that is not there already.

    Returns:
        The report, or ``None`` when this was one of several shards and `finish` has to follow.

    Raises:
        UsageError: another run works on the same shard, or links are not possible.
        DataPrepError: the disk is full.
    """
    if options.link != "copy" and plan.is_personal:
        raise UsageError(
            f"--link {options.link} would leave the original files, and the names in them, in the data set; "
            "use --link copy."
        )
    if options.link == "dataset-json" and not plan.layout_object.may_refer:
        raise UsageError(
            "--link dataset-json is for the nnU-Net layout, whose dataset.json may refer to other folders."
        )
    out.mkdir(parents=True, exist_ok=True)
    make_private(private)
    tag = f"{options.shard[0]}-of-{options.shard[1]}"
    with _lock(private / f"lock-{tag}"):
        remove_leftovers(out, f".tmp-{tag}-")
        plan.save(private)
        journal = Journal(private, options.shard)
        try:
            before = dict(journal.known)
            mine = [entry for entry in plan.entries if in_shard(entry.name, options.shard)]
            fingerprints = {entry.name: plan.fingerprint(entry, options.link) for entry in mine}
            todo = [e for e in mine if not _is_done(before.get(e.name), fingerprints[e.name], out, options.resume)]
            # No two runs share a temporary folder, not even with a worker that has outlived its killed parent.
            token = secrets.token_hex(4)
            with progress("cases", len(mine), len(mine) - len(todo)) as tick:
                for result in _results((_task(plan, e, out, options, f"{tag}-{token}") for e in todo), options):
                    journal.append(result | {"fingerprint": fingerprints[result["name"]]})
                    _remove_stale(before.get(result["name"]), result, out)
                    tick(result["status"] == "failed")
                    if result["reason"] == "no-space":
                        raise DataPrepError("the disk is full; free space and run the same command again.")
            if options.shard[1] > 1:
                return None
            return finish(plan, out, private)
        finally:
            journal.close()


def finish(plan: Plan, out: Path, private: Path) -> Report:
    """Write documents, manifest and report from the journals of all shards.

    Raises:
        UsageError: a shard has not been run to its end.
    """
    records = read_journals(private)
    missing = [entry.name for entry in plan.entries if entry.name not in records]
    if missing:
        raise UsageError(
            f"{len(missing)} of {len(plan.entries)} cases have not been made; run the remaining shards first."
        )
    wanted = {entry.name for entry in plan.entries}
    for name, record in records.items():
        if name not in wanted:
            _remove_stale(record, None, out)
    report = make_report(plan, records)
    made = [
        Made(
            entry,
            tuple(file["path"] for file in records[entry.name]["files"]),
            tuple(tuple(point) for point in records[entry.name].get("landmarks_voxel", [])),
        )
        for entry in plan.entries
        if records[entry.name]["status"] != "failed"
    ]
    documents = plan.layout_object.documents(plan.description, made)
    documents[MANIFEST] = "".join(_manifest_line(one, records[one.entry.name]) for one in made)
    documents["report.csv"] = report.csv(plan.shown, plan.is_personal)
    documents["report.json"] = report.json(plan, tool_versions())
    for path, text in documents.items():
        write_whole(out / path, text)
    for optional in ("splits_final.json",):
        if optional not in documents:
            (out / optional).unlink(missing_ok=True)
    write_whole(private / "report.csv", report.csv())
    return report


def tool_versions() -> dict[str, str]:
    found = {}
    for package in REPORTED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "posix":
        folder.chmod(0o700)


def _manifest_line(made: Made, record: dict[str, Any]) -> str:
    entry = made.entry
    content = {
        "case": entry.name,
        "patient": entry.group,
        "part": entry.case.split or "train",
        "fold": entry.fold,
        "images": len(entry.case.images),
        "same_grid": entry.case.same_grid,
        "files": record["files"],
    }
    if entry.case.landmarks:
        content["landmarks"] = [list(point) for point in entry.case.landmarks]
    return json.dumps(content) + "\n"


def _task(plan: Plan, entry: Any, out: Path, options: RunOptions, tag: str) -> dict[str, Any]:
    return {
        "name": entry.name,
        "out": str(out.absolute()),
        "work": str(out.absolute() / f".tmp-{tag}-{entry.name}"),
        "makes": [
            {
                "operation": make.operation,
                "inputs": [plan.absolute(path) for path in make.inputs],
                "params": dict(make.params),
                "output": output,
            }
            for make, output in zip(entry.case.makes, entry.outputs, strict=True)
        ],
        "link": options.link,
        "personal": plan.is_personal,
        "same_grid": entry.case.same_grid,
        "landmarks": [list(point) for point in entry.case.landmarks],
    }


def _is_done(record: dict[str, Any] | None, fingerprint: str, out: Path, resume: str) -> bool:
    if resume == "no" or record is None or record["status"] == "failed" or record["fingerprint"] != fingerprint:
        return False
    from data_prep.engine.files import sha256

    for file in record["files"]:
        path = out / file["path"]
        try:
            if path.stat().st_size != file["bytes"] or (resume == "sha256" and sha256(path) != file["sha256"]):
                return False
        except OSError:
            return False
    return True


def _remove_stale(old: dict[str, Any] | None, new: dict[str, Any] | None, out: Path) -> None:
    """Delete files that an earlier run made for a case and that are no longer part of it."""
    if old is None:
        return
    kept = {file["path"] for file in new["files"]} if new else set()
    for file in old["files"]:
        # A path with ".." is an input that dataset.json refers to, not a file of ours.
        if file["path"] not in kept and ".." not in file["path"].split("/") and not os.path.isabs(file["path"]):
            (out / file["path"]).unlink(missing_ok=True)


def _results(tasks: Iterator[dict[str, Any]], options: RunOptions) -> Iterator[dict[str, Any]]:
    if options.engine == "serial":
        yield from map(execute, tasks)
        return
    with _executor(options) as (executor, slots, call):
        waiting: dict[Future[dict[str, Any]], dict[str, Any]] = {}
        while True:
            for task in itertools.islice(tasks, 2 * slots - len(waiting)):
                waiting[call(executor, task)] = task
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                task = waiting.pop(future)
                try:
                    yield future.result()
                except Exception as error:  # a Dask worker that was lost with its case
                    yield {"name": task["name"], "status": "failed", "reason": "worker-lost", "seconds": 0.0} | {
                        "detail": type(error).__name__,
                        "notes": [],
                        "files": [],
                    }


Call = Callable[[Executor, dict[str, Any]], "Future[dict[str, Any]]"]


@contextlib.contextmanager
def _executor(options: RunOptions) -> Iterator[tuple[Executor, int, Call]]:
    def call(executor: Executor, task: dict[str, Any]) -> Future[dict[str, Any]]:
        return executor.submit(run_isolated, task, options.case_timeout)

    if options.engine == "process":
        pool = ThreadPoolExecutor(options.workers, thread_name_prefix="data-prep")
        try:
            yield pool, options.workers, call
        finally:
            close_workers()
            pool.shutdown(wait=True, cancel_futures=True)
        return
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError("--engine dask needs Dask; install it with: pip install 'monai-mamba[dask]'.") from error
    with contextlib.ExitStack() as stack:
        if options.scheduler is None:
            # Threads of one process: each thread has a worker process of its own, see run_isolated.
            cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=options.workers,
                processes=False,
                dashboard_address=None,
                host="127.0.0.1",
                protocol="tcp",
            )
            stack.enter_context(cluster)
            stack.callback(close_workers)
        try:
            client = stack.enter_context(Client(options.scheduler or cluster, timeout=SCHEDULER_SECONDS))
        except OSError as error:
            raise UsageError(f"no Dask scheduler answers at {options.scheduler}; check --scheduler.") from error
        slots = sum(client.nthreads().values())
        if slots == 0:
            raise UsageError("the Dask cluster has no workers; start some and run again.")
        stack.callback(client.run, close_workers)
        yield client.get_executor(pure=False, retries=0), slots, call


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Only one process may work on a shard."""
    with open(path, "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: no lock; two runs at once are the user's to avoid
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError("another run is working on this data set; wait for it or choose another --out.") from error
        except OSError:  # a file system without locks
            pass
        yield
