"""The compiled kernels at an 8B model's shapes in bf16. Errors are taken row by row against float64 and may be at most 1.5 times
those of torch's own bf16 operator."""

import pytest
import torch
import torch.nn.functional as F

from kernels import dependent_launch
from kernels.eight_bit import EightBit
from kernels.ops import AttentionBatch, LogitEdits, Sums
from kernels.philox import gumbel_noise
from kernels.reference import ReferenceOps, filter_scores, keep_typical
from kernels.skinny_gemm import GemmConfig, skinny_gated_product, skinny_linear, skinny_product
from kernels.triton_ops import TritonOps
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.tree import default_trees
from tests.kernels.cases import attention_batch, random_cache, sampling_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BF16, Q_HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = torch.bfloat16, 32, 8, 128, 128_256
REFERENCE = ReferenceOps()


@pytest.fixture(scope="module")
def ops():
    return TritonOps()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def row_errors(got: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    difference = (got.double() - exact).flatten(1).norm(dim=1)
    return difference / exact.flatten(1).norm(dim=1).clamp(min=1e-9)


def assert_as_exact_as_torch(got: torch.Tensor, torchs: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.isfinite().all()
    ours, theirs = row_errors(got, exact), row_errors(torchs, exact)
    # Single rows scatter: the limit for one is the worst of torch's, the limit of 1.5 times is for the mean.
    assert ours.mean() <= 1.5 * theirs.mean(), f"{ours.mean():.2e} against {theirs.mean():.2e}"
    assert ours.max() <= 1.5 * theirs.max(), f"{ours.max():.2e} against {theirs.max():.2e}"


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(BF16)


def test_norms(ops):
    x, residual, weight = bf16(300, 4096), bf16(300, 4096), bf16(4096)
    exact = F.rms_norm(x.double(), (4096,), weight.double(), 1e-5)
    theirs = REFERENCE.rms_norm(x, weight, 1e-5)
    assert_as_exact_as_torch(ops.rms_norm(x, weight, 1e-5), theirs, exact)
    total = residual + x
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    exact = F.rms_norm(total.double(), (4096,), weight.double(), 1e-5)
    assert_as_exact_as_torch(got, REFERENCE.rms_norm(total, weight, 1e-5), exact)


def test_silu_mul(ops):
    gate_up = bf16(300, 2 * 14336)
    gate, up = gate_up.chunk(2, -1)
    assert_as_exact_as_torch(ops.silu_mul(gate_up), F.silu(gate) * up, F.silu(gate.double()) * up.double())


LINEAR_CONFIGS = [
    GemmConfig(4, 1024, 4),
    GemmConfig(2, 512, 1),
    GemmConfig(64, 128, 4, 1, 4, True),
    GemmConfig(64, 128, 4, 5, 4, False),
    GemmConfig(128, 64, 4, 3, 4, True),
    GemmConfig(32, 128, 2, 2, 6, False),
]


@pytest.mark.parametrize("config", LINEAR_CONFIGS, ids=str)
@pytest.mark.parametrize(("width", "depth"), [(1024, 3072), (6144, 4096), (1000, 1152)])
@pytest.mark.parametrize("biased", [False, True])
def test_linear(config, width, depth, biased):
    weight, bias = bf16(width, depth), bf16(width) if biased else None
    for rows in (1, 3, 4) if config.split == 0 else (1, 7, 16, 33, 64, 128, 200):
        x = bf16(rows, depth)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_as_exact_as_torch(skinny_linear(x, weight, bias, config), F.linear(x, weight, bias), exact)


GATED_CONFIGS = [
    GemmConfig(2, 512, 1),
    GemmConfig(8, 1024, 4),
    GemmConfig(64, 128, 4, 1, 4, True),
    GemmConfig(64, 128, 4, 1, 2, True),
    GemmConfig(32, 128, 2, 1, 4, False),
]


@pytest.mark.parametrize("config", GATED_CONFIGS, ids=str)
@pytest.mark.parametrize(("width", "depth"), [(14336, 4096), (3072, 1024), (500, 1152)])
@pytest.mark.parametrize("biased", [False, True])
def test_gates_and_values_of_one_product(config, width, depth, biased):
    weight, bias = bf16(2 * width, depth), bf16(2 * width) if biased else None
    for rows in (1, 2, 4) if config.split == 0 else (1, 7, 16, 33, 64):
        x = bf16(rows, depth)
        gate, up = F.linear(x, weight, bias).chunk(2, -1)
        exact_gate, exact_up = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).chunk(
            2, -1
        )
        got = skinny_gated_product(x, weight, bias, config)
        assert_as_exact_as_torch(got, F.silu(gate) * up, F.silu(exact_gate) * exact_up)


def test_a_product_is_added_up_where_it_is_read(ops):
    """The same bits as with the whole product."""
    weight, x, residual, norm = bf16(6144, 4096), bf16(33, 4096), bf16(33, 6144), bf16(6144)
    config = GemmConfig(64, 128, 4, 6, 4, True)
    parts, product = skinny_product(x, weight, None, config), skinny_linear(x, weight, None, config)
    assert isinstance(parts, Sums)
    torch.testing.assert_close(parts.total(), product)  # torch adds in another order
    norms = [ops.add_rms_norm(form, residual.clone(), norm, 1e-6) for form in (parts, product)]
    assert torch.equal(*norms)
    assert torch.equal(ops.silu_mul(parts), ops.silu_mul(product))
    table, places = torch.randn(64, HEAD_DIM, device="cuda"), torch.arange(33, dtype=torch.int32, device="cuda")
    results = []
    for form in (parts, product):
        cache = torch.zeros(2, 2, 64, KV_HEADS, HEAD_DIM, dtype=BF16, device="cuda")
        q = ops.rope_and_cache(form, table, places, places, *cache, Q_HEADS, KV_HEADS, norm[:128], norm[:128], 1e-6)
        results.append(torch.cat((q.flatten(), cache.flatten())))
    assert torch.equal(*results)


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_residual_blocks_of_heads(ops, rows):
    weight, bias, table = bf16(4, 4096, 4096) / 64, bf16(4, 4096), bf16(1, 90, 4096)
    slots = torch.randperm(90, device="cuda")[:rows]
    exact = REFERENCE.residual_block(table.double(), weight.double(), bias.double(), slots)
    got = ops.residual_block(table, weight, bias, slots)
    theirs = REFERENCE.residual_block(table, weight, bias, slots)
    assert_as_exact_as_torch(got.flatten(0, 1), theirs.flatten(0, 1), exact.flatten(0, 1))
    exact = REFERENCE.linear_each(got.double(), weight[:, :1000].double())
    wide = weight[:, :1000].contiguous()
    theirs = REFERENCE.linear_each(got, wide)
    assert_as_exact_as_torch(ops.linear_each(got, wide).flatten(0, 1), theirs.flatten(0, 1), exact.flatten(0, 1))


@pytest.mark.parametrize("rows", [1, 4, 20, 70])
def test_products_with_eight_bit_weights(ops, rows):
    square, bias, table = EightBit.of(bf16(4, 4096, 4096) / 64), bf16(4, 4096), bf16(1, 90, 4096)
    slots = torch.randperm(90, device="cuda")[:rows]
    got = ops.residual_block(table, square, bias, slots)
    exact = REFERENCE.residual_block(table.double(), square, bias.double(), slots)
    theirs = REFERENCE.residual_block(table, square, bias, slots)
    assert_as_exact_as_torch(got.flatten(0, 1), theirs.flatten(0, 1), exact.flatten(0, 1))
    wide = EightBit.of(bf16(1, 10_007, 4096))
    exact, theirs = REFERENCE.linear_each(got[:1].double(), wide), REFERENCE.linear_each(got[:1], wide)
    assert_as_exact_as_torch(ops.linear_each(got[:1], wide)[0], theirs[0], exact[0])


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("mapped", [False, True])
def test_guesses_of_heads(ops, size, mapped):
    tree = next(tree for tree in default_trees(4).trees if tree.size == size)
    tables = DeviceTree(tree, torch.device("cuda"))
    logits = bf16(tree.depth, 40, VOCABULARY)
    token_map = torch.randperm(VOCABULARY, device="cuda") if mapped else None
    slots, last = torch.randperm(50, device="cuda")[:40], torch.randint(0, 1000, (50,), device="cuda")
    given = (logits, token_map, slots, last, tables.sources, tree.width)
    assert torch.equal(ops.guess_tokens(*given), REFERENCE.guess_tokens(*given))


def test_a_linear_of_fixed_split_has_the_same_bits_in_every_batch():
    invariant, weight, x = TritonOps(fixed_split=256), bf16(1024, 4096), bf16(130, 4096)
    together = invariant.linear(x, weight)
    for rows in (1, 2, 16, 17, 64, 128):
        assert torch.equal(invariant.linear(x[:rows], weight), together[:rows])


@pytest.mark.parametrize("rows", [1, 8])
def test_kernels_that_start_early_wait_for_what_they_read(ops, rows, monkeypatch):
    """A chain in which each kernel reads what the one ahead wrote, as a CUDA graph, against the same one after another."""
    weights = [bf16(1024, 1024) / 32 for _ in range(8)]
    x, norm = bf16(rows, 1024), bf16(1024)

    def chain():
        residual, y = x.clone(), x
        for weight in weights:
            y = ops.linear(ops.add_rms_norm(y, residual, norm, 1e-6), weight)
            y = ops.product(ops.silu_mul(torch.cat((y, y), 1)), weight)
        return ops.add_rms_norm(y, residual, norm, 1e-6)

    with monkeypatch.context() as patch:
        patch.setattr(dependent_launch, "ENABLED", False)
        expected = chain()
    assert torch.equal(chain(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(20):
        got.zero_()
        graph.replay()
        assert torch.equal(got, expected)


@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache(ops, normed):
    rows = 300
    qkv = bf16(rows, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM)
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda") * 6.3
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(4096, (rows,), device="cuda").int()
    slots = torch.randperm(640, device="cuda")[:rows].int()
    slots[5] = -1
    norm = bf16(HEAD_DIM) if normed else None
    results = []
    for implementation, dtype in ((ops, BF16), (REFERENCE, BF16), (REFERENCE, torch.float32)):
        k_cache, v_cache = torch.zeros(2, 10, 64, KV_HEADS, HEAD_DIM, device="cuda", dtype=dtype)
        weight = None if norm is None else norm.to(dtype)
        q = implementation.rope_and_cache(
            qkv.to(dtype), table, positions, slots, k_cache, v_cache, Q_HEADS, KV_HEADS, weight, weight, 1e-6
        )
        results.append((q, k_cache.flatten(0, 1), v_cache))
    (q, k, v), (their_q, their_k, their_v), (exact_q, exact_k, _) = results
    assert_as_exact_as_torch(q, their_q, exact_q.double())
    used = slots[slots >= 0].long()
    assert_as_exact_as_torch(k[used], their_k[used], exact_k[used].double())
    assert torch.equal(v, their_v)
    unused = torch.ones(640, dtype=torch.bool, device="cuda")
    unused[used] = False
    assert not k[unused].any()


def attend(q, k_cache, v_cache, batch: AttentionBatch, scale: float, window: int, dtype) -> torch.Tensor:
    """torch's attention, a sequence at a time, on gathered keys and values of the type."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    page, group = k_cache.shape[1], q.shape[1] // k_cache.shape[2]
    starts = batch.query_start.tolist()
    for s, context in enumerate(batch.context_len.tolist()):
        begin, end = starts[s], starts[s + 1]
        if context == 0 or begin == end:
            continue
        n = end - begin
        index = torch.arange(context, device=q.device)
        table = batch.block_table[s].long()
        k, v = (
            c[table[index // page], index % page].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
            for c in (k_cache, v_cache)
        )
        node = index - (context - n)
        lane = torch.arange(n, device=q.device)[:, None]
        depth = lane
        visible = node <= lane
        if batch.tree_mask is not None and s < batch.decode_seqs:
            words = batch.tree_mask.view(-1, n)[:, :, None]
            word = words[s % len(words)]
            depth = ((word >> torch.arange(n, device=q.device)) & 1).sum(-1, keepdim=True) - 1
            visible = (node < 0) | ((word >> node.clamp(min=0)) & 1 == 1)
        if window:
            visible &= (node > depth - window) | ((node >= 0) & (depth is not lane))
        queries = q[begin:end].to(dtype).transpose(0, 1)
        attended = F.scaled_dot_product_attention(queries[None], k[None], v[None], visible, scale=scale)
        out[begin:end] = attended[0].transpose(0, 1)
    return out


TREE = torch.tensor([1, 3, 5, 9, 19, 35, 69, 133] + [(1 << j) | 1 for j in range(8, 16)])


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize("tree", [False, True])
def test_attention(ops, page, window, tree):
    n = 16 if tree else 1
    contexts, rows = [1000, n, 3000, 0, 65, 700, 2048, 130, 64], [n] * 5 + [700, 500, 1, 64]
    words = TREE if tree else None
    blocks = 8 + sum(-(-c // page) for c in contexts)
    batch = attention_batch(contexts, rows, page, blocks, decode_seqs=5, tree=words, device="cuda")
    caches = [random_cache(blocks, page, KV_HEADS, HEAD_DIM, BF16, "cuda") for _ in "kv"]
    q, scale = bf16(sum(rows), Q_HEADS, HEAD_DIM), HEAD_DIM**-0.5
    got = ops.attention(q, *caches, batch, scale, window)
    exact = attend(q, *caches, batch, scale, window, torch.float64)
    assert_as_exact_as_torch(got, attend(q, *caches, batch, scale, window, BF16), exact)
    padded = slice(batch.query_start[3].item(), batch.query_start[4].item())
    assert not got[padded].any()


@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim"), [(28, 4, 128), (16, 8, 128), (8, 1, 256), (14, 2, 64), (6, 2, 16)]
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_attention_of_other_shapes(ops, q_heads, kv_heads, head_dim, dtype):
    batch = attention_batch([300, 20, 333], [1, 1, 150], 64, 20, decode_seqs=2, device="cuda")
    caches = [random_cache(20, 64, kv_heads, head_dim, dtype, "cuda") for _ in "kv"]
    q = torch.randn(152, q_heads, head_dim, device="cuda").to(dtype)
    got = ops.attention(q, *caches, batch, head_dim**-0.5)
    exact = attend(q, *caches, batch, head_dim**-0.5, 0, torch.float64)
    if dtype is torch.float32:
        assert row_errors(got, exact).max() < 1e-5
    else:
        assert_as_exact_as_torch(got, attend(q, *caches, batch, head_dim**-0.5, 0, BF16), exact)


def test_stale_nan_in_a_block_harms_nobody(ops):
    batch = attention_batch([100, 70, 90], [1, 1, 20], 64, 8, decode_seqs=2, device="cuda")
    caches = [random_cache(8, 64, KV_HEADS, HEAD_DIM, BF16, "cuda") for _ in "kv"]
    q = bf16(22, Q_HEADS, HEAD_DIM)
    clean = ops.attention(q, *caches, batch, 0.1)
    for s, context in enumerate(batch.context_len.tolist()):
        for cache in caches:
            cache[batch.block_table[s, context // 64].item(), context % 64 :] = float("nan")
    assert torch.equal(ops.attention(q, *caches, batch, 0.1), clean)


def test_fixed_split_gives_the_same_bits_in_every_batch():
    invariant = TritonOps(fixed_split=256)
    contexts = [4000, 100, 900, 1777]
    batch = attention_batch(contexts, [1] * 4, 64, 120, decode_seqs=4, device="cuda")
    caches = [random_cache(120, 64, KV_HEADS, HEAD_DIM, BF16, "cuda") for _ in "kv"]
    q = bf16(4, Q_HEADS, HEAD_DIM)
    together = invariant.attention(q, *caches, batch, 0.1)
    for s, context in enumerate(contexts):
        alone = attention_batch([context], [1], 64, 120, decode_seqs=1, device="cuda")
        alone.block_table.copy_(batch.block_table[s, : alone.block_table.shape[1]])
        assert torch.equal(invariant.attention(q[s : s + 1], *caches, alone, 0.1), together[s : s + 1])


@pytest.mark.parametrize("window", [0, 700])
def test_batch_invariant_prefill_and_decode_agree_bit_by_bit(ops, window):
    """One sequence: prefilled at once, in chunks beside others, and token by token; against the ordinary kernels within rounding."""
    invariant, length = TritonOps(fixed_split=512), 2000
    whole = attention_batch([length], [length], 64, 120, decode_seqs=0, device="cuda")
    caches = [random_cache(120, 64, KV_HEADS, HEAD_DIM, BF16, "cuda") for _ in "kv"]
    q = bf16(length, Q_HEADS, HEAD_DIM)
    together = invariant.attention(q, *caches, whole, 0.1, window)
    torch.testing.assert_close(together, ops.attention(q, *caches, whole, 0.1, window), atol=0.02, rtol=0.02)
    others = attention_batch([900, 300, length], [1, 100, 777], 64, 120, decode_seqs=1, device="cuda")
    others.block_table[2] = whole.block_table[0, : others.block_table.shape[1]]
    mixed = torch.cat((bf16(101, Q_HEADS, HEAD_DIM), q[-777:]))
    assert torch.equal(invariant.attention(mixed, *caches, others, 0.1, window)[101:], together[-777:])
    for position in (0, 63, 64, 511, 512, 1023, 1999):
        alone = attention_batch([position + 1], [1], 64, 120, decode_seqs=1, device="cuda")
        alone.block_table.copy_(whole.block_table[:, : alone.block_table.shape[1]])
        row = slice(position, position + 1)
        assert torch.equal(invariant.attention(q[row], *caches, alone, 0.1, window), together[row]), position


def test_batch_invariant_products_of_thousands_of_rows():
    invariant, weight, x = TritonOps(fixed_split=512), bf16(6144, 4096), bf16(3000, 4096)
    together = invariant.linear(x, weight)
    exact = F.linear(x.double(), weight.double())
    assert_as_exact_as_torch(together, F.linear(x, weight), exact)
    for rows in (slice(0, 1), slice(1000, 1130), slice(2047, 3000)):
        assert torch.equal(invariant.linear(x[rows], weight), together[rows])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("vocabulary", [4096, 151936, 151937])
def test_token_bitmask(ops, dtype, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(33, vocabulary, device="cuda").to(dtype)
    masks = torch.randint(-(1 << 31), 1 << 31, (20, -(-vocabulary // 32)), dtype=torch.int64, device="cuda").int()
    rows = torch.randint(-1, 20, (34,), dtype=torch.int32, device="cuda")
    for part in (rows[:33], rows[1:]):  # aligned and not
        expected = ReferenceOps().apply_token_bitmask(logits.clone(), masks, part)
        assert torch.equal(ops.apply_token_bitmask(logits.clone(), masks, part), expected)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_sample(ops, dtype):
    rows = 64
    logits = (torch.randn(rows, VOCABULARY, device="cuda") * 3).to(dtype)
    index = torch.arange(rows)
    batch = sampling_batch(
        rows,
        device="cuda",
        temperature=torch.tensor([0, 1, 0.6, 1.5])[index % 4],
        top_k=torch.tensor([0, 20, 1, 1000, 0])[index % 5],
        top_p=torch.tensor([1, 0.95, 0.5])[index % 3],
        min_p=torch.tensor([0, 0, 0, 0, 0, 0, 0.05])[index % 7],
        seed=index * 7919 - 5,
        position=index,
    )
    got = ops.sample(logits, batch)
    greedy = batch.temperature == 0
    assert torch.equal(got[greedy], logits[greedy].argmax(-1))
    scores = logits.float() / batch.temperature[:, None].clamp(min=1e-3)
    scores = filter_scores(scores, batch.top_k, batch.top_p, batch.min_p)
    scores += gumbel_noise(batch.seed, batch.position, batch.choice, VOCABULARY)
    lost = scores.max(-1).values - scores.gather(1, got[:, None])[:, 0]
    assert lost[~greedy].max() < 1e-4  # the noise's logarithms are rounded differently


def test_sample_typical(ops):
    """The choice is one of those kept, and none that is kept beats it; at the edge of what is kept f32 decides otherwise than f64."""
    rows = 64
    logits = torch.randn(rows, VOCABULARY, device="cuda") * 3
    index = torch.arange(rows)
    batch = sampling_batch(
        rows,
        device="cuda",
        temperature=torch.tensor([0.6, 1, 1.5])[index % 3],
        top_k=torch.tensor([0, 0, 40, 500])[index % 4],
        top_p=torch.tensor([1, 0.9])[index % 2],
        min_p=torch.tensor([0, 0, 0, 0, 0.01])[index % 5],
        typical_p=torch.tensor([0.2, 0.5, 0.9, 1])[index % 4],
        seed=index * 7919 - 5,
        position=index,
    )
    got = ops.sample(logits, batch)
    scores = filter_scores(logits / batch.temperature[:, None], batch.top_k, batch.top_p, batch.min_p)
    noise = gumbel_noise(batch.seed, batch.position, batch.choice, VOCABULARY)
    for margin in (-1e-4, 1e-4):  # kept by a little less and by a little more
        typical_p = torch.where(batch.typical_p < 1, batch.typical_p + margin, 1.0)
        kept = keep_typical(scores, typical_p)
        lost = (kept + noise).max(-1).values - (scores + noise).gather(1, got[:, None])[:, 0]
        assert lost.max() < 1e-4 if margin < 0 else (kept.gather(1, got[:, None]) > -torch.inf).all()


def test_logit_edits(ops):
    rows, slots, number, words, length = 40, 8, 512, 256, 16
    ids = torch.stack([torch.randperm(VOCABULARY, device="cuda")[:number] for _ in range(slots)]).int()
    ids[:, 300:] = -1
    values = torch.randn(slots, number, device="cuda") * 20
    values[:, 200:] = -torch.inf
    until = torch.where(torch.arange(number, device="cuda") < 250, 2**31 - 1, 7).int().expand(slots, -1).contiguous()
    prefixes = torch.full((slots, words, length), -1, device="cuda", dtype=torch.int32)
    prefixes[..., -3:] = torch.randint(0, 3, (slots, words, 3), device="cuda").int()
    last = torch.randint(0, VOCABULARY, (slots, words), device="cuda").int()
    edits = LogitEdits(ids, values, until, last, prefixes)
    edit_rows = (torch.arange(rows, device="cuda") % 9 - 1).int()
    position = torch.arange(rows, device="cuda").int()
    recent = torch.randint(0, 3, (rows, length), device="cuda").int()
    logits = torch.randn(rows, VOCABULARY, device="cuda")
    expected, got = (o.edit_logits(logits.clone(), edits, edit_rows, position, recent) for o in (REFERENCE, ops))
    assert torch.equal(got, expected) and torch.isinf(got).any()


def test_penalties_and_moves(ops):
    logits = torch.randn(40, VOCABULARY, device="cuda")
    counts = torch.randint(0, 3, (8, VOCABULARY), device="cuda").int()
    mask = torch.rand(8, VOCABULARY, device="cuda") > 0.5
    rows = (torch.arange(40, device="cuda") % 9 - 1).int()
    penalties = [1 + torch.rand(40, device="cuda") for _ in range(3)]
    expected, got = (o.apply_penalties(logits.clone(), counts, mask, rows, *penalties) for o in (REFERENCE, ops))
    torch.testing.assert_close(got, expected)

    caches = torch.randn(2, 4, 20, 64, KV_HEADS, HEAD_DIM, device="cuda").to(BF16)
    source = torch.arange(1, 1001, device="cuda").int()
    target = (source - 1).where(source % 7 != 0, -1)
    moved = caches.clone()
    REFERENCE.move_kv(*caches, source, target)
    ops.move_kv(*moved, source, target)
    assert torch.equal(moved, caches)


def test_a_step_in_a_cuda_graph_follows_its_inputs(ops):
    """Captured with one set of lengths, replayed with others: nothing may depend on the host but the bounds."""
    seqs, page, blocks = 8, 64, 200
    contexts = torch.randint(1, 1024, (seqs,)).tolist()
    batch = attention_batch([1024] * seqs, [1] * seqs, page, blocks, decode_seqs=seqs, device="cuda")
    caches = [random_cache(blocks, page, KV_HEADS, HEAD_DIM, BF16, "cuda") for _ in "kv"]
    q, logits = bf16(seqs, Q_HEADS, HEAD_DIM), torch.randn(seqs, VOCABULARY, device="cuda")
    sampling = sampling_batch(seqs, device="cuda", temperature=0.8, top_k=50, top_p=0.9, seed=torch.arange(seqs))

    def step():
        return ops.attention(q, *caches, batch, 0.1), ops.sample(logits, sampling)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attended, tokens = step()
    for new_contexts in (contexts, [0, 1, 64, 65, 1024, 500, 0, 3]):
        batch.context_len.copy_(torch.tensor(new_contexts))
        q.copy_(torch.randn_like(q))
        logits.copy_(torch.randn_like(logits) * 4)
        sampling.position += 1
        graph.replay()
        expected = REFERENCE.attention(q, *caches, batch, 0.1)
        torch.testing.assert_close(attended.float(), expected.float(), atol=0.02, rtol=0.02)
        assert (tokens == REFERENCE.sample(logits, sampling)).sum() >= seqs - 1
