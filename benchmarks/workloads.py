"""Shapes of models and the workloads that are measured on them.

Without torch: a process that plays clients imports this, and should be there at once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTEXT = 16_896

SHAPES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
    # For trying the script itself on a CPU.
    "tiny": {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 32768,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """`count` prompts whose lengths are drawn from `prompt`, each generating a number of tokens drawn from `output` (both inclusive).

    figure    what is measured: output or input tokens per second, or the milliseconds to the first token
    at_least, aim    targets by shape
    """

    name: str
    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    figure: str = "output tok/s"
    temperature: float = 0.0
    at_least: dict[str, float] = field(default_factory=dict)
    aim: dict[str, float] = field(default_factory=dict)


def _targets(large: float, small: float) -> dict[str, float]:
    return {"llama3.1-8b": large, "qwen3-0.6b": small}


# In the order of growing need of time, so that a short lease gives the most.
WORKLOADS = [
    Workload("ttft 2048", 1, (2048, 2048), (1, 1), "ms", at_least=_targets(52, 9.3)),
    Workload("batch 1", 1, (128, 128), (256, 256), at_least=_targets(230, 700), aim=_targets(253, 900)),
    Workload("batch 8", 8, (128, 128), (256, 256), at_least=_targets(1700, 5400), aim=_targets(1800, 6500)),
    Workload("batch 64", 64, (1024, 1024), (256, 256), at_least=_targets(4673, 14615), aim=_targets(4900, 17000)),
    Workload("batch 256", 256, (512, 512), (256, 256), at_least=_targets(9784, 30464), aim=_targets(10300, 35000)),
    Workload("prefill 64x2048", 64, (2048, 2048), (1, 1), "input tok/s", at_least=_targets(42000, 396000)),
    Workload("prefill 8x16384", 8, (16384, 16384), (1, 1), "input tok/s", at_least=_targets(33600, 196000)),
    Workload("nano256", 256, (100, 1024), (100, 1024), temperature=0.6, at_least=_targets(9642, 23541), aim=_targets(10500, 28000)),
]  # fmt: skip


def earlier_rows(file: Path) -> dict[str, Any]:
    """The complete rows that a run before this one has left."""
    rows = json.loads(file.read_text())["workloads"] if file.is_file() else {}
    return {name: row for name, row in rows.items() if row.get("complete", True)}
