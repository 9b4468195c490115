"""The oracle's own oracles: transformers, float64, and published test vectors."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from kernels import select_ops
from kernels.philox import gumbel_noise, philox4x32
from kernels.reference import ReferenceOps, filter_scores
from tests.kernels.cases import attention_batch, naive_attention, random_cache, sampling_batch

torch.set_num_threads(1)
OPS = ReferenceOps()


def test_select_ops_on_a_cpu_is_the_reference():
    assert select_ops("cpu").name == "reference"


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # from Random123's known-answer file
        ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    words = philox4x32(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
    assert [w.item() for w in words] == expected


def test_gumbel_noise_is_keyed_by_seed_position_choice_and_token():
    seeds = torch.tensor([1, -1, 1 << 40, 1, 1])
    positions = torch.tensor([0, 0, 0, 1, 0])
    choices = torch.tensor([0, 0, 0, 0, 1])
    noise = gumbel_noise(seeds, positions, choices, 4099)
    assert noise.shape == (5, 4099)
    assert noise.unique().numel() > 0.99 * noise.numel()
    assert torch.equal(noise[3:4], gumbel_noise(seeds[3:4], positions[3:4], choices[3:4], 4099))
    # A float64 Gumbel has mean 0.5772 and variance pi²/6.
    assert abs(noise.double().mean() - 0.5772) < 0.03
    assert abs(noise.double().var() - 1.6449) < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_activation_and_rope_equal_transformers(dtype):
    torch.manual_seed(0)
    rows, heads, kv_heads, head_dim = 5, 4, 2, 16
    config = LlamaConfig(hidden_size=64, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=96)
    x = torch.randn(rows, 64).to(dtype)
    norm = LlamaRMSNorm(64, 1e-5).to(dtype)
    torch.nn.init.uniform_(norm.weight)
    assert torch.equal(OPS.rms_norm(x, norm.weight, 1e-5), norm(x))
    residual = torch.randn(rows, 64).to(dtype)
    expected = residual + x
    assert torch.equal(OPS.add_rms_norm(x, residual, norm.weight, 1e-5), norm(expected))
    assert torch.equal(residual, expected)
    mlp = LlamaMLP(config).to(dtype)
    gate_up = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), dim=-1)
    assert torch.equal(mlp.down_proj(OPS.silu_mul(gate_up)), mlp(x))

    positions = torch.tensor([0, 1, 7, 100, 1000], dtype=torch.int32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None].long())
    table = torch.zeros(1001, head_dim)
    table[positions.long()] = torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), dim=-1)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype)
    q, k, v = (part.view(rows, -1, head_dim) for part in qkv.split([64, 32, 32], dim=-1))
    k_cache, v_cache = torch.zeros(2, 3, 16, kv_heads, head_dim, dtype=dtype)
    slots = torch.tensor([3, 47, -1, 0, 20], dtype=torch.int32)
    got = OPS.rope_and_cache(qkv, table, positions, slots, k_cache, v_cache, heads, kv_heads, None, None, 1e-5)
    q, k = apply_rotary_pos_emb(q.float()[None], k.float()[None], cos, sin, unsqueeze_dim=2)
    written = slots >= 0
    expected_k, expected_v = (
        torch.zeros_like(k_cache).view(48, kv_heads, head_dim),
        torch.zeros_like(v).new_zeros(48, kv_heads, head_dim),
    )
    expected_k[slots[written].long()] = k[0, written].to(dtype)
    expected_v[slots[written].long()] = v[written]
    assert torch.equal(got, q[0].to(dtype))
    assert torch.equal(k_cache.view_as(expected_k), expected_k)
    assert torch.equal(v_cache.view_as(expected_v), expected_v)


CHAIN, SHARED_TREE = None, torch.tensor([0b0001, 0b0011, 0b0101, 0b1011])
OWN_TREES = torch.cat((SHARED_TREE, torch.tensor([0b0001, 0b0011, 0b0111, 0b1111]), SHARED_TREE))


@pytest.mark.parametrize("window", [0, 5, 30])
@pytest.mark.parametrize("tree", [CHAIN, SHARED_TREE, OWN_TREES], ids=["causal", "tree", "trees"])
@pytest.mark.parametrize(("page", "group"), [(16, 3), (32, 1)])
def test_attention_is_its_definition(window, tree, page, group):
    torch.manual_seed(1)
    n = 1 if tree is None else 4
    batch = attention_batch(
        [37, 0, 64, 20, 50, 0], [n, n, n, 20, 7, 2], page, 40, decode_seqs=3, tree=tree, window=window
    )
    k_cache, v_cache = random_cache(40, page, 2, 8), random_cache(40, page, 2, 8)
    q = torch.randn(3 * n + 29, 2 * group, 8)
    got = OPS.attention(q, k_cache, v_cache, batch, 8**-0.5, window)
    torch.testing.assert_close(
        got.double(), naive_attention(q, k_cache, v_cache, batch, 8**-0.5, window), atol=2e-6, rtol=1e-5
    )


FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (20, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.0, 0.0),
    (20, 0.8, 0.0),
    (0, 1.0, 0.1),
    (50, 0.95, 0.05),
    (5000, 0.99, 1.0),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), FILTERS)
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_filters_equal_transformers_warpers(top_k, top_p, min_p, spread):
    torch.manual_seed(2)
    logits = torch.randn(4, 1000) * spread
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    batch = sampling_batch(4, top_k=top_k, top_p=top_p, min_p=min_p)
    got = filter_scores(logits / 0.7, batch.top_k, batch.top_p, batch.min_p)
    assert torch.equal(got, warpers(torch.zeros(4, 1, dtype=torch.long), logits))


def test_filters_keep_what_ties_with_the_last_token_kept():
    scores = torch.tensor([[3.0, 2, 2, 2, 1], [1.0, 1, 1, 1, 1]])
    batch = sampling_batch(2, top_k=2)
    kept = filter_scores(scores, batch.top_k, batch.top_p, batch.min_p) > -torch.inf
    assert kept.tolist() == [[True, True, True, True, False], [True] * 5]


def test_filters_with_masked_tokens():
    scores = torch.full((1, 10), -torch.inf)
    scores[0, 4] = 1.0
    batch = sampling_batch(1, top_k=3, top_p=0.9, min_p=0.1)
    assert (filter_scores(scores, batch.top_k, batch.top_p, batch.min_p) > -torch.inf).nonzero().tolist() == [[0, 4]]


def test_penalties_equal_transformers_and_their_definition():
    torch.manual_seed(3)
    logits = torch.randn(3, 50)
    prompt, generated = torch.tensor([3, 4, 5]), torch.tensor([5, 7, 7, 9])
    counts, mask = torch.zeros(2, 50, dtype=torch.int32), torch.zeros(2, 50, dtype=torch.bool)
    counts[1], mask[1, prompt] = torch.bincount(generated, minlength=50).int(), True
    rows = torch.tensor([1, -1, 1], dtype=torch.int32)
    ones, zeros = torch.ones(3), torch.zeros(3)
    repeated = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat((prompt, generated))[None], logits[:1])
    got = OPS.apply_penalties(logits.clone(), counts, mask, rows, ones * 1.3, zeros, zeros)
    assert torch.equal(got[:1], repeated)
    assert torch.equal(got[1], logits[1])
    got = OPS.apply_penalties(logits.clone(), counts, mask, rows, ones, ones * 0.5, ones * 0.25)
    expected = logits[0].clone()
    expected[[5, 9]] -= 0.75
    expected[7] -= 1.0
    torch.testing.assert_close(got[0], expected)


def test_greedy_takes_the_lowest_of_equals_and_ignores_noise():
    logits = torch.zeros(2, 100)
    logits[0, [40, 60]] = 1.0
    assert OPS.sample(logits, sampling_batch(2, temperature=0.0)).tolist() == [40, 0]


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}, {"typical_p": 0.5}])
@pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-45])
def test_the_least_temperatures_are_greedy(temperature, filters):
    """A logit divided by less than 3e-38 may be infinite, and then several are."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(3)) * 5
    tokens = OPS.sample(logits, sampling_batch(4, temperature=temperature, **filters))
    assert torch.equal(tokens, logits.argmax(-1))


def test_logprobs():
    torch.manual_seed(4)
    logits = torch.randn(3, 40)
    chosen = torch.tensor([0, 7, 39])
    expected = logits.double().log_softmax(-1)
    own, top, ids = OPS.logprobs(logits, chosen, 4)
    torch.testing.assert_close(own.double(), expected[torch.arange(3), chosen], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(top.double(), expected.gather(1, ids), atol=1e-6, rtol=1e-6)
    assert torch.equal(ids, expected.topk(4).indices)
    assert OPS.logprobs(logits, chosen, 0)[1].shape == (3, 0)


def test_move_kv_moves_in_order():
    k_cache = torch.arange(2 * 4 * 8).float().view(2, 4, 8, 1, 1)
    v_cache = -k_cache
    source = torch.tensor([5, 6, 9, 31], dtype=torch.int32)
    target = torch.tensor([3, 5, -1, 30], dtype=torch.int32)
    expected = k_cache.clone().view(2, 32)
    for s, t in ((5, 3), (6, 5), (31, 30)):
        expected[:, t] = expected[:, s]
    OPS.move_kv(k_cache, v_cache, source, target)
    assert torch.equal(k_cache.view(2, 32), expected)
    assert torch.equal(v_cache.view(2, 32), -expected)
