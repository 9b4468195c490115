"""The workloads of benchmarks/engine.py through the whole pipeline: NATS and all four stages as processes, clients as processes too.

    python -m benchmarks.serving --shape qwen3-0.6b --tokenizer DIR --out results/

Prompts are token ids, weights are random, so that the table can be laid beside that of the engine alone. `--tokenizer` names a folder
with a tokenizer.json whose vocabulary is at least the shape's. Seconds run from the first request's publication to the last event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import load
from benchmarks.workloads import CONTEXT, SHAPES, WORKLOADS, Workload, earlier_rows
from services.running import running
from services.supervisor import STAGES, Plan, Supervisor
from shared.broker import free_port

MODEL = "bench"


async def measure(
    url: str, workload: Workload, vocabulary: int, seed: int, clients: int, output: int | None = None
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    prompts, outputs = [], []
    for _ in range(workload.count):
        length = int(rng.integers(workload.prompt[0], workload.prompt[1] + 1))
        outputs.append(output or int(rng.integers(workload.output[0], workload.output[1] + 1)))
        prompts.append(rng.integers(0, vocabulary, length, dtype=np.int32).tolist())
    run = uuid.uuid4().hex[:8]
    count = min(clients, workload.count)
    loads = [
        (load.generate, (url, MODEL, prompts[c::count], outputs[c::count], workload.temperature, f"{run}-{c}"))
        for c in range(count)
    ]
    parts = await asyncio.to_thread(load.run_together, loads)
    seconds = max(p["ended"] for p in parts) - min(p["began"] for p in parts)
    tokens = sum(p["tokens"] for p in parts)
    firsts = [t for p in parts for t in p["first"]]
    assert tokens == sum(outputs), f"{tokens} tokens of {sum(outputs)}"
    figure = {
        "output tok/s": tokens / seconds,
        "input tok/s": sum(map(len, prompts)) / seconds,
        "ms": min(firsts) * 1e3,
    }[workload.figure]
    return dict(figure=figure, seconds=seconds, tokens=tokens, first_token_ms_mean=statistics.mean(firsts) * 1e3)


async def measure_first_token(
    url: str, workload: Workload, vocabulary: int, seed: int, repeats: int, pause: float
) -> dict[str, Any]:
    """Requests of one client, one after the other, as the engine alone is measured. With a pause between them, the device has gone to
    rest, and a client that comes by now and then waits until its clocks are up again: that time is the device's, not the pipeline's.
    """
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, vocabulary, workload.prompt[0], dtype=np.int32).tolist() for _ in range(repeats)]
    run = (url, MODEL, prompts, workload.output[0], uuid.uuid4().hex[:8], pause)
    began = time.monotonic()
    (seconds,) = await asyncio.to_thread(load.run_together, [(load.in_turn, run)])
    figures = [1e3 * s for s in seconds]
    return dict(
        figure=statistics.median(figures),
        seconds=time.monotonic() - began,
        tokens=repeats * workload.output[0],
        first_token_ms_mean=statistics.mean(figures),
        figures=figures,
    )


def cpu_seconds(supervisor: Supervisor) -> dict[str, float]:
    """CPU seconds used so far, by process; 0 for one that is gone."""
    import psutil

    used = {}
    for child in supervisor.children():
        if child.pid is not None:
            times = psutil.Process(child.pid).cpu_times()
            used[child.name] = times.user + times.system
    return used


def random_model(folder: Path, shape: str, tokenizer: Path) -> tuple[Path, list[str]]:
    """A folder that serves as a model of this shape, and the flags of a worker that gives it random weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[shape]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder, ["--load-format", "dummy", "--max-model-len", str(CONTEXT), "--prefix-cache", "false"]


async def run_shape(shape: str, args: argparse.Namespace) -> None:
    config = SHAPES[shape]
    done = earlier_rows(args.out / f"serving-{shape}.json") if args.resume else {}
    results: dict[str, Any] = {"shape": shape, "workloads": done}
    workloads = [w for w in WORKLOADS if w.name not in done and (not args.rows or w.name in args.rows)]
    if not workloads:
        print(f"{shape}: every row is measured")
        return
    with tempfile.TemporaryDirectory(prefix="gorgon-serving-") as folder:
        model, worker = random_model(Path(folder) / "model", shape, args.tokenizer)
        worker += args.worker_flag
        copies = {stage: 1 if stage == "model_worker" else args.copies for stage in STAGES}
        plan = Plan(Path(folder), MODEL, model, free_port(), copies, {"model_worker": worker})
        began = time.perf_counter()
        async with running(plan, 120) as (supervisor, _):
            results["ready_seconds"] = time.perf_counter() - began
            print(f"{shape}: every stage is ready after {results['ready_seconds']:.1f} s", flush=True)
            await asyncio.sleep(1.0)
            print(
                "| shape | workload | figure | through the pipeline | runs | mean ms to first token |\n|---|---|---|---|---|---|"
            )
            for workload in workloads:
                await measure(
                    plan.nats_url, workload, config["vocab_size"], 99, args.clients, min(4, workload.output[1])
                )
                before = cpu_seconds(supervisor)
                if workload.figure == "ms":
                    runs = [
                        await measure_first_token(plan.nats_url, workload, config["vocab_size"], n, 20, 0.0)
                        for n in range(args.repeats)
                    ]
                    rested = await measure_first_token(plan.nats_url, workload, config["vocab_size"], 77, 5, 1.0)
                    results["first_token_ms_after_a_second_of_rest"] = rested["figures"]
                    print(f"after a second of rest, ms: {[round(ms, 2) for ms in rested['figures']]}", flush=True)
                else:
                    runs = [
                        await measure(plan.nats_url, workload, config["vocab_size"], n, args.clients)
                        for n in range(args.repeats)
                    ]
                seconds = sum(run["seconds"] for run in runs)
                share = {
                    name: round((cpu - before[name]) / seconds, 2) for name, cpu in cpu_seconds(supervisor).items()
                }
                runs.sort(key=lambda run: run["figure"])
                middle = runs[len(runs) // 2]
                results["workloads"][workload.name] = middle | {
                    "runs": [run["figure"] for run in runs],
                    "cpu_share": share,
                }
                digits = 2 if workload.figure == "ms" else 0
                spread = " … ".join(f"{runs[i]['figure']:,.{digits}f}" for i in (0, -1))
                row = f"| {shape} | {workload.name} | {workload.figure} | {middle['figure']:,.{digits}f} | {spread} "
                print(row + f"| {middle['first_token_ms_mean']:.1f} |  cpu {share}", flush=True)
                args.out.mkdir(parents=True, exist_ok=True)
                (args.out / f"serving-{shape}.json").write_text(json.dumps(results, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=[*SHAPES])
    parser.add_argument("--rows", type=lambda text: [name.strip() for name in text.split(",")], default=[])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=4, help="client processes")
    parser.add_argument("--copies", type=int, default=1, help="of tokenizer, scheduler and detokenizer")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has already")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker-flag", action="append", default=[], help="handed to the model worker")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    for shape in args.shape or ["qwen3-0.6b"]:
        asyncio.run(run_shape(shape, args))


if __name__ == "__main__":
    main()
