"""Values that several commands take."""

from __future__ import annotations

import ast
from typing import Any


def parse_shape(text: str) -> tuple[int, ...]:
    """Read ``1x3x224x224``.

    Raises:
        ValueError: if it is something else.
    """
    try:
        shape = tuple(int(size) for size in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise ValueError(f"`--input` must be sizes joined by x, e.g. 1x3x224x224, got {text!r}") from None
    if not shape or min(shape) < 1:
        raise ValueError(f"`--input` must have sizes of at least 1, got {text!r}")
    return shape


def parse_argument(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``; the value is a Python literal or a word.

    Raises:
        ValueError: if it is something else.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ValueError(f"`--argument` must be NAME=VALUE, e.g. num_classes=6, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value  # a word, e.g. mixer=none
