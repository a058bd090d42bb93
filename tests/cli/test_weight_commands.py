"""``inspect-weights``, ``convert-weights`` and ``export``, in one process and as users run them."""

from __future__ import annotations

import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pytest
import torch

from monai_mamba.cli import main as cli
from monai_mamba.networks import MedMamba
from monai_mamba.weights import from_published, read_state_dict, to_published

TINY = {"in_channels": 1, "num_classes": 3, "depths": (1, 1), "dims": 16, "d_state": 4}


@pytest.fixture
def published(tmp_path):
    """A MedMamba file as its authors would have saved it."""
    path = tmp_path / "medmamba.pth"
    torch.save(to_published(MedMamba(**TINY)), path)
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_inspect_weights_tells_the_network(published, capsys):
    assert run("inspect-weights", published, "--keys") == 0
    text = capsys.readouterr().out
    assert "torch, " in text and "sha256" in text
    assert "network: MedMamba" in text
    assert "num_classes=3" in text
    assert "layers.0.blocks.0.self_attention.A_logs  float32  64x4" in text


def test_inspect_weights_as_json(published, capsys):
    assert run("inspect-weights", published, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["arguments"]["dims"] == [16, 32]
    assert facts["sha256"] == hashlib.sha256(published.read_bytes()).hexdigest()
    assert facts["groups"][0]["tensors"] == len(read_state_dict(published))


def test_inspect_weights_of_an_unknown_network_says_so(tmp_path, capsys):
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "file.pt")
    assert run("inspect-weights", tmp_path / "file.pt") == 0
    assert "not recognized: its names (weight, bias" in capsys.readouterr().out


def test_inspect_weights_of_a_bad_file_is_one_line(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "file.pt")
    assert run("inspect-weights", tmp_path / "file.pt") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "torch.nn.modules.linear.Linear" in error


def test_inspect_weights_lists_the_catalogue(capsys):
    assert run("inspect-weights", "--catalogue") == 0
    assert "vssm1_tiny_0230s_ckpt_epoch_264.pth, 30,249,064 parameters" in capsys.readouterr().out
    assert run("inspect-weights", "--catalogue", "--json") == 0
    assert all(entry["page"].startswith("https://") for entry in json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("names", ["ours", "published"])
def test_convert_weights_writes_what_loads_again(published, tmp_path, capsys, names):
    output, report = tmp_path / "out.safetensors", tmp_path / "report.json"
    assert run("convert-weights", published, output, "--to", names, "--report", report) == 0
    assert f"names: {names}" in capsys.readouterr().out
    original, converted = from_published(published), from_published(output)
    assert all(torch.equal(v, original.state_dict()[k]) for k, v in converted.state_dict().items())
    if names == "published":
        assert read_state_dict(output).keys() == read_state_dict(published).keys()
    account = json.loads(report.read_text())
    assert {record["source"] for record in account["keys"]} == set(read_state_dict(published))


def test_convert_weights_refuses_in_one_line_and_writes_nothing(published, tmp_path, capsys):
    output = tmp_path / "out.safetensors"
    weights = read_state_dict(published)
    del weights["head.bias"]
    torch.save(weights, published)
    assert run("convert-weights", published, output) == 1
    assert "`head.bias` is missing" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.pth"], "must end in .safetensors"),
        (["out.safetensors", "--url", "https://example.org/x"], "nothing is fetched without a hash"),
        (["out.safetensors", "--url", "file:///etc/passwd", "--sha256", "0" * 64], "must start with https://"),
        (["out.safetensors", "--url", "https://example.org/x", "--sha256", "abc"], "64 hexadecimal digits"),
        (["there.safetensors"], "exists; choose another name"),
        (["out.safetensors", "--layout", "resnet"], "`layout` must be one of"),
    ],
    ids=["suffix", "url-without-hash", "file-url", "short-hash", "existing", "layout"],
)
def test_convert_weights_wrong_usage(published, tmp_path, capsys, arguments, message):
    (tmp_path / "there.safetensors").write_bytes(b"kept")
    name, *options = arguments
    assert run("convert-weights", published, tmp_path / name, *options) == 2
    # typer breaks long messages into the lines of a box
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in shown
    assert (tmp_path / "there.safetensors").read_bytes() == b"kept"


@pytest.fixture
def server(published):
    """The file behind a web address on this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/file" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    content = published.read_bytes()
    instance = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=instance.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{instance.server_port}", hashlib.sha256(content).hexdigest()
    instance.shutdown()
    thread.join()


def test_convert_weights_fetches_with_the_right_hash_only(server, tmp_path, capsys):
    address, digest = server
    fetched, output = tmp_path / "fetched.pth", tmp_path / "out.safetensors"
    assert run("convert-weights", fetched, output, "--url", f"{address}/file", "--sha256", "0" * 64) == 1
    assert f"its sha256 is {digest}" in capsys.readouterr().err
    assert run("convert-weights", fetched, output, "--url", f"{address}/none", "--sha256", digest) == 1
    assert "cannot be fetched: Not Found" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["medmamba.pth"]
    assert run("convert-weights", fetched, output, "--url", f"{address}/file", "--sha256", digest.upper()) == 0
    assert fetched.exists() and output.exists()
    assert (
        run("convert-weights", fetched, tmp_path / "2.safetensors", "--url", f"{address}/file", "--sha256", digest) == 2
    )


def test_convert_weights_checks_the_hash_of_a_file_that_is_there(published, tmp_path, capsys):
    assert run("convert-weights", published, tmp_path / "out.safetensors", "--sha256", "1" * 64) == 1
    assert "expected 1111" in capsys.readouterr().err
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    assert run("convert-weights", published, tmp_path / "out.safetensors", "--sha256", digest) == 0


def test_export_of_a_weight_file(published, tmp_path, capsys):
    output = tmp_path / "network.ts"
    assert run("export", published, output, "--input", "1x1x32x40") == 0
    assert "input: image batchx1x32x40" in capsys.readouterr().out
    image = torch.randn(3, 1, 32, 40)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(output))(image), from_published(published)(image))


def test_export_of_a_named_network_with_weights(published, tmp_path, capsys):
    output = tmp_path / "network.ts"
    arguments = [word for key, value in TINY.items() for word in ("-a", f"{key}={value}")]
    assert run("export", "medmamba_t", output, "--weights", published, *arguments, "--input", "1x1x32x32") == 0
    image = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(output))(image), from_published(published)(image))
    capsys.readouterr()
    assert run("export", "medmamba_t", output, "--untrained", "--overwrite", *arguments, "--input", "1x1x32x32") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["medmamba_t", "x.ts"], "--weights FILE is needed"),
        (["medmamba_tt", "x.ts", "--untrained"], "did you mean"),
        (["medmamba_t", "x.ts", "--untrained", "-a", "colour=3"], "has no argument `colour`"),
        (["medmamba_t", "x.trt", "--untrained", "-a", "depths=(1,)", "-a", "dims=16"], "`format` must be one of"),
        (["FILE", "x.ts"], "--input is needed"),
        (["FILE", "x.ts", "--untrained"], "belong to a network given by name"),
        (["FILE", "x.ts", "--input", "big"], "sizes joined by x"),
    ],
    ids=["no-weights", "name", "argument", "suffix", "no-input", "file-untrained", "shape"],
)
def test_export_wrong_usage(published, tmp_path, capsys, arguments, message):
    words = [published if word == "FILE" else tmp_path / word if word.startswith("x.") else word for word in arguments]
    assert run("export", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_commands_run_from_the_shell(published, tmp_path):
    output = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "monai_mamba"]
    done = subprocess.run(
        [*command, "convert-weights", str(published), str(output)], capture_output=True, text=True, check=True
    )
    assert "MedMamba from medmamba.pth: " in done.stdout
    done = subprocess.run([*command, "inspect-weights", str(output)], capture_output=True, text=True, check=True)
    assert "safetensors" in done.stdout and "monai_mamba.network: MedMamba" in done.stdout
