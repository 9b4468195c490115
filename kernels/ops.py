"""The operations that a decoder step is made of, as one interface with two implementations.

`kernels.reference.ReferenceOps` is plain torch: the oracle of every kernel and the CPU path.
`kernels.triton_ops.TritonOps` launches the Triton kernels. `kernels.select_ops(device)` picks one. Both take and return the same
shapes and dtypes, allocate nothing per request, and never synchronise with the host, so a step can be captured in a CUDA graph.

Letters in shapes: T rows of this step (all sequences, padded rows last), S sequences, H hidden size, Hq/Hkv query/KV heads, D head
size, B KV blocks, P tokens in a block, V vocabulary.

The KV cache of a layer is two tensors [B, P, Hkv, D]. A *slot* is a row of it: block × P + offset; slot -1 means "do not write".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.eight_bit import EightBit


@dataclass(slots=True)
class AttentionBatch:
    """Which rows attend to which cache blocks. Tensors live on the device; ints are host-side bounds, fixed under a CUDA graph.

    query_start   int32 [S+1]; the rows of sequence s are query_start[s]:query_start[s+1] (padded sequences have none or a row of -1s)
    context_len   int32 [S]; tokens of the sequence that are in the cache once this step's rows are written. Row i of a sequence
                  with n rows stands at position context_len - n + i and sees positions ≤ its own. 0 for a padded sequence:
                  its rows' output is then zero.
    block_table   int32 [S, max_blocks]; entries past the sequence's blocks are never read. With a sliding window, entries of blocks
                  wholly before the window may be -1 and are never read either
    decode_seqs   the first decode_seqs sequences have exactly decode_rows rows each (1, or the nodes of a speculation tree);
                  the rest are prefill chunks of any length
    decode_rows   rows of each decode sequence
    max_query     upper bound of the rows of a prefill sequence (0: there is none)
    max_context   upper bound of context_len
    tree_mask     int64 [decode_rows] or [decode_seqs * decode_rows] or None (causal); bit j of a row's word lets it see node j of
                  its own sequence's rows (its ancestors and itself); everything before the tree's rows is visible. With a
                  window a node stands at context_len - decode_rows + the number of its ancestors

    Rows of no sequence (after query_start[S]) get no defined output. What a block holds past context_len may be anything, NaN
    too. On a GPU the launch grid follows from the ints: a bound on max_context far above the real lengths costs empty programs.
    """

    query_start: Tensor
    context_len: Tensor
    block_table: Tensor
    decode_seqs: int
    decode_rows: int
    max_query: int
    max_context: int
    tree_mask: Tensor | None = None


@dataclass(slots=True)
class Sums:
    """A product [T, out] whose spans along K are still to be added up: parts f32 [spans, T, out]; the sum counts rounded to dtype."""

    parts: Tensor
    dtype: torch.dtype

    def total(self) -> Tensor:
        return self.parts.sum(0).to(self.dtype)


Product = Tensor | Sums


def whole(product: Product) -> Tensor:
    return product.total() if isinstance(product, Sums) else product


@dataclass(slots=True)
class SamplingBatch:
    """Sampling state of the R rows whose next token is wanted; every tensor [R] unless said otherwise.

    temperature f32 (0: greedy) · top_k int32 (0: all) · top_p f32 · min_p f32 · seed int64 · choice int32
    position int32: index of the token to be chosen among the *generated* ones (0 for the first) — the key of the noise
    any_filter: host-side bound, some row uses top_k/top_p/min_p/typical_p · any_random: some row has temperature > 0
    typical_p f32 (1: off), or None: no row has any
    Penalties and edits are applied to the logits beforehand (`apply_penalties`, `edit_logits`).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    choice: Tensor
    position: Tensor
    any_random: bool = True
    any_filter: bool = True
    typical_p: Tensor | None = None

    @classmethod
    def greedy(cls, floats: Tensor, ints: Tensor, longs: Tensor) -> SamplingBatch:
        """Of rows that all take the likeliest token: nothing of these is read, only their types count (f32, int32, int64)."""
        return cls(floats, ints, floats, floats, longs, ints, ints, any_random=False, any_filter=False)


@dataclass(slots=True)
class LogitEdits:
    """What sequences change of single tokens' logits, by slot; E, W and L are fixed, -1 fills up ids and words.

    ids       int32 [slots, E], values f32 [slots, E]: added to the logits of these tokens; -inf bans
    until     int32 [slots, E]: only while the token to be chosen stands before this position among the generated ones
    words     int32 [slots, W]: tokens that are banned behind
    prefixes  int32 [slots, W, L]: these tokens; the newest last, -1 stands for any or none. L is a power of two
    """

    ids: Tensor
    values: Tensor
    until: Tensor
    words: Tensor
    prefixes: Tensor


@dataclass(slots=True)
class RowLayout:
    """Where the rows of S sequences with n rows each stand: tokens int64 [S], the newest of each sequence · positions int32 [S × n] ·
    kv_slots int32 [S, n] · context_len int32 [S] · block_table int32 [S, max_blocks]."""

    tokens: Tensor
    positions: Tensor
    kv_slots: Tensor
    context_len: Tensor
    block_table: Tensor


class TreeTables(Protocol):
    """Of a tree with n nodes, at most 64, and depth d: parents int64 [n] (the root's is itself), words int64 [n] (bit j: node j is an
    ancestor or the node itself), paths int64 [n, d + 1] (the nodes from the root to each, then -1)."""

    parents: Tensor
    words: Tensor
    paths: Tensor


@dataclass(slots=True)
class AcceptedTree:
    """ids int64 [R, d + 1]: the new tokens, then -1. source, target int32 [R × d]: rows of the cache that `Ops.move_kv` has to move."""

    ids: Tensor
    source: Tensor
    target: Tensor


class Ops(Protocol):
    """See the module docstring for the letters. Activations are bf16 or f32; norm weights have the activations' dtype."""

    name: str

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] · weight [out, in]ᵀ (+ bias [out]) → [T, out]; sums in f32. The weight may be read before the kernels ahead
        have finished: nothing may write it while steps run."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
        """As `linear`, for an operation that takes a Product: adding up where it is read saves a launch."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[T, H] → [T, H]; statistics in f32, the normalised row is cast to x.dtype, then scaled (Llama's order)."""

    def add_rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x in place (rounded to its dtype); returns rms_norm(residual)."""

    def silu_mul(self, gate_up: Product) -> Tensor:
        """[T, 2I] → silu(first half) × second half, [T, I]."""

    def gated_product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu_mul(product(x, weight, bias)) with weight [2I, in], gates first → [T, I]."""

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
        """Per-head RMS norm of q and k (if weights [D] are given), NeoX-style rotary embedding, and the write of k, v to the cache.

        qkv [T, (Hq + 2 Hkv) D] as the fused projection gives it; cos_sin f32 [max_position, D] (cos of D/2 frequencies, then sin);
        positions int32 [T]; slots int32 [T]. Returns q [T, Hq, D], contiguous: `out` if given.
        """

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
        """Causal (or tree-masked) attention of q [T, Hq, D] over the paged cache → [T, Hq, D]: `out` if given, which q must not be.

        window > 0: a row at position p sees positions > p - window only (Mistral's sliding window).
        """

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
        """In place on f32 logits [R, V], in transformers' and OpenAI's sense; returns it.

        token_counts int32 [slots, V] (generated so far), prompt_mask bool [slots, V] (occurs in the prompt), count_rows int32 [R]:
        the row's slot, or -1 for "no penalties".
        """

    def edit_logits(
        self, logits: Tensor, edits: LogitEdits, edit_rows: Tensor, position: Tensor, recent: Tensor
    ) -> Tensor:
        """In place on f32 logits [R, V]; returns it. In the sense of transformers' SequenceBiasLogitsProcessor,
        NoBadWordsLogitsProcessor and MinNewTokensLengthLogitsProcessor.

        edit_rows int32 [R]: the row's slot, or -1 for "no edits"; position int32 [R] as in SamplingBatch; recent int32 [R, L]: the
        newest tokens of each row's sequence, prompt included, the newest last, -1 before its beginning.
        """

    def apply_token_bitmask(self, logits: Tensor, masks: Tensor, mask_rows: Tensor) -> Tensor:
        """In place on f32 or bf16 logits [R, V], which it returns: -inf for the tokens that a row must not choose.

        masks int32 [K, ⌈V / 32⌉]: bit t % 32 of word t // 32 is set where token t is allowed; mask_rows int32 [R]: the row's row of
        masks, or -1 for "all are allowed".
        """

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """logits f32 or bf16 [R, V] → chosen ids int64 [R].

        Greedy rows: argmax, ties to the lowest id. Random rows: argmax over the kept tokens of logit / temperature + Gumbel noise
        (Gumbel-max), the noise from Philox4x32-10 (Salmon et al. 2011) with key = seed (low, high word) and counter =
        (token id // 4, position, choice, 0), output word token id % 4. With v = (word + 0.5) × 2^-32, at most 1 - 2^-24,
        the noise is -log(-log1p(-v)). Filters in the order of transformers' warpers: temperature, top_k, top_p, min_p,
        typical_p (Meister et al. 2022, arXiv 2202.00666).
        """

    def logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-softmax of raw logits [R, V]: (of the chosen ids f32 [R], the `top` largest f32 [R, top], their ids int64 [R, top])."""

    def move_kv(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies cache rows, one layer or all: caches [..., B, P, Hkv, D], source/target int32 [n] slots; target -1 skips.

        Used to move the accepted nodes of a speculation tree into place: target ≤ source for each, and rows are moved in order.
        """

    def embed(self, ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """ids int32 or int64 [T], weight [V, H] → [T, H]: `out` if given."""

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
        """The rows of decode sequences: node i of a sequence takes the place context + i in the cache, and stands at position
        context + depths[i].

        slots int64 [S]: rows of context int32 [slots], last_token int64 [slots] and block_table int32 [slots, max_blocks]; the last
        slot is nobody's: such a sequence gets kv_slots -1 and context_len 0. depths int32 [n]. advance: context counts the rows from
        now on.
        """

    def keep_chosen(
        self, slots: Tensor, chosen: Tensor, last_token: Tensor, hidden: Tensor | None, kept_hidden: Tensor | None
    ) -> None:
        """What a step without a tree leaves to the next one: chosen int64 [R] becomes last_token int64 [slots], and hidden [R, H] that
        of kept_hidden [slots, H] (None: nobody asks), at slots int64 [R]. Among them only nobody's, the last, may be there twice."""

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
        """From the root on, follows the child that holds the token chosen at its parent; of siblings with the same token the first.

        tokens, chosen int64 [R, n]: the nodes' and what the model chose after each; kv_slots int32 [R, n], hidden [R × n, H];
        context_len int32 [R]: the sequences' contexts with all nodes. Written at slots int64 [≥ R]: context int32 [slots], with what
        was accepted; last_token int64 [slots] and kept_hidden [slots, H], of the last accepted node. The last slot is nobody's; its
        context stays 0.
        """

    def residual_block(self, x: Tensor, weight: Tensor | EightBit, bias: Tensor, slots: Tensor | None = None) -> Tensor:
        """x + SiLU(weight x + bias) of each Medusa head (Cai et al. 2024): weight [heads, H, H], bias [heads, H].

        x [heads, R, H], or [1, R, H] for all heads; with slots int64 [R] its rows are x[:, slots]. Returns [heads, R, H].
        """

    def linear_each(self, x: Tensor, weight: Tensor | EightBit) -> Tensor:
        """x [heads, R, K] · weight [heads, N, K]ᵀ → [heads, R, N]."""

    def guess_tokens(
        self,
        logits: Tensor,
        token_map: Tensor | None,
        slots: Tensor,
        last_token: Tensor,
        sources: Tensor,
        width: int,
    ) -> Tensor:
        """The tokens of a tree's nodes: int64 [R, n]. The root's is last_token[slots], that of node i the one at sources[i - 1] of the
        `width` likeliest tokens of each head, head-major [d, width].

        logits [d, R, V'] of d heads, of equals the lowest id first; token_map int64 [V']: their tokens' ids, None: the ids themselves;
        slots int64 [R]; last_token int64 [slots]; sources int64 [n - 1].
        """
