"""What the MONAI bundles are made of: data lists, samples, transforms, losses, samplers and handlers.

The bundles' configurations refer to these by their full names. Everything needs torch and MONAI.
"""

from __future__ import annotations
