"""``monai-mamba doctor``: what is installed, what would be used, and whether it computes the right thing."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    search_trainers: Annotated[
        bool,
        typer.Option(
            "--trainers/--no-trainers",
            help="Ask nnU-Net, in a fresh process, whether it finds the trainers (about 10 seconds).",
        ),
    ] = True,
) -> None:
    """Show versions, devices and scan backends, and check the scan against its definition.

    Exit code 1 if the self-check of the scan fails. A trainer that nnU-Net does not find is reported, but is no
    failure: `monai-mamba nnunet train` works without the search.
    """
    facts = _collect(search_trainers)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print(facts)
    if not all(check["ok"] for check in facts["self_check"]):
        raise typer.Exit(1)


def _collect(search_trainers: bool) -> dict[str, Any]:
    from monai_mamba import diagnostics

    devices = diagnostics.collect_devices()
    return {
        "versions": diagnostics.collect_versions(),
        "devices": devices,
        "backends": diagnostics.collect_backends(),
        "chosen": diagnostics.chosen_backends(),
        "self_check": [diagnostics.check_scan(name) for name in ("cpu", *(["cuda"] if devices["cuda"] else []))],
        "nnunet_trainers": diagnostics.check_trainers() if search_trainers else None,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def mark(good: bool) -> Text:
        return Text("yes", "green") if good else Text("no", "yellow")

    versions = Table("Package", "Version", title="Versions", title_justify="left")
    for name, version in facts["versions"].items():
        versions.add_row(name, version or Text("not installed", "dim"))
    console.print(versions)

    devices = facts["devices"]
    console.print(Text("\nDevices", "italic"))
    console.print(f"  {devices['platform']}", highlight=False)
    console.print(
        f"  CPU: {devices['cpu']['cores']} cores, {devices['cpu']['torch_threads']} torch threads", highlight=False
    )
    for index, gpu in enumerate(devices["cuda"]):
        console.print(
            f"  CUDA {index}: {gpu['name']}, {gpu['memory_gb']} GB, capability {gpu['capability']}", highlight=False
        )
    if not devices["cuda"]:
        console.print("  CUDA: none found by torch", highlight=False)
    console.print(f"  MPS: {'available' if devices['mps'] else 'none'}\n", highlight=False)

    backends = Table("Backend", "Available", "Reason", "Serves", "Devices", title="Scan backends", title_justify="left")
    for backend in facts["backends"]:
        backends.add_row(
            backend["name"],
            mark(backend["available"]),
            Text(backend["reason"]),
            ", ".join(backend["ops"]),
            ", ".join(backend["devices"]),
        )
    console.print(backends)
    for device_type, chosen in facts["chosen"].items():
        console.print(
            Text(f"  {device_type} tensors: " + ", ".join(f"{op} on {name}" for op, name in chosen.items())),
            highlight=False,
        )

    console.print(Text("\nSelf-check of the scan against the sequential definition", "italic"))
    for check in facts["self_check"]:
        if check["ok"]:
            verdict = Text("  ok", "green")
            detail = f" ({check['device']}): error {check['forward_error']:.1e} forward, "
            detail += f"{check['gradient_error']:.1e} gradients, {check['seconds']:.2f} s"
        else:
            verdict, detail = Text("  FAILED", "red"), f" ({check['device']}): {check['reason']}"
        console.print(verdict + Text(detail), highlight=False)

    trainers = facts["nnunet_trainers"]
    if trainers is not None:
        console.print(Text("\nnnU-Net trainers", "italic"))
        if trainers["ok"]:
            console.print(
                Text("  ok", "green") + Text(f": nnUNetv2_train finds {trainers['trainer']}"), highlight=False
            )
        else:
            reason = (
                "the start-up file is switched off by MONAI_MAMBA_NO_STARTUP; " if trainers["startup_disabled"] else ""
            )
            console.print(Text("  not found", "yellow") + Text(f": {reason}{trainers['reason']}"), highlight=False)
