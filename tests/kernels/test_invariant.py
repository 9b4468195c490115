"""The batch-invariant mode, in Triton's interpreter: the same bits for a row, whatever shares its batch and however it came there."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from kernels import select_ops
from kernels.ops import AttentionBatch
from kernels.reference import ReferenceOps
from tests.kernels.cases import attention_batch, random_cache

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)

from kernels.attention_invariant import invariant_attention
from kernels.gemm_choice import invariant
from kernels.skinny_gemm import invariant_fits, skinny_linear
from kernels.triton_ops import INVARIANT_ROWS, TritonOps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
torch.set_num_threads(1)

SPAN, PAGE, LENGTH, SCALE = 32, 16, 70, 0.25
OPS = TritonOps(fixed_split=SPAN)


def one_sequence(table: torch.Tensor, begin: int, end: int, *, decode: bool = False) -> AttentionBatch:
    """Positions begin..end of one sequence whose blocks are `table`."""
    return AttentionBatch(
        torch.tensor([0, end - begin], dtype=torch.int32),
        torch.tensor([end], dtype=torch.int32),
        table,
        int(decode),
        end - begin,
        0 if decode else end - begin,
        end,
    )


@pytest.fixture(autouse=True)
def products_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores treat all rows of a tile alike. NumPy's BLAS, which stands for them, does not on every CPU: at the edges of a matrix
    it adds up in another order."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = np.matmul(a.data[..., None, :], b.data[..., None, :, :], dtype=d.data.dtype)[..., 0, :]
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture
def sequence() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q of all positions of one sequence, the caches, its blocks."""
    torch.manual_seed(6)
    table = (torch.randperm(29)[:6] + 1).int()[None, :]
    return torch.randn(LENGTH, 2, 16), random_cache(30, PAGE, 1, 16), random_cache(30, PAGE, 1, 16), table


@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize(("page", "group", "head_dim"), [(16, 3, 8), (64, 2, 20)])
def test_it_is_attention(window, page, group, head_dim):
    """Decodes, a padded sequence and prefill chunks in one batch, with unread NaN blocks."""
    torch.manual_seed(2)
    batch = attention_batch([37, 0, 70, 20, 50, 0], [1, 1, 1, 20, 7, 2], page, 30, decode_seqs=3, window=window)
    k_cache, v_cache = random_cache(30, page, 2, head_dim), random_cache(30, page, 2, head_dim)
    q = torch.randn(32, 2 * group, head_dim)
    expected = ReferenceOps().attention(q, k_cache, v_cache, batch, 0.3, window)
    got = OPS.attention(q, k_cache, v_cache, batch, 0.3, window)
    torch.testing.assert_close(got, expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_prefill_chunks_and_decodes_agree_bit_by_bit(sequence, window):
    q, k_cache, v_cache, table = sequence
    whole = OPS.attention(q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE, window)
    for begin, end in ((0, 37), (37, 38), (38, LENGTH)):
        chunk = OPS.attention(q[begin:end], k_cache, v_cache, one_sequence(table, begin, end), SCALE, window)
        assert torch.equal(chunk, whole[begin:end]), f"positions {begin} to {end} in a chunk of their own"
    for position in (0, 31, 32, 69):
        batch = one_sequence(table, position, position + 1, decode=True)
        alone = OPS.attention(q[position : position + 1], k_cache, v_cache, batch, SCALE, window)
        assert torch.equal(alone, whole[position : position + 1]), f"position {position}, decoded"


def test_neighbours_and_the_workspace_change_no_bit(sequence):
    q, k_cache, v_cache, table = sequence
    whole = OPS.attention(q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE)
    others = attention_batch([50, 64, LENGTH], [1, 10, LENGTH - 40], PAGE, 30, decode_seqs=1)
    others.block_table[2] = table[0, : others.block_table.shape[1]]
    mixed = OPS.attention(torch.cat((torch.randn(11, 2, 16), q[40:])), k_cache, v_cache, others, SCALE)
    assert torch.equal(mixed[11:], whole[40:])
    out = torch.empty_like(q)
    invariant_attention(
        q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE, 0, out, span=SPAN, workspace_bytes=1 << 13
    )
    assert torch.equal(out, whole), "rows taken in turn"


def test_the_ordinary_mode_does_differ(sequence):
    """Negative control: there it is another kernel that prefills, and the spans of a decode follow from the batch."""
    q, k_cache, v_cache, table = sequence
    ordinary = TritonOps()
    whole = ordinary.attention(q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE)
    single = torch.cat(
        [
            ordinary.attention(q[p : p + 1], k_cache, v_cache, one_sequence(table, p, p + 1, decode=True), SCALE)
            for p in (50, 60, 69)
        ]
    )
    torch.testing.assert_close(single, whole[[50, 60, 69]], atol=3e-6, rtol=1e-5)
    shorter = TritonOps(fixed_split=64).attention(q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE)
    spans = OPS.attention(q, k_cache, v_cache, one_sequence(table, 0, LENGTH), SCALE)
    assert not (torch.equal(single, whole[[50, 60, 69]]) and torch.equal(shorter, spans)), "bits can differ at all"


@pytest.mark.parametrize("bias", [False, True])
def test_products_have_the_same_bits_for_any_number_of_rows(bias):
    torch.manual_seed(7)
    x, weight = torch.randn(40, 512), torch.randn(96, 512)
    shift = torch.randn(96) if bias else None
    config = replace(invariant(*weight.shape), tma=False)
    assert config.split > 1
    whole = skinny_linear(x, weight, shift, config)
    torch.testing.assert_close(whole, torch.nn.functional.linear(x, weight, shift), atol=1e-3, rtol=1e-4)
    for begin, end in ((0, 1), (3, 8), (8, 25), (39, 40)):
        assert torch.equal(skinny_linear(x[begin:end], weight, shift, config), whole[begin:end])


def test_many_rows_are_taken_in_turn(monkeypatch):
    calls = []

    def linear(x, weight, bias, config):
        calls.append((x.shape[0], config))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr("kernels.triton_ops.skinny_linear", linear)
    x, weight = torch.randn(2 * INVARIANT_ROWS + 5, 128), torch.randn(64, 128)
    got = OPS._invariant_linear(x, weight, None)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight))
    assert [rows for rows, _ in calls] == [INVARIANT_ROWS, INVARIANT_ROWS, 5]
    assert {config for _, config in calls} == {invariant(64, 128)}


def test_where_the_mode_cannot_be_had_it_is_refused():
    with pytest.raises(ValueError, match="capability"):
        select_ops("cpu", batch_invariant=True)
    assert invariant_fits(torch.empty(64, 256, dtype=torch.bfloat16))
    assert not invariant_fits(torch.empty(64, 200, dtype=torch.bfloat16)), "no multiple of 128"
    assert not invariant_fits(torch.empty(64, 256))


def test_a_worker_on_a_cpu_refuses_the_mode(tmp_path):
    from services.model_worker.engine_setup import EngineConfig, build
    from services.model_worker.models.config import ModelError

    shape = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    config = EngineConfig(tmp_path, load_format="dummy", device="cpu", batch_invariant=True)
    with pytest.raises(ModelError, match="batch-invariant"):
        build(config, lambda part, what: None)
