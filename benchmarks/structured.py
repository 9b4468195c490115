"""Structured output of the demo model: do its documents keep to their schemas, and what does a mask cost?

    python benchmarks/structured.py                      500 schemas at temperature 1; every finished document is validated
    ... --schemas 60 --max-tokens 200 --seed 3           fewer, shorter, others
    ... --speed                                          time per token at batch 32 with masks and without
    ... --masks TOKENIZER --eos ID                       a batch's masks alone, for any tokenizer.json

The engine runs on the CPU with one thread, in f32. A document that comes to --max-tokens is unfinished and not judged; their share is
told. Exit status 1 if a finished document does not parse or validate.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from jsonschema import Draft202012Validator  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from benchmarks.structured_libraries import instance  # noqa: E402
from services.model_worker.engine import EngineConfig, EngineRequest, FinishReason  # noqa: E402
from shared.sampling import SamplingParams  # noqa: E402
from shared.structured import Matcher, Vocabulary, json_constraint  # noqa: E402
from tests.structured_schemas import HARD, bfcl_schemas  # noqa: E402
from tests.unit.engine_harness import Harness  # noqa: E402

DEMO = ROOT / "models/demo"
PROMPT = "The clerk filled in the form, and wrote:\n"


def started(**options: Any) -> Harness:
    torch.set_num_threads(1)
    harness = Harness(EngineConfig(DEMO, device="cpu", dtype="float32", **options))
    harness.engine.load()
    harness.engine.start()
    return harness


def request(name: str, prompt: list[int], constraint: str, **params: Any) -> EngineRequest:
    return EngineRequest(name, 0, 1, prompt, SamplingParams(**params), constraint=constraint)


def complaint(text: str, schema: dict[str, Any]) -> str:
    try:
        document = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    error = next(Draft202012Validator(schema).iter_errors(document), None)
    return "" if error is None else error.message


def validity(first: int, count: int, max_tokens: int, seed: int) -> int:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    schemas = list(HARD.items())
    schemas += [(f"BFCL {index}", schema) for index, schema in enumerate(bfcl_schemas())]
    schemas = schemas[first : first + count]
    prompt = tokenizer.encode(PROMPT).ids
    harness = started(max_seqs=32, max_waiting=len(schemas), speculate=False)
    start = time.perf_counter()
    outputs = {}
    for index, (name, schema) in enumerate(schemas):
        params = dict(max_tokens=max_tokens, temperature=1.0, seed=seed + first + index)
        outputs[name] = harness.submit(request(name, prompt, json_constraint(schema), **params))
    harness.wait_for(lambda: all(o.finish or o.error for o in outputs.values()), timeout=3600)
    seconds = time.perf_counter() - start
    harness.settle()
    outcomes: Counter[str] = Counter()
    unfinished = []
    for name, schema in schemas:
        output = outputs[name]
        if output.error is not None:
            outcomes["failed"] += 1
            print(f"{name}: {output.error.code}: {output.error.message}")
        elif output.finish is FinishReason.LENGTH:
            outcomes["unfinished"] += 1
            unfinished.append(name)
        else:
            text = tokenizer.decode(output.ids, skip_special_tokens=True)
            problem = complaint(text, schema)
            outcomes["invalid" if problem else "valid"] += 1
            if problem:
                print(f"{name}: {problem}: {text[:200]!r}")
    tokens = sum(len(output.ids) for output in outputs.values())
    print(f"{len(schemas)} schemas, {tokens} tokens, {seconds:.0f} s: {dict(outcomes)}")
    print(
        f"unfinished after {max_tokens} tokens: {len(unfinished) / len(schemas):.1%}",
        [n for n in unfinished if n in HARD],
    )
    return 1 if outcomes["invalid"] or outcomes["failed"] else 0


def speed(rounds: int) -> None:
    """Sequences of equal length, with and without a constraint that never ends, in turns."""
    tokens, batch = 96, 32
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    schema = {"type": "array", "items": HARD["order"], "minItems": 100}
    harness = started(max_seqs=batch)
    times: dict[str, list[float]] = {"without": [], "with": []}
    work: dict[str, list[float]] = {"without": [], "with": []}  # of the CPU, which a busy machine changes less
    for number in range(2 * rounds + 2):
        kind = ("without", "with")[number % 2]
        constraint = json_constraint(schema) if kind == "with" else ""
        params = dict(max_tokens=tokens, temperature=1.0, ignore_eos=not constraint)
        first = len(harness.steps)
        marks: list[tuple[float, float]] = []
        outputs = [harness.submit(request(f"{number}-{i}", prompt, constraint, seed=i, **params)) for i in range(batch)]
        harness.wait_for(lambda n=first + 8: len(harness.steps) >= n)
        marks.append((time.perf_counter(), time.process_time()))
        begun = len(harness.steps)
        harness.wait(outputs)
        marks.append((time.perf_counter(), time.process_time()))
        if number >= 2:
            steps = len(harness.steps) - begun
            times[kind].append((marks[1][0] - marks[0][0]) / steps * 1e3)
            work[kind].append((marks[1][1] - marks[0][1]) / steps * 1e3)
        assert all(len(output.ids) == tokens for output in outputs), "a document ended early"
    harness.settle()
    for name, table in (("wall clock", times), ("CPU", work)):
        without, with_ = table["without"], table["with"]
        print(f"{name}, ms a step of {batch}: without {median(without):.2f}, with masks {median(with_):.2f}; "
              f"ratio {median(with_) / median(without):.3f}, of minima {min(with_) / min(without):.3f}")  # fmt: skip


def masks(path: Path, eos: int, batch: int) -> None:
    """What a step's masks take on the host: all masks at once, then advancing the matchers; over documents of BFCL's schemas."""
    import numpy as np
    from llguidance import LLExecutor

    tokenizer = Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    vocabulary = Vocabulary(path.read_text(), size, [eos])
    schemas = bfcl_schemas(4 * batch)
    texts = [json.dumps(instance(schema), ensure_ascii=False) for schema in schemas]
    documents = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    table = np.zeros((batch, -(-size // 32)), dtype=np.int32)
    executor = LLExecutor(1)
    fills, advances = [], []
    turn = 0
    running: list[tuple[Matcher, list[int]]] = []
    while turn < len(schemas) or len(running) == batch:
        while turn < len(schemas) and len(running) < batch:
            running.append((vocabulary.compile(json_constraint(schemas[turn])), documents[turn][::-1]))
            turn += 1
        start = time.process_time()
        executor.unsafe_compute_mask_ptr(
            [(matcher.raw, row) for row, (matcher, _) in enumerate(running)],
            table.ctypes.data,
            table.shape[1] * 4,
            batch,
        )
        fills.append((time.process_time() - start) * 1e3)
        start = time.process_time()
        for matcher, left in running:
            assert matcher.advance((left.pop(),)), matcher.error
        advances.append((time.process_time() - start) * 1e3)
        running = [(matcher, left) for matcher, left in running if left]
    for name, values in (("masks", fills), ("advance", advances)):
        p99 = sorted(values)[int(len(values) * 0.99)]
        print(f"{name:8} of {batch} at {size} tokens, one thread: p50 {median(values):.3f} ms, p99 {p99:.3f} ms of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="schemas to leave out before")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masks", type=Path)
    parser.add_argument("--eos", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.masks is not None:
        masks(arguments.masks, arguments.eos, arguments.batch)
    elif arguments.speed:
        speed(arguments.rounds)
    else:
        sys.exit(validity(arguments.first, arguments.schemas, arguments.max_tokens, arguments.seed))


if __name__ == "__main__":
    main()
