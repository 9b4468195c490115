"""What Medusa heads do in a step: the kernels against the reference, in Triton's interpreter."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)

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
