"""Where a trained network looks, whether these maps may be believed, and how it orders the cases."""

from __future__ import annotations
