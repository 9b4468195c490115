"""Each Triton kernel against the reference, in Triton's interpreter on the CPU (the root conftest turns it on)."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from kernels.ops import LogitEdits, Sums
from kernels.reference import ReferenceOps
from tests.kernels.cases import attention_batch, naive_attention, random_cache, sampling_batch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)

from kernels.attention_decode import plan_splits
from kernels.attention_tiles import TileConfig
from kernels.triton_ops import TritonOps

# NumPy's remarks on what the interpreter does with it.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
torch.set_num_threads(1)
REFERENCE, TRITON = ReferenceOps(), TritonOps()
BOTH = (REFERENCE, TRITON)


@pytest.fixture
def bf16():
    """The interpreter computes wrongly on bf16; a tool beside the repository mends it."""
    path = Path(__file__).parents[3] / "shared" / "tools" / "interp_bf16.py"
    if not path.exists():
        pytest.skip(f"{path} is not there: Triton's interpreter cannot compute in bf16 without it")
    spec = importlib.util.spec_from_file_location("interp_bf16", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return torch.bfloat16


@pytest.mark.parametrize("width", [64, 100])
def test_norms(width):
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, width), torch.randn(3, width), torch.rand(width)
    torch.testing.assert_close(TRITON.rms_norm(x, weight, 1e-5), REFERENCE.rms_norm(x, weight, 1e-5))
    residuals = [residual.clone(), residual.clone()]
    expected, got = (ops.add_rms_norm(x, r, weight, 1e-5) for ops, r in zip(BOTH, residuals, strict=True))
    torch.testing.assert_close(got, expected)
    assert torch.equal(*residuals)


def test_silu_mul():
    x = torch.randn(3, 2200)
    torch.testing.assert_close(TRITON.silu_mul(x), REFERENCE.silu_mul(x))


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_dim"), [(6, 2, 8), (20, 4, 20)])
@pytest.mark.parametrize("normed", ["", "q", "qk"])
def test_rope_and_cache(q_heads, kv_heads, head_dim, normed):
    torch.manual_seed(1)
    qkv = torch.randn(5, (q_heads + 2 * kv_heads) * head_dim)
    table = torch.randn(50, head_dim)
    positions = torch.tensor([0, 3, 7, 9, -1], dtype=torch.int32)
    slots = torch.tensor([5, 17, -1, 40, -1], dtype=torch.int32)
    q_norm, k_norm = (torch.rand(head_dim) if kind in normed else None for kind in "qk")
    results = []
    for ops in BOTH:
        k_cache, v_cache = torch.zeros(2, 3, 16, kv_heads, head_dim)
        q = ops.rope_and_cache(qkv, table, positions, slots, k_cache, v_cache, q_heads, kv_heads, q_norm, k_norm, 1e-5)
        results.append((q, k_cache, v_cache))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("spans", [1, 3])
def test_products_that_are_added_up_where_they_are_read(spans):
    torch.manual_seed(15)
    sums = Sums(torch.randn(spans, 3, 96), torch.float16)
    half = [torch.rand(n).half() for n in (96, 12)]
    residuals = torch.randn(1, 3, 96).half().expand(2, -1, -1).clone()
    cache, table, ints = torch.zeros(2, 2, 3, 16, 2, 12).half(), torch.randn(50, 12), torch.tensor([4, 9, -1]).int()
    for product in (sums, sums.total()):
        norms, activations, queries = [], [], []
        for ops, residual, (keys, values) in zip(BOTH, residuals.clone(), cache, strict=True):
            norms += [ops.add_rms_norm(product, residual, half[0], 1e-5), residual]
            activations.append(ops.silu_mul(product))
            q = ops.rope_and_cache(product, table, ints, ints, keys, values, 4, 2, half[1], half[1], 1e-5)
            queries += [q, keys.clone(), values.clone()]
        for results in (norms, activations, queries):
            count = len(results) // 2
            for expected, got in zip(results[:count], results[count:], strict=True):
                assert got.dtype == torch.float16
                torch.testing.assert_close(got, expected, atol=4e-3, rtol=2e-3)


CHAIN, SHARED_TREE = None, torch.tensor([0b0001, 0b0011, 0b0101, 0b1011])
OWN_TREES = torch.cat((SHARED_TREE, torch.tensor([0b0001, 0b0011, 0b0111, 0b1111]), SHARED_TREE))


@pytest.mark.parametrize("window", [0, 5, 30])
@pytest.mark.parametrize("tree", [CHAIN, SHARED_TREE, OWN_TREES], ids=["causal", "tree", "trees"])
@pytest.mark.parametrize(("page", "group", "head_dim", "fixed_split"), [(16, 3, 8, None), (64, 2, 20, 32)])
def test_attention(window, tree, page, group, head_dim, fixed_split):
    """Decodes or trees and prefill chunks in one batch, with padded sequences, several splits and unread NaN blocks."""
    torch.manual_seed(2)
    n = 1 if tree is None else 4
    batch = attention_batch(
        [37, 0, 70, 20, 50, 0], [n, n, n, 20, 7, 2], page, 30, decode_seqs=3, tree=tree, window=window
    )
    k_cache, v_cache = random_cache(30, page, 2, head_dim), random_cache(30, page, 2, head_dim)
    q = torch.randn(3 * n + 29, 2 * group, head_dim)
    expected = REFERENCE.attention(q, k_cache, v_cache, batch, 0.3, window)
    got = TritonOps(fixed_split).attention(q, k_cache, v_cache, batch, 0.3, window)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 30])
def test_attention_of_a_step_captured_for_more(window):
    """As a graph of whole prompt steps has it: decodes are prompts of one row, the grid is made for more rows and sequences than there
    are, and rows behind the last belong to nobody."""
    torch.manual_seed(16)
    batch = attention_batch([37, 70, 20, 50, 0, 0], [1, 70, 9, 7, 0, 0], 16, 30, decode_seqs=0, window=window)
    exact, batch = batch, dataclasses.replace(batch, max_query=128, max_context=500)
    k_cache, v_cache = random_cache(30, 16, 2, 8), random_cache(30, 16, 2, 8)
    q = torch.randn(128, 4, 8)
    expected = naive_attention(q[:87], k_cache, v_cache, exact, 0.3, window)
    for ops in BOTH:
        got = ops.attention(q, k_cache, v_cache, batch, 0.3, window)[:87]
        torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("rows", [2, 5])
def test_candidates_see_the_context_and_themselves(window, rows):
    """Rows of contrastive search: all at the same position, none sees another, also where the first ends a tile."""
    torch.manual_seed(12)
    own = 1 << torch.arange(rows)
    contexts = [rows + 1, 40, 0, 67, rows + 31, rows + 63]
    batch = attention_batch(contexts, [rows] * 6, 16, 20, decode_seqs=6, tree=own, window=window)
    k_cache, v_cache = random_cache(20, 16, 2, 8), random_cache(20, 16, 2, 8)
    q = torch.randn(6 * rows, 4, 8)
    expected = naive_attention(q, k_cache, v_cache, batch, 0.3, window)
    for ops in BOTH:
        got = ops.attention(q, k_cache, v_cache, batch, 0.3, window)
        torch.testing.assert_close(got.double(), expected, atol=3e-6, rtol=1e-5)


def test_attention_over_whole_tiles_between_masked_ones():
    torch.manual_seed(3)
    batch = attention_batch([200, 150], [1, 60], 16, 40, decode_seqs=1)
    k_cache, v_cache = random_cache(40, 16, 1, 16), random_cache(40, 16, 1, 16)
    q = torch.randn(61, 2, 16)
    for window in (0, 70):
        got = TRITON.attention(q, k_cache, v_cache, batch, 0.25, window)
        expected = naive_attention(q, k_cache, v_cache, batch, 0.25, window)
        torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
def test_attention_in_bf16_by_tensor_descriptors(bf16, rows):
    """The production path: a tile is a block, loaded by TMA, which cannot mask what a block's former user left behind."""
    torch.manual_seed(4)
    tree = None if rows == 1 else SHARED_TREE
    batch = attention_batch([90, 40, 100], [rows, rows, 30], 64, 8, decode_seqs=2, tree=tree)
    caches = [random_cache(8, 64, 1, 64, bf16) for _ in "kv"]
    for s, context in enumerate(batch.context_len.tolist()):
        for cache in caches:
            cache[batch.block_table[s, context // 64].item(), context % 64 :] = float("nan")
    q = torch.randn(2 * rows + 30, 4, 64).to(bf16)
    expected = REFERENCE.attention(q, *caches, batch, 0.125)
    got = TRITON.attention(q, *caches, batch, 0.125)
    torch.testing.assert_close(got.float(), expected.float(), atol=0.01, rtol=0.02)


def test_fixed_split_gives_the_same_bits_in_every_batch():
    torch.manual_seed(5)
    k_cache, v_cache = random_cache(30, 16, 2, 16), random_cache(30, 16, 2, 16)
    q = torch.randn(3, 4, 16)
    batch = attention_batch([90, 33, 150], [1, 1, 1], 16, 30, decode_seqs=3)
    alone = attention_batch([90], [1], 16, 30, decode_seqs=1)
    alone.block_table[0] = batch.block_table[0, :6]
    ops = TritonOps(fixed_split=32)
    together = ops.attention(q, k_cache, v_cache, batch, 0.25)
    assert torch.equal(ops.attention(q[:1], k_cache, v_cache, alone, 0.25), together[:1])


def test_splits_cover_every_context_within_the_grid():
    for programs in (1, 8, 100, 512, 4096):
        for max_context in (1, 100, 5000, 130_000):
            for fixed in (None, 256):
                plan = plan_splits(programs, max_context, 132, fixed)
                for context in {1, max_context // 3 + 1, max_context}:
                    span = min(max(-(-context // plan.fill), plan.min_span), plan.max_span)
                    assert plan.splits * span >= context


def test_tile_config_is_hashable():
    assert len({TileConfig(16, 64, 4, 3, True), TileConfig(16, 64, 4, 3, True)}) == 1


ROWS = {
    "temperature": [0, 1, 0.7, 1, 1, 1, 2, 1, 0.01],
    "top_k": [0, 5, 0, 0, 40, 1, 0, 50, 3],
    "top_p": [1, 1, 0.5, 0.9, 0.9, 1, 0, 1, 0.9],
    "min_p": [0, 0, 0, 0.1, 0, 0, 0, 0.3, 0],
}


@pytest.mark.parametrize("vocabulary", [7, 1000, 5003])
@pytest.mark.parametrize(
    "bounds", [{}, {"any_filter": False}, {"any_random": False}], ids=["all", "unfiltered", "greedy"]
)
def test_sample(vocabulary, bounds):
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(6)) * 3
    logits[4, ::2] = -torch.inf  # as a grammar masks
    logits[5] = logits[5].round()  # ties
    for seed in (3, -(1 << 62)):
        batch = sampling_batch(9, **ROWS, seed=seed + torch.arange(9), position=torch.arange(9), choice=2, **bounds)
        assert torch.equal(TRITON.sample(logits, batch), REFERENCE.sample(logits, batch))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("vocabulary", [7, 5003])
@pytest.mark.parametrize("typical", [{}, {"typical_p": 0.5}], ids=["filters", "typical"])
def test_a_row_without_any_token_comes_to_an_end(vocabulary, typical):
    """With some valid id, whatever its filters; and the rows beside it are what they were."""
    filters = {name: values[1:5] for name, values in ROWS.items()} | {"min_p": [0, 0.1, 0.1, 0.1]}
    logits = torch.randn(8, vocabulary, generator=torch.Generator().manual_seed(7))
    logits[4:] = -torch.inf
    batch = sampling_batch(8, **{name: values * 2 for name, values in filters.items()}, **typical, seed=torch.arange(8))
    chosen = TRITON.sample(logits, batch)
    assert torch.equal(chosen[:4], REFERENCE.sample(logits, batch)[:4])
    assert all(0 <= token < vocabulary for token in chosen.tolist())


TYPICAL_ROWS = {
    "temperature": [0, 1, 0.7, 1, 1, 1, 2, 1, 0.3],
    "top_k": [0, 5, 0, 0, 40, 1, 0, 80, 3],
    "top_p": [1, 1, 0.5, 0.9, 0.9, 1, 1, 1, 0.9],
    "min_p": [0, 0, 0, 0.1, 0, 0, 0, 0.01, 0],
    "typical_p": [0.5, 0.5, 0.9, 0.3, 0.7, 0.2, 0.8, 1, 0.95],
}


@pytest.mark.parametrize("vocabulary", [7, 5003])
def test_sample_typical(vocabulary):
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(6)) * 3
    logits[4, ::2] = -torch.inf
    logits[6] = logits[6].round()  # ties
    for seed in (3, -(1 << 62)):
        batch = sampling_batch(9, **TYPICAL_ROWS, seed=seed + torch.arange(9), position=torch.arange(9), choice=2)
        assert torch.equal(TRITON.sample(logits, batch), REFERENCE.sample(logits, batch))
    without = sampling_batch(9, **TYPICAL_ROWS | {"typical_p": 1.0}, seed=seed + torch.arange(9))
    without.typical_p[:] = 1.0
    off = sampling_batch(9, **{k: v for k, v in TYPICAL_ROWS.items() if k != "typical_p"}, seed=without.seed)
    assert torch.equal(TRITON.sample(logits, without), TRITON.sample(logits, off))


def random_edits(slots: int, vocabulary: int, words: int = 12) -> LogitEdits:
    """Bias with distinct tokens, some until a position, and words of up to four tokens; the rest is filled up."""
    ids = torch.stack([torch.randperm(vocabulary)[:20] for _ in range(slots)]).int()
    ids[:, 15:] = -1
    values = torch.randn(slots, 20) * 10
    values[:, 3:5] = -torch.inf
    until = torch.where(torch.arange(20) % 4 == 3, 5, 2**31 - 1).int().expand(slots, -1).contiguous()
    prefixes = torch.randint(0, 3, (slots, words, 4), dtype=torch.int32)
    for column in range(4):  # of all lengths, right-aligned
        prefixes[:, column::4, :column] = -1
    prefixes[:, 0] = -1
    last = torch.randint(0, vocabulary, (slots, words), dtype=torch.int32)
    last[:, -1] = -1
    return LogitEdits(ids, values, until, last, prefixes)


def test_logit_edits():
    torch.manual_seed(10)
    edits = random_edits(3, 1500)
    logits = torch.randn(5, 1500)
    rows = torch.tensor([0, 2, -1, 1, 1], dtype=torch.int32)
    position = torch.tensor([0, 4, 0, 5, 9], dtype=torch.int32)
    recent = torch.randint(0, 3, (5, 4), dtype=torch.int32)
    recent[0, :2] = -1
    expected, got = (ops.edit_logits(logits.clone(), edits, rows, position, recent) for ops in BOTH)
    assert torch.equal(got, expected)
    assert torch.equal(got[2], logits[2]) and torch.isinf(got[0]).any()


def test_sampling_follows_the_reference_row_by_row():
    """Many draws from one distribution: the noise, not only the maximum, must be the reference's."""
    logits = torch.randn(50, generator=torch.Generator().manual_seed(7)).expand(24, -1)
    batch = sampling_batch(24, temperature=1.3, top_k=30, seed=11, position=torch.arange(24))
    tokens = TRITON.sample(logits, batch)
    assert torch.equal(tokens, REFERENCE.sample(logits, batch))
    assert tokens.unique().numel() > 10


def test_sampling_from_nan_gives_a_token_of_the_vocabulary():
    logits = torch.full((2, 1000), float("nan"))
    batch = sampling_batch(2, temperature=[0, 1], top_k=5, top_p=0.9)
    tokens = TRITON.sample(logits, batch)
    assert ((tokens >= 0) & (tokens < 1000)).all()


def test_penalties():
    torch.manual_seed(8)
    logits = torch.randn(5, 1500)
    counts, mask = torch.randint(0, 3, (3, 1500)).int(), torch.rand(3, 1500) > 0.5
    rows = torch.tensor([0, 2, -1, 1, 1], dtype=torch.int32)
    penalties = 1 + torch.rand(5), torch.rand(5), torch.rand(5)
    expected, got = (ops.apply_penalties(logits.clone(), counts, mask, rows, *penalties) for ops in BOTH)
    torch.testing.assert_close(got, expected)
    assert torch.equal(got[2], logits[2])


@pytest.mark.parametrize("vocabulary", [7, 1000, 9001])
def test_token_bitmask(vocabulary):
    torch.manual_seed(10)
    logits = torch.randn(5, vocabulary)
    masks = torch.randint(-(1 << 31), 1 << 31, (3, -(-vocabulary // 32)), dtype=torch.int64).int()
    rows = torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32)
    expected, got = (ops.apply_token_bitmask(logits.clone(), masks, rows) for ops in BOTH)
    assert torch.equal(got, expected)
    for row, mask in enumerate(rows.tolist()):
        for token in range(0, vocabulary, 13):
            allowed = mask < 0 or masks[mask, token // 32].item() >> token % 32 & 1
            assert got[row, token] == (logits[row, token] if allowed else -torch.inf)


def test_sampling_from_one_allowed_token():
    """Fewer tokens are left than the filters would keep."""
    logits = torch.randn(4, 300)
    masks = torch.zeros(4, 10, dtype=torch.int32)
    masks[:, 5] = 1 << 7
    masks[3, 9] = 3
    batch = sampling_batch(
        4, temperature=[0, 1, 2, 1], top_k=[0, 40, 5, 200], top_p=[1, 0.9, 1, 0.99], min_p=[0, 0, 0.1, 0]
    )
    for ops in BOTH:
        tokens = ops.sample(ops.apply_token_bitmask(logits.clone(), masks, torch.arange(4, dtype=torch.int32)), batch)
        assert tokens[:3].tolist() == [167] * 3 and tokens[3].item() in (167, 288, 289)


def test_logprobs():
    logits, chosen = torch.randn(3, 50), torch.tensor([1, 2, 49])
    torch.testing.assert_close(TRITON.logprobs(logits, chosen, 5), REFERENCE.logprobs(logits, chosen, 5))


@pytest.mark.parametrize("layers", [(), (2,)])
def test_move_kv(layers):
    torch.manual_seed(9)
    moves = torch.arange(1, 41, dtype=torch.int32)  # each row is the target of the next: order matters
    source, target = moves, (moves - 1).where(moves % 7 != 0, -1)
    caches = torch.randn(2, *layers, 6, 16, 2, 5)
    expected, got = caches.clone(), caches.clone()
    REFERENCE.move_kv(*expected, source, target)
    TRITON.move_kv(*got, source, target)
    assert torch.equal(got, expected)
    assert not torch.equal(got, caches)
