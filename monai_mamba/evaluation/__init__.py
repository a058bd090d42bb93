"""Metrics as the papers define them, with intervals: tables of predictions in, tables of figures out."""

from __future__ import annotations
