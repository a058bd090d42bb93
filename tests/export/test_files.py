"""Exported files give what the network gives, for every format, size and batch."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from monai_mamba.errors import ExportError
from monai_mamba.export import export_network
from monai_mamba.layers.mamba import MambaMixer
from monai_mamba.layers.ss2d import SS2D
from monai_mamba.networks import MedMamba, NNMambaSeg, VMamba, XFMamba
from monai_mamba.ops import selective_scan, ss2d_scan
from monai_mamba.ops.backends import use_backend

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class PixelSequence(nn.Module):
    """The smallest network with a scan: pixels as tokens."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.mixer = MambaMixer(channels, d_state=4)

    def forward(self, x):
        return self.mixer(x.flatten(2).transpose(1, 2)).mean(1)


class MapLayer(nn.Module):
    """One layer that scans a map along four routes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = SS2D(4, d_state=3)

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1))


NETWORKS = {
    "medmamba-3-channels-64x96": lambda: (
        MedMamba(num_classes=4, depths=(1, 1), dims=16, d_state=4),
        [torch.zeros(1, 3, 64, 96)],
    ),
    "vmamba-1-channel-33x47": lambda: (
        VMamba(in_channels=1, num_classes=3, depths=(1, 1), dims=8),
        [torch.zeros(1, 1, 33, 47)],
    ),
    "xfmamba-two-views-48x32": lambda: (
        XFMamba(num_classes=2, depths=(1, 1), dims=16, fusion_d_state=4),
        [torch.zeros(1, 3, 48, 32)] * 2,
    ),
    "nnmamba-2-channels-16x32x20": lambda: (
        NNMambaSeg(in_channels=2, out_channels=3, init_filters=16, num_blocks=2, deep_supervision=True),
        [torch.zeros(1, 2, 16, 32, 20)],
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_onnx_file_equals_network_for_every_batch_size(tmp_path, case):
    network, example = NETWORKS[case]()
    report = export_network(network.eval(), tmp_path / "network.onnx", example)
    assert report.difference <= 1e-4
    assert report.batch_sizes == (1, 2, 3)
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    axes = [value.type.tensor_type.shape.dim for value in [*model.graph.input, *model.graph.output]]
    assert {shape[0].dim_param for shape in axes} == {"batch"}
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    images = [torch.randn(5, *image.shape[1:]) for image in example]
    feeds = {i.name: image.numpy() for i, image in zip(session.get_inputs(), images, strict=True)}
    (found,) = session.run(None, feeds)
    if isinstance(network, NNMambaSeg):
        network.decoder.deep_supervision = False
    with torch.no_grad():
        expected = network(*images).numpy()
    assert found.shape == expected.shape
    assert abs(found - expected).max() <= 1e-4 * abs(expected).max()


@pytest.mark.parametrize("format", ["program", "torchscript"])
@pytest.mark.parametrize("case", ["medmamba-3-channels-64x96", "nnmamba-2-channels-16x32x20"])
def test_file_of_torch_equals_network(tmp_path, case, format):
    network, example = NETWORKS[case]()
    report = export_network(network, tmp_path / "file", example, format=format)
    assert report.difference <= 1e-6
    assert report.inputs == {"image": ("batch", *example[0].shape[1:])}


def test_program_keeps_a_scan_as_one_node(tmp_path):
    export_network(MapLayer(), tmp_path / "network.pt2", torch.zeros(1, 4, 8, 8))
    nodes = torch.export.load(tmp_path / "network.pt2").graph.nodes
    assert sum(node.target is torch.ops.monai_mamba.ss2d_scan_fwd.default for node in nodes) == 1


def test_onnx_graph_does_not_grow_with_the_image(tmp_path):
    network = MapLayer()
    nodes = [
        export_network(network, tmp_path / f"{size}.onnx", torch.zeros(1, 4, size, size)).num_nodes for size in (4, 40)
    ]
    assert nodes[0] == nodes[1]


def test_forced_reference_backend_does_not_reach_the_file(tmp_path):
    with use_backend("reference"):
        report = export_network(PixelSequence(), tmp_path / "network.pt2", torch.zeros(1, 6, 5, 40))
    assert report.num_nodes < 50


class ScanOfInputs(nn.Module):
    """A selective scan whose sequences are inputs, so that one file serves every length."""

    def __init__(self, channels: int, d_state: int, with_options: bool) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.rand(channels, d_state) - 0.1)
        self.D = nn.Parameter(torch.randn(channels)) if with_options else None
        self.bias = nn.Parameter(torch.randn(channels)) if with_options else None

    def forward(self, u, delta, B, C):
        if self.D is None:
            return selective_scan(u, delta.abs(), self.A, B, C, channels_last=True)
        return selective_scan(u, delta, self.A, B, C, self.D, u.sin(), self.bias, True, channels_last=True)


@pytest.mark.parametrize(
    ("groups", "with_options"), [(1, True), (3, False)], ids=["skip-gate-bias-softplus", "three-groups-bare"]
)
def test_onnx_scan_equals_eager_for_every_length(tmp_path, groups, with_options):
    from monai_mamba.export.onnx_scan import translation_table

    names, channels, d_state = ["u", "delta", "B", "C"], 6, 5
    network = ScanOfInputs(channels, d_state, with_options).eval()

    def inputs(batch, length):
        matrices = [torch.randn(batch, length, groups, d_state) for _ in range(2)]
        return torch.randn(batch, length, channels), torch.randn(batch, length, channels), *matrices

    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("length", min=1)}
    with torch.no_grad():
        program = torch.onnx.export(
            network,
            inputs(2, 70),
            dynamo=True,
            dynamic_shapes=(axes,) * 4,
            custom_translation_table=translation_table(),
            input_names=names,
            verbose=False,
        )
        program.save(tmp_path / "scan.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "scan.onnx"), providers=["CPUExecutionProvider"])
        for batch, length in [(1, 1), (2, 2), (1, 63), (3, 64), (2, 65), (1, 128), (2, 1000)]:
            values = inputs(batch, length)
            expected = network(*values)
            feeds = {name: value.numpy() for name, value in zip(names, values, strict=True)}
            found = torch.from_numpy(session.run(None, feeds)[0])
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1), (batch, length)


class ScanOfMap(nn.Module):
    def __init__(self, routes: tuple[str, ...]) -> None:
        super().__init__()
        self.routes = routes
        self.A = nn.Parameter(-torch.rand(len(routes), 3, 2) - 0.1)

    def forward(self, x):
        delta = torch.stack([x * (k + 1) for k in range(len(self.routes))], dim=3)  # (B, H, W, K, 3)
        return ss2d_scan(x, delta, self.A, delta[..., :2].cos(), delta[..., 1:].sin(), routes=self.routes)


@pytest.mark.parametrize("routes", [("row",), ("column_reversed", "row"), ("row_reversed", "column")], ids="-".join)
def test_onnx_scan_of_a_map_follows_its_routes(tmp_path, routes):
    report = export_network(ScanOfMap(routes), tmp_path / "map.onnx", torch.zeros(1, 5, 7, 3))
    assert report.difference <= 1e-5


@pytest.mark.parametrize("suffix", [".pt2", ".ts"])
def test_file_of_torch_loads_in_a_fresh_process_that_imports_the_operators(tmp_path, suffix):
    path, image_path = tmp_path / f"network{suffix}", tmp_path / "image.pt"
    network, image = PixelSequence().eval(), torch.randn(3, 6, 4, 5)
    export_network(network, path, torch.zeros(1, 6, 4, 5))
    torch.save(image, image_path)
    load = "torch.jit.load(sys.argv[1])" if suffix == ".ts" else "torch.export.load(sys.argv[1]).module()"
    script = f"""
        import sys, torch
        if sys.argv[3] == "with": import monai_mamba.ops
        torch.save({load}(torch.load(sys.argv[2])).detach(), sys.argv[2] + ".out")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), str(path), str(image_path)]
    assert subprocess.run([*command, "without"], capture_output=True).returncode != 0
    subprocess.run([*command, "with"], check=True, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(f"{image_path}.out"), network(image))


def test_monai_converts_to_torchscript_by_tracing(tmp_path):
    """What ``monai.bundle ckpt_export`` calls; it needs ``use_trace``."""
    from monai.networks.utils import convert_to_torchscript

    network = MedMamba(num_classes=2, depths=(1, 1), dims=16, d_state=4)
    path, image = str(tmp_path / "model.ts"), torch.randn(2, 3, 32, 32)
    convert_to_torchscript(network, filename_or_obj=path, verify=True, inputs=[image], use_trace=True, rtol=1e-4)
    network.eval()
    other = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(path)(other), network(other))


def test_export_leaves_the_network_as_it_was(tmp_path):
    network = NNMambaSeg(spatial_dims=2, init_filters=16, num_blocks=1, deep_supervision=True).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    export_network(network, tmp_path / "network.ts", torch.zeros(1, 1, 16, 16))
    assert network.training
    assert network.decoder.deep_supervision
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


class Unstable(nn.Module):
    """Gives something else each time, as no exported file can."""

    def forward(self, x):
        return x.mean((1, 2, 3)) + torch.rand(1)


def test_file_that_differs_is_not_kept(tmp_path):
    with pytest.raises(ExportError, match="differs from the network"):
        export_network(Unstable(), tmp_path / "network.ts", torch.zeros(1, 1, 4, 4))
    assert list(tmp_path.iterdir()) == []


class Silent(nn.Module):
    def forward(self, x):
        return (x * 0).mean((1, 2, 3))


def test_comparison_with_zeros_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="Silent gives nothing but zeros"):
        export_network(Silent(), tmp_path / "network.ts", torch.zeros(1, 1, 4, 4))


class DataDependent(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_network_that_cannot_be_written_is_one_error(tmp_path):
    with pytest.raises(ExportError, match="DataDependent cannot be written as program"):
        export_network(DataDependent(), tmp_path / "network.pt2", torch.zeros(1, 1, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    network, path = PixelSequence(), tmp_path / "x.ts"
    with pytest.raises(ValueError, match=r"`format` must be one of 'onnx' \(.onnx\).*got '.trt'"):
        export_network(network, tmp_path / "x.trt", torch.zeros(1, 6, 4, 4))
    with pytest.raises(ValueError, match="`example` must be batches of images"):
        export_network(network, path, torch.zeros(4, 4))
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        export_network(network, path, torch.zeros(1, 6, 4, 4))
    assert path.read_bytes() == b"old"
    export_network(network, path, torch.zeros(1, 6, 4, 4), overwrite=True)
    assert path.read_bytes() != b"old"


def test_missing_onnx_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime: pip install 'monai-mamba\[export\]'"):
        export_network(PixelSequence(), tmp_path / "network.onnx", torch.zeros(1, 6, 4, 4))
