"""Matrices in half their bytes, for what only guesses: a guess that is wrong costs time and changes no output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = 127
_PIECE = 1 << 26  # elements that are in f32 at the same time


@dataclass(frozen=True, slots=True)
class EightBit:
    """Rows of whole numbers, each with a factor of its own: values int8 [..., N, K] × factors f32 [..., N]. Rounding moves an element
    by at most 1/254 of its row's largest (symmetric quantisation by row, Jacob et al. 2018, arXiv 1712.05877)."""

    values: Tensor
    factors: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> EightBit:
        """weight [..., N, K] of any floating type."""
        rows = weight.reshape(-1, weight.shape[-1])
        values = torch.empty_like(rows, dtype=torch.int8)
        factors = torch.empty(len(rows), device=rows.device)
        step = max(1, _PIECE // weight.shape[-1])
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            exact = rows[part].float()
            factors[part] = (exact.abs().amax(1) / _STEPS).clamp_(min=torch.finfo(torch.float32).tiny)
            values[part] = (exact / factors[part, None]).round_()
        return cls(values.view(weight.shape), factors.view(weight.shape[:-1]))

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def __getitem__(self, index: object) -> EightBit:
        """Of the dimensions before the rows."""
        return EightBit(self.values[index], self.factors[index])  # type: ignore[index]

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """[..., N, K]"""
        return (self.values.to(torch.promote_types(dtype, torch.float32)) * self.factors[..., None]).to(dtype)
