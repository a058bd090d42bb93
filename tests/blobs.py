"""A task that small networks learn in seconds: is there a bright blob, and where it is is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

SIZE = 32
CLASSES = ["empty", "blob"]


def draw_blobs(number: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gray images ``(number, SIZE, SIZE)`` in [0, 1], labels and the centers of the blobs (row, column)."""
    generator = np.random.default_rng(seed)
    label = np.arange(number) % 2
    center = generator.uniform(7, SIZE - 7, (number, 2))
    grid = np.mgrid[:SIZE, :SIZE]
    distance = ((grid[None] - center[:, :, None, None]) ** 2).sum(1)
    blob = np.exp(-distance / (2 * 3.0**2)) * label[:, None, None]
    images = 0.25 + 0.05 * generator.standard_normal((number, SIZE, SIZE)) + 0.6 * blob
    return images.clip(0, 1), label, center


def write_blobs(folder: Path, number: int, seed: int, color: bool = False, views: int = 1) -> Path:
    """Write a data set of blobs, all of it in the section `test`; two cases are of one patient."""
    (folder / "images").mkdir(parents=True)
    images, label, _ = draw_blobs(number, seed)
    cases = []
    for index, image in enumerate(images):
        pixels = (image * 255).round().astype(np.uint8)
        case: dict[str, object] = {"case": f"c{index:02d}", "patient": f"p{index // 2:02d}", "label": int(label[index])}
        for view in range(views):
            shown = np.stack([pixels, pixels // 2, 255 - pixels], -1) if color else np.roll(pixels, 5 * view, 1)
            name = f"images/{index:02d}_{view}.png"
            Image.fromarray(shown).save(folder / name)
            case["image" if views == 1 else f"image{view + 1}"] = name
        cases.append(case)
    (folder / "datalist.json").write_text(json.dumps({"classes": CLASSES, "test": cases}))
    return folder


def train_on_blobs(network: nn.Module, steps: int = 60) -> nn.Module:
    """Train on images in [-1, 1] with three equal channels, as the bundle medmamba prepares them."""
    torch.manual_seed(0)
    images, label, _ = draw_blobs(256, seed=1)
    data = torch.from_numpy(images).float()[:, None].repeat(1, 3, 1, 1) * 2 - 1
    target = torch.from_numpy(label)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    network.train()
    for _ in range(steps):
        rows = torch.randint(0, len(data), (32,))
        loss = nn.functional.cross_entropy(network(data[rows]), target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()
