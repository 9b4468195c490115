"""Tables of the rotary position embedding (Su et al. 2021, RoFormer, arXiv 2104.09864) and its extensions to longer contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from services.model_worker.models.config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, positions: int, device: torch.device) -> Tensor:
    """f32 [positions, head_dim]: the cosines of the head_dim / 2 angles, then their sines."""
    frequencies = inverse_frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * _attention_factor(rope)).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """f32 [head_dim / 2], radians per position."""
    frequencies: Tensor = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return frequencies / _factor(rope)
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, head_dim)
    return frequencies


def _factor(rope: RopeConfig) -> float:
    return float(rope.options["factor"])


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (rope.options[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    stretched: Tensor = (1 - kept) * frequencies / factor + kept * frequencies
    return stretched


def _yarn(frequencies: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), "NTK by parts"."""

    def dimension(turns: float) -> float:
        """Where the embedding turns that often over the original context."""
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.options.get("beta_fast") or 32.0), dimension(rope.options.get("beta_slow") or 1.0)
    if rope.options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / _factor(rope) * ramp + frequencies * (1 - ramp)


def _attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature of the attention, folded into the table as it scales queries and keys alike."""
    if rope.kind != "yarn":
        return 1.0
    options, factor = rope.options, rope.options["factor"]
    if (given := options.get("attention_factor")) is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if options.get("mscale") and options.get("mscale_all_dim"):
        return scale(options["mscale"]) / scale(options["mscale_all_dim"])
    return scale(1.0)
