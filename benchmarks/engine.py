"""The engine alone, token ids in and out, on the workloads of docs/performance.md, with random weights of a model's shape.

    python -m benchmarks.engine --shape qwen3-0.6b --out results/
    python -m benchmarks.engine --shape llama3.1-8b --rows "batch 1,ttft 2048" --profile

Prints a table row as soon as it is measured and writes `engine-<shape>.json` after each, so that a run cut short leaves what it had.
The host's share is the part of the time in which the engine's thread does not wait for the device, so that it may hold the
interpreter's lock (which is free while it waits): what is left is all that other threads of the process can have.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_profile import profile_steps
from benchmarks.workloads import CONTEXT, SHAPES, WORKLOADS, Workload, earlier_rows
from services.model_worker.engine import Engine, EngineConfig, EngineRequest, StepOutput
from services.model_worker.readback import StepResult, Ticket
from shared.sampling import SamplingParams


class Waits:
    """Seconds for which engines' threads have waited for the device, once `note` was called. Of the process: it keeps no engine."""

    seconds = 0.0

    @classmethod
    def note(cls) -> None:
        result = Ticket.result

        def noted(ticket: Ticket) -> StepResult:
            event = ticket._event
            if event is not None:
                began = time.perf_counter()
                event.synchronize()
                cls.seconds += time.perf_counter() - began
            return result(ticket)

        Ticket.result = noted  # type: ignore[method-assign]


class Client:
    """Submits a batch of sequences and times what comes back; `on_step` runs on the engine's thread."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config, self._on_step, self._on_fatal)
        self.step_times: list[float] = []
        self.first_token: list[float] = []
        self.tokens = 0
        self._open = 0
        self._runs = 0
        self._done = threading.Event()
        self._error: BaseException | None = None

    def _on_step(self, output: StepOutput) -> None:
        now = time.perf_counter()
        self.step_times.append(now)
        for token in output.outputs:
            self.tokens += len(token.ids)
            if token.position == 0:
                self.first_token.append(now)
            self._open -= token.finish is not None
        if self._open == 0:
            self._done.set()

    def _on_fatal(self, error: BaseException, suspects: list[tuple[str, int]]) -> None:
        traceback.print_exception(error)
        self._error = error
        self._done.set()

    def begin(self, workload: Workload, rng: np.random.Generator, output: int | None = None) -> list[EngineRequest]:
        """Submits the workload's sequences at once, each with `output` tokens to generate if given."""
        self._runs += 1
        vocabulary = self.engine.info.vocab_size
        requests = []
        for index in range(workload.count):
            length = int(rng.integers(workload.prompt[0], workload.prompt[1] + 1))
            tokens = output or int(rng.integers(workload.output[0], workload.output[1] + 1))
            params = SamplingParams(max_tokens=tokens, temperature=workload.temperature, seed=index, ignore_eos=True)
            prompt = rng.integers(0, vocabulary, length, dtype=np.int32).tolist()
            requests.append(EngineRequest(f"{self._runs}-{index}", 0, 1, prompt, params))
        self.step_times, self.first_token, self.tokens = [], [], 0
        self._open = workload.count
        self._done.clear()
        self.engine.submit(*requests)
        return requests

    def wait(self, timeout: float) -> bool:
        """True when all have ended; after the time limit they are aborted and it is False. Raises what killed the engine."""
        ended = self._done.wait(timeout)
        if self._error is not None:
            raise RuntimeError("the engine has died") from self._error
        return ended

    def abort(self, requests: list[EngineRequest]) -> None:
        for request in requests:
            self.engine.abort(request.request_id, request.epoch)
        if not self.wait(60.0):
            raise RuntimeError("aborted sequences did not end")


def measure(client: Client, workload: Workload, seed: int, limit: float) -> dict[str, Any]:
    """One timed run. A run over the time limit gives the rate up to there, and says so."""
    start, waited = time.perf_counter(), Waits.seconds
    requests = client.begin(workload, np.random.default_rng(seed))
    complete = client.wait(limit)
    elapsed = (client.step_times[-1] if client.step_times else time.perf_counter()) - start
    tokens, first, steps = client.tokens, list(client.first_token), np.diff(client.step_times) * 1e3
    if not complete:
        client.abort(requests)
    prompt_tokens = sum(len(request.prompt_ids) for request in requests)
    figure = {
        "output tok/s": tokens / elapsed,
        "input tok/s": prompt_tokens / elapsed,
        "ms": (first[0] - start) * 1e3 if first else float("nan"),
    }[workload.figure]
    result = {
        "figure": figure,
        "complete": complete,
        "seconds": elapsed,
        "output_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "host_share": 1 - (Waits.seconds - waited) / elapsed,
    }
    if len(steps):
        result |= {f"step_ms_p{p}": float(np.percentile(steps, p)) for p in (50, 90, 99, 100)}
    if first:
        result |= {"first_token_ms_mean": (statistics.mean(first) - start) * 1e3}
    return result


def run_workload(client: Client, workload: Workload, repeats: int, limit: float) -> dict[str, Any]:
    """Warms up with a few tokens a sequence (kernels are compiled for shapes as they come), then the median of the runs."""
    deadline = time.perf_counter() + limit
    warm_up = client.begin(workload, np.random.default_rng(99), min(4, workload.output[1]))
    if not client.wait(limit):
        client.abort(warm_up)
    runs = []
    for repeat in range(repeats if workload.count > 1 else max(repeats, 5 if workload.output[1] == 1 else repeats)):
        left = deadline - time.perf_counter()
        if runs and left < runs[-1]["seconds"]:
            break
        runs.append(measure(client, workload, repeat, max(left, 1.0)))
    runs.sort(key=lambda run: run["figure"])
    result = {**runs[len(runs) // 2], "runs": [run["figure"] for run in runs]}
    if workload.figure == "ms":
        result["after_rest_ms"] = {rest: after_rest(client, workload, rest) for rest in RESTS}
    return result


RESTS = (0.0, 0.002, 0.005, 0.02, 0.2)  # seconds


def after_rest(client: Client, workload: Workload, rest: float) -> float:
    """The figure where the engine has nothing to do for so long before each request, as between requests that come through a pipeline:
    threads and the device have to be woken, and caches are somebody else's."""
    figures = []
    for repeat in range(9):
        time.sleep(rest)
        figures.append(measure(client, workload, 100 + repeat, 10.0)["figure"])
    return round(statistics.median(figures), 3)


def table_row(shape: str, workload: Workload, result: dict[str, Any]) -> str:
    def target(values: dict[str, float]) -> str:
        return f"{values[shape]:,.0f}" if shape in values else ""

    digits = 2 if workload.figure == "ms" else 0
    spread = " … ".join(f"{result['runs'][index]:,.{digits}f}" for index in (0, -1))
    note = "" if result["complete"] else " (cut off)"
    return (
        f"| {shape} | {workload.name} | {workload.figure} | {result['figure']:,.{digits}f}{note} | {spread} "
        f"| {target(workload.at_least)} | {target(workload.aim)} | {result.get('step_ms_p50', float('nan')):.2f} "
        f"| {result.get('step_ms_p99', float('nan')):.2f} | {result.get('first_token_ms_mean', float('nan')):.1f} "
        f"| {result['host_share']:.2f} |"
        + (f" after a rest of so many s: {result['after_rest_ms']}" if "after_rest_ms" in result else "")
    )


HEADER = (
    "| shape | workload | figure | median | runs | at least | aim | step ms p50 | p99 | mean ms to first token | host's share |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def profile(client: Client, batch: int, out: Path, name: str) -> str:
    """A profile of decode steps with `batch` sequences, after they have got going."""
    workload = Workload("profile", batch, (128, 128), (4096, 4096))
    requests = client.begin(workload, np.random.default_rng(5))

    def steps(count: int) -> None:
        goal = len(client.step_times) + count
        deadline = time.perf_counter() + 60
        while len(client.step_times) < goal and client._error is None and time.perf_counter() < deadline:
            time.sleep(0.002)

    steps(40)
    text = profile_steps(lambda: steps(50), client.step_times, out / f"trace-{name}-batch{batch}.json.gz")
    client.abort(requests)
    return f"### {name}, {batch} sequences decode\n{text}"


def run_shape(shape: str, arguments: argparse.Namespace) -> bool:
    config = SHAPES[shape]
    results: dict[str, Any] = {
        "shape": shape,
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "workloads": {},
    }
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    done = earlier_rows(out / f"engine-{shape}.json") if arguments.resume else {}
    results["workloads"] |= done
    rows = [w for w in WORKLOADS if w.name not in done and (not arguments.rows or w.name in arguments.rows)]
    if not rows and not arguments.profile:
        print(f"{shape}: every row is measured")
        return True
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        client = Client(
            EngineConfig(
                Path(folder), load_format="dummy", device=arguments.device, max_model_len=CONTEXT, max_seqs=256,
                max_batched_tokens=arguments.max_batched_tokens, block_size=arguments.block_size, prefix_cache=False,
                cuda_graphs=not arguments.no_graphs, overlap=False if arguments.no_overlap else None,
                batch_invariant=arguments.batch_invariant, whole_prompts=not arguments.no_whole_prompts,
            )
        )  # fmt: skip
        start = time.perf_counter()
        client.engine.load(
            lambda part, what: print(f"{time.perf_counter() - start:6.1f} s  {part:4.0%} {what}", file=sys.stderr)
        )
    results |= {"load_seconds": time.perf_counter() - start, "model": asdict(client.engine.info) | {"eos_ids": None}}
    print(f"{shape}: loaded in {results['load_seconds']:.1f} s, {client.engine.info}", flush=True)
    client.engine.start()
    failed = False
    print(HEADER)
    for workload in rows:
        try:
            result = run_workload(client, workload, arguments.repeats, arguments.row_limit)
        except Exception:
            traceback.print_exc()
            failed = True
            break
        results["workloads"][workload.name] = result
        print(table_row(shape, workload, result), flush=True)
        (out / f"engine-{shape}.json").write_text(json.dumps(results, indent=1))
    if arguments.profile and not failed:
        for batch in arguments.profile:
            text = profile(client, batch, out, shape)
            print(text, flush=True)
            (out / f"profile-{shape}-batch{batch}.md").write_text(text)
    client.engine.stop(timeout=30)
    complaints = [] if failed else client.engine.check_idle()
    for complaint in complaints:
        print(f"not idle: {complaint}")
    return not failed and not complaints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[*SHAPES], help="may be repeated; default: both large ones")
    parser.add_argument(
        "--rows", type=lambda text: [row.strip() for row in text.split(",")], help="names, with commas between"
    )
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--resume", action="store_true", help="keep the complete rows that --out has already")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--row-limit", type=float, default=60.0, help="seconds for a row, warm-up included")
    parser.add_argument(
        "--profile", type=int, nargs="*", metavar="BATCH", help="then profile decode steps; default: 1 and 256"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-batched-tokens", type=int, default=8192)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument(
        "--no-whole-prompts", action="store_true", help="steps of few prompts in pieces, as longer ones"
    )
    parser.add_argument(
        "--batch-invariant", action="store_true", help="what the mode costs; give it an --out of its own"
    )
    arguments = parser.parse_args()
    if arguments.profile == []:
        arguments.profile = [1, 256]
    Waits.note()
    shapes = arguments.shape or ["qwen3-0.6b", "llama3.1-8b"]
    good = True
    for shape in shapes:
        good &= run_shape(shape, arguments)
        gc.collect()  # the client and its engine refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
