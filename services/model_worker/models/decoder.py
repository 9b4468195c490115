"""The decoder-only transformer that all supported families are configurations of: pre-norm, rotary embedding, grouped-query
attention on the paged cache, gated MLP. Plain tensors and `kernels.ops`; nothing here depends on a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, Ops, Product, whole
from services.model_worker.models.config import ModelConfig
from services.model_worker.models.rope import rope_table


@dataclass(slots=True)
class Layer:
    """Weights of one layer; projections are [out, in], q, k and v stacked in `qkv`, gate and up in `gate_up`."""

    input_norm: Tensor
    qkv: Tensor
    o: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(slots=True)
class Weights:
    """`head` is `embedding` itself when they are tied; both [V, H]."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape, by its path in Weights ("layers.3.qkv")."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * head, config.num_kv_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "post_norm": (hidden,),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
    }
    if config.qkv_bias:
        layer["qkv_bias"] = (q + 2 * kv,)
    if config.o_bias:
        layer["o_bias"] = (hidden,)
    if config.mlp_bias:
        layer |= {"gate_up_bias": (2 * inner,), "down_bias": (hidden,)}
    if config.qk_norm:
        layer |= {"q_norm": (head,), "k_norm": (head,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["norm"] = (hidden,)
    if not config.tied:
        shapes["head"] = (config.vocab_size, hidden)
    return shapes


def assemble(parameters: dict[str, Tensor], config: ModelConfig) -> Weights:
    """Parameters by path → Weights."""
    layers: list[dict[str, Tensor]] = [{} for _ in range(config.num_layers)]
    for path, tensor in parameters.items():
        if path.startswith("layers."):
            _, index, name = path.split(".")
            layers[int(index)][name] = tensor
    embedding = parameters["embedding"]
    return Weights(
        embedding, [Layer(**layer) for layer in layers], parameters["norm"], parameters.get("head", embedding)
    )


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, max_positions: int) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.scale = config.head_dim**-0.5
        self.cos_sin = rope_table(config.rope, config.head_dim, max_positions, weights.embedding.device)
        # So many layers launch all the kernels that there are, for those who want them compiled.
        self.rehearsal_layers = 2 if len(set(config.windows)) == 1 else config.num_layers

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        caches: list[tuple[Tensor, Tensor]],
        wanted: Tensor | None,
        last: AttentionBatch | None = None,
    ) -> Tensor:
        """ids int32 or int64 [T], positions int32 [T], slots int32 [T], caches: (keys, values) of each layer, see kernels.ops → the
        final hidden states, normed, [R, H] of the rows `wanted` int32 [R] (None: of all rows). last: the batch of these rows alone;
        with it the last layer computes only keys and values of the others."""
        residual = self.embed(ids)
        x: Product | None = None
        for index, cache in enumerate(caches):
            q = self.queries(index, x, residual, positions, slots, cache)
            if last is not None and index == len(caches) - 1:
                assert wanted is not None
                return self.last_rows(q, residual, cache, wanted, last)
            attended = self.ops.attention(q, *cache, batch, self.scale, self.config.windows[index])
            x = self.after_attention(index, attended, residual)
        assert x is not None
        return self.hidden(x, residual, wanted)

    # The parts of `forward`. The residual [T, H] is updated in place by each.

    def embed(self, ids: Tensor, out: Tensor | None = None) -> Tensor:
        """The first residual (`out`, if given)."""
        return self.ops.embed(ids, self.weights.embedding, out)

    def queries(
        self,
        index: int,
        x: Product | None,
        residual: Tensor,
        positions: Tensor,
        slots: Tensor,
        cache: tuple[Tensor, Tensor],
        out: Tensor | None = None,
    ) -> Tensor:
        """A layer up to its attention: writes keys and values to its cache → q [T, Hq, D] (`out`, if given). x [T, H]: what the layer
        before adds to the residual, None before the first."""
        config, ops, eps, layer = self.config, self.ops, self.config.norm_eps, self.weights.layers[index]
        if x is None:
            normed = ops.rms_norm(residual, layer.input_norm, eps)
        else:
            normed = ops.add_rms_norm(x, residual, layer.input_norm, eps)
        return ops.rope_and_cache(
            ops.product(normed, layer.qkv, layer.qkv_bias), self.cos_sin, positions, slots, *cache,
            config.num_heads, config.num_kv_heads, layer.q_norm, layer.k_norm, eps, out,
        )  # fmt: skip

    def after_attention(self, index: int, attended: Tensor, residual: Tensor) -> Product:
        """A layer from its attention's result [T, Hq, D] on → what it adds to the residual, [T, H]."""
        ops, layer = self.ops, self.weights.layers[index]
        added = ops.product(attended.flatten(1), layer.o, layer.o_bias)
        x = ops.add_rms_norm(added, residual, layer.post_norm, self.config.norm_eps)
        x = ops.gated_product(x, layer.gate_up, layer.gate_up_bias)
        return ops.product(x, layer.down, layer.down_bias)

    def last_rows(
        self, q: Tensor, residual: Tensor, cache: tuple[Tensor, Tensor], wanted: Tensor, batch: AttentionBatch
    ) -> Tensor:
        """The final hidden states of the rows `wanted`, from all rows' queries of the last layer on."""
        if not wanted.shape[0]:
            return residual.new_empty(0, residual.shape[1])
        q, residual = q.index_select(0, wanted), residual.index_select(0, wanted)
        attended = self.ops.attention(q, *cache, batch, self.scale, self.config.windows[-1])
        return self.hidden(self.after_attention(self.config.num_layers - 1, attended, residual), residual, None)

    def hidden(self, x: Product, residual: Tensor, wanted: Tensor | None) -> Tensor:
        """The final hidden states of the rows `wanted`."""
        if wanted is not None:
            x, residual = whole(x).index_select(0, wanted), residual.index_select(0, wanted)
        return self.ops.add_rms_norm(x, residual, self.weights.norm, self.config.norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] → [R, V], in the activations' dtype."""
        return self.ops.linear(hidden, self.weights.head)


def dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Weights:
    """Random weights made on the device, scaled so that activations stay of order one; norms are one."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = {}
    for path, shape in parameter_shapes(config).items():
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if path.endswith("norm"):
            tensor.fill_(1)
        else:
            tensor.normal_(0.0, 0.02 if path == "embedding" else shape[-1] ** -0.5, generator=generator)
        parameters[path] = tensor
    return assemble(parameters, config)
