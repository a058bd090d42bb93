"""What stands behind the trainer classes of ``nnunet_trainers``; needs nnunetv2, imported by the submodules only."""
