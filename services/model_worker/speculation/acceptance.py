"""Which guessed tokens of a tree are kept, for a whole batch on the device, without a word from the host.

The rule for greedy decoding and for sampling is the same. The target model's next token is chosen at every node, with the noise of the
node's own position; from the root on, the child that holds the chosen token is followed. What comes out is what plain decoding would
have chosen, whatever the tree: a node's choice depends only on the tokens before it. For a tree without randomness no rule accepts
more often (a token is accepted with the target's own probability of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.model_worker.speculation.tree import Tree


class DeviceTree:
    """A tree's tables. n nodes, d: depth.

    depths   int32 [n]
    words    int64 [n], bit j: node j is an ancestor or the node itself (`AttentionBatch.tree_mask`)
    parents  int64 [n], the root's is itself
    paths    int64 [n, d + 1]: the nodes from the root to each, then -1
    sources  int64 [n - 1]: where the guesses after the root are in head-major [d, width] candidates
    """

    def __init__(self, tree: Tree, device: torch.device) -> None:
        def put(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.tree = tree
        self.depths = put([len(node) for node in tree.nodes], torch.int32)
        self.words = put(tree.ancestor_words)
        self.parents = put(tree.parents)
        self.paths = put(tree.paths)
        self.sources = put([(len(node) - 1) * tree.width + node[-1] for node in tree.nodes[1:]])
        self._bits = torch.ones_like(self.words) << torch.arange(tree.size, device=device)
        # Deeper wins, then the earlier node.
        self._rank = put([len(node) * tree.size + tree.size - index for index, node in enumerate(tree.nodes)])

    def deepest(self, match: Tensor) -> Tensor:
        """match bool [R, n]: the node may follow its parent (the root's entry does not count) → the deepest node all of whose
        ancestors match, the first of equals, int64 [R]."""
        # An integer sum of distinct bits is their union.
        matching = torch.where(match, self._bits, 0)[:, 1:].sum(dim=1, keepdim=True) | 1
        accepted = (matching & self.words) == self.words
        return torch.where(accepted, self._rank, 0).argmax(dim=1)


@dataclass(slots=True)
class Accepted:
    """last   int64 [R]: the last accepted node
    path   int64 [R, d + 1]: the nodes from the root to it, then -1
    ids    int64 [R, d + 1]: the new tokens, the guessed ones and the one chosen after them, then -1
    count  int32 [R]: how many, at least 1
    """

    last: Tensor
    path: Tensor
    ids: Tensor
    count: Tensor


def exact_match(tree: DeviceTree, tokens: Tensor, chosen: Tensor) -> Tensor:
    """Nodes that hold what the target chose at their parent: bool [R, n]. tokens: the nodes'; chosen: the target's after each node;
    int64 [R, n]."""
    return tokens == chosen.index_select(1, tree.parents)


def typical_match(
    tree: DeviceTree, tokens: Tensor, logits: Tensor, temperature: Tensor, epsilon: float, delta: float
) -> Tensor:
    """Typical acceptance (§2.3.1 of the paper): nodes whose probability at their parent exceeds min(ε, δ exp(-entropy)): bool [R, n].

    The output is no longer distributed as the model's: plausible tokens pass for chosen ones. logits [R, n, V], after each node;
    temperature f32 [R] > 0.
    """
    logprobs = (logits.float() / temperature[:, None, None]).log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs.nan_to_num(neginf=0.0)).sum(dim=-1)
    threshold = torch.clamp(delta * torch.exp(-entropy), max=epsilon)
    of_parent = logprobs.index_select(1, tree.parents).gather(2, tokens[..., None]).squeeze(2)
    return of_parent.exp() > threshold.index_select(1, tree.parents)


def accept(tree: DeviceTree, tokens: Tensor, chosen: Tensor, match: Tensor) -> Accepted:
    """tokens, chosen int64 [R, n] and match bool [R, n] as above."""
    last = tree.deepest(match)
    path = tree.paths.index_select(0, last)
    following = torch.cat((path[:, 1:], torch.full_like(path[:, :1], -1)), dim=1)
    guessed = tokens.gather(1, following.clamp(min=0))
    final = torch.where(path >= 0, chosen.gather(1, path.clamp(min=0)), -1)
    ids = torch.where(following >= 0, guessed, final)
    return Accepted(last, path, ids, tree.depths.index_select(0, last) + 1)


def moves(path: Tensor, kv_slots: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of the KV cache an accepted path moves so that it continues the context: (source, target) int32 [R × d], target -1:
    none. kv_slots int32 [R, n]: where each node was written; node k of a path belongs where the tree's node k is."""
    order = torch.arange(1, path.shape[1], device=path.device)
    nodes = path[:, 1:]
    source = kv_slots.gather(1, nodes.clamp(min=0))
    target = torch.where((nodes >= 0) & (nodes != order), kv_slots[:, 1 : path.shape[1]], -1)
    return source.flatten(), target.flatten()
