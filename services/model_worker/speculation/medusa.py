"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): head k reads the final hidden state of position t and guesses token t + 2 + k.

A head is residual blocks x + SiLU(W x + b), then an output matrix of its own or the model's. The heads are kept stacked, so that each
block of all heads is one batched product.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.eight_bit import EightBit
from kernels.ops import Ops
from kernels.reference import ReferenceOps
from services.model_worker.models.config import ModelConfig, ModelError, read_json

HEADS_FILE = "heads.safetensors"
_TORCH: Ops = ReferenceOps()  # gradients go through it
# What others publish: the paper's authors (torch pickle, later safetensors), then vLLM.
_PUBLISHED_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors")


@dataclass(slots=True)
class MedusaHeads:
    """weights    [layers, heads, H, H], the [out, in] matrices of the residual blocks
    biases     [layers, heads, H]
    outputs    [heads, V', H], or None: the heads share the model's output matrix
    token_map  int64 [V']: the token ids that the heads know, or None: all
    """

    weights: Tensor
    biases: Tensor
    outputs: Tensor | None = None
    token_map: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.weights.shape[1]

    @classmethod
    def initial(cls, heads: int, layers: int, hidden: int, output: Tensor | None = None) -> MedusaHeads:
        """As training starts (§2.1.1 of the paper): every head gives the model's own prediction. f32.

        output [V, H]: copied for each head as its own matrix; None: tied.
        """
        shape = (layers, heads, hidden)
        outputs = None if output is None else output.float().expand(heads, *output.shape).clone()
        return cls(torch.zeros(*shape, hidden), torch.zeros(shape), outputs)

    def states(self, hidden: Tensor, heads: int | None = None) -> Tensor:
        """hidden [R, H] → the first `heads` heads' states [heads, R, H]."""
        blocks = zip(self.weights, self.biases, strict=True)
        return head_states(blocks, hidden, self.num_heads if heads is None else heads)

    def logits(self, states: Tensor, model_head: Tensor) -> Tensor:
        """states [heads, R, H] → [heads, R, V']. model_head: the matrix that tied heads share, [V', H]."""
        if self.outputs is None:
            return states @ model_head.T
        return _TORCH.linear_each(states, self.outputs[: len(states)])

    def to(self, device: torch.device, dtype: torch.dtype) -> MedusaHeads:
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, dtype)

        token_map = None if self.token_map is None else self.token_map.to(device)
        return MedusaHeads(self.weights.to(device, dtype), self.biases.to(device, dtype), move(self.outputs), token_map)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        named = {"weights": self.weights, "biases": self.biases, "outputs": self.outputs, "token_map": self.token_map}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def head_states(
    blocks: Iterable[tuple[Tensor | EightBit, Tensor]],
    hidden: Tensor,
    heads: int,
    slots: Tensor | None = None,
    ops: Ops = _TORCH,
) -> Tensor:
    """hidden [R, H] → the first `heads` heads' states [heads, R, H]. blocks: weights [≥ heads, H, H] and biases [≥ heads, H] of each
    layer; slots int64 [R]: hidden's rows, None: all."""
    x = hidden[None]
    for weight, bias in blocks:
        x, slots = ops.residual_block(x, weight[:heads], bias[:heads], slots), None
    return x


def save_heads(heads: MedusaHeads, folder: Path, dtype: torch.dtype, notes: Mapping[str, Any]) -> None:
    """Writes our own form: `heads.safetensors`, and a config.json with `notes` on how they came about."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.detach() if name == "token_map" else tensor.detach().to(dtype)).contiguous().cpu()
        for name, tensor in heads.tensors().items()
    }
    save_file(tensors, folder / HEADS_FILE)
    (folder / HEADS_FILE).chmod(0o644)  # as any other file of a model: the worker may run as another user
    layers, number, hidden = heads.biases.shape
    config = {"drafter": "medusa", "num_heads": number, "num_layers": layers, "hidden_size": hidden}
    config |= {"tied": heads.outputs is None, **notes}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_heads(folder: Path, model: ModelConfig) -> MedusaHeads:
    """Heads for `model`, of our own form or a published one, as stored, on the CPU. Raises ModelError: heads_missing, heads_corrupt,
    heads_unknown_layout, heads_wrong_shape."""
    if (folder / HEADS_FILE).is_file():
        named = _read(folder / HEADS_FILE)
        if not {"weights", "biases"} <= named.keys() <= {"weights", "biases", "outputs", "token_map"}:
            raise ModelError("heads_unknown_layout", f"{folder / HEADS_FILE} holds {', '.join(sorted(named))}")
        heads = MedusaHeads(**named)
    else:
        file = next((folder / name for name in _PUBLISHED_FILES if (folder / name).is_file()), None)
        if file is None:
            raise ModelError("heads_missing", f"{folder} holds none of {HEADS_FILE}, {', '.join(_PUBLISHED_FILES)}")
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        heads = assemble_published(_read(file), bool(config.get("original_lm_head", False)))
    _check(heads, model)
    return heads


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # weights_only: a pickle from elsewhere must not run code.
        named = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ModelError("heads_corrupt", f"{file} cannot be read: {error}") from None
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in named.items()
    ):
        raise ModelError("heads_unknown_layout", f"{file} is not a state dict")
    return named


# (head, layer, weight or bias) of a residual block, in the authors' names and in vLLM's; the same of output matrices.
_BLOCK = re.compile(r"(?:medusa_heads?\.)?(?:blocks\.)?(\d+)\.(?:layers\.(\d+)|(\d+)\.linear)\.(weight|bias)")
_OUTPUT = re.compile(r"(?:medusa_heads?\.)?(?:lm_heads\.(\d+)|(\d+)\.\d+)\.weight")


def assemble_published(named: Mapping[str, Tensor], shared_output: bool = False) -> MedusaHeads:
    """From the names of FasterDecoding/Medusa ("0.0.linear.weight", and "0.1.weight" unless the output is the model's) or vLLM's
    ("blocks.0.layers.0.weight", "lm_heads.0.weight"). shared_output: output matrices are copies of the model's, whatever the file
    holds. Raises ModelError."""
    blocks: dict[tuple[int, int], dict[str, Tensor]] = {}
    outputs: dict[int, Tensor] = {}
    token_map = None
    for name, tensor in named.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault((int(match[1]), int(match[2] or match[3])), {})[match[4]] = tensor
        elif match := _OUTPUT.fullmatch(name):
            outputs[int(match[1] or match[2])] = tensor
        elif name.endswith("token_map"):
            token_map = tensor.long()
        elif not name.endswith("lm_head.weight"):
            raise ModelError("heads_unknown_layout", f"no layout of Medusa heads has a tensor {name}")
    heads, layers = (1 + max((key[axis] for key in blocks), default=-1) for axis in (0, 1))
    complete = len(blocks) == heads * layers > 0 and all("weight" in block for block in blocks.values())
    if not complete or (outputs and sorted(outputs) != list(range(heads))):
        raise ModelError("heads_corrupt", f"{len(blocks)} blocks and {len(outputs)} output matrices of {heads} heads")

    def stack(kind: str) -> Tensor:
        def of(head: int, layer: int) -> Tensor:
            block = blocks[head, layer]
            return block[kind] if kind in block else torch.zeros_like(block["weight"][:, 0])

        return torch.stack([torch.stack([of(head, layer) for head in range(heads)]) for layer in range(layers)])

    try:
        own = torch.stack([outputs[head] for head in range(heads)]) if outputs and not shared_output else None
        return MedusaHeads(stack("weight"), stack("bias"), own, token_map)
    except (RuntimeError, IndexError) as error:
        raise ModelError("heads_wrong_shape", f"the heads differ in shape, or are no matrices: {error}") from None


def _check(heads: MedusaHeads, model: ModelConfig) -> None:
    hidden, vocabulary, token_map = model.hidden_size, model.vocab_size, heads.token_map
    if heads.weights.dim() != 4:
        raise ModelError("heads_wrong_shape", f"weights of the heads is {tuple(heads.weights.shape)}")
    layers, number = heads.weights.shape[:2]
    if not layers * number:
        raise ModelError("heads_wrong_shape", f"{number} heads of {layers} blocks")
    if token_map is not None:
        listed = token_map.dim() == 1 and len(token_map) > 0 and not token_map.is_floating_point()
        if not listed or token_map.min() < 0 or token_map.max() >= vocabulary:
            raise ModelError("heads_wrong_shape", f"token_map does not hold ids below {vocabulary}")
        vocabulary = len(token_map)
        if heads.outputs is not None and heads.outputs.shape[1:2] == (model.vocab_size,):
            heads.outputs = heads.outputs[:, token_map]
    wanted = {"weights": (layers, number, hidden, hidden), "biases": (layers, number, hidden)}
    if heads.outputs is not None:
        wanted["outputs"] = (number, vocabulary, hidden)
    for name, shape in wanted.items():
        if (found := tuple(heads.tensors()[name].shape)) != shape:
            raise ModelError("heads_wrong_shape", f"{name} of the heads is {found}, the model wants {shape}")


def tied_output(heads: MedusaHeads, model_head: Tensor) -> Tensor:
    """The rows of the model's output matrix [V, H] that tied heads use."""
    if heads.token_map is None:
        return model_head
    return model_head.index_select(0, heads.token_map.to(model_head.device))
