"""Trains Medusa heads for any model that the engine loads (Medusa-1, Cai et al. 2024, §2.2.1: the model itself stays as it is), and
designs their trees. `gorgon train-heads` and `gorgon tune-tree` end up in `main`.

    python -m services.model_worker.train_heads train-heads --model DIR --data FILE... --out DIR
    python -m services.model_worker.train_heads tune-tree --model DIR --prompts FILE...
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from services.model_worker.engine import Engine, EngineConfig, EngineRequest, StepOutput
from services.model_worker.models.config import ModelError, load_config, read_json
from services.model_worker.speculation.measure import (
    Backbone,
    head_targets,
    known_targets,
    rows_per_slice,
    target_ranks,
    top_accuracies,
)
from services.model_worker.speculation.medusa import MedusaHeads, load_heads, save_heads, tied_output
from services.model_worker.speculation.tree import MAX_NODES, TreeSet, design, observed
from shared.sampling import SamplingParams

Tokens = NDArray[np.int32]

DISCOUNT = 0.8  # weight of head k's loss: DISCOUNT ** k, as in the paper
REPORTED = 5  # accuracies are given for the 1 … 5 likeliest tokens
TREE_WIDTH = 10
_PIECE = 1 << 20  # characters tokenised at a time


@dataclass(frozen=True)
class TrainConfig:
    """model, data, held_out   a Hugging Face folder; text files. Without held_out the last twentieth of the data is held out
    init                    folder of heads to go on from; None: new ones
    heads, layers           number of new heads, residual blocks in each
    tied                    new heads share the model's output matrix; otherwise each trains its own, which begins as a copy
    vocabulary              new heads know only so many tokens, the data's most frequent (0: all): smaller and faster when not tied
    rows, length            sequences of a step, tokens of each
    steps, minutes          how long; with minutes the learning rate follows the clock
    distil                  tokens to generate with the model itself and to train on instead of the text; its texts are the prompts.
                            0: train on the text
    temperature             of the model's own generations
    hard_targets            heads learn the tokens that follow, as in the paper; False: what the model itself expected in their place,
                            its distribution there (Ankner et al. 2024, Hydra, arXiv 2402.05109, §4), which says more than one token
    device, dtype           "auto": CUDA in bfloat16 if there is one, else the CPU in float32. The heads are trained in float32
    """

    model: Path
    data: tuple[Path, ...]
    out: Path
    held_out: tuple[Path, ...] = ()
    init: Path | None = None
    heads: int = 4
    layers: int = 1
    tied: bool = True
    vocabulary: int = 0
    rows: int = 16
    length: int = 512
    steps: int = 1000
    minutes: float | None = None
    learning_rate: float = 1e-3
    distil: int = 0
    temperature: float = 1.0
    hard_targets: bool = False
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    checkpoint_seconds: float = 60.0


def read_tokens(files: tuple[Path, ...], model: Path) -> Tokens:
    """The files' text as token ids, without special tokens. Raises ModelError."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        parts = []
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            pieces = [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]
            parts += [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(pieces, add_special_tokens=False)]
    except OSError as error:
        raise ModelError("data_missing", str(error)) from None
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError("tokenizer_invalid", f"{model / 'tokenizer.json'}: {error}") from None
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def begin_id(model: Path) -> int | None:
    """The id that texts begin with, if the model has one."""
    bos = read_json(model / "config.json").get("bos_token_id")
    return bos if isinstance(bos, int) else None


def cut_rows(tokens: Tokens, starts: NDArray[np.int64], length: int, bos: int | None) -> Tensor:
    """int64 [len(starts), length]: windows of the text, each beginning as a prompt does."""
    own = length - (bos is not None)
    windows = tokens[starts[:, None] + np.arange(own)].astype(np.int64)
    if bos is not None:
        windows = np.concatenate((np.full((len(starts), 1), bos), windows), axis=1)
    return torch.from_numpy(windows)


@dataclass(slots=True)
class Material:
    """Rows to train on int64 [N, L] or a text to cut them from, and held-out rows int64 [n, L]. Only positions ≥ `first` count."""

    held_out: Tensor
    tokens: Tokens | None = None
    bos: int | None = None
    rows: Tensor | None = None
    first: int = 0

    def batch(self, rows: int, length: int, rng: np.random.Generator) -> Tensor:
        if self.rows is not None:
            return self.rows[torch.from_numpy(rng.integers(0, len(self.rows), rows))]
        assert self.tokens is not None
        return cut_rows(self.tokens, rng.integers(0, len(self.tokens) - length + 1, rows), length, self.bos)


def gather(config: TrainConfig, console: Console) -> Material:
    """Reads or generates what to train on. Raises ModelError."""
    bos = begin_id(config.model)
    tokens = read_tokens(config.data, config.model)
    if config.held_out:
        held = read_tokens(config.held_out, config.model)
    else:
        tokens, held = np.split(tokens, [len(tokens) * 19 // 20])
    if min(len(tokens), len(held)) < config.length:
        raise ModelError(
            "data_missing", f"{len(tokens)} and {len(held)} tokens are too few for rows of {config.length}"
        )
    count = min(64, len(held) // config.length)
    held_rows = cut_rows(held, np.linspace(0, len(held) - config.length, count).astype(np.int64), config.length, bos)
    console.print(f"{len(tokens):,} tokens to train on, {len(held):,} held out")
    if not config.distil:
        return Material(held_rows, tokens, bos)
    prompt = config.length // 4
    total = max(1, config.distil // (config.length - prompt))
    rng = np.random.default_rng(config.seed)
    starts = rng.integers(0, len(tokens) - prompt + 1, total)
    prompts = torch.cat((cut_rows(tokens, starts, prompt, bos), held_rows[:, :prompt]))
    generated = generate_rows(config.model, prompts, config.length, config.temperature, config.device, console)
    return Material(generated[total:], rows=generated[:total], first=prompt)


def generate_rows(
    model: Path, prompts: Tensor, length: int, temperature: float, device: str, console: Console
) -> Tensor:
    """Continues prompts int64 [N, P] with the model itself: int64 [N, length]."""
    ended, error = threading.Event(), []
    rows = [prompt.tolist() for prompt in prompts]
    left = len(rows)
    with progress_bar(console) as bar:
        task = bar.add_task("generating", total=len(rows) * (length - prompts.shape[1]))

        def on_step(step: StepOutput) -> None:
            nonlocal left
            for output in step.outputs:
                rows[int(output.request_id)] += output.ids
                left -= output.finish is not None
            bar.advance(task, sum(len(output.ids) for output in step.outputs))
            if not left:
                ended.set()

        def on_fatal(raised: BaseException, _: Any) -> None:
            error.append(raised)
            ended.set()

        engine = Engine(EngineConfig(model, device=device, max_waiting=len(rows), speculate=False), on_step, on_fatal)
        engine.load()
        engine.start()
        for index, prompt in enumerate(prompts.tolist()):
            params = SamplingParams(
                max_tokens=length - len(prompt), temperature=temperature, seed=index, ignore_eos=True
            )
            engine.submit(EngineRequest(str(index), 0, 1, prompt, params))
        ended.wait()
        engine.stop()
    if error:
        raise error[0]
    return torch.tensor(rows)


def head_losses(heads: MedusaHeads, output: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of each head, f32 [heads]; hidden [R, H], targets int64 [heads, R], -1 ones do not count."""
    logits = heads.logits(heads.states(hidden), output)
    pairs = zip(logits, targets, strict=True)
    return torch.stack([F.cross_entropy(own, wanted, ignore_index=-1, reduction="sum") for own, wanted in pairs])


@torch.no_grad()
def expected_tokens(backbone: Backbone, heads: MedusaHeads, hidden: Tensor) -> Tensor:
    """The model's probabilities after each row of hidden [R, H], of the tokens that the heads know: f32 [R, V']. What they do not know
    is missing from the sum, so that a place where nothing that they know belongs weighs next to nothing."""
    expected = backbone.decoder.logits(hidden).float().softmax(-1)
    return expected if heads.token_map is None else expected[:, heads.token_map]


def distilled_losses(heads: MedusaHeads, output: Tensor, hidden: Tensor, expected: Tensor, valid: Tensor) -> Tensor:
    """Summed cross-entropy of each head to what the model expects where the head's token goes, f32 [heads]. hidden [R, H]; expected
    f32 [R + heads, V'] after these rows and those behind them; valid bool [heads, R]: what counts."""
    logits, rows = heads.logits(heads.states(hidden), output), len(hidden)
    losses = [
        F.cross_entropy(own, expected[head + 1 : head + 1 + rows], reduction="none") for head, own in enumerate(logits)
    ]
    return torch.where(valid, torch.stack(losses), 0.0).sum(1)


@dataclass(slots=True)
class Trainer:
    """Heads in training: everything that a checkpoint holds."""

    heads: MedusaHeads
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def save(self, file: Path, config: TrainConfig) -> None:
        state = {
            "heads": self.heads.tensors(), "optimizer": self.optimizer.state_dict(), "step": self.step,
            "seconds": self.seconds, "losses": self.losses, "rng": json.dumps(self.rng.bit_generator.state),
            "config": _fingerprint(config),
        }  # fmt: skip
        write_checkpoint(file, state)

    def load(self, file: Path, config: TrainConfig) -> None:
        state = read_checkpoint(file, self.heads.weights.device, _fingerprint(config))
        with torch.no_grad():
            for name, tensor in self.heads.tensors().items():
                tensor.copy_(state["heads"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
        self.rng.bit_generator.state = json.loads(state["rng"])


def _fingerprint(config: TrainConfig) -> str:
    """What must not change between a checkpoint and its resumption; how long to train may."""
    kept = asdict(config)
    for name in ("out", "steps", "minutes", "device", "dtype", "checkpoint_seconds"):
        del kept[name]
    if config.hard_targets:  # as it was before there was a choice
        del kept["hard_targets"]
    return json.dumps(kept, default=str, sort_keys=True)


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Beside it, and then moved into place: a kill in between leaves the older one."""
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)


def read_checkpoint(file: Path, device: torch.device, fingerprint: str) -> dict[str, Any]:
    """Raises ModelError if it is of a training with another `fingerprint`, which it holds as "config"."""
    state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    if state["config"] != fingerprint:
        text = f"{file} is of another training: delete it or choose another folder"
        raise ModelError("checkpoint_mismatch", text)
    return state


class Training(Protocol):
    """What a checkpoint holds. step: updates so far; seconds: that they have taken."""

    step: int
    seconds: float


def run_steps(
    training: Training,
    steps: int,
    minutes: float | None,
    title: str,
    console: Console,
    update: Callable[[float], str],
    save: Callable[[], None],
    save_every: float,
) -> None:
    """Updates for so many steps, or minutes if given, with a progress bar; saves every `save_every` seconds and at the end, whatever
    ends it. `update(progress)` makes one update, progress being 0 … 1, and says what its losses are."""
    began = time.monotonic() - training.seconds
    saved = time.monotonic()

    def progress() -> float:
        if minutes is not None:
            return (time.monotonic() - began) / (60 * minutes)
        return training.step / steps

    with progress_bar(console) as bar:
        task = bar.add_task(title, total=1.0)
        bar.update(task, completed=progress())
        try:
            while (done := progress()) < 1:
                losses = update(done)
                training.seconds = time.monotonic() - began
                bar.update(task, completed=progress(), description=f"step {training.step}, {losses}")
                if time.monotonic() - saved > save_every:
                    save()
                    saved = time.monotonic()
        finally:
            save()


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over 2 %, then a cosine to a tenth. progress 0..1."""
    if progress < 0.02:
        return peak * progress / 0.02
    return peak * (0.55 + 0.45 * math.cos(math.pi * (progress - 0.02) / 0.98))


def train(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Trains, resuming from `out`/checkpoint.pt if there is one; writes heads.safetensors, config.json, accuracies.json and
    trees.json to `out`. Returns the report. Raises ModelError."""
    device, dtype = device_and_dtype(config.device, config.dtype)
    torch.manual_seed(config.seed)
    material = gather(config, console)
    backbone = Backbone(config.model, device, dtype)
    if config.length > backbone.config.max_position:
        raise ModelError("context_length_exceeded", f"the model's context is {backbone.config.max_position} tokens")
    model_head = backbone.decoder.weights.head
    if config.init is not None:
        heads = load_heads(config.init, backbone.config)
    else:
        heads = new_heads(config, model_head, material)
    heads = heads.to(device, torch.float32)
    parameters = [tensor.requires_grad_() for name, tensor in heads.tensors().items() if name != "token_map"]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    trainer = Trainer(heads, optimizer, np.random.default_rng(config.seed))
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint = config.out / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint, config)
        console.print(f"resumed at step {trainer.step}")

    def update(progress: float) -> str:
        trainer.losses = _train_step(trainer, config, backbone, material, progress)
        return "loss by head " + " ".join(f"{loss:.3f}" for loss in trainer.losses)

    run_steps(
        trainer,
        config.steps,
        config.minutes,
        "training",
        console,
        update,
        lambda: trainer.save(checkpoint, config),
        config.checkpoint_seconds,
    )
    report = evaluate(heads, backbone, material, console)
    effort: dict[str, Any] = {
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "tokens": trainer.step * config.rows * config.length,
    }
    save_heads(heads, config.out, torch.bfloat16, {"vocab_size": backbone.config.vocab_size, "trained": effort})
    report |= effort
    ranks = report.pop("ranks")
    (config.out / "accuracies.json").write_text(json.dumps(report, indent=2) + "\n")
    TreeSet(design(observed(ranks), heads.num_heads, TREE_WIDTH, MAX_NODES)).save(config.out / "trees.json")
    return report


def new_heads(config: TrainConfig, model_head: Tensor, material: Material) -> MedusaHeads:
    token_map = None
    if 0 < config.vocabulary < len(model_head):
        source = material.tokens if material.tokens is not None else material.rows[:, material.first :].numpy()  # type: ignore[index]
        counts = np.bincount(source.ravel(), minlength=len(model_head))
        token_map = torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[: config.vocabulary]))
    known = model_head if token_map is None else model_head[token_map.to(model_head.device)]
    heads = MedusaHeads.initial(config.heads, config.layers, model_head.shape[1], None if config.tied else known)
    heads.token_map = token_map
    return heads


def _train_step(
    trainer: Trainer, config: TrainConfig, backbone: Backbone, material: Material, progress: float
) -> list[float]:
    """One update; the loss of each head, nats per token."""
    heads, device = trainer.heads, backbone.device
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(config.learning_rate, progress)
    ids = material.batch(config.rows, config.length, trainer.rng).to(device)
    hidden = backbone.hidden(ids).flatten(0, 1)
    model_head = backbone.decoder.weights.head
    targets = head_targets(ids, heads.num_heads, material.first).flatten(1)
    if config.hard_targets:
        targets = known_targets(heads, targets, len(model_head))
    valid = targets >= 0
    counts = valid.sum(1).clamp(min=1)
    weights = DISCOUNT ** torch.arange(heads.num_heads, device=device) / counts
    output = tied_output(heads, model_head)
    step = rows_per_slice(heads, model_head)
    totals = torch.zeros(heads.num_heads, device=device)
    trainer.optimizer.zero_grad(set_to_none=True)
    behind = F.pad(hidden, (0, 0, 0, heads.num_heads))  # of rows whose targets lie beyond the end, and do not count
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        rows = hidden[part].float()
        with torch.autocast(device.type, torch.bfloat16, enabled=backbone.dtype is torch.bfloat16):
            if config.hard_targets:
                losses = head_losses(heads, output, rows, targets[:, part])
            else:
                expected = expected_tokens(backbone, heads, behind[start : start + len(rows) + heads.num_heads])
                losses = distilled_losses(heads, output, rows, expected, valid[:, part])
        (losses * weights).sum().backward()
        totals += losses.detach()
    torch.nn.utils.clip_grad_norm_([p for g in trainer.optimizer.param_groups for p in g["params"]], 1.0)
    trainer.optimizer.step()
    trainer.step += 1
    return (totals / counts).tolist()


def evaluate(heads: MedusaHeads, backbone: Backbone, material: Material, console: Console) -> dict[str, Any]:
    """Accuracies on the held-out rows: of the model's own next token, then of each head. "ranks": one list for each position."""
    rows = material.held_out
    model_head = backbone.decoder.weights.head
    ranks, targets, own = [], [], []
    for start in range(0, len(rows), 4):
        ids = rows[start : start + 4].to(backbone.device)
        hidden = backbone.hidden(ids).flatten(0, 1)
        wanted = head_targets(ids, heads.num_heads, material.first).flatten(1)
        ranks.append(target_ranks(heads.to(backbone.device, hidden.dtype), model_head, hidden, wanted).cpu())
        targets.append(wanted.cpu())
        following = ids.roll(-1, 1)
        following[:, -1] = -1
        itself = MedusaHeads.initial(1, 1, hidden.shape[1]).to(backbone.device, hidden.dtype)
        own.append(target_ranks(itself, model_head, hidden, following.view(1, -1)).cpu())
    all_ranks, all_targets, own_ranks = (torch.cat(parts, dim=1) for parts in (ranks, targets, own))
    accuracies = top_accuracies(all_ranks, all_targets >= 0, TREE_WIDTH)
    base = top_accuracies(own_ranks, own_ranks >= 0, REPORTED)[0]
    console.print("accuracy on held-out text, among the 1 … 5 likeliest")
    for name, top in [("next token, by the model", base), *((f"head {i + 1}", a) for i, a in enumerate(accuracies))]:
        console.print(f"  {name:26} " + "  ".join(f"{value:6.2%}" for value in top[:REPORTED]))
    complete = (all_targets >= 0).all(0)
    return {
        "model": [round(value, 5) for value in base],
        "heads": [[round(value, 5) for value in top] for top in accuracies],
        "positions": int(complete.sum()),
        "ranks": all_ranks[:, complete].T.tolist(),
    }


def tune_tree(
    model: Path, folder: Path, prompts: tuple[Path, ...], temperature: float, tokens: int, device_name: str,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Designs the trees of the heads in `folder` from what the model itself generates after the prompts (text files, a prompt for
    each paragraph), about `tokens` tokens. Writes trees.json there. Raises ModelError."""
    device, dtype = device_and_dtype(device_name, "auto")
    prompt, length = 64, 320
    found = read_tokens(prompts, model)
    bos = begin_id(model)
    if len(found) < prompt:
        raise ModelError("data_missing", f"the prompts have {len(found)} tokens, {prompt} are the least")
    count = max(1, tokens // (length - prompt))
    starts = np.linspace(0, len(found) - prompt, count).astype(np.int64)
    rows = generate_rows(model, cut_rows(found, starts, prompt, bos), length, temperature, device_name, console)
    backbone = Backbone(model, device, dtype)
    heads = load_heads(folder, backbone.config).to(device, dtype)
    report = evaluate(heads, backbone, Material(rows, first=prompt), console)
    trees = TreeSet(design(observed(report.pop("ranks")), heads.num_heads, TREE_WIDTH, MAX_NODES))
    trees.save(folder / "trees.json")
    report["trees"] = {tree.size: round(1 + tree.expected_extra, 4) for tree in trees.trees}
    console.print("nodes: expected tokens a step  " + ", ".join(f"{k}: {v:.2f}" for k, v in report["trees"].items()))
    return report


def device_and_dtype(name: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return device, {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _train_jointly(config: TrainConfig, joint: dict[str, Any], console: Console) -> None:
    from services.model_worker.joint_training import JointConfig, train_joint  # which needs transformers

    train_joint(JointConfig(config, joint[""], joint["_steps"], joint["_minutes"], joint["_learning_rate"]), console)


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main(arguments: list[str]) -> int:
    """`gorgon train-heads …` or `gorgon tune-tree …`; the exit status."""
    parser = argparse.ArgumentParser(prog="gorgon", description="Medusa heads: training and tree design.")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train-heads", help="train Medusa heads for a model, resuming where it was stopped")
    training.add_argument("--data", type=Path, nargs="+", required=True, help="text files")
    training.add_argument("--held-out", type=Path, nargs="+", default=[], help="text files to measure on")
    training.add_argument("--init", type=Path, help="folder of heads to go on from")
    training.add_argument("--untied", dest="tied", action="store_false", help="each head trains an output matrix")
    for name, kind in (
        ("heads", _at_least_one),
        ("layers", _at_least_one),
        ("rows", _at_least_one),
        ("length", _at_least_one),
        ("steps", _at_least_one),
        ("seed", int),
        ("vocabulary", int),
    ):
        training.add_argument(f"--{name}", type=kind, default=getattr(TrainConfig, name))
    training.add_argument("--minutes", type=float, help="train for so long instead of a number of steps")
    training.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    training.add_argument("--joint", type=Path, help="then train model and heads together (Medusa-2) into this folder")
    training.add_argument("--joint-steps", type=int, default=1000)
    training.add_argument("--joint-minutes", type=float, help="for so long instead of a number of steps")
    training.add_argument(
        "--joint-learning-rate", type=float, default=5e-5, help="of the model; the heads' is four times that"
    )
    training.add_argument("--distil", type=int, default=0, help="tokens to generate with the model and train on")
    training.add_argument(
        "--hard-targets", action="store_true", help="learn the tokens that follow, not what the model expects there"
    )
    tuning = commands.add_parser("tune-tree", help="design the trees of heads from the model's own generations")
    tuning.add_argument("--prompts", type=Path, nargs="+", required=True, help="text files")
    tuning.add_argument("--tokens", type=int, default=20_000, help="to generate")
    for command in (training, tuning):
        command.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
        command.add_argument("--out", type=Path, help="folder of the heads; default: medusa in the model's")
        command.add_argument("--temperature", type=float, default=1.0, help="of the model's own generations")
        command.add_argument("--device", default="auto")
        command.add_argument("--threads", type=int, default=0, help="of torch on a CPU; 0: its own choice")
    options = vars(parser.parse_args(arguments))
    command, threads = options.pop("command"), options.pop("threads")
    options["out"] = options["out"] or options["model"] / "medusa"
    console = Console(stderr=True)
    if threads:
        torch.set_num_threads(threads)
    try:
        load_config(options["model"])  # before anything is read or generated
        if command == "train-heads":
            options |= {name: tuple(options[name]) for name in ("data", "held_out")}
            joint = {n: options.pop(f"joint{n}") for n in ("", "_steps", "_minutes", "_learning_rate")}
            config = TrainConfig(**options)
            if joint[""] is None:
                train(config, console)
            else:
                _train_jointly(config, joint, console)
        else:
            tune_tree(
                options["model"], options["out"], tuple(options["prompts"]), options["temperature"],
                options["tokens"], options["device"], console,
            )  # fmt: skip
    except ModelError as error:
        console.print(f"[red]{error.code}[/red]: {error.message}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
