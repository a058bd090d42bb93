"""Deterministic fixture weights and inputs (our own code; stdlib + numpy only).

recipe(shapes) -> dict of numpy arrays.   shapes: {state-dict key: shape}
make_input(case, shape) -> float32 array.
"""

import hashlib
import math
import re

import numpy as np


def rng_for(name):
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64(seed))


def tensor(key, shape):
    shape = tuple(int(s) for s in shape)
    base = np.asarray(rng_for(key).standard_normal(shape), dtype=np.float64)
    last = key.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last == "running_var":
        v = 0.5 + np.abs(base)
    elif last == "running_mean":
        v = 0.1 * base
    elif re.fullmatch(r"A_logs?(_\d+)?", last):
        v = np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)) + 0.3 * base
    elif re.fullmatch(r"Ds?(_\d+)?", last):
        v = 1.0 + 0.3 * base
    elif re.search(r"dt_projs?(_\d+)?\.bias$", key) or re.fullmatch(r"dt_projs?_bias(_\d+)?", last):
        v = base - 2.0
    elif len(shape) == 0:
        v = 1.0 + 0.1 * base
    elif len(shape) == 1 and last == "weight":
        v = 1.0 + 0.1 * base
    elif len(shape) == 1:
        v = 0.1 * base
    elif "pos_embed" in last:
        v = 0.1 * base
    elif re.fullmatch(r"(x_proj|dt_projs?)_weight(_\d+)?", last):
        v = base / math.sqrt(shape[-1])
    else:
        v = base / math.sqrt(math.prod(shape[1:]))
    return v.astype(np.float32)


def recipe(shapes, aliases=None, overrides=None):
    """aliases: {key: canonical key} for tensors the original shares between
    several modules; an aliased key takes the canonical key's tensor.
    overrides: {canonical key: array} of BatchNorm running statistics stored
    in a fixture's .npz under 'override/<key>'."""
    aliases, overrides = aliases or {}, overrides or {}
    out = {}
    for k, s in shapes.items():
        c = aliases.get(k, k)
        out[k] = np.asarray(overrides[c]) if c in overrides else tensor(c, s)
    return out


def make_input(case, shape):
    return rng_for("input:" + case).standard_normal(tuple(shape)).astype(np.float32)
