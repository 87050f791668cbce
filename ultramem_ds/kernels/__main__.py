"""``python -m ultramem_ds.kernels``: build the native extension now, say what will be used.

``--tune`` times the Triton kernels' tiles on this machine's GPU instead (``kernels/tiles``).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ultramem_ds.kernels import registry, tiles
from ultramem_ds.kernels.build import BuildError, build


def main() -> int:
    """Build or tune, as the command line says; 1 if it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m ultramem_ds.kernels", description=__doc__)
    parser.add_argument("--tune", action="store_true", help="time tiles on this GPU, write a table")
    parser.add_argument("--out", type=Path, default=tiles.PATH, help="of --tune; default: in place")
    arguments = parser.parse_args()
    return _tune(arguments.out) if arguments.tune else _build()


def _tune(out: Path) -> int:
    try:
        from ultramem_ds.kernels import tuning

        tuning.main(out)
    except (ImportError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _build() -> int:
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
