"""What Medusa heads do in a step: the kernels against the reference, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)

from kernels import eight_bit
from kernels.eight_bit import EightBit
from kernels.reference import ReferenceOps
from kernels.triton_ops import TritonOps
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.tree import Tree, default_trees

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton")
torch.set_num_threads(1)
REFERENCE, TRITON = ReferenceOps(), TritonOps()


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("hidden", [40, 96])
def test_residual_block(rows: int, hidden: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(2, hidden, hidden), torch.randn(2, hidden)
    table, slots = torch.randn(1, 80, hidden), torch.randperm(80)[:rows]
    first = TRITON.residual_block(table, weight, bias, slots)
    torch.testing.assert_close(first, REFERENCE.residual_block(table, weight, bias, slots), atol=1e-4, rtol=1e-4)
    second = TRITON.residual_block(first, weight, bias)
    torch.testing.assert_close(second, REFERENCE.residual_block(first, weight, bias), atol=1e-3, rtol=1e-4)
    wide = torch.randn(2, 75, hidden)
    torch.testing.assert_close(
        TRITON.linear_each(first, wide), REFERENCE.linear_each(first, wide), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize(("width", "depth"), [(75, 96), (33, 300)])
def test_products_with_eight_bit_weights(dtype: torch.dtype, rows: int, width: int, depth: int) -> None:
    torch.manual_seed(rows)
    x, scales = torch.randn(2, rows, depth).to(dtype), 10 ** torch.randn(2, width, 1).clamp(-2, 1)
    weight = EightBit.of((torch.randn(2, width, depth) * scales).to(dtype))
    exact = REFERENCE.linear_each(x.double(), weight)
    got = TRITON.linear_each(x, weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, atol=1e-3, rtol=1e-4 if dtype == torch.float32 else 1e-2)
    square, bias, slots = EightBit.of(torch.randn(2, depth, depth) / 10), torch.randn(2, depth), torch.arange(rows)
    got = TRITON.residual_block(x[:1].float(), square, bias, slots)
    torch.testing.assert_close(got, REFERENCE.residual_block(x[:1].float(), square, bias, slots), atol=1e-4, rtol=1e-4)


def test_eight_bit_rows_are_as_close_as_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "_PIECE", 3 * 50)  # in several pieces
    weight = torch.randn(2, 4, 50)
    weight[0, 1], weight[1, 2, 7] = 0.0, 40.0
    small = EightBit.of(weight.bfloat16())
    assert small.values.dtype == torch.int8 and small.values.shape == weight.shape
    assert small.values[1, 2, 7] == 127 and not small.values[0, 1].any()
    errors = (small.expanded(torch.float64) - weight.bfloat16().double()).abs()
    assert (errors <= weight.abs().amax(-1, keepdim=True) / 253).all()
    assert torch.equal(small[1].expanded(torch.float32), small.expanded(torch.float32)[1])


@pytest.mark.parametrize("tree", [Tree.of([(0,)]), Tree.of([(2,), (0,), (0, 1), (2, 3)]), default_trees(4).trees[-1]])
@pytest.mark.parametrize("vocabulary", [12, 2500])
@pytest.mark.parametrize("mapped", [False, True])
def test_guess_tokens(tree: Tree, vocabulary: int, mapped: bool) -> None:
    """With many equal logits, in 16 bits, and -inf for most tokens of a head."""
    torch.manual_seed(vocabulary)
    tables = DeviceTree(tree, torch.device("cpu"))
    logits = torch.randint(-4, 4, (tree.depth, 5, vocabulary)).half()
    logits[-1, 2, 1:] = -torch.inf
    token_map = torch.randperm(9000)[:vocabulary] if mapped else None
    slots, last = torch.tensor([6, 0, 3, 2, 6]), torch.randint(0, 9000, (7,))
    expected, got = (
        ops.guess_tokens(logits, token_map, slots, last, tables.sources, tree.width) for ops in (REFERENCE, TRITON)
    )
    assert got.dtype == torch.int64
    assert torch.equal(got, expected)
    assert torch.equal(got[:, 0], last[slots])
