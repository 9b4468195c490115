"""A decode step with a tree, on the static step state: guess, lay out the nodes' rows, accept, move, remember. All on the device.

The nodes of a sequence take the cache rows right behind its context, whatever their depth; attention sees through the tree's mask which
are ancestors. The accepted ones are then moved so that they continue the context, and the rest is overwritten by the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import Ops
from services.model_worker.models.decoder import Decoder
from services.model_worker.sampler import RowMasks, Sampled, SamplingMode, choose
from services.model_worker.speculation.acceptance import DeviceTree, accept, exact_match, moves, typical_match
from services.model_worker.speculation.drafter import Drafter, DraftInputs
from services.model_worker.speculation.tree import Tree
from services.model_worker.step_state import DecodeInputs, StepState


@dataclass(slots=True)
class TreeRows:
    """The rows of R sequences with n nodes each.

    slots        int64 [≥ R], the sequences', padded as `sampler.choose` wants it
    tokens       int64 [R, n] · positions int32 [R × n] · kv_slots int32 [R, n], -1 for padded sequences
    context_len  int32 [R]: with all nodes; 0 for padded sequences
    block_table  int32 [R, max_blocks]
    """

    tree: DeviceTree
    slots: Tensor
    tokens: Tensor
    positions: Tensor
    kv_slots: Tensor
    context_len: Tensor
    block_table: Tensor

    def inputs(self) -> DecodeInputs:
        """As rows of a forward pass."""
        return DecodeInputs(
            self.tokens.flatten(), self.positions, self.kv_slots.flatten(), self.context_len, self.block_table
        )

    def first(self, rows: int) -> TreeRows:
        """Of the first `rows` sequences only."""
        nodes = self.tokens.shape[1]
        return TreeRows(
            self.tree, self.slots, self.tokens[:rows], self.positions[: rows * nodes],
            self.kv_slots[:rows], self.context_len[:rows], self.block_table[:rows],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to speculate. trees: by growing size; max_rows: of all sequences' nodes in a step; typical: (ε, δ) of typical acceptance for
    sequences with a temperature, None: the lossless rule for all."""

    drafter: Drafter
    trees: list[Tree]
    max_rows: int
    typical: tuple[float, float] | None = None

    @property
    def depth(self) -> int:
        return max(tree.depth for tree in self.trees)


class Verifier:
    """trees: by size. hidden [slots, H]: of each sequence the final hidden state that chose its newest token, the drafter's input."""

    def __init__(self, speculation: Speculation, state: StepState, ops: Ops, decoder: Decoder) -> None:
        device, embedding = state.context.device, decoder.weights.embedding
        self.trees = {tree.size: DeviceTree(tree, device) for tree in speculation.trees}
        self.hidden = torch.zeros(len(state.context), embedding.shape[1], dtype=embedding.dtype, device=device)
        self._drafter = speculation.drafter
        self._typical = speculation.typical
        self._state = state
        self._ops = ops

    def rows(self, padded: Tensor, count: int, tree: DeviceTree) -> TreeRows:
        """padded int64 [≥ count]: the slots of `count` sequences."""
        state, slots = self._state, padded[:count]
        tokens = self._drafter.draft(DraftInputs(slots, state.context, state.last_token, self.hidden), tree)
        laid = self._ops.lay_out(
            slots, tree.depths, state.context, state.last_token, state.block_table, state.block_size
        )
        return TreeRows(tree, padded, tokens, laid.positions, laid.kv_slots, laid.context_len, laid.block_table)

    def accept(
        self, rows: TreeRows, hidden: Tensor, logits: Tensor, mode: SamplingMode, cache: Tensor,
        masks: RowMasks | None = None,
    ) -> Sampled:  # fmt: skip
        """hidden [R × n, H] and logits [R × n, V] after each node, cache as KVCache.data, masks: of the R × n rows. Leaves the state
        to the next step."""
        state, tree = self._state, rows.tree
        count, nodes = rows.tokens.shape
        slots = rows.slots[:count]
        # Nothing but the chosen tokens decides, and nobody wants to know more.
        plain = mode.logprobs < 0 and not (mode.penalties or mode.recent or (mode.random and self._typical is not None))
        roots = None if plain else torch.arange(0, count * nodes, nodes, device=slots.device)
        plausible = logits
        if masks is not None and self._typical is not None:
            plausible = self._ops.apply_token_bitmask(logits.clone(), masks.masks, masks.mask_rows)
        # A node's choice has the noise of the position after the node's own, as it would have in a step without a tree.
        of_nodes, lengths = rows.slots, rows.positions
        if not mode.logits_alone:
            of_nodes, lengths = rows.slots.repeat_interleave(nodes), rows.positions + 1
        chosen = choose(
            self._ops, state, logits, of_nodes, lengths, mode, counted=roots, masks=masks
        ).view(count, nodes)  # fmt: skip
        if roots is None:
            kept = self._ops.accept_tree(
                tree,
                slots,
                rows.tokens,
                chosen,
                rows.kv_slots,
                hidden,
                rows.context_len,
                state.context,
                state.last_token,
                self.hidden,
            )
            self._ops.move_kv(cache[0], cache[1], kept.source, kept.target)
            return Sampled(kept.ids)
        match = self._match(rows, chosen, plausible, mode)
        accepted = accept(tree, rows.tokens, chosen, match)
        source, target = moves(accepted.path, rows.kv_slots)
        self._ops.move_kv(cache[0], cache[1], source, target)
        real = slots < state.null_slot
        state.context.index_copy_(0, slots, torch.where(real, rows.context_len - nodes + accepted.count, 0))
        state.last_token.index_copy_(0, slots, chosen.gather(1, accepted.last[:, None]).squeeze(1))
        self.hidden.index_copy_(0, slots, hidden.index_select(0, roots + accepted.last))
        if mode.logprobs < 0:
            return Sampled(accepted.ids)
        wanted = (roots[:, None] + accepted.path.clamp(min=0)).flatten()
        ids = accepted.ids.clamp(min=0).flatten()
        return Sampled(accepted.ids, self._ops.logprobs(logits.index_select(0, wanted), ids, mode.logprobs))

    def _match(self, rows: TreeRows, chosen: Tensor, logits: Tensor, mode: SamplingMode) -> Tensor:
        match = exact_match(rows.tree, rows.tokens, chosen)
        slots = rows.slots[: len(chosen)]
        if self._typical is not None and mode.random:
            temperature = self._state.field("temperature", slots)
            heated = torch.where(temperature > 0, temperature, 1.0)
            typical = typical_match(rows.tree, rows.tokens, logits.view(*chosen.shape, -1), heated, *self._typical)
            match = torch.where((temperature > 0)[:, None], typical, match)
        if mode.penalties or mode.recent:
            # Beyond the root a path's own tokens would be missing: in the counts, and before bad words.
            match = match & (self._state.field("rooted", slots) == 0)[:, None]
        return match
