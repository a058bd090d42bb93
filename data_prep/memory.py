"""A bound on the memory of one case, the last resort against files that make a decoder ask for gigabytes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.errors import CaseError

#: libraries that are loaded during a case, buffers of decoders, and the heap's reserves
BASE_BYTES = 256 << 20
#: a compressed file is unpacked, and copied on the way, but seldom to more than this many times its size
PER_INPUT_BYTE = 16


@contextlib.contextmanager
def bounded(inputs: Sequence[Path], pixel_bytes: int) -> Iterator[None]:
    """Let the block take no more new memory than its case justifies: a base, the largest file, and its pixels.

    Programs that it starts are bound as well. Only Linux enforces a limit on data (RLIMIT_DATA); elsewhere, and where
    the administrator's limit is lower, nothing is changed. A decoder may answer with an error of its own, or with the
    end of the process, which costs the case alone.

    Args:
        inputs: files of the case, read one at a time.
        pixel_bytes: what all copies of the pixels may take, by the headers.

    Raises:
        CaseError: ``too-much-memory``.
    """
    used = data_in_use()
    if used is None:
        yield
        return
    import resource

    largest = max((path.stat().st_size for path in inputs), default=0)
    old, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = used + BASE_BYTES + PER_INPUT_BYTE * largest + pixel_bytes
    if any(value != resource.RLIM_INFINITY and value <= limit for value in (old, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    except MemoryError as error:
        megabytes = (limit - used) >> 20
        raise CaseError(
            "too-much-memory", f"more than {megabytes} MB, the bound for its files and image size"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (old, hard))


def data_in_use() -> int | None:
    """Bytes of data that count against RLIMIT_DATA in this process; ``None`` where the system does not say."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmData:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return None
