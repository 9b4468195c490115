"""The numeric operations of a decoder step: an interface (`kernels.ops`), its torch reference, its Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from kernels.ops import Ops


def select_ops(device: torch.device | str, batch_invariant: bool = False) -> Ops:
    """Triton kernels on a CUDA device, plain torch elsewhere. Imported on demand, so that a CPU needs no Triton.

    batch_invariant: a row's result has the same bits in every batch; see TritonOps. Raises ValueError where that cannot be had.
    """
    import torch as _torch

    if batch_invariant and not (
        _torch.device(device).type == "cuda" and _torch.cuda.get_device_capability(device)[0] >= 9
    ):
        raise ValueError("the batch-invariant mode needs a CUDA device of capability 9.0 or later")
    if _torch.device(device).type == "cuda":
        from kernels.triton_ops import TritonOps

        if batch_invariant:
            from kernels.attention_invariant import SPAN

            return TritonOps(fixed_split=SPAN)

        if _torch.cuda.get_device_capability(device)[0] == 9 and _gluon_fits():
            from kernels.attention_prefill_hopper import new_counters

            return TritonOps(hopper_counters=new_counters(device))
        return TritonOps()
    from kernels.reference import ReferenceOps

    return ReferenceOps()


def _gluon_fits() -> bool:
    """Gluon is experimental and its names change; without those that we use, the plain kernel does the work."""
    from triton.experimental.gluon import language as gluon

    return hasattr(gluon, "thread_barrier")
