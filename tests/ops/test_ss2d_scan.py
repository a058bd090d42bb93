"""The map scan against its definition, route by route, written out with explicit pixel orders."""

from __future__ import annotations

import itertools

import pytest
import torch

from monai_mamba.ops import selective_scan, ss2d_scan
from monai_mamba.ops.ss2d_scan import ROUTES

NAMES = ("x", "delta", "A", "B", "C", "D", "delta_bias")


def make_inputs(size=(3, 5), num_routes=4, d_state=4, channels=6, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = {
        "x": normal(batch, *size, channels),
        "delta": normal(batch, *size, num_routes, channels),
        "A": -torch.exp(0.3 * normal(num_routes, channels, d_state)),
        "B": normal(batch, *size, num_routes, d_state),
        "C": normal(batch, *size, num_routes, d_state),
        "D": normal(num_routes, channels),
        "delta_bias": normal(num_routes, channels) - 1,
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def pixel_order(route, height, width):
    order = list(itertools.product(range(height), range(width)))
    if route.startswith("column"):
        order.sort(key=lambda pixel: (pixel[1], pixel[0]))
    return order[::-1] if route.endswith("reversed") else order


def definition(x, delta, A, B, C, D, delta_bias, routes):
    """Each route as a sequence of listed pixels; the results go back to the same list."""
    total = torch.zeros_like(x)
    for k, route in enumerate(routes):
        rows, columns = zip(*pixel_order(route, *x.shape[1:3]), strict=True)
        y = selective_scan(
            x[:, rows, columns],
            delta[:, rows, columns, k],
            A[k],
            B[:, rows, columns, k],
            C[:, rows, columns, k],
            D[k],
            None,
            delta_bias[k],
            True,
            channels_last=True,
            backend="reference",
        )
        scattered = torch.zeros_like(x)
        scattered[:, rows, columns] = y
        total = total + scattered
    return total


@pytest.mark.parametrize(
    "routes",
    [ROUTES, ("row",), ("column_reversed", "row"), ("column", "row_reversed", "row")],
    ids="+".join,
)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 5), (8, 2), (9, 16)], ids=str)
def test_ss2d_scan_matches_the_definition_with_gradients(size, routes):
    inputs = make_inputs(size, len(routes))
    y = ss2d_scan(**inputs, routes=routes)
    expected = definition(**inputs, routes=routes)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(y)
    found = torch.autograd.grad(y, list(inputs.values()), weight)
    reference = torch.autograd.grad(expected, list(inputs.values()), weight)
    for name, gradient, wanted in zip(NAMES, found, reference, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_ss2d_scan_float32_is_close_to_float64():
    inputs = make_inputs((12, 11), d_state=16)
    expected = ss2d_scan(**inputs)
    y = ss2d_scan(**{name: value.float() for name, value in inputs.items()})
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_ss2d_scan_bfloat16_sums_the_routes_in_float32():
    inputs = make_inputs((4, 4))
    low = {name: value.to(torch.bfloat16) for name, value in inputs.items()}
    y = ss2d_scan(**low)
    expected = ss2d_scan(**{name: value.double() for name, value in low.items()})
    assert y.dtype == torch.bfloat16
    # Half a unit in the last place for each route's output and one for the sum.
    assert (y.double() - expected).abs().max() <= 4 * 2**-8 * expected.abs().max()


def test_ss2d_scan_without_skip_bias_and_softplus():
    inputs = make_inputs((3, 4), num_routes=1)
    step_size = inputs["delta"].abs()
    y = ss2d_scan(inputs["x"], step_size, inputs["A"], inputs["B"], inputs["C"], routes=("row",), delta_softplus=False)
    expected = selective_scan(
        inputs["x"].flatten(1, 2),
        step_size.flatten(1, 3),
        inputs["A"][0],
        inputs["B"].flatten(1, 3),
        inputs["C"].flatten(1, 3),
        channels_last=True,
        backend="reference",
    )
    torch.testing.assert_close(y.flatten(1, 2), expected)


def test_ss2d_scan_accepts_views():
    inputs = make_inputs((3, 5))
    expected = ss2d_scan(**inputs)
    strided = dict(inputs)
    strided["x"] = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    strided["delta"] = inputs["delta"].permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    torch.testing.assert_close(ss2d_scan(**strided), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routes": "row"}, r"`routes` must be a tuple or list.*got 'row'; write \('row',\)"),
        ({"routes": None}, "`routes` must be a tuple or list.*got None"),
        ({"C": None}, "`C` must be a tensor"),
        ({"routes": ()}, "`routes` must name at least one"),
        ({"routes": ("row", "diagonal", "column", "row_reversed")}, "`routes`.*'diagonal'"),
        ({"routes": ("row", "row", "column", "row_reversed")}, "`routes`.*twice"),
        ({"routes": ("row", "column")}, r"`A`.*K=2"),
        ({"x": torch.zeros(2, 15, 6)}, r"`x` must be a map"),
        ({"delta": torch.zeros(2, 3, 5, 4, 5)}, "`delta` must have shape"),
        ({"C": torch.zeros(2, 3, 5, 4, 5)}, "`C` must have shape"),
        ({"D": torch.zeros(24)}, "`D` must have shape"),
    ],
)
def test_ss2d_scan_bad_argument_is_named(changes, message):
    inputs = {name: value.detach().float() for name, value in make_inputs().items()}
    with pytest.raises((TypeError, ValueError), match=message):
        ss2d_scan(**(inputs | changes))
