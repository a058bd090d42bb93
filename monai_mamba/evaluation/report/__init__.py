"""Reports: one HTML file with pictures, curves and tables that needs no network and reads well on a phone."""

from __future__ import annotations
