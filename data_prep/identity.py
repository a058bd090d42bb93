"""Names of cases: published names as they are, personal ones as keyed hashes."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from data_prep.errors import DatasetError, UsageError

#: variable that names the key file
KEY_VARIABLE = "MONAI_MAMBA_KEY_FILE"
_DIGITS = 16


class Pseudonyms:
    """Turns keys of cases, groups and inputs into names.

    The same key file gives the same names for the same input, so a data set can grow; without the key file nobody can
    test a guess. Published names only lose characters that are not fit for file names.

    Args:
        secret: content of the key file.
        identifiers: of the source.
    """

    def __init__(self, secret: bytes, identifiers: Literal["public", "personal"]) -> None:
        self._secret = secret
        self.identifiers = identifiers

    def hashed(self, kind: str, text: str) -> str:
        """16 hexadecimal digits that depend on `text`, its kind and the secret."""
        return hmac.new(self._secret, f"{kind}\0{text}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[
            :_DIGITS
        ]

    def case(self, key: str) -> str:
        return fit_name(key) if self.identifiers == "public" else "case-" + self.hashed("case", key)

    def group(self, key: str) -> str:
        return fit_name(key) if self.identifiers == "public" else "group-" + self.hashed("group", key)

    def input(self, path: str) -> str:
        return path if self.identifiers == "public" else "input-" + self.hashed("input", path)

    def names(self, keys: Iterable[str]) -> dict[str, str]:
        """Case names of all keys.

        Raises:
            DatasetError: two keys would share a file name (also on file systems that ignore case).
        """
        names: dict[str, str] = {}
        taken: dict[str, str] = {}
        for key in keys:
            name = self.case(key)
            if taken.setdefault(name.lower(), key) != key:
                raise DatasetError(f"two cases would both be called {name}; rename one of them in the download.")
            names[key] = name
        return names


def fit_name(key: str) -> str:
    """A published name without the characters that are not fit for file names."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip("-.")
    return name[:120] or "case"


def read_secret(path: Path | None) -> bytes:
    """Content of the key file, which is created with 32 random bytes when it does not exist.

    Args:
        path: the file; ``None`` takes the variable ``MONAI_MAMBA_KEY_FILE`` or a file in the user's configuration.

    Raises:
        UsageError: the file cannot be read or created, or is shorter than 16 bytes.
    """
    if path is None:
        configured = os.environ.get(KEY_VARIABLE)
        base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
        path = Path(configured) if configured else Path(base) / "monai-mamba" / "data_prep.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
        else:
            secret = secrets.token_hex(32).encode()
            with os.fdopen(handle, "wb") as file:
                file.write(secret)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(
            f"the key file {path} cannot be used ({error.strerror}); name another with --key-file."
        ) from error
    if len(secret) < 16:
        raise UsageError(f"the key file {path} holds {len(secret)} bytes; at least 16 are needed.")
    return secret
