"""`kernels.ops.Ops` by Triton kernels: each method launches the kernels of one module."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import activation, draft, kv_move, logit_edits, norm, rope_cache, sampling, step_rows, token_bitmask
from kernels.attention_decode import decode_attention
from kernels.attention_invariant import invariant_attention
from kernels.attention_prefill import prefill_attention
from kernels.eight_bit import EightBit
from kernels.gemm_choice import choose, choose_gated, invariant
from kernels.ops import AcceptedTree, AttentionBatch, LogitEdits, Product, RowLayout, SamplingBatch, TreeTables
from kernels.skinny_gemm import add_up, fits, skinny_gated_product, skinny_linear, skinny_product

INVARIANT_ROWS = 1024  # of one product in the batch-invariant mode


class TritonOps:
    """Launches on torch's current stream. Grids follow from shapes and host bounds, so a step can be captured in a CUDA graph.

    fixed_split: the batch-invariant mode (None: off). A row's result then depends on its own sequence and on nothing else, bit by bit:
    neither on the other rows of the batch, nor on how its prompt was cut into chunks, nor on whether its context was prefilled or
    decoded. Contexts are cut into spans of so many tokens (a multiple of 64), and a product's kernel depends on the weights' shape
    alone. Rows of speculation trees are equal among themselves only: the mode is for engines without.
    hopper_counters: prefill by the warp-specialised kernel where it fits (capability 9.0, heads of 128, no window), which counts tiles
    in them, see attention_prefill_hopper.new_counters.
    """

    name = "triton"

    def __init__(self, fixed_split: int | None = None, hopper_counters: Tensor | None = None) -> None:
        self.fixed_split = fixed_split
        self.hopper_counters = hopper_counters

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return add_up(self.product(x, weight, bias))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
        if fits(x, weight):
            if self.fixed_split is not None:
                return self._invariant_linear(x, weight, bias)
            if (config := choose(x.shape[0], *weight.shape)) is not None:
                return skinny_product(x, weight, bias, config)
        return torch.nn.functional.linear(x, weight, bias)

    def _invariant_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Many rows are taken in turn: the spans' sums of all of a long prefill would take gigabytes."""
        config = invariant(*weight.shape)
        if x.shape[0] <= INVARIANT_ROWS:
            return skinny_linear(x, weight, bias, config)
        out = x.new_empty(x.shape[0], weight.shape[0])
        for part, into in zip(x.split(INVARIANT_ROWS), out.split(INVARIANT_ROWS), strict=True):
            into.copy_(skinny_linear(part, weight, bias, config))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps, residual)

    def silu_mul(self, gate_up: Product) -> Tensor:
        return activation.silu_mul(gate_up)

    def gated_product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.fixed_split is None and fits(x, weight):
            config = choose_gated(x.shape[0], *weight.shape)
            if config is not None:
                return skinny_gated_product(x, weight, bias, config)
        return self.silu_mul(self.product(x, weight, bias))

    def rope_and_cache(
        self,
        qkv: Product,
        cos_sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        num_q_heads: int,
        num_kv_heads: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        out: Tensor | None = None,
    ) -> Tensor:
        return rope_cache.rope_and_cache(
            qkv, cos_sin, positions, slots, k_cache, v_cache, num_q_heads, num_kv_heads, q_norm, k_norm, eps, out
        )

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        window: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q) if out is None else out
        if self.fixed_split is not None:
            trees = batch.tree_mask is not None
            if trees:
                decode_attention(q, k_cache, v_cache, batch, scale, window, out, self.fixed_split)
            invariant_attention(
                q, k_cache, v_cache, batch, scale, window, out, decodes=not trees, span=self.fixed_split
            )
            return out
        decode_attention(q, k_cache, v_cache, batch, scale, window, out)
        if self.hopper_counters is not None:
            from kernels import attention_prefill_hopper as hopper  # Gluon: has no interpreter, so not for every import

            if hopper.fits(q, k_cache, window):
                hopper.prefill_attention_hopper(q, k_cache, v_cache, batch, scale, out, self.hopper_counters)
                return out
        prefill_attention(q, k_cache, v_cache, batch, scale, window, out)
        return out

    def apply_penalties(
        self,
        logits: Tensor,
        token_counts: Tensor,
        prompt_mask: Tensor,
        count_rows: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> Tensor:
        return sampling.apply_penalties(logits, token_counts, prompt_mask, count_rows, repetition, presence, frequency)

    def edit_logits(
        self, logits: Tensor, edits: LogitEdits, edit_rows: Tensor, position: Tensor, recent: Tensor
    ) -> Tensor:
        return logit_edits.edit_logits(logits, edits, edit_rows, position, recent)

    def apply_token_bitmask(self, logits: Tensor, masks: Tensor, mask_rows: Tensor) -> Tensor:
        return token_bitmask.apply_token_bitmask(logits, masks, mask_rows)

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        return sampling.sample(logits, batch)

    def logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        # Asked for by few requests, and torch's operators are graph-safe here: a kernel of its own would not pay.
        logprobs = logits.float().log_softmax(dim=-1)
        values, ids = logprobs.topk(top, dim=-1)
        return logprobs.gather(1, chosen[:, None]).squeeze(1), values, ids

    def move_kv(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        kv_move.move_kv(k_cache, v_cache, source, target)

    def embed(self, ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return step_rows.embed(ids, weight, out)

    def lay_out(
        self,
        slots: Tensor,
        depths: Tensor,
        context: Tensor,
        last_token: Tensor,
        block_table: Tensor,
        block_size: int,
        advance: bool = False,
    ) -> RowLayout:
        return step_rows.lay_out(slots, depths, context, last_token, block_table, block_size, advance)

    def keep_chosen(
        self, slots: Tensor, chosen: Tensor, last_token: Tensor, hidden: Tensor | None, kept_hidden: Tensor | None
    ) -> None:
        step_rows.keep_chosen(slots, chosen, last_token, hidden, kept_hidden)

    def accept_tree(
        self,
        tree: TreeTables,
        slots: Tensor,
        tokens: Tensor,
        chosen: Tensor,
        kv_slots: Tensor,
        hidden: Tensor,
        context_len: Tensor,
        context: Tensor,
        last_token: Tensor,
        kept_hidden: Tensor,
    ) -> AcceptedTree:
        return step_rows.accept_tree(
            tree, slots, tokens, chosen, kv_slots, hidden, context_len, context, last_token, kept_hidden
        )

    def residual_block(self, x: Tensor, weight: Tensor | EightBit, bias: Tensor, slots: Tensor | None = None) -> Tensor:
        return draft.residual_block(x, weight, bias, slots)

    def linear_each(self, x: Tensor, weight: Tensor | EightBit) -> Tensor:
        return draft.linear_each(x, weight)

    def guess_tokens(
        self,
        logits: Tensor,
        token_map: Tensor | None,
        slots: Tensor,
        last_token: Tensor,
        sources: Tensor,
        width: int,
    ) -> Tensor:
        return draft.guess_tokens(logits, token_map, slots, last_token, sources, width)
