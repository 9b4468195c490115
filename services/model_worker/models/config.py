"""The decoder's configuration, read from a Hugging Face config.json of any age."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import StartError
from shared.model_folder import eos_ids


class ModelError(StartError):
    """A model folder that cannot be served."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; `kind` is default, linear, llama3 or yarn, and `factor` and `options` are that kind's own parameters."""

    theta: float
    kind: str
    original_max_position: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What `models.decoder.Decoder` is built from.

    windows        for each layer the sliding window in positions, 0: none
    max_position   longest context the model is made for
    dtype          of the checkpoint, as a name ("bfloat16")
    qkv_bias, o_bias, mlp_bias   which projections have biases
    qk_norm        RMS norm of each query and key head before the rotary embedding (Qwen3)
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    max_position: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    eos_ids: frozenset[int]

    @property
    def window(self) -> int:
        """Positions that any layer can see, 0: all. A block of the cache is needed as long as one layer needs it."""
        return max(self.windows) if all(self.windows) else 0


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family's config.json is to be read: defaults of missing fields are those of its class in transformers."""

    name: str
    defaults: dict[str, Any]
    qkv_bias: bool | None = None  # None: `attention_bias` says so, of all four projections
    qk_norm: bool = False


# By the name in config.json's "architectures".
FAMILIES = {
    "LlamaForCausalLM": Family("llama", {"max_position_embeddings": 2048}),
    "MistralForCausalLM": Family(
        "mistral",
        {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "sliding_window": 4096},
        qkv_bias=False,
    ),
    "Phi3ForCausalLM": Family("phi3", {"max_position_embeddings": 4096}, qkv_bias=False),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
        qkv_bias=True,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "max_window_layers": 28,
            "head_dim": 128,
        },
        qk_norm=True,
    ),
}


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError("config_missing" | "config_invalid")."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("config_missing", f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ModelError("config_invalid", f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ModelError("config_invalid", f"{path} does not hold a JSON object")
    return content


def load_config(folder: Path) -> ModelConfig:
    """The configuration of a Hugging Face model folder. Raises ModelError."""
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return parse_config(raw, read_json(generation) if generation.exists() else {})


def parse_config(raw: dict[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The content of config.json and of generation_config.json → ModelConfig. Raises ModelError."""
    architectures = raw.get("architectures") or [None]
    name = architectures[0] if isinstance(architectures, list) else architectures
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError("unsupported_architecture", f"{name} is none of {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ModelError("unsupported_dtype", "quantised checkpoints are not supported")
    config = {**family.defaults, **raw}
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ModelError("unsupported_architecture", f"activation {activation} is not supported, only silu")
    try:
        hidden, heads, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
        attention_bias = bool(config.get("attention_bias", False))
        parsed = ModelConfig(
            family=family.name,
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope=_rope(config),
            windows=_windows(family, config, _size("num_layers", layers)),
            max_position=config["max_position_embeddings"],
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias and family.qkv_bias is None,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family.qk_norm,
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
            eos_ids=eos_ids(config, generation or {}, config["vocab_size"]),
        )
    except KeyError as error:
        raise ModelError("config_invalid", f"config.json lacks {error}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ModelError("config_invalid", f"config.json: {error}") from None
    _check(parsed)
    return parsed


def _size(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _TOO_MUCH.get(name, 2**31):
        raise ModelError("config_invalid", f"{name} is {value!r:.80}, not a positive integer of a sensible size")
    return value


# A million layers would be built, one by one, before their weights were missed.
_TOO_MUCH = {"num_layers": 10_000}


def _check(config: ModelConfig) -> None:
    sizes = (
        "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_position",
    )  # fmt: skip
    for name in sizes:
        _size(name, getattr(config, name))
    if not (math.isfinite(config.norm_eps) and config.norm_eps >= 0):
        raise ModelError("config_invalid", f"rms_norm_eps is {config.norm_eps}")
    if config.num_heads % config.num_kv_heads:
        raise ModelError("config_invalid", f"{config.num_heads} heads cannot share {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise ModelError("config_invalid", f"head_dim {config.head_dim} is odd: no rotary embedding")


def _rope(config: dict[str, Any]) -> RopeConfig:
    """transformers ≥ 5 writes one `rope_parameters`; before, `rope_theta` and `rope_scaling`, whose kind was first called `type`."""
    options = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = options.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError("unsupported_architecture", f"rotary embedding of kind {kind!r} is not supported")
    if (partial := options.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0) != 1.0:
        raise ModelError("unsupported_architecture", f"a partial rotary embedding ({partial}) is not supported")
    original = options.pop("original_max_position_embeddings", None) or config["max_position_embeddings"]
    numbers = {"rope_theta": theta, "original_max_position_embeddings": original}
    for name in {"linear": ("factor",), "yarn": ("factor",), "llama3": _LLAMA3}.get(kind, ()):
        if name not in options:
            raise ModelError("config_invalid", f"rotary embedding of kind {kind} needs {name}")
        numbers[name] = options[name]
    if kind == "yarn":
        numbers |= {name: options[name] for name in _YARN if options.get(name)}
    for name, value in numbers.items():
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ModelError("config_invalid", f"rotary embedding: {name} is {value!r:.80}, not a positive number")
    return RopeConfig(float(theta), kind, original, options)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor")
_YARN = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


def _windows(family: Family, config: dict[str, Any], layers: int) -> tuple[int, ...]:
    window = config.get("sliding_window") or 0
    if type(window) is not int or window < 0:
        raise ModelError("config_invalid", f"sliding_window is {window!r:.80}, not a positive integer")
    if "max_window_layers" not in family.defaults:  # all layers alike
        return (window if family.name in ("mistral", "phi3") else 0,) * layers
    if not config.get("use_sliding_window", False) or not window:
        return (0,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        return tuple(window if layer >= config["max_window_layers"] else 0 for layer in range(layers))
    if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise ModelError("config_invalid", f"layer_types {kinds} do not fit {layers} layers")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
