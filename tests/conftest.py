"""What all tests share: one BLAS thread, no settings from the caller's environment, hypothesis without a stopwatch."""

from __future__ import annotations

import os
import signal

# A shell has its background jobs ignore Ctrl-C, and with them all that they start: tests that send it would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
for _name in [name for name in os.environ if name.startswith("RELOD_")]:
    del os.environ[_name]

from hypothesis import settings  # noqa: E402

# Time limits per example fail on a busy machine for no fault of the code; the limit per test stays.
settings.register_profile("relod", deadline=None, max_examples=60)
settings.load_profile("relod")
