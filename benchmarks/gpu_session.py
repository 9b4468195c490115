"""All GPU measurements in one call that may be cut off at any moment: correctness first, then the rows of docs/performance.md.

    python -m benchmarks.gpu_session --out DIR                    everything that is not done yet, in order, for 9 minutes
    python -m benchmarks.gpu_session --out DIR --part engine-8b   one part, again even if it is done
    python -m benchmarks.gpu_session --out DIR --table            only the table of what DIR holds
    python -m benchmarks.gpu_session --out DIR --tiny             the same parts in miniature on a CPU, to try the script itself

Each part is a process of its own with a time limit. `session.json` in the folder says what is done; a part that failed or was cut off
is tried again by the next call, and keeps what it had measured. When correctness fails, nothing is timed (--anyway does).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"06b": "qwen3-0.6b", "8b": "llama3.1-8b"}
BUDGET = 540.0  # seconds of a call
LEAST = 15.0  # a part is not begun with less than this


@dataclass(frozen=True)
class Part:
    """`limit`: seconds after which it is ended; `seconds`: what it usually takes. A part that is a `gate` must pass before timings."""

    name: str
    command: list[str]
    limit: float
    seconds: float
    gate: bool = False
    env: dict[str, str] = field(default_factory=dict)


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def parts(out: Path, tokenizer: Path) -> list[Part]:
    results = ("--out", str(out))
    demo = ("--model", str(ROOT / "models/demo"))

    def gpu_tests(file: str) -> list[str]:
        return module("pytest", "-q", "-m", "gpu", f"tests/gpu/{file}")

    def kernels(name: str, families: str) -> list[str]:
        return [sys.executable, "benchmarks/kernels.py", "--only", families, "--out", str(out / name)]

    found = [
        Part("kernels-correct", gpu_tests("test_kernels_gpu.py"), 150, 60, gate=True),
        Part("hopper-correct", gpu_tests("test_prefill_hopper_gpu.py"), 60, 30, gate=True),
        Part("engine-correct", gpu_tests("test_engine_gpu.py"), 200, 90, gate=True),
        Part("invariant-correct", gpu_tests("test_batch_invariant_gpu.py"), 120, 40, gate=True),
        Part("identity-f32", module("benchmarks.identity", *demo, *results), 120, 40, gate=True),
    ]
    for short, shape in SHAPES.items():
        small = short == "06b"
        engine = module("benchmarks.engine", "--resume", "--shape", shape, "--row-limit", "45", *results)
        serving = module("benchmarks.serving", "--resume", "--shape", shape, "--tokenizer", str(tokenizer), *results)
        found.append(Part(f"engine-{short}", engine, 240, 60 if small else 120))
        found.append(Part(f"pipeline-{short}", serving, 300, 100 if small else 150))
    timeline = (
        "--shape",
        SHAPES["06b"],
        "--rows",
        "ttft 2048",
        "--profile",
        "1",
        "256",
        "--out",
        str(out / "timeline"),
    )
    found += [
        Part("attention", kernels("attention", "prefill,hopper,decode"), 180, 90),
        Part("identity-bf16", module("benchmarks.identity", *demo, "--dtype", "bfloat16", *results), 120, 40),
        Part("timeline", module("benchmarks.engine", *timeline), 120, 40),
        Part("tree-steps", module("benchmarks.speculation", "steps", *results), 240, 120),
        Part("elementwise", kernels("elementwise", "elementwise,sampling"), 120, 60),
        Part("gemm", kernels("gemm", "gemm"), 300, 200),
    ]
    return found


def tiny_parts(out: Path, tokenizer: Path) -> list[Part]:
    results = ("--out", str(out))
    identity = ("--model", str(ROOT / "models/demo"), "--device", "cpu", "--output", "8", "--only", "prefix cache")
    rows = ("--resume", "--shape", "tiny", "--rows", "ttft 2048,batch 8")
    worker = [f"--worker-flag={flag}" for flag in ("--device", "cpu", "--threads", "1", "--max-seqs", "16")]
    serving = ("--repeats", "1", "--tokenizer", str(tokenizer), *worker)
    on_cpu = {"OMP_NUM_THREADS": "1"}
    return [
        Part("kernels-correct", module("pytest", "-q", "tests/unit/test_block_pool.py"), 60, 5, gate=True),
        Part("identity-f32", module("benchmarks.identity", *identity, *results), 60, 10, True, on_cpu),
        Part("engine-tiny", module("benchmarks.engine", *rows, "--device", "cpu", *results), 60, 20, env=on_cpu),
        Part("pipeline-tiny", module("benchmarks.serving", *rows, *serving, *results), 120, 30, env=on_cpu),
    ]


class Session:
    """What is done, in `session.json`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._path = out / "session.json"
        out.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def passed(self, name: str) -> bool:
        return self.done.get(name, {}).get("status") == 0

    def run(self, part: Part, limit: float) -> bool:
        """True if it came to its end with exit status 0. Its output goes to a file, the end of it to the terminal if it fails."""
        log = self.out / f"{part.name}.log"
        print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
        began = time.monotonic()
        with log.open("w") as file:
            # A group of its own: what it has started must not outlive it.
            process = subprocess.Popen(
                part.command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | part.env,
                process_group=0,
            )
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
                _end(process)
        seconds = round(time.monotonic() - began, 1)
        self.done[part.name] = {"status": status, "seconds": seconds}
        self._path.write_text(json.dumps(self.done, indent=1) + "\n")
        word = "cut off" if status is None else "passed" if status == 0 else f"failed ({status})"
        print(f"   {word} after {seconds} s", flush=True)
        if status != 0:
            print(*log.read_text(errors="replace").splitlines()[-25:], sep="\n", flush=True)
        return status == 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """First asked, so that what stages it has started stop in order."""
    for sig, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, sig)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def choose(available: list[Part], session: Session, named: list[str]) -> list[Part]:
    """What is named, or else what is not done. Raises KeyError for a part that does not exist."""
    by_name = {part.name: part for part in available}
    return [by_name[name] for name in named] if named else [p for p in available if not session.passed(p.name)]


def run(available: list[Part], session: Session, named: list[str], budget: float, anyway: bool) -> bool:
    """False if something failed, or was not done for want of time."""
    ends = time.monotonic() + budget
    good = True
    for part in choose(available, session, named):
        left = ends - time.monotonic()
        if left < LEAST:
            print(f"== {part.name}: no time left")
            good = False
            continue
        closed = [p.name for p in available if p.gate and not session.passed(p.name)]
        if closed and not part.gate and not named and not anyway:
            print(f"== {part.name}: not begun, {', '.join(closed)} did not pass")
            good = False
            continue
        if left < part.seconds:
            print(f"   ({part.name} usually takes {part.seconds:.0f} s, {left:.0f} s are left: it may be cut off)")
        good &= session.run(part, min(part.limit, left))
    return good


def table(out: Path) -> str:
    """The rows of docs/performance.md as far as they are measured."""
    lines = ["| shape | workload | engine | pipeline | share | at least | aim |", "|---|---|---|---|---|---|---|"]
    from benchmarks.workloads import WORKLOADS

    for shape in (*SHAPES.values(), "tiny"):
        engine, pipeline = (_workloads(out / f"{kind}-{shape}.json") for kind in ("engine", "serving"))
        for workload in WORKLOADS:
            alone, whole = (rows.get(workload.name, {}).get("figure") for rows in (engine, pipeline))
            if alone is None and whole is None:
                continue
            digits = 2 if workload.figure == "ms" else 0
            shown = [f"{value:,.{digits}f}" if value is not None else "–" for value in (alone, whole)]
            if alone is None or whole is None:
                share = "–"
            else:
                share = f"{whole - alone:+.2f} ms" if workload.figure == "ms" else f"{whole / alone:.3f}"
            goals = (workload.at_least, workload.aim)
            targets = [f"{goal[shape]:,.{1 if digits else 0}f}" if shape in goal else "" for goal in goals]
            cut = "" if engine.get(workload.name, {}).get("complete", True) else " (cut off)"
            cells = [shape, f"{workload.name}, {workload.figure}", shown[0] + cut, shown[1], share, *targets]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _workloads(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["workloads"] if path.is_file() else {}
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu_session", help="results; kept from call to call")
    parser.add_argument("--part", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=ROOT.parent / "shared/data/tokenizers/qwen2",
        help="folder, of a large vocabulary",
    )
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of this call")
    parser.add_argument("--anyway", action="store_true", help="time even what is not correct")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()  # fmt: skip
    out: Path = args.out.resolve()
    available = tiny_parts(out, ROOT / "models/demo") if args.tiny else parts(out, args.tokenizer.resolve())
    session = Session(out)
    if args.list:
        for part in available:
            print(f"{part.name:18} {part.seconds:4.0f} s  {'done' if session.passed(part.name) else ''}")
        return 0
    good = True
    if not args.table:
        try:
            good = run(available, session, args.part, args.budget, args.anyway)
        except KeyError as unknown:
            parser.error(f"there is no part {unknown}; --list shows them")
    print(table(out))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
