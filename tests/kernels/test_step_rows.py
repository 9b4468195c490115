"""Where decode rows stand and which guesses are kept: the kernels against the reference, and the reference against plain Python."""

from __future__ import annotations

import pytest
import torch

from kernels.reference import ReferenceOps
from kernels.triton_ops import TritonOps
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.tree import Tree, default_trees

REFERENCE, TRITON = ReferenceOps(), TritonOps()
SLOTS = torch.tensor([4, 0, 2, 6, 1])  # of six sequences and nobody
NULL = 6
TREES = {
    "one guess": Tree.of([(0,)]),
    "chain": Tree.of([(0,), (0, 0), (0, 0, 0)]),
    "wide": Tree.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0)]),
}


@pytest.mark.parametrize("nodes", [1, 3, 9])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("advance", [False, True])
def test_lay_out(nodes: int, block_size: int, advance: bool) -> None:
    torch.manual_seed(nodes)
    context = torch.tensor([5, 0, 2 * block_size - 1, 33, 64, 7, 0], dtype=torch.int32)
    table = torch.randint(0, 500, (7, 300), dtype=torch.int32)
    depths = torch.randint(0, 4, (nodes,), dtype=torch.int32)
    depths[0] = 0
    last_token = torch.arange(7) * 11
    results, contexts = [], []
    for ops in (REFERENCE, TRITON):
        contexts.append(context.clone())
        results.append(ops.lay_out(SLOTS, depths, contexts[-1], last_token, table, block_size, advance))
    expected, got = results
    assert torch.equal(got.tokens, expected.tokens) and expected.tokens.tolist() == [44, 0, 22, 66, 11]
    assert torch.equal(*contexts)
    grown = [
        length + nodes * advance * (slot in SLOTS and slot != NULL) for slot, length in enumerate(context.tolist())
    ]
    assert contexts[0].tolist() == grown
    for name in ("positions", "kv_slots", "context_len", "block_table"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype == torch.int32
        assert torch.equal(ours, theirs), name
    for row, slot in enumerate(SLOTS.tolist()):
        start = context[slot].item()
        assert expected.positions.view(-1, nodes)[row].tolist() == [start + depth for depth in depths.tolist()]
        if slot == NULL:
            assert expected.context_len[row] == 0 and (expected.kv_slots[row] == -1).all()
            continue
        places = [
            table[slot, p // block_size].item() * block_size + p % block_size for p in range(start, start + nodes)
        ]
        assert expected.kv_slots[row].tolist() == places
        assert expected.context_len[row] == start + nodes


@pytest.mark.parametrize("width", [24, 1500])
def test_embed_and_keep_chosen(width: int) -> None:
    weight, ids = torch.randn(50, width), torch.tensor([3, 49, 0, 3])
    for form in (ids, ids.int()):
        into = torch.empty(4, width)
        assert TRITON.embed(form, weight, into) is into
        assert torch.equal(into, REFERENCE.embed(form, weight)) and torch.equal(into, weight[ids])
    slots, hidden = torch.tensor([5, 1, 6, 6]), torch.randn(1, width).expand(4, -1)
    for kept in (None, torch.zeros(2, 7, width)):
        last_tokens = torch.zeros(2, 7, dtype=torch.int64)
        for ops, last_token, of_ops in zip(
            (REFERENCE, TRITON), last_tokens, kept if kept is not None else (None, None), strict=True
        ):
            ops.keep_chosen(slots, torch.tensor([9, 8, 7, 7]), last_token, hidden, of_ops)
        assert last_tokens.tolist() == [[0, 8, 0, 0, 0, 9, 7]] * 2
        if kept is not None:
            assert torch.equal(*kept) and torch.equal(kept[0].any(1), torch.tensor([0, 1, 0, 0, 0, 1, 1]).bool())


def accepted_by_hand(tree: Tree, tokens: list[int], chosen: list[int]) -> list[int]:
    """The nodes from the root to the last accepted one."""
    path = [0]
    while True:
        here = tree.nodes[path[-1]]
        children = [n for n, node in enumerate(tree.nodes) if len(node) == len(here) + 1 and node[: len(here)] == here]
        following = [n for n in children if tokens[n] == chosen[path[-1]]]
        if not following:
            return path
        path.append(following[0])


@pytest.mark.parametrize("name", [*TREES, "largest default"])
def test_accept_tree(name: str) -> None:
    tree = TREES[name] if name in TREES else default_trees(4).trees[-1]
    device_tree, nodes, hidden_size = DeviceTree(tree, torch.device("cpu")), tree.size, 40
    torch.manual_seed(len(name))
    seen = set()
    for _ in range(12):
        # Few tokens, so that guesses come true; distinct among siblings, as a drafter's are.
        tokens = torch.randint(0, 3, (5, nodes))
        for n, node in enumerate(tree.nodes[1:], 1):
            tokens[:, n] = (tokens[:, device_tree.parents[n]] + node[-1]) % 97
        chosen = (tokens + torch.randint(0, 2, (5, nodes))) % 97
        kv_slots = torch.randperm(2000)[: 5 * nodes].view(5, nodes).int()
        kv_slots[3] = -1
        hidden = torch.randn(5 * nodes, hidden_size)
        before = torch.tensor([10, 20, 30, 0, 50], dtype=torch.int32)
        results = []
        for ops in (REFERENCE, TRITON):
            context = torch.arange(100, 107, dtype=torch.int32)
            last_token, kept = torch.arange(7), torch.zeros(7, hidden_size)
            out = ops.accept_tree(
                device_tree, SLOTS, tokens, chosen, kv_slots, hidden, before + nodes, context, last_token, kept
            )
            results.append(
                (out.ids, out.target, torch.where(out.target >= 0, out.source, -1), context, last_token, kept)
            )
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        ids, target, source, context, last_token, kept = results[0]
        for row, slot in enumerate(SLOTS.tolist()):
            path = accepted_by_hand(tree, tokens[row].tolist(), chosen[row].tolist())
            seen.add(len(path))
            assert [t for t in ids[row].tolist() if t >= 0] == [chosen[row, n].item() for n in path]
            assert last_token[slot] == chosen[row, path[-1]]
            assert torch.equal(kept[slot], hidden[row * nodes + path[-1]])
            assert context[slot] == (0 if slot == NULL else before[row] + len(path))
            if slot != NULL:
                moves = [(kv_slots[row, n].item(), kv_slots[row, k].item()) for k, n in enumerate(path) if k != n]
                depth = tree.depth
                pairs = zip(source[row * depth :][:depth].tolist(), target[row * depth :][:depth].tolist(), strict=True)
                assert [pair for pair in pairs if pair[1] >= 0] == moves
        assert context[3] == 103 and context[5] == 105, "others' are left alone"
    assert len(seen) > 1
