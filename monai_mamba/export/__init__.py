"""Networks as files for other runtimes: ONNX, torch.export, TorchScript; each file is compared with its network."""

from __future__ import annotations

from monai_mamba.export.files import FORMATS, ExportReport, export_network

__all__ = ["FORMATS", "ExportReport", "export_network"]
