"""The kernels compile for Hopper as meant: nothing spilled, tensor cores and TMA used. No GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)  # some fifty compilations


@pytest.fixture(scope="module")
def report() -> dict[str, str]:
    """Lines of `python -m kernels.resources` by operation; a process of its own, as the interpreter must be off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.resources"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line[:50].strip(): line for line in done.stdout.splitlines()}


def test_nothing_spills_and_no_matrix_product_is_serialised(report):
    assert len(report) >= 20
    for line in report.values():
        assert " spill    0 " in line and "SERIALIZED" not in line, line


def test_attention_uses_tensor_cores_and_tma(report):
    attention = [
        line for line in report.values() if "_prefill_" in line or "_decode_kernel" in line or "_span_kernel" in line
    ]
    assert len(attention) >= 10
    for line in attention:
        assert ("wgmma   0" not in line) or ("mma   0 tma" not in line), line
        by_pointers = "P 16" in line and "Hopper" not in line
        assert ("tma  0" in line) == by_pointers, line
