"""``python -m ultramem_ds.kernels``: build the native extension now, say what will be used."""

from __future__ import annotations

import sys
import time

from ultramem_ds.kernels import registry
from ultramem_ds.kernels.build import BuildError, build


def main() -> int:
    """Build; print the library and the kernel that ``auto`` takes; 1 if it cannot be built."""
    start_s = time.monotonic()
    try:
        path = build()
    except BuildError as error:
        print(f"the native lookup extension cannot be built: {error}", file=sys.stderr)
        return 1
    print(f"{path} ({time.monotonic() - start_s:.1f} s)")
    print(registry.describe("auto", "cpu"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
