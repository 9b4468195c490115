"""Every operation of `kernels.ops.Ops` in plain torch: the oracle of the Triton kernels, and the path of a CPU.

Reductions are done in f32, as the kernels do them; in f32 the results are those of transformers' eager models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.eight_bit import EightBit
from kernels.ops import AcceptedTree, AttentionBatch, LogitEdits, Product, RowLayout, SamplingBatch, TreeTables, whole
from kernels.philox import gumbel_noise

LEAST_TEMPERATURE = 1e-30  # below it every token is chosen greedily


class ReferenceOps:
    """`Ops` in torch; runs on any device. It may read tensors back to the host, so it is not for CUDA graphs."""

    name = "reference"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
        return F.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * normalised.to(x.dtype)

    def add_rms_norm(self, x: Product, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(whole(x)), weight, eps)

    def silu_mul(self, gate_up: Product) -> Tensor:
        gate, up = whole(gate_up).chunk(2, dim=-1)
        return F.silu(gate) * up

    def gated_product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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
        head_dim = k_cache.shape[-1]
        qkv = whole(qkv)
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        q, k, v = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        cos, sin = cos_sin[positions.long().clamp(min=0)][:, None].chunk(2, dim=-1)
        written = slots >= 0
        target = slots[written].long()
        k_cache.view(-1, num_kv_heads, head_dim)[target] = _rotate(k, cos, sin)[written]
        v_cache.view(-1, num_kv_heads, head_dim)[target] = v[written]
        rotated = _rotate(q, cos, sin)
        return rotated if out is None else out.copy_(rotated)

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
        out = torch.zeros_like(q) if out is None else out.zero_()
        starts, contexts = batch.query_start.tolist(), batch.context_len.tolist()
        decodes, rows = batch.decode_seqs, batch.decode_rows
        # All decodes in one call, each prefill chunk in one of its own.
        groups = [(0, decodes)] if decodes else []
        groups += [(s, s + 1) for s in range(decodes, len(contexts))]
        for first, last in groups:
            begin, end = starts[first], starts[last]
            longest = max(contexts[first:last])
            if begin == end or longest == 0:
                continue
            n = rows if first < decodes else end - begin
            earliest = min(max(0, c - n + 1 - window) for c in contexts[first:last]) if window else 0
            tree = batch.tree_mask.view(-1, n) if batch.tree_mask is not None and first < decodes else None
            block_size = k_cache.shape[1]
            blocks = batch.block_table[first:last, earliest // block_size : -(-longest // block_size)].long()
            context = batch.context_len[first:last].long()
            index = earliest // block_size * block_size + torch.arange(blocks.shape[1] * block_size, device=q.device)
            visible = _visible(index, context, n, window, tree)
            # What no row may see can be anything, NaN too, so it is cleared rather than only masked.
            unseen = ~visible.any(dim=1)[..., None, None]
            k, v = (
                cache[blocks.clamp(min=0)].flatten(1, 2).float().masked_fill_(unseen, 0) for cache in (k_cache, v_cache)
            )
            queries = q[begin:end].view(last - first, n, *q.shape[1:])
            attended = _attend(queries.float(), k, v, visible, scale).to(q.dtype)
            out[begin:end] = attended.masked_fill_((context == 0)[:, None, None, None], 0).flatten(0, 1)
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
        penalised = (count_rows >= 0)[:, None]
        rows = count_rows.long().clamp(min=0)
        counts = token_counts[rows]
        seen = prompt_mask[rows] | (counts > 0)
        repetition = repetition[:, None]
        repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
        changed = torch.where(seen, repeated, logits)
        changed = changed - frequency[:, None] * counts - presence[:, None] * (counts > 0)
        return logits.copy_(torch.where(penalised, changed, logits))

    def edit_logits(
        self, logits: Tensor, edits: LogitEdits, edit_rows: Tensor, position: Tensor, recent: Tensor
    ) -> Tensor:
        edited = (edit_rows >= 0)[:, None]
        rows = edit_rows.long().clamp(min=0)
        ids = edits.ids[rows]
        active = edited & (ids >= 0) & (position[:, None] < edits.until[rows])
        # Where nothing is to be added, 0 is; each token has one value, or is banned beside.
        logits.scatter_add_(1, ids.long().clamp(min=0), torch.where(active, edits.values[rows], 0.0))
        words, prefixes = edits.words[rows], edits.prefixes[rows]
        behind = ((prefixes < 0) | (prefixes == recent[:, None])).all(dim=-1)
        banned = torch.where(edited & (words >= 0) & behind, -torch.inf, 0.0)
        return logits.scatter_add_(1, words.long().clamp(min=0), banned)

    def apply_token_bitmask(self, logits: Tensor, masks: Tensor, mask_rows: Tensor) -> Tensor:
        rows = (mask_rows >= 0).nonzero().flatten()
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        words = masks.index_select(0, mask_rows.index_select(0, rows).long())
        allowed = ((words[..., None] >> bits) & 1).flatten(1)[:, : logits.shape[1]]
        logits[rows] = logits[rows].masked_fill_(allowed == 0, -torch.inf)
        return logits

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        greedy = logits.argmax(dim=-1)
        if not batch.any_random:
            return greedy
        rows = (batch.temperature > 0).nonzero().flatten()
        # As in the kernels: what is divided by less is infinite, and of infinite scores none is the greatest.
        scores = logits[rows].float() / batch.temperature[rows, None].clamp(min=LEAST_TEMPERATURE)
        if batch.any_filter:
            scores = filter_scores(scores, batch.top_k[rows], batch.top_p[rows], batch.min_p[rows])
            if batch.typical_p is not None:
                scores = keep_typical(scores, batch.typical_p[rows])
        noise = gumbel_noise(batch.seed[rows], batch.position[rows], batch.choice[rows], logits.shape[1])
        greedy[rows] = (scores + noise).argmax(dim=-1)
        return greedy

    def logprobs(self, logits: Tensor, chosen: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
        logprobs = logits.float().log_softmax(dim=-1)
        values, ids = logprobs.topk(top, dim=-1)
        return logprobs.gather(1, chosen[:, None]).squeeze(1), values, ids

    def move_kv(self, k_cache: Tensor, v_cache: Tensor, source: Tensor, target: Tensor) -> None:
        moved = target >= 0
        source, target = source[moved].long(), target[moved].long()
        for cache in (k_cache, v_cache):
            rows = cache.flatten(-4, -3)  # a view: the cache is contiguous
            # Reading all before writing any equals moving in order, as no target is the source of a later row.
            rows[..., target, :, :] = rows[..., source, :, :]

    def embed(self, ids: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.index_select(weight, 0, ids, out=out)

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
        nodes, of_rows, table = len(depths), context.index_select(0, slots), block_table.index_select(0, slots)
        real = slots < len(context) - 1
        places = of_rows[:, None] + torch.arange(nodes, dtype=torch.int32, device=slots.device)
        block = table.gather(1, (places // block_size).clamp(max=table.shape[1] - 1).long())
        context_len = torch.where(real, of_rows + nodes, 0)
        if advance:
            context.index_copy_(0, slots, context_len)
        return RowLayout(
            tokens=last_token.index_select(0, slots),
            positions=(of_rows[:, None] + depths).flatten(),
            kv_slots=torch.where(real[:, None], block * block_size + places % block_size, -1),
            context_len=context_len,
            block_table=table,
        )

    def keep_chosen(
        self, slots: Tensor, chosen: Tensor, last_token: Tensor, hidden: Tensor | None, kept_hidden: Tensor | None
    ) -> None:
        last_token.index_copy_(0, slots, chosen)
        if hidden is not None and kept_hidden is not None:
            kept_hidden.index_copy_(0, slots, hidden)

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
        (count, nodes), width = tokens.shape, tree.paths.shape[1]
        accepted = tokens == chosen.index_select(1, tree.parents)
        accepted[:, 0] = True
        for node in range(1, nodes):  # ancestors come first
            accepted[:, node] &= accepted[:, tree.parents[node]]
        lengths = (tree.paths >= 0).sum(1)
        # Deeper wins, then the earlier node.
        last = torch.where(accepted, lengths * nodes - torch.arange(nodes, device=tokens.device), -1).argmax(1)
        path = tree.paths.index_select(0, last)
        order = torch.arange(width, device=tokens.device)
        onward = path.clamp(min=0)
        source = kv_slots.gather(1, onward)[:, 1:]
        target = torch.where((path >= 0) & (path != order), kv_slots[:, :width], -1)[:, 1:]
        ids = torch.where(path >= 0, chosen.gather(1, onward), -1)
        slots = slots[:count]
        grown = context_len - nodes + lengths.index_select(0, last)
        context.index_copy_(0, slots, torch.where(slots < len(context) - 1, grown, 0).int())
        last_token.index_copy_(0, slots, chosen.gather(1, last[:, None]).squeeze(1))
        rows = torch.arange(0, count * nodes, nodes, device=tokens.device) + last
        kept_hidden.index_copy_(0, slots, hidden.index_select(0, rows))
        return AcceptedTree(ids, source.flatten(), target.flatten())

    def residual_block(self, x: Tensor, weight: Tensor | EightBit, bias: Tensor, slots: Tensor | None = None) -> Tensor:
        weight = weight.expanded(x.dtype) if isinstance(weight, EightBit) else weight
        x = (x if slots is None else x.index_select(1, slots)).expand(len(weight), -1, -1)
        return x + F.silu(torch.baddbmm(bias[:, None], x, weight.transpose(1, 2)))

    def linear_each(self, x: Tensor, weight: Tensor | EightBit) -> Tensor:
        weight = weight.expanded(x.dtype) if isinstance(weight, EightBit) else weight
        return torch.bmm(x, weight.transpose(1, 2))

    def guess_tokens(
        self,
        logits: Tensor,
        token_map: Tensor | None,
        slots: Tensor,
        last_token: Tensor,
        sources: Tensor,
        width: int,
    ) -> Tensor:
        candidates = logits.sort(dim=-1, descending=True, stable=True).indices[..., :width]
        if token_map is not None:
            candidates = token_map[candidates]
        by_sequence = candidates.transpose(0, 1).flatten(1)
        return torch.cat((last_token.index_select(0, slots)[:, None], by_sequence.index_select(1, sources)), dim=1)


def filter_scores(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Scores f32 [R, V] (logits / temperature), dropped ones at -inf: top-k, top-p, min-p as transformers' warpers.

    Each filter is a threshold on the score: what ties with the last token kept is kept too. The likeliest always stays.
    """
    vocabulary = scores.shape[1]
    ordered = scores.sort(dim=-1, descending=True).values
    best = ordered[:, :1]
    k = torch.where((top_k <= 0) | (top_k > vocabulary), vocabulary, top_k).long()
    threshold = ordered.gather(1, k[:, None] - 1)
    # Ties with the k-th are part of the distribution that top-p looks at.
    mass = (ordered - best).double().exp().masked_fill_(ordered < threshold, 0)
    above = mass.cumsum(dim=-1) - mass
    nucleus = (above < top_p[:, None].double() * mass.sum(dim=-1, keepdim=True)) & (mass > 0)
    last_kept = (nucleus.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    threshold = torch.where(top_p[:, None] < 1, ordered.gather(1, last_kept), threshold)
    threshold = torch.maximum(threshold, best + min_p[:, None].log())
    return scores.masked_fill(scores < torch.minimum(threshold, best), -torch.inf)


def keep_typical(scores: Tensor, typical_p: Tensor) -> Tensor:
    """Scores f32 [R, V], atypical ones at -inf, as transformers' TypicalLogitsWarper: of the tokens whose surprise is nearest to the
    entropy, the fewest whose mass reaches typical_p f32 [R] (1: all). Ties with the last are kept."""
    logprobs = scores.double().log_softmax(dim=-1)
    mass = logprobs.exp()
    entropy = -(logprobs * mass).nansum(dim=-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    ordered, order = distance.sort(dim=-1)
    reached = mass.gather(1, order).cumsum(dim=-1)
    last = (reached < typical_p[:, None].double()).sum(dim=-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    dropped = (distance > ordered.gather(1, last)) & (typical_p[:, None] < 1)
    return scores.masked_fill(dropped, -torch.inf)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, NeoX style: element i is paired with i + D/2. cos and sin f32 [T, 1, D/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _visible(index: Tensor, context: Tensor, rows: int, window: int, tree: Tensor | None) -> Tensor:
    """Which of the cache indices [L] each row sees: bool [S, rows, L]. tree: ancestor words int64 [S or 1, rows]."""
    before = (context - rows)[:, None, None]
    node = index - before  # index among this step's rows; negative for what came before them
    lane = torch.arange(rows, device=index.device)[:, None]
    if tree is None:
        visible = node <= lane
        if window:
            visible &= node > lane - window
    else:
        seen = (tree[:, :, None] >> torch.arange(rows, device=index.device)) & 1
        visible = (tree[:, :, None] >> node.clamp(0, rows - 1)) & 1 == 1
        # A node stands as far into the sequence as it has ancestors, wherever its row is; windows exceed depths.
        depth = seen.sum(-1, keepdim=True) - 1
        visible = torch.where(node < 0, node > depth - window if window else True, visible)
    return visible & (index < context[:, None, None])


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """q [S, n, Hq, D], k and v [S, L, Hkv, D], visible [S, n, L] → [S, n, Hq, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, visible[:, None], scale=scale, enable_gqa=gqa)
    return attended.transpose(1, 2)
