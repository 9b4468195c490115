"""The loader: what it reads, and what it says about folders that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.model_worker.loader import load_weights
from services.model_worker.models.config import ModelConfig, ModelError, load_config, parse_config
from services.model_worker.models.decoder import Weights

CPU = torch.device("cpu")
BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64, "eos_token_id": 2,
    "rms_norm_eps": 1e-5, "torch_dtype": "float32",
}  # fmt: skip


def checkpoint(config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that transformers would save for the config, numbered through so that each is different."""
    h, i, d = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], h), "model.norm.weight": (h,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], h)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", q, h), ("self_attn.k_proj", kv, h), ("self_attn.v_proj", kv, h), ("self_attn.o_proj", h, q),
            ("mlp.gate_proj", i, h), ("mlp.up_proj", i, h), ("mlp.down_proj", h, i),
        ):  # fmt: skip
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if config.get("attention_bias") and "attn" in name:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (h,)
    return {name: torch.full(shape, float(n)) for n, (name, shape) in enumerate(shapes.items())}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, index = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def load(folder: Path, **options: Any) -> Weights:
    return load_weights(folder, load_config(folder), options.pop("dtype", torch.float32), CPU, **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_every_tensor_comes_to_its_place(tmp_path: Path, shards: int, changes: dict[str, Any]) -> None:
    config = BASE | changes
    tensors = checkpoint(config)
    seen: list[float] = []
    weights = load(write(tmp_path, config, tensors, shards), progress=lambda fraction, text: seen.append(fraction))
    assert seen == sorted(seen) and seen[-1] == 1.0
    for index, layer in enumerate(weights.layers):
        attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

        def stacked(prefix: str, names: tuple[str, ...], kind: str) -> Tensor:
            return torch.cat([tensors[f"{prefix}{name}_proj.{kind}"] for name in names])

        assert torch.equal(layer.qkv, stacked(attention, ("q", "k", "v"), "weight"))
        assert torch.equal(layer.gate_up, stacked(mlp, ("gate", "up"), "weight"))
        assert torch.equal(layer.o, tensors[attention + "o_proj.weight"])
        assert torch.equal(layer.down, tensors[mlp + "down_proj.weight"])
        assert torch.equal(layer.post_norm, tensors[f"model.layers.{index}.post_attention_layernorm.weight"])
        assert layer.down_bias is None and layer.q_norm is None
        if config.get("attention_bias"):
            assert layer.qkv_bias is not None and layer.o_bias is not None
            assert torch.equal(layer.qkv_bias, stacked(attention, ("q", "k", "v"), "bias"))
            assert torch.equal(layer.o_bias, tensors[attention + "o_proj.bias"])
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])
    if config.get("tie_word_embeddings"):
        assert weights.head is weights.embedding
    else:
        assert torch.equal(weights.head, tensors["lm_head.weight"])


def test_dtypes_are_converted(tmp_path: Path) -> None:
    tensors = {name: tensor.to(torch.float16) for name, tensor in checkpoint(BASE).items()}
    weights = load(write(tmp_path, BASE, tensors), dtype=torch.bfloat16)
    assert weights.head.dtype == weights.layers[1].qkv.dtype == torch.bfloat16
    assert torch.equal(weights.head, tensors["lm_head.weight"].bfloat16())


def test_superfluous_tensors_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    config = BASE | {"tie_word_embeddings": True}
    tensors = checkpoint(config)
    copy = tensors["model.embed_tokens.weight"].clone()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "lm_head.weight": copy}
    weights = load(write(tmp_path, config, tensors | extra))
    assert weights.head is weights.embedding


@pytest.mark.parametrize("shards", [1, 3])
def test_a_head_of_its_own_is_taken_whatever_the_config_says(tmp_path: Path, shards: int) -> None:
    """Who trains the head of a tied model may leave the config as it was; transformers does not tie them then."""
    tensors = checkpoint(BASE)
    weights = load(write(tmp_path, BASE | {"tie_word_embeddings": True}, tensors, shards))
    assert torch.equal(weights.head, tensors["lm_head.weight"])
    assert torch.equal(weights.embedding, tensors["model.embed_tokens.weight"])


def code_of(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder)
    return caught.value.code


def test_missing_files(tmp_path: Path) -> None:
    assert code_of(tmp_path) == "config_missing"
    (tmp_path / "config.json").write_text("{")
    assert code_of(tmp_path) == "config_invalid"
    (tmp_path / "config.json").write_text("[1]")
    assert code_of(tmp_path) == "config_invalid"
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    assert code_of(tmp_path) == "weights_missing"
    write(tmp_path, BASE, checkpoint(BASE), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert code_of(tmp_path) == "weights_missing"
    for content in ({}, {"weight_map": []}, {"weight_map": {"lm_head.weight": None}}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        assert code_of(tmp_path) == "weights_corrupt"


@pytest.mark.parametrize("keep", [0, 5, 100, -7])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    file = write(tmp_path, BASE, checkpoint(BASE)) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert code_of(tmp_path) == "weights_corrupt"


@pytest.mark.parametrize(
    ("code", "name", "tensor"),
    [
        ("weights_missing_tensor", "lm_head.weight", None),
        ("weights_missing_tensor", "model.layers.1.self_attn.k_proj.weight", None),
        ("weights_missing_tensor", "model.layers.1.mlp.down_proj.weight", None),
        ("weights_unexpected_tensor", "model.layers.2.mlp.down_proj.weight", torch.ones(16, 24)),
        ("weights_unexpected_tensor", "model.layers.0.self_attn.q_norm.weight", torch.ones(4)),
        ("weights_unexpected_tensor", "model.layers.0.self_attn.q_proj.bias", torch.ones(16)),
        ("weights_unexpected_tensor", "visual.weight", torch.ones(1)),
        ("weights_wrong_shape", "model.embed_tokens.weight", torch.ones(31, 16)),
        ("weights_wrong_shape", "model.layers.0.self_attn.v_proj.weight", torch.ones(16, 8)),
        ("unsupported_dtype", "model.layers.0.mlp.up_proj.weight", torch.ones(24, 16, dtype=torch.int8)),
        ("unsupported_dtype", "model.layers.0.mlp.up_proj.weight", torch.ones(24, 16).to(torch.float8_e4m3fn)),
    ],
)
def test_wrong_tensors(tmp_path: Path, code: str, name: str, tensor: Tensor | None) -> None:
    write(tmp_path, BASE, checkpoint(BASE))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, file)
    assert code_of(tmp_path) == code


def parsed(**changes: Any) -> ModelConfig:
    return parse_config({key: value for key, value in (BASE | changes).items() if value is not None})


def test_old_and_new_styles_mean_the_same() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = parsed(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **llama3}, torch_dtype="bfloat16")
    new = parsed(
        torch_dtype=None, dtype="bfloat16", rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **llama3}
    )
    assert old == new and new.rope.theta == 5e5 and new.rope.original_max_position == 32 and new.dtype == "bfloat16"
    oldest = parsed(rope_scaling={"type": "linear", "factor": 2.0})
    assert oldest == parsed(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})


def test_defaults_of_missing_fields() -> None:
    llama1 = parsed(num_key_value_heads=None, max_position_embeddings=None, rms_norm_eps=None)
    assert (llama1.num_kv_heads, llama1.max_position, llama1.norm_eps, llama1.head_dim) == (4, 2048, 1e-6, 4)
    qwen3 = parsed(architectures=["Qwen3ForCausalLM"])
    assert qwen3.head_dim == 128 and qwen3.qk_norm and not qwen3.qkv_bias
    qwen2 = parsed(architectures=["Qwen2ForCausalLM"])
    assert qwen2.qkv_bias and not qwen2.o_bias and not qwen2.qk_norm


def test_windows() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parsed(**mistral).windows == (4096, 4096) and parsed(**mistral).window == 4096
    assert parse_config(BASE | mistral | {"sliding_window": None}).windows == (0, 0)
    qwen2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert parsed(**qwen2).windows == (0, 0)
    mixed = parsed(**qwen2, use_sliding_window=True)
    assert mixed.windows == (0, 8) and mixed.window == 0  # one layer sees everything: no block may go
    kinds = ["sliding_attention", "full_attention"]
    assert parsed(**qwen2, use_sliding_window=True, layer_types=kinds).windows == (8, 0)
    assert parsed(sliding_window=8).windows == (0, 0)  # Llama has none


def test_eos_ids(tmp_path: Path) -> None:
    assert parsed(eos_token_id=[3, 4]).eos_ids == {3, 4} and parsed(eos_token_id=None).eos_ids == frozenset()
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load_config(tmp_path).eos_ids == {2, 7}
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_config(tmp_path).eos_ids == {2}
    # An id without a logit can neither be generated nor forbidden.
    assert parsed(eos_token_id=[3, 32, 10**20]).eos_ids == {3}


YARN = {"rope_type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("unsupported_architecture", {"architectures": ["GPT2LMHeadModel"]}),
        ("unsupported_architecture", {"architectures": None}),
        ("unsupported_architecture", {"architectures": {"0": "LlamaForCausalLM"}}),
        ("unsupported_architecture", {"architectures": [["LlamaForCausalLM"]]}),
        ("unsupported_architecture", {"hidden_act": "gelu"}),
        ("unsupported_architecture", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
        ("unsupported_architecture", {"partial_rotary_factor": 0.5}),
        ("unsupported_dtype", {"quantization_config": {"quant_method": "awq"}}),
        ("config_invalid", {"hidden_size": None}),
        ("config_invalid", {"hidden_size": "big"}),
        ("config_invalid", {"num_hidden_layers": 0}),
        ("config_invalid", {"num_hidden_layers": 10**6}),
        ("config_invalid", {"num_hidden_layers": 10**12}),
        ("config_invalid", {"num_hidden_layers": True}),
        ("config_invalid", {"max_position_embeddings": 2**40}),
        ("config_invalid", {"rms_norm_eps": float("nan")}),
        ("config_invalid", {"num_key_value_heads": 3}),
        ("config_invalid", {"head_dim": 5}),
        ("config_invalid", {"num_attention_heads": 0}),
        ("config_invalid", {"eos_token_id": "</s>"}),
        ("config_invalid", {"eos_token_id": [None]}),
        ("config_invalid", {"eos_token_id": -1}),
        ("config_invalid", {"rope_theta": -1.0}),
        ("config_invalid", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
        ("config_invalid", {"rope_scaling": YARN | {"beta_fast": "32"}}),
        ("config_invalid", {"rope_scaling": YARN | {"original_max_position_embeddings": "4096"}}),
        ("config_invalid", {"architectures": ["MistralForCausalLM"], "sliding_window": {"a": 1}}),
        ("config_invalid", {"architectures": ["MistralForCausalLM"], "sliding_window": -8}),
        ("config_invalid", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
        ("config_invalid", {"rope_scaling": "yarn"}),
        ("config_invalid", {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["x"]}),
    ],
)
def test_bad_configs(code: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as caught:
        parsed(**changes)
    assert caught.value.code == code
