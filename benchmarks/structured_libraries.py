"""llguidance and xgrammar side by side, by which the library of structured output was chosen: what compiles, how long it takes, how
long a mask takes, and whether other threads run meanwhile.

    python benchmarks/structured_libraries.py --tokenizer models/demo/tokenizer.json --eos 1 [--only llguidance] [--schemas 300]

xgrammar is not among the project's dependencies: `pip install xgrammar` beforehand. One thread each. Documents are instances of the
schemas, written as JSON, tokenised, and fed token by token.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from services.bench.measure import percentile  # noqa: E402
from tests.structured_schemas import HARD, REFUSED, bfcl_schemas  # noqa: E402


class LLGuidance:
    name = "llguidance"

    def __init__(self, path: Path, tokenizer: Tokenizer, vocab: int, eos: int) -> None:
        from llguidance import LLTokenizer

        self._tokenizer = LLTokenizer(path.read_text(), n_vocab=vocab, eos_token=[eos])

    def compile(self, schema: dict[str, Any]) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(schema))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def matcher(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def rollback(self, matcher: Any, tokens: int) -> None:
        assert matcher.rollback(tokens)


class XGrammar:
    name = "xgrammar"

    def __init__(self, path: Path, tokenizer: Tokenizer, vocab: int, eos: int) -> None:
        import transformers
        import xgrammar

        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        info = xgrammar.TokenizerInfo.from_huggingface(wrapped, vocab_size=vocab, stop_token_ids=[eos])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: dict[str, Any]) -> Any:
        return self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def matcher(self, compiled: Any) -> Any:
        import xgrammar

        return xgrammar.GrammarMatcher(compiled)

    def mask(self, matcher: Any, row: np.ndarray) -> None:
        import torch

        matcher.fill_next_token_bitmask(torch.from_numpy(row[None]), 0)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def rollback(self, matcher: Any, tokens: int) -> None:
        matcher.rollback(tokens)


def instance(schema: dict[str, Any], depth: int = 0) -> Any:
    """A document of a BFCL schema; what it leaves to choose is chosen so that numbers, words and punctuation all occur."""
    if "enum" in schema:
        return schema["enum"][-1]
    kind = schema.get("type", "string")
    if kind == "object":
        return {name: instance(inner, depth + 1) for name, inner in schema.get("properties", {}).items()}
    if kind == "array":
        return [instance(schema.get("items", {}), depth + 1) for _ in range(2)]
    values = {"integer": schema.get("minimum", 1234), "number": 12.75, "boolean": True}
    return values.get(kind, "The quick brown fox, 42 years old; größer – 東京")


def milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def share_of_other_thread(call: Callable[[], Any]) -> float:
    """How much of a second thread's undisturbed pace (of bytecode) is left while `call` runs: 0 where the GIL is held."""
    count, stop = 0, threading.Event()

    def spin() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    def pace(during: Callable[[], Any]) -> float:
        before, start = count, time.perf_counter()
        during()
        return (count - before) / (time.perf_counter() - start)

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    free = pace(lambda: time.sleep(0.3))
    result = pace(call) / free
    stop.set()
    thread.join()
    return result


def measure(library: Any, tokenizer: Tokenizer, vocab: int, schemas: list[dict[str, Any]]) -> None:
    row = np.zeros(-(-vocab // 32), dtype=np.int32)
    compiles, masks, firsts, accepts, rejected = [], [], [], [], 0
    for schema in schemas:
        start = time.perf_counter()
        matcher = library.matcher(library.compile(schema))
        compiles.append((time.perf_counter() - start) * 1e3)
        ids = tokenizer.encode(json.dumps(instance(schema), ensure_ascii=False), add_special_tokens=False).ids
        for position, token in enumerate(ids):
            (masks if position else firsts).append(milliseconds(lambda m=matcher: library.mask(m, row)))
            start = time.perf_counter()
            accepted = library.accept(matcher, token)
            accepts.append((time.perf_counter() - start) * 1e3)
            if not accepted:
                rejected += 1
                break
        else:
            start = time.perf_counter()
            library.rollback(matcher, min(3, len(ids)))
    print(f"{library.name}: {len(schemas)} schemas, {rejected} valid documents refused")
    for name, values in (("compile", compiles), ("first mask", firsts), ("mask", masks), ("accept", accepts)):
        p50, p99 = median(values), percentile(sorted(values), 99)
        print(f"  {name:10} ms: p50 {p50:8.4f}  p99 {p99:8.4f}  max {max(values):8.3f}  n {len(values)}")

    wide = {
        "type": "object",
        "properties": {f"field{i}": {"enum": [f"v{i}-{j}" for j in range(60)]} for i in range(60)},
    }
    compiled = library.compile(schemas[0])
    matcher = library.matcher(compiled)
    print(f"  other thread's pace while compiling: {share_of_other_thread(lambda: library.compile(wide)):.2f}", end="")
    print(f", masking: {share_of_other_thread(lambda: [library.mask(matcher, row) for _ in range(2000)]):.2f}")

    def outcome(schema: dict[str, Any]) -> str:
        try:
            library.compile(schema)
        except Exception as error:
            return str(error).strip().splitlines()[-1][:90] or repr(error)
        return ""

    failed = {name: reason for name, schema in HARD.items() if (reason := outcome(schema))}
    print(f"  hard schemas refused: {len(failed)} of {len(HARD)}", failed or "")
    ignored = [name for name, schema in REFUSED.items() if not outcome(schema)]
    print(f"  accepted though it cannot be honoured: {len(ignored)} of {len(REFUSED)}", ignored or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models/demo/tokenizer.json")
    parser.add_argument("--eos", type=int, default=1)
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer))
    vocab = tokenizer.get_vocab_size(with_added_tokens=True)
    schemas = bfcl_schemas(arguments.schemas) or list(HARD.values())
    print(f"{arguments.tokenizer}: {vocab} tokens")
    for kind in (LLGuidance, XGrammar):
        if arguments.only in ("", kind.name):
            start = time.perf_counter()
            library = kind(arguments.tokenizer, tokenizer, vocab, arguments.eos)
            print(f"{kind.name}: tokenizer taken in {time.perf_counter() - start:.2f} s")
            measure(library, tokenizer, vocab, schemas)


if __name__ == "__main__":
    main()
