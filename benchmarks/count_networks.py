"""Print the table of docs/networks/README.md: parameters and operations of every network of the registry.

python benchmarks/count_networks.py
"""

from __future__ import annotations

import torch

from monai_mamba.networks import create_model, list_models, model_entry
from monai_mamba.networks.counting import count


def row(name: str) -> str:
    """One line of the table: the network as the registry builds it, on its usual input."""
    entry = model_entry(name)
    with torch.device("meta"):
        network = create_model(name)
    counts = count(network, entry.input_shape)
    figures = (counts.macs, counts.scan_operations, counts.flops)
    printed = " / ".join(value for value in (entry.published.parameters, entry.published.flops) if value)
    beyond = ", ".join(f"{key}={value}" for key, value in entry.published.arguments.items())
    return " | ".join(
        (
            f"| `{name}`",
            "x".join(map(str, entry.input_shape)),
            f"{counts.parameters:,}",
            *(f"{value / 1e9:.3f}" for value in figures),
            f"{printed}{f' ({beyond})' if beyond else ''} |",
        )
    )


if __name__ == "__main__":
    print("| name | input | parameters | GMACs | scan, G | GFLOPs | printed |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for family in ("nnmamba*", "medmamba*", "vmamba*", "xfmamba*"):
        for name in list_models(family):
            print(row(name), flush=True)
