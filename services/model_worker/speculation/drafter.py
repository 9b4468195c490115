"""What guesses the next tokens. The engine knows only this interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kernels.eight_bit import EightBit
from kernels.ops import Ops
from services.model_worker.models.config import ModelConfig, ModelError
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.medusa import MedusaHeads, head_states, load_heads, tied_output
from services.model_worker.speculation.tree import TreeSet, default_trees

TREES_FILE = "trees.json"
# Parameters of a matrix from which its bytes take longer than the launch: below it the copy is not worth its memory.
EIGHT_BIT_FROM = 32 << 20
EIGHT_BIT_ROWS = 32  # with more of them cuBLAS's product with tied heads is faster, in 16 bits


@dataclass(slots=True)
class DraftInputs:
    """What is known of R sequences after their last step; all on the device.

    slots       int64 [R]: their rows of the others (a drafter with a cache of its own finds it by them)
    context     int32 [slots]: tokens in the cache
    last_token  int64 [slots]: the newest token, which stands at position `context`
    hidden      [slots, H]: the target's final hidden state that chose it, of position context - 1
    """

    slots: Tensor
    context: Tensor
    last_token: Tensor
    hidden: Tensor


class Drafter(Protocol):
    @property
    def depth(self) -> int:
        """The most tokens that it guesses ahead."""

    def draft(self, inputs: DraftInputs, tree: DeviceTree) -> Tensor:
        """The tokens of all nodes, int64 [R, n]; node 0 is the newest token. Siblings are distinct. No synchronisation with the
        host: it is captured in CUDA graphs."""


class MedusaDrafter:
    """See Drafter. model_head [V, H]: the target's output matrix. eight_bit: large matrices that only guesses are made with are read
    in 8 bits: of a small batch their bytes are what a draft takes."""

    def __init__(self, heads: MedusaHeads, model_head: Tensor, ops: Ops, eight_bit: bool = False) -> None:
        heads = heads.to(model_head.device, model_head.dtype)

        def guessing(weight: Tensor) -> Tensor | EightBit:
            return EightBit.of(weight) if eight_bit and weight.numel() >= EIGHT_BIT_FROM else weight

        self._ops = ops
        self._blocks = [(guessing(weight), bias) for weight, bias in zip(heads.weights, heads.biases, strict=True)]
        self._tied = tied_output(heads, model_head) if heads.outputs is None else None
        outputs = heads.outputs if self._tied is None else self._tied[None]
        assert outputs is not None
        self._outputs = guessing(outputs)
        self._token_map = heads.token_map
        self.depth = heads.num_heads

    @property
    def vocabulary(self) -> int:
        """The tokens that the heads know."""
        return self._outputs.shape[1]

    def draft(self, inputs: DraftInputs, tree: DeviceTree) -> Tensor:
        ops, slots = self._ops, inputs.slots
        logits = self._logits(head_states(self._blocks, inputs.hidden, tree.tree.depth, slots, ops))
        return ops.guess_tokens(logits, self._token_map, slots, inputs.last_token, tree.sources, tree.tree.width)

    def _logits(self, states: Tensor) -> Tensor:
        """[heads, R, H] → [heads, R, V']"""
        if self._tied is None:
            return self._ops.linear_each(states, self._outputs[: len(states)])
        rows = states.flatten(0, 1)
        if isinstance(self._outputs, EightBit) and len(rows) <= EIGHT_BIT_ROWS:
            logits = self._ops.linear_each(rows[None], self._outputs)
        else:
            logits = self._ops.linear(rows, self._tied)
        return logits.view(*states.shape[:2], -1)


def load_drafter(
    folder: Path, model: ModelConfig, model_head: Tensor, ops: Ops, eight_bit: bool = False
) -> tuple[Drafter, TreeSet]:
    """The drafter in `folder` and its trees (those of trees.json, or a default). Raises ModelError."""
    heads = load_heads(folder, model)
    trees = default_trees(heads.num_heads)
    if (folder / TREES_FILE).exists():
        try:
            trees = TreeSet.load(folder / TREES_FILE).limited(heads.num_heads)
        except (ValueError, OSError) as error:
            raise ModelError("trees_invalid", str(error)) from None
    drafter = MedusaDrafter(heads, model_head, ops, eight_bit)
    if any(tree.width > drafter.vocabulary for tree in trees.trees):
        raise ModelError("trees_invalid", "a tree wants more candidates than there are tokens")
    return drafter, trees
