"""The published numbers on a GPU, in full precision and under autocast."""

from __future__ import annotations

import pytest
import torch

from tests.networks.test_compile_and_autocast import FULL

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _without_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", FULL)
def test_network_gives_the_cpu_s_output_on_the_gpu(name):
    network, inputs = FULL[name]()
    network.eval()
    with torch.no_grad():
        expected = network(*inputs)
        network.cuda()
        on_device = [x.cuda() for x in inputs]
        found = network(*on_device).cpu()
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        for dtype, limit in ((torch.bfloat16, 0.1), (torch.float16, 0.03)):
            with torch.autocast("cuda", dtype=dtype):
                low = network(*on_device).float().cpu()
            assert (low - expected).norm() <= limit * expected.norm(), dtype
