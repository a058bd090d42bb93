"""Fetch a weight file whose hash is known."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from monai_mamba.errors import CheckpointError
from monai_mamba.weights.io import Limits, atomic_path

_BLOCK = 1 << 20
_TIMEOUT_S = 60


def fetch(url: str, path: os.PathLike[str] | str, sha256: str, *, max_bytes: int | None = None) -> Path:
    """Download a file and put it in place only if its hash is the expected one.

    Args:
        url: ``https`` or ``http`` address; the hash makes both equally safe.
        path: where to put the file; must not exist.
        sha256: expected hash, 64 hexadecimal digits.
        max_bytes: give up beyond this size; default that of :class:`~monai_mamba.weights.io.Limits`.

    Returns:
        ``path``.

    Raises:
        ValueError: if the hash or the address is not of that form.
        FileExistsError: if ``path`` exists.
        CheckpointError: if the file cannot be fetched, is too large or has another hash; nothing is left then.
    """
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"`sha256` must be 64 hexadecimal digits, got {sha256!r}; nothing is fetched without a hash")
    if urllib.parse.urlsplit(url).scheme not in ("https", "http"):
        raise ValueError(f"`url` must start with https:// or http://, got {url!r}")
    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} exists; remove it or choose another name")
    limit = max_bytes or Limits().max_bytes
    digest, size = hashlib.sha256(), 0
    with atomic_path(target) as temporary:
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, open(temporary, "wb") as file:
                while block := response.read(_BLOCK):
                    size += len(block)
                    if size > limit:
                        raise CheckpointError(f"it has more than {limit} bytes; not fetched", url)
                    digest.update(block)
                    file.write(block)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise CheckpointError(f"cannot be fetched: {getattr(error, 'reason', error)}", url) from error
        if digest.hexdigest() != sha256.lower():
            raise CheckpointError(
                f"its sha256 is {digest.hexdigest()} ({size} bytes), expected {sha256.lower()}; not kept", url
            )
    return target
