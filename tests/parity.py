"""Read a parity fixture: weights drawn from the published state-dict keys, inputs, stored outputs and gradients."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.parity_recipe import make_input, recipe

DATA = Path(__file__).parent / "data" / "parity"


@dataclass
class Fixture:
    """One case: ``table`` is its JSON, ``arrays`` its npz, ``weights`` the published state dict."""

    name: str
    table: dict
    arrays: dict[str, np.ndarray]
    weights: dict[str, Tensor]

    @property
    def input(self) -> Tensor:
        shape = self.table["input_shape"] if "input_shape" in self.table else self.table["input"]["shape"]
        return fixture_input(self.name, shape)


def fixture_input(name: str, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(make_input(name, shape))


def fixture_weights(shapes: dict[str, list[int]], aliases=None, overrides=None) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value) for key, value in recipe(shapes, aliases, overrides).items()}


def load_table(family: str, name: str) -> dict:
    return json.loads((DATA / family / f"{name}.json").read_text())


def load_fixture(family: str, name: str) -> Fixture:
    table = load_table(family, name)
    with np.load(DATA / family / f"{name}.npz") as file:
        arrays = dict(file)
    overrides = {key[9:]: value for key, value in arrays.items() if key.startswith("override/")}
    shapes = table["shapes"] if "shapes" in table else table["state_dict"]
    return Fixture(name, table, arrays, fixture_weights(shapes, table.get("aliases"), overrides))


def renamed(weights: dict[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Apply a table of renames to the keys of a published state dict."""
    result = {}
    for key, value in weights.items():
        for pattern, replacement in table:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result
