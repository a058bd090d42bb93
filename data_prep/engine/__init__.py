"""Scan, plan, run: what all sources share."""
