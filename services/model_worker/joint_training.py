"""Medusa-2 (Cai et al. 2024, §2.2.2): the model and its heads trained together, for models that fit into memory with their gradients.

The paper's recipe: first the heads alone (Medusa-1, train_heads.py), then both, with the loss L_LM + λ · Σ 0.8^k L_k, where λ
grows from nothing to `weight`, and a learning rate for the heads that is `head_factor` times the model's. The result is another
model: a folder of its own, its heads in it. The model is transformers' here, since the engine's decoder has no gradients.

    gorgon train-heads --model DIR --data TEXT... --joint NEW
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from services.model_worker.models.config import ModelError, load_config, read_json
from services.model_worker.speculation.measure import Backbone, head_targets, known_targets, rows_per_slice
from services.model_worker.speculation.medusa import HEADS_FILE, MedusaHeads, load_heads, save_heads, tied_output
from services.model_worker.speculation.tree import MAX_NODES, TreeSet, design, observed
from services.model_worker.train_heads import (
    DISCOUNT,
    TREE_WIDTH,
    Material,
    TrainConfig,
    device_and_dtype,
    evaluate,
    gather,
    head_losses,
    learning_rate,
    read_checkpoint,
    run_steps,
    train,
    write_checkpoint,
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class JointConfig:
    """first          the first stage, and what both stages train on; if its `out` has heads already, they are taken
    out            folder of the new model
    steps, minutes    how long; with minutes the schedules follow the clock
    learning_rate  of the model;  head_factor: how many times that is the heads';  weight: λ at the end
    """

    first: TrainConfig
    out: Path
    steps: int = 1000
    minutes: float | None = None
    learning_rate: float = 5e-5
    head_factor: float = 4.0
    weight: float = 0.2


def weight_at(weight: float, progress: float) -> float:
    """λ: a quarter of a sine, as in the authors' code."""
    return weight * math.sin(min(1.0, progress) * math.pi / 2)


class Joint:
    """Model and heads in training: everything that a checkpoint holds."""

    def __init__(self, config: JointConfig, device: torch.device) -> None:
        self.model = _trainable(config.first.model, device)
        self.heads = load_heads(config.first.out, load_config(config.first.model)).to(device, torch.float32)
        head_tensors = [t.requires_grad_() for name, t in self.heads.tensors().items() if name != "token_map"]
        groups = [
            {"params": list(self.model.parameters()), "factor": 1.0},
            {"params": head_tensors, "factor": config.head_factor},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
        self.rng = np.random.default_rng(config.first.seed)
        self.step, self.seconds = 0, 0.0

    def save(self, file: Path, config: JointConfig) -> None:
        state = {
            "model": self.model.state_dict(), "heads": self.heads.tensors(), "optimizer": self.optimizer.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state), "step": self.step, "seconds": self.seconds,
            "config": _fingerprint(config),
        }  # fmt: skip
        write_checkpoint(file, state)

    def load(self, file: Path, config: JointConfig) -> None:
        state = read_checkpoint(file, self.heads.weights.device, _fingerprint(config))
        self.model.load_state_dict(state["model"])
        with torch.no_grad():
            for name, tensor in self.heads.tensors().items():
                tensor.copy_(state["heads"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.step, self.seconds = state["step"], state["seconds"]


def _trainable(folder: Path, device: torch.device) -> Any:
    """transformers' model in float32. Raises ModelError."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ModelError(
            "transformers_missing", "joint training needs transformers: pip install 'gorgon[train]'"
        ) from None
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.to(device).train()


def _fingerprint(config: JointConfig) -> str:
    """What must not change between a checkpoint and its resumption; how long to train may."""
    kept = asdict(config)
    for name in ("out", "steps", "minutes"):
        del kept[name]
    for name in ("steps", "minutes", "device", "dtype", "checkpoint_seconds"):
        del kept["first"][name]
    return json.dumps(kept, default=str, sort_keys=True)


def joint_losses(model: Any, heads: MedusaHeads, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """ids int64 [S, L] → mean cross-entropy of the model's next token, and of each head, f32 [heads]; nats a token. Only tokens from
    position `first` on count."""
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    model_head = model.get_output_embeddings().weight
    following = ids[:, 1:].clone()
    following[:, : max(0, first - 1)] = -1
    scores = F.linear(hidden[:, :-1], model_head).float()
    own = F.cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=-1)
    targets = known_targets(heads, head_targets(ids, heads.num_heads, first).flatten(1), len(model_head))
    rows = hidden.flatten(0, 1)
    output = tied_output(heads, model_head)
    total = torch.zeros(heads.num_heads, device=ids.device)
    size = rows_per_slice(heads, model_head)
    for start in range(0, len(rows), size):
        total = total + head_losses(heads, output, rows[start : start + size], targets[:, start : start + size])
    return own, total / (targets >= 0).sum(1).clamp(min=1)


def train_joint(config: JointConfig, console: Console) -> dict[str, Any]:
    """Both stages, resuming each from its checkpoint; writes the new model with its heads to `config.out` and returns the report,
    with the model's loss on the held-out text before and after. Raises ModelError."""
    first = config.first
    if not (first.out / HEADS_FILE).is_file():
        console.print("first the heads alone")
        train(first, console)
    device, dtype = device_and_dtype(first.device, first.dtype)
    torch.manual_seed(first.seed)
    material = gather(first, console)
    joint = Joint(config, device)
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint = config.out / "checkpoint.pt"
    if checkpoint.exists():
        joint.load(checkpoint, config)
        console.print(f"resumed at step {joint.step}")

    def update(progress: float) -> str:
        losses = _step(joint, config, material, dtype, progress)
        return "loss of model and heads " + " ".join(f"{value:.3f}" for value in losses)

    run_steps(
        joint,
        config.steps,
        config.minutes,
        "training jointly",
        console,
        update,
        lambda: joint.save(checkpoint, config),
        config.first.checkpoint_seconds,
    )
    losses = {"after": _held_out_loss(joint.model, material, device)}
    _write_model(joint, config)
    joint.model = None
    losses["before"] = _held_out_loss(_trainable(first.model, device), material, device)
    console.print(f"loss on held-out text: {losses['before']:.4f} before, {losses['after']:.4f} after")
    backbone = Backbone(config.out, device, dtype)
    heads = load_heads(config.out / "medusa", backbone.config).to(device, torch.float32)
    report = evaluate(heads, backbone, material, console)
    ranks = report.pop("ranks")
    report |= {"steps": joint.step, "seconds": round(joint.seconds, 1), "held_out_loss": losses}
    (config.out / "medusa/accuracies.json").write_text(json.dumps(report, indent=2) + "\n")
    trees = TreeSet(design(observed(ranks), heads.num_heads, TREE_WIDTH, MAX_NODES))
    trees.save(config.out / "medusa/trees.json")
    checkpoint.unlink()
    return report


def _step(joint: Joint, config: JointConfig, material: Material, dtype: torch.dtype, progress: float) -> list[float]:
    """One update; the losses of the model and of each head, nats a token."""
    device = joint.heads.weights.device
    for group in joint.optimizer.param_groups:
        group["lr"] = group["factor"] * learning_rate(config.learning_rate, progress)
    ids = material.batch(config.first.rows, config.first.length, joint.rng).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
        own, of_heads = joint_losses(joint.model, joint.heads, ids, material.first)
    discounts = DISCOUNT ** torch.arange(len(of_heads), device=device)
    loss = own + weight_at(config.weight, progress) * (of_heads * discounts).sum()
    joint.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in joint.optimizer.param_groups for p in g["params"]], 1.0)
    joint.optimizer.step()
    joint.step += 1
    return [own.item(), *of_heads.tolist()]


@torch.no_grad()
def _held_out_loss(model: Any, material: Material, device: torch.device) -> float:
    model.eval()
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in material.held_out.to(device)]
    return sum(losses) / len(losses)


def _write_model(joint: Joint, config: JointConfig) -> None:
    """In the dtype that the model was published in."""
    source, out = config.first.model, config.out
    dtype = getattr(torch, load_config(source).dtype or "float32", torch.float32)
    joint.model.config.use_cache = True
    joint.model.to(dtype).save_pretrained(out)
    if (source / "generation_config.json").is_file():
        (out / "generation_config.json").write_text(json.dumps(read_json(source / "generation_config.json")) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    notes = {"vocab_size": load_config(source).vocab_size, "trained": {"jointly": True, "steps": joint.step}}
    save_heads(joint.heads, out / "medusa", torch.bfloat16, notes)
