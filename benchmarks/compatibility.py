"""Other people's tools against the OpenAI door, unchanged: lm-eval (likelihoods by echoed log-probabilities, and generation) and
guidellm (streams under load). Starts the demo model with a gateway, runs them, and fails if one of them does.

    python -m venv eval  && eval/bin/pip install "lm-eval[api]" transformers
    python -m venv guide && guide/bin/pip install guidellm
    python benchmarks/compatibility.py --lm-eval eval/bin/lm-eval --guidellm guide/bin/guidellm

Nothing is downloaded while they run: the task is benchmarks/lm_eval/, the tokenizer the model's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.running import running  # noqa: E402
from services.supervisor import GATEWAY, STAGES, Plan  # noqa: E402
from shared.broker import free_port  # noqa: E402

MODEL = "demo"
TASKS = {
    "gorgon_tiny": "acc,none",
    "gorgon_tiny_words": "bits_per_byte,none",
    "gorgon_tiny_generate": "exact_match,none",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OPENAI_API_KEY": "none"}


async def run(command: list[str], folder: Path, env: dict[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=os.environ | OFFLINE | env)
    if await process.wait():
        raise SystemExit(f"{command[0]} failed")


async def lm_eval(command: Path, url: str, model_path: Path, out: Path) -> None:
    arguments = dict(
        model=MODEL,
        base_url=f"{url}/v1/completions",
        num_concurrent=4,
        tokenizer_backend="huggingface",
        tokenizer=model_path,
        max_length=1024,
    )
    options = ["run", "--model", "local-completions", "--tasks", ",".join(TASKS), "--include_path", "."]
    options += ["--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()), "--output_path", str(out)]
    await run([str(command), *options], ROOT / "benchmarks/lm_eval", {"HF_DATASETS_CACHE": str(out / "cache")})
    (results,) = out.rglob("results_*.json")  # noqa: ASYNC240
    scores = json.loads(results.read_text())["results"]
    for task, metric in TASKS.items():
        print(f"lm-eval {task}: {metric} = {scores[task][metric]}")


async def guidellm(command: Path, url: str, model_path: Path, out: Path) -> None:
    for profile in ("kind=synchronous", "kind=concurrent,streams=4"):
        report = out / f"{profile.split('=')[1].split(',')[0]}.json"
        options = ["run", "--backend", f"kind=openai_http,target={url},model={MODEL}", "--profile", profile]
        options += ["--tokenizer", f"kind=huggingface_auto,model={model_path}", "--disable-console-interactive"]
        options += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"]
        options += ["--constraint", "kind=max_requests,count=12", "--output", f"kind=json,path={report}"]
        await run([str(command), *options], out, {})
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        totals = benchmark["metrics"]["request_totals"]
        print(f"guidellm {profile}: {totals}")
        if totals["successful"] != 12 or totals["errored"]:
            raise SystemExit("guidellm saw errors")


async def main(args: argparse.Namespace) -> None:
    model_path = args.model_path.resolve()
    with tempfile.TemporaryDirectory(prefix="gorgon-compat-") as name:
        folder = Path(name)
        copies = dict.fromkeys(STAGES, 1) | {GATEWAY: 1}
        plan = Plan(folder / "data", MODEL, model_path, free_port(), copies, http_port=free_port())
        plan.flags["model_worker"] = ["--device", "cpu", "--threads", "1"]
        async with running(plan):
            await asyncio.sleep(1.5)  # the gateway hears who is there
            url = f"http://127.0.0.1:{plan.http_port}"
            for tool, check in ((args.lm_eval, lm_eval), (args.guidellm, guidellm)):
                if tool is not None:
                    out = folder / check.__name__
                    out.mkdir()
                    await check(tool.absolute(), url, model_path, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path)
    parser.add_argument("--guidellm", type=Path)
    parser.add_argument("--model-path", type=Path, default=ROOT / "models/demo")
    asyncio.run(main(parser.parse_args()))
