"""Entry point of `relod` and of `python -m relod`."""

from __future__ import annotations

import os
import sys

# Read by numpy, OpenBLAS and OpenMP when they are loaded, so set before any import: two BLAS threads on a busy
# machine turned a 2 ms product into 10-15 ms. The update worker sets its own number of torch threads.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")


def main() -> None:
    """Run the command line and exit with its code."""
    from .cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
