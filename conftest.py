"""Runs before any test module is imported, and so before Triton and torch are."""

import os
from pathlib import Path

# Triton decides at import whether its kernels are compiled or interpreted on the CPU, so this cannot wait for tests/kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models are too small for more than one thread, and several processes run tests at the same time: threads that wait for work
# take the processor from them. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
