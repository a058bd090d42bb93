"""How much the figures of a trained network suffer when its images are worse than those it was trained on."""

from __future__ import annotations
