#!/usr/bin/env python3
"""Train the demo model in models/demo: a small Llama that writes English prose, in Hugging Face form.

    python tools/train_demo_model.py --corpora corpora.tar.xz --out models/demo --minutes 6

does it all. The three steps can also run on different machines, since only the second one wants a GPU:

    python tools/train_demo_model.py prepare --corpora corpora.tar.xz --prepared DATA     (text to token ids)
    python tools/train_demo_model.py train --prepared DATA --checkpoint RUN --minutes 6   (best weights so far, and a log)
    python tools/train_demo_model.py publish --prepared DATA --checkpoint RUN --out models/demo
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_card import write_card
from demo_corpus import ASSISTANT, BOS, CHAT_SHARE, CHAT_TEMPLATE, EOS, PAD, SYSTEM, USER, PreparedCorpus, prepare
from demo_llama import LlamaForTraining, LlamaShape
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

WARM_UP, DECAY_FROM = 0.02, 0.4  # fractions of the run


def windows(tokens: Tensor, starts: Tensor, bos: int, length: int) -> tuple[Tensor, Tensor]:
    """Cut training rows. tokens: integer [n]; starts: int64 [rows]. Returns ids and targets, int64 [rows, length].

    Each row is <s> followed by the tokens from its start on, as a prompt is at inference.
    """
    targets = tokens[starts[:, None] + torch.arange(length, device=tokens.device)].long()
    return torch.cat([torch.full_like(targets[:, :1], bos), targets[:, :-1]], dim=1), targets


def shuffled_starts(starts: NDArray[np.int32], total: int, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """One epoch: the first paragraph after each step of `length` tokens, in random order, from a random phase."""
    usable = starts[starts <= total - length].astype(np.int64)
    grid = np.arange(rng.integers(length), total - length, length)
    return rng.permutation(usable[np.minimum(np.searchsorted(usable, grid), len(usable) - 1)])


class Batches:
    """Endless training batches on the device: prose with a share of dialogues."""

    def __init__(self, corpus: PreparedCorpus, rows: int, length: int, device: str, seed: int) -> None:
        self.bos = corpus.tokenizer.token_to_id(BOS)
        self.length, self.device, self.rng = length, device, np.random.default_rng(seed)
        chat_rows = round(rows * CHAT_SHARE)
        self.sources = [
            (torch.from_numpy(tokens.astype(np.int32)).to(device), starts, count)
            for tokens, starts, count in (
                (corpus.train, corpus.train_starts, rows - chat_rows),
                (corpus.chat, corpus.chat_starts, chat_rows),
            )
        ]
        self.queues = [np.empty(0, dtype=np.int64) for _ in self.sources]

    def next(self) -> tuple[Tensor, Tensor]:
        """ids and targets, int64 [rows, length]."""
        parts = []
        for i, (tokens, starts, count) in enumerate(self.sources):
            while len(self.queues[i]) < count:
                fresh = shuffled_starts(starts, len(tokens), self.length, self.rng)
                self.queues[i] = np.concatenate([self.queues[i], fresh])
            chosen, self.queues[i] = self.queues[i][:count], self.queues[i][count:]
            parts.append(windows(tokens, torch.from_numpy(chosen).to(self.device), self.bos, self.length))
        return torch.cat([ids for ids, _ in parts]), torch.cat([targets for _, targets in parts])


@torch.no_grad()
def evaluate(model: LlamaForTraining, tokens: NDArray[np.uint16], bos: int, device: str, rows: int) -> float:
    """Mean nats per token; every token is predicted once, each window of the context's length on its own."""
    model.eval()
    length, total = model.shape.max_position_embeddings, torch.zeros((), dtype=torch.float64, device=device)
    data = torch.from_numpy(tokens.astype(np.int64)).to(device)
    whole = len(data) // length * length
    starts = torch.arange(0, whole, length, device=device)
    pieces = [windows(data[:whole], s, bos, length) for s in starts.split(rows)] if whole else []
    if whole < len(data):
        pieces.append(windows(data, torch.tensor([whole], device=device), bos, len(data) - whole))
    with torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for ids, targets in pieces:
            total += model(ids, targets).sum(dtype=torch.float64)
    model.train()
    return float(total) / len(data)


def learning_rate_at(progress: float) -> float:
    """Factor at a fraction of the run: linear warm-up, a plateau, and a linear descent to zero."""
    return max(0.0, min(progress / WARM_UP, 1.0, (1 - progress) / (1 - DECAY_FROM)))


def hugging_face_config(shape: LlamaShape, corpus: PreparedCorpus) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": corpus.tokenizer.token_to_id(BOS),
        "eos_token_id": corpus.tokenizer.token_to_id(EOS),
        "pad_token_id": corpus.tokenizer.token_to_id(PAD),
    }


def build_optimizers(model: LlamaForTraining, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the embedding and the norms' gains."""
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    others = [p for name, p in model.named_parameters() if "proj" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


class Checkpoints:
    """Measures the model now and then, and keeps its weights and the log of the run on disk whenever it got better."""

    def __init__(self, folder: Path, corpus: PreparedCorpus, device: str, args: argparse.Namespace) -> None:
        self.folder, self.device, self.args = folder, device, args
        self.bos = corpus.tokenizer.token_to_id(BOS)
        self.held_out = corpus.held_out[: args.eval_tokens]
        self.seen = corpus.train[: len(self.held_out)]  # as much of the training text, to see overfitting
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {"held_out_loss": math.inf}
        self.spent = 0.0  # seconds of the run that went into measuring

    def take(self, model: LlamaForTraining, step: int, elapsed: float) -> None:
        began = time.perf_counter()
        loss = evaluate(model, self.held_out, self.bos, self.device, self.args.batch)
        train_loss = evaluate(model, self.seen, self.bos, self.device, self.args.batch)
        tokens = step * self.args.batch * self.args.context
        self.history.append(
            {"seconds": round(elapsed, 1), "step": step, "tokens": tokens, "held_out": loss, "train": train_loss}
        )
        print(
            f"{elapsed:6.1f} s  step {step:5d}  {tokens / 1e6:7.1f} M tokens  "
            f"held-out {loss:.4f}  train {train_loss:.4f}",
            flush=True,
        )
        if loss < self.best["held_out_loss"]:
            save_torch_state_dict(model.state_for_hugging_face(), self.folder, max_shard_size="15MB")
            self.best = {
                "held_out_loss": loss,
                "train_loss": train_loss,
                "parameters": sum(p.numel() for p in model.parameters()),
                "steps": step,
                "tokens_seen": tokens,
                "tokens_per_second": round(tokens / (elapsed - self.spent)),
                "training_seconds": round(elapsed, 1),
                "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
                "torch": torch.__version__,
                "options": {k: v for k, v in vars(self.args).items() if isinstance(v, int | float)},
            }
        (self.folder / "train.json").write_text(json.dumps({**self.best, "history": self.history}, indent=1) + "\n")
        self.spent += time.perf_counter() - began


def train(corpus: PreparedCorpus, checkpoint: Path, args: argparse.Namespace) -> None:
    """Train for `minutes` of wall-clock time after compilation, keeping the weights of the lowest held-out loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    shape = LlamaShape(
        vocab_size=corpus.tokenizer.get_vocab_size(),
        num_hidden_layers=args.layers,
        max_position_embeddings=args.context,
    )
    model = LlamaForTraining(shape, args.dropout).to(device)
    optimizers = build_optimizers(model, args)
    batches = Batches(corpus, args.batch, args.context, device, args.seed)

    def loss_of_batch() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(*batches.next()).mean()

    compile_began = time.perf_counter()
    if device == "cuda":
        model.compile_parts()
        loss_of_batch().backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    print(f"training on {device}, ready after {time.perf_counter() - compile_began:.0f} s", flush=True)

    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(hugging_face_config(shape, corpus), indent=2) + "\n")
    checkpoints = Checkpoints(checkpoint, corpus, device, args)
    step, budget, next_eval = 0, args.minutes * 60, args.eval_every
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < budget:
        if elapsed >= next_eval:
            checkpoints.take(model, step, elapsed)
            next_eval = elapsed + args.eval_every
        factor = learning_rate_at(elapsed / budget)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss = loss_of_batch()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 and not math.isfinite(loss.item()):  # also keeps the host from running ahead of the clock
            raise SystemExit(f"the loss is {loss.item()} after {step} steps")
    checkpoints.take(model, step, elapsed)


def publish(corpus: PreparedCorpus, checkpoint: Path, out: Path) -> None:
    """Turn a checkpoint into the folder that ships: one weight file, tokenizer, configs, and a card with measured figures."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private, and a container's user must read it
    shutil.copyfile(checkpoint / "config.json", out / "config.json")
    corpus.tokenizer.save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    special = {
        f"{kind}_token_id": corpus.tokenizer.token_to_id(t) for kind, t in (("bos", BOS), ("eos", EOS), ("pad", PAD))
    }
    generation = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    (out / "generation_config.json").write_text(json.dumps({**special, **generation}, indent=2) + "\n")

    published = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    write_card(out, published, tokenizer, corpus, json.loads((checkpoint / "train.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=["all", "prepare", "train", "publish"], default="all")
    parser.add_argument("--corpora", type=Path, help="corpora.tar.xz or its unpacked folder")
    parser.add_argument("--prepared", type=Path, default=Path("build/demo"), help="folder of the prepared corpus")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("build/demo/run"), help="folder of the training's result"
    )
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder of the finished model")
    parser.add_argument("--minutes", type=float, default=6.0, help="training time, without compilation")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=LlamaShape.num_hidden_layers)
    parser.add_argument("--context", type=int, default=LlamaShape.max_position_embeddings)
    parser.add_argument("--batch", type=int, default=128, help="rows of --context tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.5, help="of the matrices")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--eval-every", type=float, default=20.0, help="seconds")
    parser.add_argument("--eval-tokens", type=int, default=None, help="how much of the held-out text to use (all)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    if args.step in ("all", "prepare") and not (args.step == "all" and (args.prepared / "corpus.npz").exists()):
        if args.corpora is None:
            parser.error("--corpora is needed to prepare the data")
        prepare(args.corpora, args.vocab_size).save(args.prepared)
    if args.step == "prepare":
        return
    corpus = PreparedCorpus.load(args.prepared)
    if args.step in ("all", "train"):
        train(corpus, args.checkpoint, args)
    if args.step in ("all", "publish"):
        publish(corpus, args.checkpoint, args.out)


if __name__ == "__main__":
    main()
