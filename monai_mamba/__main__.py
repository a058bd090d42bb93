"""``python -m monai_mamba``: the same as the ``monai-mamba`` command, for when its script is not on the PATH."""

from __future__ import annotations

import sys

from monai_mamba.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
