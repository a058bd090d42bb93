"""Shared by all tests: fixed seeds, and no network."""

from __future__ import annotations

import os
import random
import signal
import socket

import numpy as np
import pytest

# Set before any test module imports torch or nnU-Net: small worker counts, no surprise from the user's environment.
os.environ.update({"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "0", "MPLBACKEND": "Agg"})
os.environ.pop("MONAI_MAMBA_BACKEND", None)
# Workers of pytest-xdist share the cores; more threads than cores make both slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
# A shell that starts the tests in the background makes them, and every command they run, deaf to Ctrl-C, and nohup to
# the end of the terminal.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - nnU-Net and batchgenerators draw from the global generator
    import sys

    torch = sys.modules.get("torch")  # tests of data_prep must not load it
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    original = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach the network: {address}")
        return original(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
