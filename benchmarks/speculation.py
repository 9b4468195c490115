"""Speculation beside plain decoding, and proof that it changes nothing.

    python -m benchmarks.speculation speed --model DIR --text held_out.txt    tokens/s by batch size, two engines in turn
    python -m benchmarks.speculation floor                                    the same, where guesses are right as often as is wished
    python -m benchmarks.speculation steps --shape llama3.1-8b                ms of a step by nodes, with random weights
    python -m benchmarks.speculation identity --model DIR --text FILE         outputs with and without, greedy and sampled

Every row is printed as soon as it is measured; JSON goes to --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.workloads import CONTEXT, SHAPES
from kernels.philox import gumbel_noise
from services.model_worker.engine import Engine, EngineConfig, EngineRequest, StepOutput
from services.model_worker.models.config import load_config
from services.model_worker.speculation.controller import TreeController
from services.model_worker.speculation.measure import Backbone
from services.model_worker.speculation.medusa import MedusaHeads, save_heads
from services.model_worker.speculation.tree import Tree
from services.model_worker.threaded_engine import SWITCH_INTERVAL
from services.model_worker.train_heads import begin_id, read_tokens
from shared.sampling import SamplingParams

KINDS = ["tied", "part", "untied"]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]


class Client:
    """Runs batches of requests."""

    def __init__(self, config: EngineConfig) -> None:
        # With Python's 5 ms the steps at whose end this thread wakes up would last that long, and mislead the tree controller.
        sys.setswitchinterval(SWITCH_INTERVAL)
        self.config = config
        self.engine = Engine(config, self._on_step, self._on_fatal)
        self._enough, self._idle = threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self._open = 0
        self._goal = math.inf
        self.outputs: dict[str, list[int]] = {}
        self.times: list[float] = []
        self.totals: list[int] = []  # tokens so far, of each step
        self.engine.load()
        self.engine.start()

    @property
    def thread_id(self) -> int:
        thread = self.engine._thread
        assert thread is not None and thread.native_id is not None
        return thread.native_id

    def _on_step(self, step: StepOutput) -> None:
        total = self.totals[-1] if self.totals else 0
        for token in step.tokens:
            self.outputs[token.request_id] += token.ids
            total += len(token.ids)
            self._open -= token.finish is not None
        if step.rows is not None:  # a service takes them as they are, too: here the engine would wait for it
            for request, ids in zip(step.rows.requests, step.rows.ids, strict=True):
                self.outputs[request.request_id] += ids
                total += len(ids)
        self.times.append(time.perf_counter())
        self.totals.append(total)
        if total >= self._goal:
            self._enough.set()
        if not self._open:
            self._enough.set()
            self._idle.set()

    def _on_fatal(self, error: BaseException, _: Any) -> None:
        self._error = error
        self._enough.set()
        self._idle.set()

    def _begin(self, requests: list[EngineRequest], goal: float) -> float:
        self.outputs = {request.request_id: [] for request in requests}
        self._open, self._goal, self.times, self.totals = len(requests), goal, [], []
        self._enough.clear()
        self._idle.clear()
        start = time.perf_counter()
        self.engine.submit(*requests)
        return start

    def _wait(self, event: threading.Event) -> None:
        event.wait()
        if self._error is not None:
            raise self._error

    def run(self, requests: list[EngineRequest]) -> tuple[list[list[int]], float]:
        """To their ends: outputs and seconds."""
        start = self._begin(requests, math.inf)
        self._wait(self._idle)
        return [self.outputs[request.request_id] for request in requests], self.times[-1] - start

    def rate(self, requests: list[EngineRequest], tokens: int) -> float:
        """Tokens per second while all of them run: from the first step after which each has a token until they have so many together.
        Then they are aborted: of sequences that get on at different speeds, the last would be measured alone."""
        self._begin(requests, tokens)
        self._wait(self._enough)
        for request in requests:
            self.engine.abort(request.request_id, request.epoch)
        self._wait(self._idle)
        steps = range(len(self.times))
        first = next(step for step in steps if self.totals[step] >= len(requests))
        last = next(step for step in steps if self.totals[step] >= tokens)
        return (self.totals[last] - self.totals[first]) / (self.times[last] - self.times[first])


def requests_of(
    text: np.ndarray, bos: int | None, count: int, prompt: int, output: int, temperature: float | None, seed: int
) -> list[EngineRequest]:
    """Prompts from all over the text. temperature None: greedy and 0.8 in turn."""
    starts = np.random.default_rng(seed).integers(0, len(text) - prompt, count)
    requests = []
    for index, start in enumerate(starts):
        heat = temperature if temperature is not None else (0.0, 0.8)[index % 2]
        ids = [*([] if bos is None else [bos]), *text[start : start + prompt].tolist()]
        params = SamplingParams(max_tokens=output, temperature=heat, seed=seed * 100_003 + index, ignore_eos=True)
        requests.append(EngineRequest(f"{seed}-{index}", 0, 1, ids, params))
    return requests


def speed_up(plain: list[float], drafted: list[float]) -> tuple[float, float, float]:
    """How many times faster all of it is, and the 95 % confidence interval, from rates over as many tokens each, in pairs.

    The total time's ratio, not the mean of the pairs' ratios: a prompt whose answer is easily guessed counts as long as it takes.
    The interval is that of a ratio estimator (Cochran, Sampling Techniques, 6.4)."""
    slow, fast = 1 / np.array(plain), 1 / np.array(drafted)
    ratio, pairs = float(slow.sum() / fast.sum()), len(plain)
    if pairs < 2:
        return ratio, math.nan, math.nan
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(pairs, 2.23)
    half = t * float(np.sqrt(((slow - ratio * fast) ** 2).sum() / (pairs * (pairs - 1))) / fast.mean())
    return ratio, ratio - half, ratio + half


def speed(arguments: argparse.Namespace) -> Generator[dict[str, Any]]:
    """One engine with the drafter and one without, taking turns; the same prompts for both. Yields a row for each batch size."""
    common: dict[str, Any] = {"device": arguments.device, "prefix_cache": False, "max_seqs": max(arguments.batches)}
    if arguments.device != "cpu" and torch.cuda.is_available():
        common["gpu_memory_fraction"] = 0.4
    clients: dict[bool, Client] = {}  # by whether it drafts
    try:
        # Where an engine's memory lies seems to matter by a per cent: whoever compares such differences should do it in both orders.
        for drafts in sorted((False, True), reverse=arguments.drafts_first):
            clients[drafts] = Client(EngineConfig(arguments.model, heads=arguments.heads, speculate=drafts, **common))
        on_one_core([*clients.values()])
        if arguments.text is None:
            text = np.random.default_rng(5).integers(3, clients[True].engine.info.vocab_size, 100_000)
        else:
            text = read_tokens((arguments.text,), arguments.model)
        yield from _rows(arguments, text, begin_id(arguments.model), clients[False], clients[True])
    finally:
        for client in clients.values():
            client.engine.stop(timeout=30)


def on_one_core(clients: list[Client]) -> None:
    """Their engines' threads, of which one works at a time. Steps that the host bounds take a fifth longer on one core than on another
    for seconds, if somebody else's machine is on it, too; the two would seem to differ by that."""
    cores = os.sched_getaffinity(0)
    for client in clients if len(cores) > 2 else ():
        os.sched_setaffinity(client.thread_id, {max(cores)})


def _rows(
    arguments: argparse.Namespace, text: np.ndarray, bos: int | None, plain: Client, drafted: Client
) -> Generator[dict[str, Any]]:
    longest = min(4 * arguments.output, plain.engine.info.max_model_len - arguments.prompt - 1)
    print("| T | batch | plain tok/s | with drafts | ratio | 95 % | tokens a step | trees (share of steps) |")
    print("|---|---|---|---|---|---|---|---|")

    def row_of(batch: int, heat: float) -> dict[str, Any]:
        rates: list[list[float]] = []
        # Compiles, and the controller learns: what its start costs is paid for by what comes much later.
        for client in (plain, drafted):
            for seed, done in enumerate(range(0, arguments.warm_up, longest), 1):
                output = min(longest, arguments.warm_up - done)
                client.run(requests_of(text, bos, batch, arguments.prompt, output, heat, 1000 * seed + batch))
        before = stats_of(drafted)
        began = time.monotonic()
        while (repeat := len(rates)) < arguments.repeats or time.monotonic() - began < arguments.seconds:
            # The fast ones among a batch must not come to their end before the batch has its tokens.
            requests = requests_of(text, bos, batch, arguments.prompt, longest, heat, repeat)
            order = [plain, drafted] if repeat % 2 else [drafted, plain]
            found = {id(client): client.rate(requests, batch * arguments.output) for client in order}
            rates.append([found[id(client)] for client in (plain, drafted)])
        after = stats_of(drafted)
        steps = {n: after["steps"].get(n, 0) - before["steps"].get(n, 0) for n in after["steps"]}
        tokens = 1 + (after["accepted"] - before["accepted"]) / max(1, after["drafted"] - before["drafted"])
        shares = {n: round(count / sum(steps.values()), 3) for n, count in sorted(steps.items()) if count}
        columns = [list(column) for column in zip(*rates, strict=True)]
        ratio, low, high = speed_up(*columns)
        slow, fast = (statistics.harmonic_mean(column) for column in columns)
        print(
            f"| {heat:.3g} | {batch} | {slow:,.0f} | {fast:,.0f} | {ratio:.3f} | {low:.3f} … {high:.3f} | {tokens:.2f} | {shares} |",
            flush=True,
        )
        assert drafted.engine.trees is not None
        times = {nodes: round(1e3 * seconds, 3) for nodes, seconds in drafted.engine.trees.times(batch).items()}
        print(f"  ms of a step by nodes: {times}", flush=True)
        return {
            "temperature": heat, "batch": batch, "plain": slow, "drafted": fast, "ratio": ratio, "low": low, "high": high,
            "pairs": [round(fast / slow, 3) for slow, fast in rates], "tokens_per_drafted_step": tokens,
            "shares": shares, "step_ms": times,
        }  # fmt: skip

    for heat in arguments.temperatures:
        for batch in arguments.batches:
            yield row_of(batch, heat)


def speeds(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = list(speed(arguments))
    return {"rows": rows, "minimum": min(row["ratio"] for row in rows)}


def floor(arguments: argparse.Namespace) -> dict[str, Any]:
    """As `speed`, with a model that repeats its last token with a chance p that the temperature sets, and heads that guess so:
    the first is right in about p² of the steps (its hidden state is that of the token before the last), the second in p³."""
    with tempfile.TemporaryDirectory() as folder:
        arguments.model, arguments.heads, arguments.text = Path(folder), None, None
        write_repeater(arguments.model)
        chances = dict(zip(map(repeater_heat, arguments.chances), arguments.chances, strict=True))
        arguments.temperatures = list(chances)
        rows = [{"chance": chances[row["temperature"]], **row} for row in speed(arguments)]
    return {"rows": rows, "minimum": min(row["ratio"] for row in rows)}


# A Llama of 150 million parameters whose layers cost what they cost and add nothing.
REPEATER = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
REPEATED = 7.0  # the logit of the last token; those of the others are about 0


def write_repeater(folder: Path) -> None:
    """The model's folder, four heads included. Its hidden state is the last token's embedding."""
    (folder / "config.json").write_text(json.dumps(REPEATER))
    model = load_config(folder)
    heads, hidden = REPEATER["num_attention_heads"], model.hidden_size
    wide, narrow = 64 * heads, 64 * REPEATER["num_key_value_heads"]  # type: ignore[operator]
    inner = REPEATER["intermediate_size"]
    torch.manual_seed(1)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).bfloat16()

    tensors = {"model.embed_tokens.weight": torch.randn(model.vocab_size, hidden).bfloat16()}
    tensors["model.norm.weight"] = torch.full((hidden,), REPEATED / hidden).bfloat16()
    for layer in range(REPEATER["num_hidden_layers"]):  # type: ignore[call-overload]
        shapes = {
            "self_attn.q": (wide, hidden), "self_attn.k": (narrow, hidden), "self_attn.v": (narrow, hidden),
            "self_attn.o": (hidden, wide), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden), "mlp.down": (hidden, inner),
        }  # fmt: skip
        for name, shape in shapes.items():
            weight = matrix(*shape)  # type: ignore[arg-type]
            tensors[f"model.layers.{layer}.{name}_proj.weight"] = weight * (name[-2:] not in (".o", "wn"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_heads(MedusaHeads.initial(4, 1, hidden), folder / "medusa", torch.bfloat16, {})


def repeater_heat(chance: float) -> float:
    """The temperature at which the last token is sampled again with this probability."""
    spread, others = REPEATED**2 / REPEATER["hidden_size"], REPEATER["vocab_size"]  # type: ignore[operator]

    def odds(heat: float) -> float:
        return REPEATED / heat - math.log(others) - spread / (2 * heat**2)  # type: ignore[arg-type]

    low, high = 0.1, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if odds(middle) > math.log(chance / (1 - chance)) else (low, middle)
    return low


def stats_of(client: Client) -> dict[str, Any]:
    stats = client.engine.stats().speculation
    assert stats is not None, "the model has no heads"
    return {"steps": stats.steps, "accepted": sum(stats.accepted), "drafted": stats.drafted}


def steps(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median ms of decode steps with each tree, by batch size, heads tied (also: to a part of the vocabulary, as in FR-Spec, Zhao et
    al. 2025, arXiv 2502.14856) and untied. With random heads next to nothing is accepted, so every step is draft, verification of all
    nodes, and acceptance."""
    results: dict[str, Any] = {}
    print(
        "| heads | batch | " + " | ".join(f"{n} nodes" if n > 1 else "plain, ms" for n in [1, *arguments.nodes]) + " |"
    )
    print("|---" * (3 + len(arguments.nodes)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
        model = load_config(Path(folder))
        few = torch.arange(min(arguments.vocabulary, model.vocab_size))
        maker = "cuda" if torch.cuda.is_available() else "cpu"  # two thousand million numbers take a CPU half a minute
        for name, (tied, token_map) in {"tied": (True, None), "part": (True, few), "untied": (False, None)}.items():
            if name not in arguments.kinds:
                continue
            shape = (1, 4, model.hidden_size)
            size = 4, model.vocab_size, model.hidden_size
            output = None if tied else torch.randn(size, dtype=torch.bfloat16, device=maker).cpu()
            blocks = torch.randn(*shape, model.hidden_size) * 0.02
            heads = MedusaHeads(blocks, torch.zeros(shape), output, token_map)
            save_heads(heads, Path(folder) / "medusa", torch.bfloat16, {})
            client = Client(
                EngineConfig(
                    Path(folder), load_format="dummy", device=arguments.device, max_model_len=CONTEXT, prefix_cache=False,
                    max_seqs=max(arguments.step_batches), max_tree_rows=max(arguments.nodes) * max(arguments.step_batches),
                )
            )  # fmt: skip
            trees = client.engine.trees
            assert trees is not None
            for batch in arguments.step_batches:
                medians = []
                for nodes in [1, *arguments.nodes]:
                    chosen: Tree | None = next((tree for tree in trees.trees if tree.size == nodes), None)
                    trees.pick = lambda *_, chosen=chosen: chosen  # type: ignore[method-assign,misc]
                    rng = np.random.default_rng(nodes)
                    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
                    prompts = rng.integers(0, model.vocab_size, (batch, arguments.prompt)).tolist()
                    client.run([EngineRequest(f"{nodes}-{i}", 0, 1, ids, params) for i, ids in enumerate(prompts)])
                    medians.append(float(np.median(np.diff(client.times[3:])) * 1e3))
                results[f"{name} {batch}"] = dict(zip([1, *arguments.nodes], medians, strict=True))
                print(f"| {name} | {batch} | " + " | ".join(f"{value:.3f}" for value in medians) + " |", flush=True)
            client.engine.stop(timeout=30)
            del client, trees, heads, output
            gc.collect()  # they refer to each other, and the next engine needs the memory
            torch.cuda.empty_cache()
    return results


def identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Outputs with and without drafts, half greedy, half at temperature 0.8. Each difference comes with the margin by which, in f32,
    the plain run's token beats the other one at the first place where they differ (noise included, in units of logit / temperature).
    """
    common: dict[str, Any] = {"device": arguments.device, "prefix_cache": False, "max_seqs": arguments.max_seqs}
    text, bos = read_tokens((arguments.text,), arguments.model), begin_id(arguments.model)
    requests = requests_of(text, bos, arguments.count, arguments.prompt, arguments.output, None, 7)
    outputs, notes = [], {}
    for options in ({"speculate": False}, {"heads": arguments.heads}):
        client = Client(EngineConfig(arguments.model, **common, **options))
        if arguments.force and client.engine.trees is not None:
            force_random_trees(client.engine.trees, client.config.max_tree_rows // arguments.max_seqs)
        got, seconds = client.run(requests)
        outputs.append(got)
        stats = client.engine.stats().speculation
        notes = {} if stats is None else {"steps": stats.steps, "tokens_per_drafted_step": stats.tokens_per_step}
        print(f"{options}: {sum(map(len, got)) / seconds:,.0f} tokens/s {notes}", flush=True)
        client.engine.stop(timeout=30)
        complaints = client.engine.check_idle()
        assert not complaints, complaints
        del client
    different = [i for i, (a, b) in enumerate(zip(*outputs, strict=True)) if a != b]
    margins = []
    if different:
        backbone = Backbone(arguments.model, torch.device("cpu"), torch.float32)
        margins = [margin(backbone, requests[i], outputs[0][i], outputs[1][i]) for i in different]
    print(f"{len(requests) - len(different)} of {len(requests)} outputs are the same; margins of the others: {margins}")
    return {"count": len(requests), "different": len(different), "margins": margins, **notes}


def force_random_trees(controller: TreeController, most_nodes: int) -> None:
    """In every step another tree, whatever it costs."""
    fitting = [tree for tree in controller.trees if tree.size <= most_nodes]
    rng = np.random.default_rng(1)
    controller.pick = lambda *_: fitting[rng.integers(len(fitting))]  # type: ignore[method-assign]


def margin(backbone: Backbone, request: EngineRequest, plain: list[int], drafted: list[int]) -> float:
    place = next(i for i, (a, b) in enumerate(zip(plain, drafted, strict=True)) if a != b)
    ids = torch.tensor([[*request.prompt_ids, *plain[:place]]])
    scores = backbone.decoder.logits(backbone.hidden(ids)[0, -1:])
    params = request.params
    if params.temperature > 0:
        key = (torch.tensor([params.seed]), torch.tensor([place]), torch.tensor([request.choice]))
        scores = scores / params.temperature + gumbel_noise(*key, scores.shape[1])
    return float(scores[0, plain[place]] - scores[0, drafted[place]])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("speed", "floor", "identity"):
        command = commands.add_parser(name)
        if name != "floor":
            command.add_argument("--model", type=Path, required=True)
            command.add_argument("--heads", type=Path, help="default: medusa in the model's folder")
            command.add_argument("--text", type=Path, required=True, help="that the model was not trained on")
        command.add_argument("--output", type=int, default=48 if name == "identity" else 256, help="tokens to generate")
        if name != "identity":
            command.add_argument("--batches", type=int, nargs="+", default=BATCHES)
            command.add_argument("--repeats", type=int, default=5, help="pairs of runs of a batch size, at least")
            command.add_argument("--seconds", type=float, default=10, help="of a batch size, at least")
            command.add_argument("--drafts-first", action="store_true", help="build the engine with heads first")
            command.add_argument("--warm-up", type=int, default=2000, help="tokens of each sequence, before")
            if name == "speed":
                command.add_argument("--temperatures", type=float, nargs="+", default=[0.0])
            else:
                command.add_argument("--chances", type=float, nargs="+", default=[0.05, 0.45, 0.6, 0.8])
        else:
            command.add_argument("--count", type=int, default=1000)
            command.add_argument("--max-seqs", type=int, default=32)
            command.add_argument("--force", action="store_true", help="a random tree in every step")
    command = commands.add_parser("steps")
    command.add_argument("--shape", choices=[*SHAPES], default="llama3.1-8b")
    command.add_argument("--nodes", type=int, nargs="+", default=[16, 32, 64])
    command.add_argument("--step-batches", type=int, nargs="+", default=[1, 8, 32])
    command.add_argument("--vocabulary", type=int, default=32_768, help="tokens that heads know which know a part")
    command.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS, help="of heads; part: tied, of --vocabulary"
    )
    for command in commands.choices.values():
        command.add_argument("--prompt", type=int, default=128 if command.prog.endswith("steps") else 64, help="tokens")
        command.add_argument("--device", default="auto")
        command.add_argument("--out", type=Path, default=Path("build/benchmarks"))
        command.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    results = {"speed": speeds, "floor": floor, "steps": steps, "identity": identity}[arguments.command](arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"speculation-{arguments.command}.json").write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
