"""Published files into networks and back: every layout, every key, all or nothing."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from monai_mamba.errors import CheckpointError
from monai_mamba.networks import (
    MedMamba,
    MedMambaSeg,
    NNMambaClassifier,
    NNMambaLandmark,
    NNMambaSeg,
    VMamba,
    VMambaSeg,
    XFMamba,
    XFMambaSeg,
)
from monai_mamba.weights import (
    from_published,
    load_pretrained,
    read_state_dict,
    recognize,
    to_published,
    write_safetensors,
)
from monai_mamba.weights.loading import adapt_input_channels
from tests.parity import DATA, fixture_input, fixture_weights, load_fixture, load_table


def snapshot(network: torch.nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


def unchanged(network: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def random_weights(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Distinct values for every key at little cost; most of these tables have tens of millions of numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, shape in shapes.items():
        values = torch.zeros(shape, dtype=torch.int64) if key.endswith("num_batches_tracked") else torch.zeros(shape)
        if values.is_floating_point():
            values.view(-1)[0] = torch.rand((), generator=generator)
        weights[key] = values
    return weights


# Small stand-ins for the published networks, in the published layout


@pytest.fixture(scope="module")
def medmamba_file() -> dict[str, Tensor]:
    return load_fixture("medmamba", "medmamba_tiny_c4_96x64").weights


@pytest.fixture(scope="module")
def vmamba_small() -> VMamba:
    return VMamba(num_classes=5, depths=(1, 1, 2, 1), dims=16, ssm_ratio=1.0)


def xfmamba_small(**arguments) -> XFMamba:
    return XFMamba(**({"num_classes": 3, "depths": (1, 1, 2, 1), "dims": 16} | arguments))


# from_published


def test_from_published_nnmamba_seg_matches_stored_output():
    fixture = load_fixture("nnmamba", "seg_pub")
    network, report = from_published(fixture.weights, return_report=True)
    assert isinstance(network, NNMambaSeg)
    assert not network.training
    with torch.no_grad():
        output = network(fixture.input)
    found = output[..., 1::3, ::3, 2::3].numpy()
    assert abs(found - fixture.arrays["output_sub"]).max() <= 1e-4 * fixture.table["output_absmax"]
    repeats = report.select("ignored")
    assert {record.source for record in repeats} == set(fixture.table["aliases"])
    assert all(record.reason.startswith("repeats `layer") for record in repeats)


@pytest.mark.parametrize("name", ["cls_pub", "cls_seq_pub"])
def test_from_published_nnmamba_classifier_matches_stored_output(name):
    fixture = load_fixture("nnmamba", name)
    network = from_published(fixture.weights)
    assert isinstance(network, NNMambaClassifier)
    assert same(to_published(network), fixture.weights)
    with torch.no_grad():
        output = network(fixture.input).numpy()
    assert abs(output - fixture.arrays["output"]).max() <= 1e-4 * fixture.table["output_absmax"]


def test_from_published_landmark_layout_gives_the_landmark_network():
    weights = load_fixture("nnmamba", "seg_pub").weights
    network = from_published(weights, layout="nnmamba_landmark")
    assert isinstance(network, NNMambaLandmark)
    assert network.num_landmarks == 6
    assert same(to_published(network), weights)
    assert same(network.state_dict(), from_published(weights).state_dict())


def fork_shapes(channels: int = 32, classes: int = 6) -> dict[str, list[int]]:
    """Names and shapes of the network in the authors' nnU-Net v1 fork."""
    network = to_published(NNMambaSeg(out_channels=classes, init_filters=channels, mixer="single"))
    siamese = load_table("nnmamba", "seg_pub")["shapes"]
    assert list(network) == [key for key in siamese if ".nin2." not in key and ".norm2." not in key]
    shapes = {key: list(value.shape) for key, value in network.items()}
    for level, width in ((1, channels), (2, 2 * channels), (3, 4 * channels)):
        shapes[f"ds{level}_cls_conv.weight"] = [classes, width, 1, 1, 1]
        shapes[f"ds{level}_cls_conv.bias"] = [classes]
    return shapes


def test_from_published_reads_the_model_file_of_the_nnunet_v1_fork(tmp_path):
    path = tmp_path / "model_final_checkpoint.model"
    weights = random_weights(fork_shapes())
    for alias, canonical in load_table("nnmamba", "seg_pub")["aliases"].items():
        if alias in weights:
            weights[alias] = weights[canonical]
    content = {
        "epoch": 1500,
        "state_dict": weights,
        "optimizer_state_dict": {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": []},
        "lr_scheduler_state_dict": None,
        "plot_stuff": ([np.float64(0.5)], [np.float32(0.25)], [], []),
        "best_stuff": (None, None, None),
    }
    torch.save(content, path, _use_new_zipfile_serialization=False)
    network, report = from_published(path, return_report=True)
    assert report.arguments["mixer"] == "single"
    # Counted in the fork itself, six classes.
    assert sum(p.numel() for p in network.parameters()) == 15_859_408
    assert not report.missing
    image = torch.randn(1, 1, 16, 16, 32)
    with torch.no_grad():
        assert network(image).shape == (1, 6, 16, 16, 32)
        network.decoder.deep_supervision = True
        assert [tuple(x.shape[2:]) for x in network(image)] == [(16, 16, 32), (8, 8, 16), (4, 4, 8), (2, 2, 4)]
    assert same(to_published(network), content["state_dict"])


@pytest.mark.parametrize("kept", ["first", "last"])
def test_from_published_nnmamba_with_deduplicated_keys_is_the_same_network(kept):
    fixture = load_fixture("nnmamba", "seg_pub")
    if kept == "first":
        weights = {k: v for k, v in fixture.weights.items() if k not in fixture.table["aliases"]}
    else:
        weights = {k: v for k, v in fixture.weights.items() if k not in fixture.table["aliases"].values()}
    whole, lean = from_published(fixture.weights), from_published(weights)
    assert len(weights) < len(fixture.weights)
    assert same(whole.state_dict(), lean.state_dict())


def test_from_published_nnmamba_with_different_repeats_is_refused():
    weights = dict(load_fixture("nnmamba", "seg_pub").weights)
    weights["layer1.2.mamba_layer.nin.weight"] = weights["layer1.2.mamba_layer.nin.weight"] + 1
    with pytest.raises(CheckpointError, match=r"layer1.2.mamba_layer.nin.weight.*one tensor.*different values"):
        from_published(weights)


@pytest.mark.parametrize("name", ["medmamba_tiny_c4_96x64", "medmamba_t_c6_64"])
def test_from_published_medmamba_matches_stored_logits(name):
    fixture = load_fixture("medmamba", name)
    network = from_published(fixture.weights)
    expected = torch.from_numpy(fixture.arrays["logits"]).float()
    with torch.no_grad():
        logits = network(fixture.input)
    assert (logits - expected).norm() / expected.norm() < 1e-4


def test_from_published_vmamba_matches_stored_logits():
    fixture_table = load_table("vmamba", "vmamba_t_classifier_64")
    weights = fixture_weights(load_table("vmamba", "v2_tiny_s1l8")["keys"])
    network, report = from_published({"model": weights, "max_accuracy": 82.6}, return_report=True)
    assert report.layout == (
        "VMamba-T s1l8 of the second generation (v2), published as vssm1_tiny_0230s_ckpt_epoch_264.pth"
    )
    with np.load(DATA / "vmamba" / "vmamba_t_classifier_64.npz") as arrays:
        expected = torch.from_numpy(next(iter(arrays.values())))
    with torch.no_grad():
        logits = network(fixture_input("vmamba_t_classifier_64", (1, 3, 64, 64)))
    assert (logits.flatten() - expected.flatten()).abs().max() <= 1e-4 * fixture_table["output_absmax"]


def test_from_published_backbone_matches_stored_maps():
    fixture = load_fixture("xfmamba", "vmamba_t_backbone_64")
    with torch.no_grad():
        maps = from_published(fixture.weights)(fixture_input(fixture.name, (1, 3, 64, 64)))
    for level, value in enumerate(maps):
        assert value.mean().item() == pytest.approx(fixture.arrays["stage_mean"][level], abs=1e-4)
        assert value.std(correction=0).item() == pytest.approx(fixture.arrays["stage_std"][level], abs=1e-4)


def test_from_published_xfmamba_matches_stored_logits():
    fixture = load_fixture("xfmamba", "xfmamba_t_c2_64")
    views = [fixture_input(fixture.name + suffix, (1, 3, 64, 64)) for suffix in ("", ":2")]
    with torch.no_grad():
        logits = from_published(fixture.weights)(*views)
    expected = torch.from_numpy(fixture.arrays["logits"])
    assert (logits - expected).abs().max() <= 1e-4 * fixture.table["output_absmax"]


@pytest.mark.parametrize(
    ("family", "table", "field", "parameters"),
    [
        ("xfmamba", "checkpoint_keys_xfmamba_s", "keys", 58_730_498),
        ("vmamba", "v0_tiny", "legacy_keys", 22_893_448),
        ("vmamba", "v2_small_s1l20", "keys", 49_012_840),
    ],
)
def test_from_published_key_tables_give_the_published_parameter_count(family, table, field, parameters):
    network = from_published(random_weights(load_table(family, table)[field]))
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("arguments", "build"),
    [
        (
            {"in_channels": 1, "num_classes": 9, "depths": (1, 2, 1), "dims": 24, "patch_size": 2, "d_state": 4},
            MedMamba,
        ),
        ({"num_classes": 3, "depths": (1, 1), "dims": 16, "channel_split": False, "with_conv_branch": False}, MedMamba),
        ({"num_classes": 3, "depths": (1, 1), "dims": 16, "channel_split": False}, MedMamba),
        ({"num_classes": 0, "depths": (1, 1), "dims": 16}, MedMamba),
        ({"in_channels": 2, "num_classes": 7, "depths": (1, 3, 1, 2), "dims": 16, "ssm_ratio": 2.0}, VMamba),
        (
            {
                "num_classes": 4,
                "depths": (1, 1),
                "dims": 16,
                "d_state": 16,
                "ssm_ratio": 2.0,
                "mlp_ratio": 0.0,
                "gate": True,
                "stem": "patch",
                "downsample": "merge",
            },
            VMamba,
        ),
        ({"in_channels": 1, "num_classes": 14, "depths": (1, 1, 2, 1), "dims": 16, "fusion_d_state": 4}, XFMamba),
        ({"spatial_dims": 2, "in_channels": 4, "out_channels": 3, "init_filters": 16, "num_blocks": 2}, NNMambaSeg),
        ({"spatial_dims": 3, "in_channels": 2, "out_channels": 2, "init_filters": 16, "num_blocks": 1}, NNMambaSeg),
        ({"mixer": "single", "out_channels": 4, "init_filters": 16, "deep_supervision": True}, NNMambaSeg),
        (
            {"spatial_dims": 2, "in_channels": 3, "num_classes": 5, "init_filters": 16, "num_blocks": 2},
            NNMambaClassifier,
        ),
        ({"num_classes": 2, "init_filters": 16, "num_blocks": 1, "sequential_head": True}, NNMambaClassifier),
    ],
    ids=lambda value: (
        value.__name__ if isinstance(value, type) else "-".join(f"{k}={v}" for k, v in list(value.items())[:3])
    ),
)
def test_round_trip_of_other_sizes_is_bit_identical(arguments, build):
    network = build(**arguments).eval()
    published = to_published(network)
    again, report = from_published(published, return_report=True)
    assert same(again.state_dict(), network.state_dict())
    assert same(to_published(again), published)
    assert not report.missing
    assert all(report.arguments[name] == value for name, value in arguments.items() if name != "dims")


@pytest.mark.parametrize("table", ["v2_tiny_s1l8", "v0_tiny"])
def test_to_published_has_the_published_names_in_their_order(table):
    keys = load_table("vmamba", table)["keys"]
    assert list(to_published(from_published(random_weights(keys)))) == list(keys)


def test_to_published_xfmamba_is_bit_identical_in_the_published_order():
    weights = random_weights(load_table("xfmamba", "checkpoint_keys_xfmamba_t")["keys"])
    assert same(to_published(from_published(weights)), weights)


def test_to_published_nnmamba_repeats_the_shared_tensors():
    weights = load_fixture("nnmamba", "seg_pub").weights
    published = to_published(from_published(weights))
    assert same(published, weights)
    assert (
        published["layer1.1.mamba_layer.nin.weight"].data_ptr()
        == published["layer1.2.mamba_layer.nin.weight"].data_ptr()
    )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (torch.nn.Linear(2, 2), "no published layout"),
        (MedMamba(depths=(1,), dims=16, mixer="none"), "it lacks `layers.0.blocks.0.op.A_logs`"),
        (NNMambaSeg(init_filters=16, deep_supervision=True), "no published name for `decoder.seg_layers.1.bias`"),
    ],
    ids=["linear", "without-scans", "deep-supervision"],
)
def test_to_published_of_what_was_never_published_is_refused(network, message):
    with pytest.raises(ValueError, match=message):
        to_published(network)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "network.", ""])
def test_wrapper_prefixes_are_removed(medmamba_file, wrapper):
    report = from_published({wrapper + key: value for key, value in medmamba_file.items()}, return_report=True)[1]
    assert not report.left_over


def test_counters_of_thop_are_ignored(medmamba_file):
    extra = {"total_ops": torch.zeros(1), "layers.0.total_params": torch.zeros(1)}
    report = from_published({**medmamba_file, **extra}, return_report=True)[1]
    assert {record.source: record.reason for record in report.select("ignored")} == dict.fromkeys(
        extra, "counter of thop"
    )


def test_matrices_may_come_as_pointwise_convolutions(vmamba_small):
    published = to_published(vmamba_small)
    table = load_table("vmamba", "v2_tiny_s1l8")
    patterns = {key.split(".", 4)[-1] for key in table["pointwise_keys_also_accepted_as_out_in_1_1"]}
    changed = {
        key: value[:, :, None, None] if key.split(".", 4)[-1] in patterns else value for key, value in published.items()
    }
    assert sum(value.ndim == 4 for value in changed.values()) > sum(value.ndim == 4 for value in published.values())
    network, report = from_published(changed, return_report=True)
    assert same(network.state_dict(), vmamba_small.state_dict())
    assert {r.reason for r in report.select("adapted")} == {"pointwise convolution and matrix are the same"}


def test_half_precision_files_are_converted_and_reported(medmamba_file):
    halved = {key: value.half() if value.is_floating_point() else value for key, value in medmamba_file.items()}
    network, report = from_published(halved, return_report=True)
    assert next(network.parameters()).dtype == torch.float32
    assert {record.reason for record in report.select("adapted")} == {"float16 to float32"}
    assert torch.equal(network.head.weight, halved["head.weight"].float())


def test_report_accounts_for_every_key(medmamba_file):
    network, report = from_published(medmamba_file, return_report=True)
    assert sorted(r.source for r in report.records if r.source) == sorted(medmamba_file)
    assert sorted(r.target for r in report.records if r.target) == sorted(network.state_dict())
    assert {r.target for r in report.select("loaded")} == set(medmamba_file) & set(network.state_dict())
    assert report.summary() == "MedMamba from state dict: 15 loaded, 136 renamed"
    assert report.to_dict()["keys"][0].keys() == {"action", "source", "target", "reason"}


def test_from_published_leaves_the_random_generator_alone(medmamba_file):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    from_published(medmamba_file)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("form", ["bare", "state_dict", "model_state_dict", "legacy", "safetensors"])
def test_from_published_reads_files(tmp_path, medmamba_file, form):
    path = tmp_path / "weights"
    if form == "safetensors":
        write_safetensors(path, medmamba_file)
    else:
        content = {form: medmamba_file, "epoch": 3} if "state" in form else medmamba_file
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    assert same(from_published(path).state_dict(), from_published(medmamba_file).state_dict())


def test_from_published_chooses_between_model_and_its_average(tmp_path, vmamba_small):
    path = tmp_path / "vssm.pth"
    published = to_published(vmamba_small)
    average = {key: value + 1 for key, value in published.items()}
    torch.save({"model": published, "model_ema": average, "max_accuracy": 82.6}, path)
    assert torch.equal(from_published(path).classifier.head.bias, published["classifier.head.bias"])
    averaged = from_published(path, weights="model_ema")
    assert torch.equal(averaged.classifier.head.bias, published["classifier.head.bias"] + 1)


# Refusals


def drop(weights, key):
    return {k: v for k, v in weights.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: drop(w, "layers.1.blocks.0.self_attention.Ds"), "`layers.1.blocks.0.op.Ds` is missing"),
        (lambda w: {**w, "surprise.weight": torch.zeros(2)}, "`surprise.weight` is unknown"),
        (lambda w: {**w, "head.bias": torch.zeros(5)}, r"`head.bias` has shape \(5,\), the network needs \(4,\)"),
        (lambda w: {**w, "head.bias": torch.tensor([0.0, float("nan"), 0, 0])}, "`?'head.bias' holds NaN"),
        (lambda w: {**w, "head.bias": torch.zeros(4, dtype=torch.int64)}, "head.bias"),
        (lambda w: {**w, "head.bias": None}, "`head.bias` is a NoneType, not a tensor"),
        (lambda w: {**w, "patch_embed.proj.weight": torch.zeros(32, 3)}, "expected at least 4 axes"),
        (lambda w: {**w, "patch_embed.proj.weight": torch.zeros(0, 3, 4, 4)}, r"no such network|does not fit"),
        (lambda w: {k.replace("blocks", "units"): v for k, v in w.items()}, "are not those of"),
        (lambda w: {f"{k}.finalconv11.x": v for k, v in w.items()}, "before April 2024"),
        (lambda w: {}, "it is empty"),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "nan",
        "integer",
        "none",
        "stem-axes",
        "stem-empty",
        "other-names",
        "pre-april-2024",
        "empty",
    ],
)
def test_from_published_refuses_what_does_not_fit(medmamba_file, change, message):
    with pytest.raises(CheckpointError, match=message):
        from_published(change(dict(medmamba_file)))


def test_old_medmamba_file_is_refused_by_load_pretrained_too(medmamba_file):
    network = MedMamba(num_classes=4, depths=(1, 1, 1, 1), dims=32)
    before = snapshot(network)
    old = {**medmamba_file, "layers.0.blocks.0.finalconv11.weight": torch.zeros(32, 32, 1, 1)}
    with pytest.raises(CheckpointError, match="before April 2024"):
        load_pretrained(network, old)
    assert unchanged(network, before)


def test_huge_network_claimed_by_a_small_file_gets_no_memory(medmamba_file):
    weights = dict(medmamba_file)
    weights["patch_embed.proj.weight"] = torch.zeros(2**20, 3, 1, 1)  # would be a network of 10**14 parameters
    with pytest.raises(CheckpointError, match=r"does not fit|no such network"):
        from_published(weights)


def test_million_blocks_claimed_by_a_few_names_are_refused_at_once(medmamba_file):
    key = "layers.2.blocks.999999.self_attention.Ds"
    with pytest.raises(CheckpointError, match="numbered with gaps"):
        from_published({**medmamba_file, key: torch.zeros(1)})
    many = {f"layers.0.blocks.{i}.self_attention.Ds": torch.zeros(1) for i in range(9000)}
    with pytest.raises(CheckpointError, match="more than 256"):
        from_published({**medmamba_file, **many})
    with pytest.raises(CheckpointError, match="more than any network here"):
        from_published({**medmamba_file, **{f"x.{i}": torch.zeros(1) for i in range(10_000)}})


def test_arrays_are_taken_for_tensors(medmamba_file):
    network = from_published({key: value.numpy() for key, value in medmamba_file.items()})
    assert same(network.state_dict(), from_published(medmamba_file).state_dict())


def test_damaged_files_of_a_network_are_refused_or_equal(tmp_path, medmamba_file):
    """Cut at every 5 percent, flipped bits: an error within three seconds, or exactly the network of the file."""
    path = tmp_path / "medmamba.pth"
    torch.save(medmamba_file, path)
    good, expected = path.read_bytes(), from_published(path).state_dict()
    damaged = [good[: len(good) * percent // 100] for percent in range(0, 100, 5)]
    generator = np.random.default_rng(0)
    for position, bit in zip(generator.integers(len(good), size=30), generator.integers(8, size=30), strict=True):
        damaged.append(good[:position] + bytes([good[position] ^ (1 << int(bit))]) + good[position + 1 :])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        start = time.process_time()
        try:
            network = from_published(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(network.state_dict(), expected)
        assert time.process_time() - start < 3
    assert refused >= 45


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="`source` must be a path or a state dict, got int"):
        from_published(3)
    with pytest.raises(ValueError, match="`layout` must be one of 'nnmamba_seg'"):
        recognize({"a": (1,)}, layout="resnet")


# Files of networks that were trained here


@pytest.mark.parametrize(
    "arguments",
    [
        {"head": "conv1x1", "norm": "instance", "deep_supervision": True},
        {"mixer": "none", "num_blocks": 2},
        {"norm": "instance", "spatial_dims": 2},
    ],
    ids=["nnunet", "without-scans", "2d-instance"],
)
def test_from_published_recognises_segmentation_networks_trained_here(arguments):
    network = NNMambaSeg(init_filters=16, out_channels=3, in_channels=2, **arguments).eval()
    again = from_published({"network_weights": network.state_dict(), "current_epoch": 3})
    assert same(again.state_dict(), network.state_dict())
    assert not again.decoder.deep_supervision
    if "deep_supervision" in arguments:
        network.decoder.deep_supervision = False
    image = torch.randn(1, 2, *[16] * (network.spatial_dims - 1), 32)
    with torch.no_grad():
        assert torch.equal(again(image), network(image))


# load_pretrained


@pytest.mark.parametrize(
    ("source", "target", "left"),
    [
        (lambda: MedMamba(num_classes=4, **TINY), lambda: MedMambaSeg(in_channels=3, **TINY), {"head"}),
        (lambda: VMamba(num_classes=4, **TINY), lambda: VMambaSeg(in_channels=3, **TINY), {"classifier"}),
        (lambda: XFMamba(**TINY), lambda: XFMambaSeg(in_channels=6, **TINY), {"final_conv", "classifier"}),
    ],
    ids=["medmamba", "vmamba", "xfmamba"],
)
def test_encoders_of_segmentation_networks_take_published_files(source, target, left):
    weights, network = to_published(source()), target()
    before = snapshot(network)
    report = load_pretrained(network, weights)
    assert {key.split(".")[0] for key in report.left_over} == left
    assert {key.split(".")[0] for key in report.missing} <= {"decoder", "encoder"}
    assert not [key for key in report.missing if key.startswith("encoder.") and "outnorm" not in key]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items() if "decoder" in key)
    assert len(report.select("loaded", "renamed")) == len(weights) - len(report.left_over)


TINY = {"depths": (1, 1, 1, 1), "dims": 16}
RIGHT = {"v2_tiny_s1l8": {}, "v2_small_s2l15": {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0}}
RIGHT["v2_base_s2l15"] = {"depths": (2, 2, 15, 2), "ssm_ratio": 2.0, "dims": 128}


@pytest.mark.parametrize("table", RIGHT)
def test_right_vmamba_file_loads_into_xfmamba(table):
    weights = random_weights(load_table("vmamba", table)["keys"])
    network = XFMamba(**RIGHT[table])
    before = snapshot(network)
    report = load_pretrained(network, weights)
    assert sorted(report.left_over) == sorted(
        f"classifier.{part}.{name}" for part in ("norm", "head") for name in ("weight", "bias")
    )
    missing = [key for key in report.missing if key.startswith("backbone.")]
    assert sorted(missing) == sorted(f"backbone.outnorm{i}.{name}" for i in range(4) for name in ("weight", "bias"))
    after = network.state_dict()
    assert all(
        torch.equal(after[f"backbone.{key}"], value) for key, value in weights.items() if "classifier" not in key
    )
    assert all(torch.equal(after[key], before[key]) for key in report.missing)


WRONG = ["v2_tiny_s2l5", "v2_small_s1l20", "v2_base_s1l20", "v0_tiny", "v0_small", "v0_base"]


@pytest.fixture(scope="module")
def xfmamba_t():
    return XFMamba()


@pytest.mark.parametrize("table", WRONG)
def test_wrong_vmamba_file_is_refused_and_leaves_xfmamba_untouched(xfmamba_t, table):
    content = load_table("vmamba", table)
    before = snapshot(xfmamba_t)
    for names in ("keys", "legacy_keys"):
        if names not in content:
            continue
        with pytest.raises(CheckpointError) as caught:
            load_pretrained(xfmamba_t, random_weights(content[names]))
        message = str(caught.value)
        generation = "first generation (v0)" if table.startswith("v0") else "second generation (v2)"
        assert generation in message
        assert content["published_file"] in message
        assert "this network needs VMamba-T s1l8" in message
        assert "vssm1_tiny_0230s_ckpt_epoch_264.pth" in message
        assert "Nothing was loaded" in message
    assert unchanged(xfmamba_t, before)


@pytest.mark.parametrize(
    ("arguments", "table", "file"),
    [
        (RIGHT["v2_small_s2l15"], "v2_small_s1l20", "vssm_small_0229_ckpt_epoch_222.pth"),
        (RIGHT["v2_base_s2l15"], "v2_base_s1l20", "vssm_base_0229_ckpt_epoch_237.pth"),
    ],
    ids=["s", "b"],
)
def test_wrong_variant_is_refused_with_the_file_that_fits(arguments, table, file):
    network = XFMamba(**arguments)
    before = snapshot(network)
    with pytest.raises(CheckpointError, match=file):
        load_pretrained(network, random_weights(load_table("vmamba", table)["keys"]))
    assert unchanged(network, before)


@pytest.mark.parametrize("change", ["nan", "missing", "shape", "truncated"])
def test_refusal_leaves_every_tensor_untouched(tmp_path, medmamba_file, change):
    weights = dict(medmamba_file)
    last = list(weights)[-3]
    if change == "nan":
        weights[last] = weights[last].clone()
        weights[last].view(-1)[-1] = float("nan")
    elif change == "missing":
        del weights[last]
    elif change == "shape":
        weights[last] = torch.zeros(7)
    path = tmp_path / "file.pth"
    torch.save(weights, path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    network = MedMamba(num_classes=4, depths=(1, 1, 1, 1), dims=32)
    before = snapshot(network)
    with pytest.raises(CheckpointError):
        load_pretrained(network, path)
    assert unchanged(network, before)


def test_load_pretrained_into_another_network_is_refused(medmamba_file):
    with pytest.raises(CheckpointError, match="it holds MedMamba, which is no part of XFMamba"):
        load_pretrained(xfmamba_small(), medmamba_file)


def test_load_pretrained_own_file_is_exact(tmp_path):
    source, target = xfmamba_small(), xfmamba_small()
    torch.save({"network_weights": source.state_dict(), "current_epoch": 3}, tmp_path / "own.pth")
    report = load_pretrained(target, tmp_path / "own.pth")
    assert same(source.state_dict(), target.state_dict())
    assert len(report.select("loaded")) == len(source.state_dict())


def test_load_pretrained_own_deep_supervision_file_is_exact():
    source, target = (NNMambaSeg(init_filters=16, deep_supervision=True) for _ in range(2))
    load_pretrained(target, source.state_dict())
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_strict_false_reports_what_strict_refuses(medmamba_file, strict):
    network = MedMamba(num_classes=4, depths=(1, 1, 2, 1), dims=32)
    before = snapshot(network)
    if strict:
        with pytest.raises(CheckpointError, match=r"`layers.2.blocks.1.norm.weight` is missing"):
            load_pretrained(network, medmamba_file)
        assert unchanged(network, before)
    else:
        report = load_pretrained(network, medmamba_file, strict=False)
        assert all(key.startswith("layers.2.blocks.1.") for key in report.missing)
        assert report.missing
        assert torch.equal(network.head.weight, medmamba_file["head.weight"])


def test_reset_head_keeps_the_head_of_the_network(medmamba_file):
    network = MedMamba(num_classes=9, depths=(1, 1, 1, 1), dims=32)
    before = snapshot(network)
    with pytest.raises(CheckpointError, match=r"`head.weight`.*`reset_head=True` leaves the head"):
        load_pretrained(network, medmamba_file)
    assert unchanged(network, before)
    report = load_pretrained(network, medmamba_file, reset_head=True)
    assert report.left_over == ["head.weight", "head.bias"]
    assert torch.equal(network.head.weight, before["head.weight"])
    assert torch.equal(network.layers[0].blocks[0].op.Ds, medmamba_file["layers.0.blocks.0.self_attention.Ds"])


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_adapt_in_channels_keeps_the_response_to_equal_channels(medmamba_file, in_channels):
    network = MedMamba(in_channels=in_channels, num_classes=4, depths=(1, 1, 1, 1), dims=32).eval()
    before = snapshot(network)
    with pytest.raises(CheckpointError, match="`adapt_in_channels=True` converts it"):
        load_pretrained(network, medmamba_file)
    assert unchanged(network, before)
    report = load_pretrained(network, medmamba_file, adapt_in_channels=True)
    assert [r.reason for r in report.select("adapted")] == [f"3 to {in_channels} input channels"]
    image = torch.randn(1, 1, 32, 32)
    if in_channels % 3 and in_channels != 1:
        return  # filters are repeated an unequal number of times; only the scale is right then
    with torch.no_grad():
        expected = from_published(medmamba_file)(image.expand(-1, 3, -1, -1))
        torch.testing.assert_close(network(image.expand(-1, in_channels, -1, -1)), expected, rtol=1e-4, atol=1e-5)


def test_adapt_input_channels_scales_by_old_over_new():
    weight = torch.tensor([[1.0, 2.0, 4.0]])[:, :, None, None]
    assert adapt_input_channels(weight, 1).flatten().tolist() == [7.0]
    assert adapt_input_channels(weight, 2).flatten().tolist() == [1.5, 3.0]
    assert adapt_input_channels(weight, 4).flatten().tolist() == [0.75, 1.5, 3.0, 0.75]


def test_load_pretrained_into_meta_network_is_refused(medmamba_file):
    with torch.device("meta"):
        network = MedMamba(num_classes=4, depths=(1, 1, 1, 1), dims=32)
    with pytest.raises(ValueError, match="meta device"):
        load_pretrained(network, medmamba_file)


def test_fuzzed_names_are_all_accounted_for(medmamba_file):
    """Rename one key at a time, fifty of them: the message always names the key."""
    keys = list(medmamba_file)
    for index in range(50):
        key = keys[index * 7 % len(keys)]
        weights = {(f"{k}x" if k == key else k): v for k, v in medmamba_file.items()}
        with pytest.raises(CheckpointError) as caught:
            from_published(weights)
        assert key.rpartition(".")[2] in str(caught.value)


def test_written_safetensors_load_again(tmp_path, medmamba_file):
    network = from_published(medmamba_file)
    write_safetensors(tmp_path / "ours.safetensors", network.state_dict())
    assert same(from_published(tmp_path / "ours.safetensors").state_dict(), network.state_dict())
    assert read_state_dict(tmp_path / "ours.safetensors").keys() == network.state_dict().keys()
