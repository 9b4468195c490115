"""Where each checkpoint tensor belongs. All families supported so far name their tensors as Llama does, but that Phi-3 stores q, k
and v in one, and gate and up: as the decoder has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from services.model_worker.models.config import ModelConfig

_TOP = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "norm", "lm_head.weight": "head"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_PLAIN = {
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "post_norm",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "self_attn.o_proj.weight": "o",
    "self_attn.o_proj.bias": "o_bias",
    "self_attn.qkv_proj.weight": "qkv",
    "mlp.gate_up_proj.weight": "gate_up",
    "mlp.down_proj.weight": "down",
    "mlp.down_proj.bias": "down_bias",
}


@dataclass(frozen=True, slots=True)
class Destination:
    """Rows first … first + rows - 1 of the parameter at `path` (rows 0: all of it)."""

    path: str
    first: int = 0
    rows: int = 0


def destination(name: str, config: ModelConfig) -> Destination | None:
    """Where the checkpoint tensor `name` goes; None if it is not part of the model."""
    if name in _TOP:
        return Destination(_TOP[name])
    if not (match := _LAYER.fullmatch(name)):
        return None
    layer, rest = f"layers.{match[1]}.", match[2]
    if rest in _PLAIN:
        return Destination(layer + _PLAIN[rest])
    q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    stacked = {
        "self_attn.q_proj": ("qkv", 0, q),
        "self_attn.k_proj": ("qkv", q, kv),
        "self_attn.v_proj": ("qkv", q + kv, kv),
        "mlp.gate_proj": ("gate_up", 0, inner),
        "mlp.up_proj": ("gate_up", inner, inner),
    }
    module, _, kind = rest.rpartition(".")
    if module not in stacked or kind not in ("weight", "bias"):
        return None
    parameter, first, rows = stacked[module]
    return Destination(layer + parameter + ("_bias" if kind == "bias" else ""), first, rows)


def ignorable(name: str, config: ModelConfig) -> bool:
    """Tensors that some checkpoints hold and no model needs: a copy of a tied head, tables that are computed."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")
