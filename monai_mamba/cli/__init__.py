"""The ``monai-mamba`` command: one file per subcommand, registered in `monai_mamba.cli.main`."""
