"""Runs before any test module is imported, and so before Triton is."""

import os
from pathlib import Path

# Triton decides at import whether its kernels are compiled or interpreted on the CPU, so this cannot wait for tests/kernels.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
