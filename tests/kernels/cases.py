"""Inputs that the tests of the kernels share."""

import torch

from kernels.ops import AttentionBatch, SamplingBatch


def random_cache(blocks: int, page: int, heads: int, head_dim: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Random blocks, and NaN in block 0, to which no table points: whoever reads it shows it."""
    cache = torch.randn(blocks, page, heads, head_dim, device=device).to(dtype)
    cache[0] = float("nan")
    return cache


def attention_batch(
    contexts: list[int],
    rows: list[int],
    page: int,
    blocks: int,
    *,
    decode_seqs: int,
    tree: torch.Tensor | None = None,
    window: int = 0,
    device="cpu",
) -> AttentionBatch:
    """Sequences with block tables drawn from blocks 1..; entries that must not be read are -1."""
    table = torch.full((len(contexts), -(-max(contexts) // page)), -1, dtype=torch.int32)
    order = torch.randperm(blocks - 1) + 1
    used = 0
    for s, (context, n) in enumerate(zip(contexts, rows, strict=True)):
        first = max(0, context - n + 1 - window) // page if window else 0
        needed = -(-context // page)
        table[s, first:needed] = order[(used + torch.arange(needed - first)) % len(order)].int()
        used += needed - first
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    return AttentionBatch(
        starts.to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        table.to(device),
        decode_seqs,
        rows[0] if decode_seqs else 1,
        max(rows[decode_seqs:], default=0),
        max(contexts),
        None if tree is None else tree.to(device),
    )


def naive_attention(q, k_cache, v_cache, batch: AttentionBatch, scale: float, window: int = 0) -> torch.Tensor:
    """Attention as its definition says: a loop over rows and positions, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    page, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    for s, context in enumerate(batch.context_len.tolist()):
        begin, end = batch.query_start[s].item(), batch.query_start[s + 1].item()
        n = end - begin
        for i in range(n if context else 0):
            if s < batch.decode_seqs and batch.tree_mask is not None:
                words = batch.tree_mask.view(-1, n)
                word = words[s % len(words), i].item()
                position = context - n + bin(word).count("1") - 1
                own = [context - n + j for j in range(n) if word >> j & 1]
            else:
                position = context - n + i
                own = list(range(context - n, position + 1))
            seen = [t for t in [*range(context - n), *own] if not window or t > position - window]
            place = [(batch.block_table[s, t // page].item(), t % page) for t in seen]
            k = torch.stack([k_cache[b, o] for b, o in place]).double().repeat_interleave(group, dim=1)
            v = torch.stack([v_cache[b, o] for b, o in place]).double().repeat_interleave(group, dim=1)
            weights = (torch.einsum("hd,lhd->hl", q[begin + i].double(), k) * scale).softmax(-1)
            out[begin + i] = torch.einsum("hl,lhd->hd", weights, v)
    return out


def sampling_batch(rows: int, *, device="cpu", **values) -> SamplingBatch:
    """Rows of temperature 1 without filters; values replace fields, scalars being repeated."""
    fields = {
        "temperature": (1.0, torch.float32),
        "top_k": (0, torch.int32),
        "top_p": (1.0, torch.float32),
        "min_p": (0.0, torch.float32),
        "seed": (0, torch.int64),
        "choice": (0, torch.int32),
        "position": (0, torch.int32),
    }
    tensors = {}
    for name, (default, dtype) in fields.items():
        value = torch.as_tensor(values.pop(name, default), dtype=dtype, device=device)
        tensors[name] = value.expand(rows).contiguous()
    if "typical_p" in values:
        typical_p = torch.as_tensor(values.pop("typical_p"), dtype=torch.float32, device=device)
        tensors["typical_p"] = typical_p.expand(rows).contiguous()
    return SamplingBatch(**tensors, **values)
