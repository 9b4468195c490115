"""A model of 100 to 300 million parameters, trained, given Medusa heads, and measured with and without them, in one resumable script:
nothing so large can be carried away from a machine that is lent for minutes.

    python -m benchmarks.medusa_end_to_end --corpora corpora.tar.xz --work DIR --minutes 9
    python -m benchmarks.medusa_end_to_end --text tinyshakespeare.txt --work DIR --tiny --device cpu     to try the script itself

The model learns on novels and is measured on books held out, whole, of the same corpus. Steps: corpus, model, heads, trees, speed. What
is done is not done again; training goes on from its last checkpoint. Call it until it prints the table. `medusa.json` in DIR has
all figures, the model's loss and entropy on the held-out text among them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from demo_corpus import BOS, EOS, PAD, prepare, train_tokenizer
from demo_llama import LlamaForTraining, LlamaShape
from train_demo_model import build_optimizers, evaluate, hugging_face_config, learning_rate_at, windows

from benchmarks import speculation
from services.model_worker import train_heads
from services.model_worker.speculation.measure import Backbone

Ids = NDArray[np.uint16]


@dataclass(frozen=True)
class Size:
    """Of the model, and of a step of its training."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    rows: int
    distil: int  # tokens of its own that heads learn from

    def shape(self, vocabulary: int) -> LlamaShape:
        return LlamaShape(
            vocabulary, self.hidden, self.intermediate, self.layers, self.heads, self.kv_heads, 64, self.context
        )


LARGE = Size(8192, 1024, 2816, 12, 16, 8, 1024, 64, 5_000_000)  # 150 M parameters
TINY = Size(512, 64, 128, 2, 2, 1, 128, 8, 4_000)


@dataclass
class Text:
    train: Ids
    held_out: Ids
    tokenizer: Tokenizer

    @classmethod
    def of(cls, args: argparse.Namespace, size: Size) -> Text:
        folder: Path = args.work / "text"
        if not (folder / "ids.npz").is_file():
            text = cls._from_corpora(args.corpora, size) if args.corpora else cls._from_file(args.text, size)
            folder.mkdir(parents=True, exist_ok=True)
            text.tokenizer.save(str(folder / "tokenizer.json"))
            np.savez(folder / "ids.new.npz", train=text.train, held_out=text.held_out)
            (folder / "ids.new.npz").replace(folder / "ids.npz")
        with np.load(folder / "ids.npz") as ids:
            return cls(ids["train"], ids["held_out"], Tokenizer.from_file(str(folder / "tokenizer.json")))

    @classmethod
    def _from_corpora(cls, corpora: Path, size: Size) -> Text:
        corpus = prepare(corpora, size.vocabulary)
        return cls(corpus.train, corpus.held_out, corpus.tokenizer)

    @classmethod
    def _from_file(cls, file: Path, size: Size) -> Text:
        paragraphs = [p + "\n\n" for p in file.read_text(encoding="utf-8").split("\n\n")]
        cut = len(paragraphs) * 19 // 20
        tokenizer = train_tokenizer(paragraphs[:cut], size.vocabulary)

        def ids(part: list[str]) -> Ids:
            encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            return np.fromiter((i for e in encoded for i in e.ids), dtype=np.uint16)

        return cls(ids(paragraphs[:cut]), ids(paragraphs[cut:]), tokenizer)

    def write(self, folder: Path, share: float = 1.0) -> tuple[Path, Path]:
        """As text files, which is what heads are trained on."""
        files = folder / "train.txt", folder / "held_out.txt"
        for file, ids in zip(files, (self.train[: int(len(self.train) * share)], self.held_out), strict=True):
            if not file.is_file():
                pieces = [ids[start : start + 100_000].tolist() for start in range(0, len(ids), 100_000)]
                file.write_text("".join(self.tokenizer.decode_batch(pieces)), encoding="utf-8")
        return files


class Clock:
    """What is left of this call."""

    def __init__(self, minutes: float) -> None:
        self._ends = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return self._ends - time.monotonic()


class OutOfTime(Exception):
    """The next call goes on."""


# ---------------------------------------------------------------- the model


def train_model(args: argparse.Namespace, size: Size, text: Text, device: str, clock: Clock) -> dict[str, Any]:
    """`args.model_seconds` of training, over as many calls as it takes. Raises OutOfTime."""
    folder: Path = args.work / "model"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    shape = size.shape(text.tokenizer.get_vocab_size())
    model = LlamaForTraining(shape, dropout=0.1).to(device)
    rates = argparse.Namespace(muon_lr=args.muon_lr, adam_lr=args.adam_lr, weight_decay=0.3)
    optimizers = build_optimizers(model, rates)
    state = {"step": 0, "seconds": 0.0}
    checkpoint = args.work / "model.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        state = saved["state"]
        print(f"model: resumed at step {state['step']}, {state['seconds']:.0f} s", flush=True)

    def save() -> None:
        states = [optimizer.state_dict() for optimizer in optimizers]
        values = {"model": model.state_dict(), "optimizers": states, "state": state}
        torch.save(values, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    tokens = torch.from_numpy(text.train.astype(np.int32)).to(device)
    bos, rng = text.tokenizer.token_to_id(BOS), np.random.default_rng(state["step"])

    def loss_of_batch() -> torch.Tensor:
        starts = torch.from_numpy(rng.integers(0, len(tokens) - size.context, size.rows)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model(*windows(tokens, starts, bos, size.context)).mean()

    if device == "cuda":
        model.compile_parts()
        loss_of_batch().backward()
        model.zero_grad(set_to_none=True)
    began, saved_at, shown_at = time.monotonic() - state["seconds"], time.monotonic(), 0.0
    while (seconds := time.monotonic() - began) < args.model_seconds:
        factor = learning_rate_at(seconds / args.model_seconds)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        loss = loss_of_batch()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        state = {"step": state["step"] + 1, "seconds": seconds}
        if state["step"] % 10 == 0:
            value = loss.item()  # also keeps the host from running ahead of the clock
            if not math.isfinite(value):
                raise SystemExit(f"the loss is {value} after {state['step']} steps")
            if seconds - shown_at > 15:
                shown_at = seconds
                print(f"model: {seconds:5.0f} s, step {state['step']}, loss {value:.3f}", flush=True)
        if clock.left < args.reserve or time.monotonic() - saved_at > 60:
            save()
            saved_at = time.monotonic()
            if clock.left < args.reserve:
                raise OutOfTime("model")
    save()
    held_out = evaluate(model, text.held_out[: args.measured_tokens], bos, device, size.rows)
    save_file(model.state_for_hugging_face(), folder / "model.safetensors", metadata={"format": "pt"})
    corpus = argparse.Namespace(tokenizer=text.tokenizer)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(shape, corpus), indent=1) + "\n")
    text.tokenizer.save(str(folder / "tokenizer.json"))
    special = {f"{k}_token": token for k, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    (folder / "tokenizer_config.json").write_text(json.dumps(special) + "\n")
    checkpoint.unlink()
    seen = state["step"] * size.rows * size.context
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "shape": asdict(shape),
        "steps": state["step"],
        "seconds": round(state["seconds"], 1),
        "tokens": seen,
        "epochs": round(seen / len(text.train), 2),
        "held_out_loss": held_out,
    }


@torch.inference_mode()
def entropy(model: Path, text: Text, device: torch.device, dtype: torch.dtype, rows: int = 16) -> dict[str, float]:
    """Of the model's own distribution on the held-out text, and its loss there: nats a token."""
    backbone = Backbone(model, device, dtype)
    length = backbone.config.max_position
    starts = np.linspace(0, len(text.held_out) - length, rows).astype(np.int64)
    ids = train_heads.cut_rows(text.held_out.astype(np.int32), starts, length, text.tokenizer.token_to_id(BOS))
    spread = loss = 0.0
    for row in ids:
        hidden = backbone.hidden(row[None].to(device))[0, :-1]
        scores = backbone.decoder.logits(hidden).float().log_softmax(-1)
        spread += float(-(scores.exp() * scores).sum(-1).mean())
        loss -= float(scores.gather(1, row[1:, None].to(device)).mean())
    return {"entropy": spread / len(ids), "loss": loss / len(ids)}


# ---------------------------------------------------------------- all of it


class Progress:
    """Figures of the steps that are done, in medusa.json."""

    def __init__(self, work: Path) -> None:
        self._path = work / "medusa.json"
        self.figures: dict[str, Any] = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._began = time.monotonic()

    def add(self, name: str, values: Any) -> None:
        self.figures[name] = values
        self._path.write_text(json.dumps(self.figures, indent=1) + "\n")
        print(f"{name}: done, {time.monotonic() - self._began:.0f} s of this call", flush=True)


def run(args: argparse.Namespace) -> Progress:
    size, clock = (TINY if args.tiny else LARGE), Clock(args.minutes)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    args.work.mkdir(parents=True, exist_ok=True)
    progress, model = Progress(args.work), args.work / "model"
    text = Text.of(args, size)
    console = Console(stderr=True)
    if "model" not in progress.figures:
        progress.add("model", train_model(args, size, text, device, clock))
        progress.add("held_out", entropy(model, text, torch.device(device), dtype))
    train_file, held_file = text.write(args.work / "text")
    heat = args.temperatures[0]  # heads and trees are made for what is measured first
    if "heads" not in progress.figures:
        if clock.left < args.reserve + args.head_seconds:
            raise OutOfTime("heads")
        config = train_heads.TrainConfig(
            model, (train_file,), model / "medusa", (held_file,), heads=args.heads, tied=False, rows=size.rows // 2,
            length=min(512, size.context), minutes=args.head_seconds / 60,
            distil=size.distil if args.distil is None else args.distil,
            temperature=heat, device=device,
        )  # fmt: skip
        progress.add("heads", train_heads.train(config, console))
    if "trees" not in progress.figures:
        if clock.left < args.reserve:
            raise OutOfTime("trees")
        # On the text that the model has seen: the held-out books are for measuring.
        values = train_heads.tune_tree(model, model / "medusa", (train_file,), heat, args.tree_tokens, device, console)
        progress.add("trees", values)
    for temperature in args.temperatures:
        name = f"speed at temperature {temperature:g}"
        rows = progress.figures.get(name, {}).get("rows", [])
        left = [batch for batch in args.batches if all(row["batch"] != batch for row in rows)]
        if not left:
            continue
        options = argparse.Namespace(
            model=model, heads=None, text=held_file, device=device, batches=left, prompt=min(64, size.context // 4),
            output=min(256, size.context // 2), repeats=args.repeats, seconds=args.seconds,
            temperatures=[temperature], warm_up=args.warm_up, drafts_first=args.drafts_first,
        )  # fmt: skip
        if clock.left < args.reserve:
            raise OutOfTime(name)
        with contextlib.closing(speculation.speed(options)) as measured:
            for row in measured:
                rows = [*rows, row]
                progress.add(name, {"rows": rows, "minimum": min(row["ratio"] for row in rows)})
                if clock.left < args.reserve and len(rows) < len(args.batches):
                    raise OutOfTime(name)
    return progress


def table(progress: Progress) -> str:
    found = progress.figures
    lines = [
        f"{found['model']['parameters'] / 1e6:.0f} M parameters, {found['model']['epochs']} epochs, on held-out books: "
        f"loss {found['held_out']['loss']:.3f}, entropy {found['held_out']['entropy']:.3f} nats a token"
    ]
    for name, values in found.items():
        if name.startswith("speed"):
            lines += ["", name, "", "| batch | plain tok/s | with heads | speed-up | 95 % | tokens a step | trees |"]
            lines.append("|---|---|---|---|---|---|---|")
            for row in values["rows"]:
                lines.append(
                    f"| {row['batch']} | {row['plain']:,.0f} | {row['drafted']:,.0f} | {row['ratio']:.3f} "
                    f"| {row['low']:.3f} … {row['high']:.3f} | {row['tokens_per_drafted_step']:.2f} | {row['shares']} |"
                )
            lines.append(f"least: {values['minimum']:.3f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpora", type=Path, help="archive with the novels, see tools/demo_corpus.py")
    source.add_argument("--text", type=Path, help="any text; its last twentieth is held out")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything; kept from call to call")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call")
    parser.add_argument("--reserve", type=float, default=20.0, help="seconds left at which nothing new is begun")
    parser.add_argument("--model-seconds", type=float, default=240.0)
    parser.add_argument("--head-seconds", type=float, default=90.0)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--distil", type=int, help="tokens of the model's own for the heads; 0: the text")
    parser.add_argument("--tree-tokens", type=int, default=50_000)
    parser.add_argument("--measured-tokens", type=int, default=200_000)
    parser.add_argument("--muon-lr", type=float, default=3e-3)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 2, 4, 16, 64, 128, 256])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs of a batch size, at least")
    parser.add_argument("--seconds", type=float, default=10, help="of a batch size, at least")
    parser.add_argument(
        "--drafts-first", action="store_true", help="build the engine with heads before the one without"
    )
    parser.add_argument("--warm-up", type=int, default=1000, help="tokens of each sequence, before")
    parser.add_argument("--tiny", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    try:
        progress = run(args)
    except OutOfTime as stopped:
        print(f"out of time before or in: {stopped}; call again to go on")
        return 3
    print(table(progress))
    return 0


if __name__ == "__main__":
    sys.exit(main())
