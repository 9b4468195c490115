"""The numeric operations of a decoder step: an interface (`kernels.ops`), its torch reference, its Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kernels.ops import Ops


def select_ops(device: torch.device | str) -> Ops:
    """Triton kernels on a CUDA device, plain torch elsewhere. Imported on demand, so that a CPU needs no Triton."""
    import torch as _torch

    if _torch.device(device).type == "cuda":
        from kernels.triton_ops import TritonOps

        return TritonOps(hopper_prefill=_torch.cuda.get_device_capability(device)[0] == 9 and _gluon_fits())
    from kernels.reference import ReferenceOps

    return ReferenceOps()


def _gluon_fits() -> bool:
    """Gluon is experimental and its names change; without those that we use, the plain kernel does the work."""
    from triton.experimental.gluon import language as gluon

    return hasattr(gluon, "thread_barrier")
