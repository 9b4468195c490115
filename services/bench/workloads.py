"""What is asked of a deployment in a benchmark: requests with their times, from fixed workloads or from recorded traces. Pure."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

MOONCAKE_BLOCK = 512  # tokens that one of a trace's hash_ids stands for


@dataclass(frozen=True, slots=True)
class Planned:
    """A request: when it is sent (seconds after the beginning), its prompt's ids, and how many tokens it generates."""

    at: float
    prompt: list[int]
    output: int
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Workload:
    """`count` prompts at once, whose lengths are drawn from `prompt`, each generating a number of tokens drawn from `output` (both
    inclusive)."""

    name: str
    count: int
    prompt: tuple[int, int]
    output: tuple[int, int]
    temperature: float = 0.0

    def draw(self, vocabulary: int, seed: int) -> list[Planned]:
        chance = random.Random(seed)
        planned = []
        for _ in range(self.count):
            length, output = chance.randint(*self.prompt), chance.randint(*self.output)
            planned.append(Planned(0.0, chance.choices(range(vocabulary), k=length), output, self.temperature))
        return planned


# Those of docs/performance.md. nano256 is nano-vllm's.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("ttft-2048", 1, (2048, 2048), (1, 1)),
        Workload("batch-1", 1, (128, 128), (256, 256)),
        Workload("batch-8", 8, (128, 128), (256, 256)),
        Workload("batch-64", 64, (1024, 1024), (256, 256)),
        Workload("batch-256", 256, (512, 512), (256, 256)),
        Workload("prefill-64x2048", 64, (2048, 2048), (1, 1)),
        Workload("prefill-8x16384", 8, (16384, 16384), (1, 1)),
        Workload("nano256", 256, (100, 1024), (100, 1024), 0.6),
    )
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace. `blocks`: (identity, tokens) of the parts of its prompt; equal identities mean equal tokens."""

    at: float
    blocks: tuple[tuple[int, int], ...]
    output: int

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for _, tokens in self.blocks)


def azure(path: Path) -> Iterator[Arrival]:
    """The Azure LLM inference traces (Patel et al. 2024): times and lengths; no two prompts have anything in common."""
    first: datetime | None = None
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            time = datetime.fromisoformat(row["TIMESTAMP"][:26])  # microseconds
            first = first or time
            tokens = int(row["ContextTokens"])
            yield Arrival((time - first).total_seconds(), ((number, tokens),), int(row["GeneratedTokens"]))


def mooncake(path: Path) -> Iterator[Arrival]:
    """Mooncake's traces (Qin et al. 2024): `hash_ids` name the chained blocks of 512 tokens of a prompt."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        left, blocks = row["input_length"], []
        for identity in row["hash_ids"]:
            blocks.append((identity, min(MOONCAKE_BLOCK, left)))
            left -= MOONCAKE_BLOCK
        yield Arrival(row["timestamp"] / 1e3, tuple(blocks), row["output_length"])


def read_trace(path: Path) -> list[Arrival]:
    """Of either kind, in the order of time. Raises ValueError for a file that is no such trace."""
    try:
        arrivals = list(azure(path) if path.suffix == ".csv" else mooncake(path))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is neither an Azure trace (.csv) nor one of Mooncake (.jsonl): {error!r}") from None
    if not arrivals:
        raise ValueError(f"{path}: there is no request in it")
    return sorted(arrivals, key=lambda arrival: arrival.at)


def replay(arrivals: list[Arrival], vocabulary: int, context: int, *, speed: float, shrink: int) -> list[Planned]:
    """A trace as requests: `speed` times as fast, lengths divided by `shrink`. What does not fit into the context then is cut, the
    output to at most a quarter of it, the prompt at its end."""
    planned = []
    for arrival in arrivals:
        output = max(1, min(arrival.output // shrink, context // 4))
        prompt: list[int] = []
        for identity, tokens in arrival.blocks:
            prompt += random.Random(identity).choices(range(vocabulary), k=max(1, tokens // shrink))
            if len(prompt) >= context - output:
                break
        planned.append(Planned(arrival.at / speed, prompt[: context - output - 1], output))
    return planned


def at_rate(planned: list[Planned], rate: float, seed: int) -> list[Planned]:
    """The same requests, arriving as a Poisson process of `rate` a second."""
    chance, at, again = random.Random(seed), 0.0, []
    for request in planned:
        again.append(replace(request, at=at))
        at += chance.expovariate(rate)
    return again
