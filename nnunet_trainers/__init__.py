"""Trainer classes for nnU-Net v2.

nnU-Net imports every file of this folder as a top-level module while it looks for a trainer by name, and forgets the
modules afterwards. So the files define names and nothing else; the logic lies in ``monai_mamba.nnunet``.
"""
