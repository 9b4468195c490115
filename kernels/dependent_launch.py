"""Programmatic dependent launch (CUDA programming guide): a kernel's programs start while the kernel before it still runs.

Launched with `launch_options`, a kernel may run anything that does not depend on earlier kernels first: address arithmetic, and
loads of weights, which nothing writes while a model runs. Before it reads any other memory or writes any, it must call
`wait_for_inputs`, which returns once all earlier kernels have ended and their writes are visible. Every program must call it:
that is what makes "all" follow from "the one before". Where the next kernel is not launched this way, nothing changes.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ENABLED = True  # False launches kernels one after another, to compare


@triton.jit
def start_next(PDL: tl.constexpr):
    """Lets the next kernel start as soon as all programs of this one run: it waits in turn."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


@cache
def _supported(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 9
    return not triton.knobs.runtime.interpret  # tensors of the CPU: `kernels.resources` compiles for a GPU


def launch_options(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch: the kernel's PDL parameter and the launch attribute."""
    supported = ENABLED and _supported(device)
    return {"PDL": supported, "launch_pdl": supported}
