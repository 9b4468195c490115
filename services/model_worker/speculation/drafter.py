"""What guesses the next tokens. The engine knows only this interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from kernels.ops import Ops
from services.model_worker.models.config import ModelConfig, ModelError
from services.model_worker.speculation.acceptance import DeviceTree
from services.model_worker.speculation.medusa import MedusaHeads, load_heads, tied_output
from services.model_worker.speculation.tree import TreeSet, default_trees

TREES_FILE = "trees.json"


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
    """See Drafter. model_head [V, H]: the target's output matrix."""

    def __init__(self, heads: MedusaHeads, model_head: Tensor, ops: Ops) -> None:
        self._ops = ops
        self._heads = heads.to(model_head.device, model_head.dtype)
        self._output = tied_output(self._heads, model_head)

    @property
    def vocabulary(self) -> int:
        """The tokens that the heads know."""
        return self._output.shape[0]

    @property
    def depth(self) -> int:
        return self._heads.num_heads

    def draft(self, inputs: DraftInputs, tree: DeviceTree) -> Tensor:
        heads, ops, slots = self._heads, self._ops, inputs.slots
        logits = heads.logits(heads.states(inputs.hidden, tree.tree.depth, slots, ops), self._output, ops)
        return ops.guess_tokens(logits, heads.token_map, slots, inputs.last_token, tree.sources, tree.tree.width)


def load_drafter(folder: Path, model: ModelConfig, model_head: Tensor, ops: Ops) -> tuple[Drafter, TreeSet]:
    """The drafter in `folder` and its trees (those of trees.json, or a default). Raises ModelError."""
    heads = load_heads(folder, model)
    trees = default_trees(heads.num_heads)
    if (folder / TREES_FILE).exists():
        try:
            trees = TreeSet.load(folder / TREES_FILE).limited(heads.num_heads)
        except (ValueError, OSError) as error:
            raise ModelError("trees_invalid", str(error)) from None
    drafter = MedusaDrafter(heads, model_head, ops)
    if any(tree.width > drafter.vocabulary for tree in trees.trees):
        raise ModelError("trees_invalid", "a tree wants more candidates than there are tokens")
    return drafter, trees
