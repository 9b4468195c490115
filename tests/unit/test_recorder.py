"""What a detokenizer records, against a slow and simple count of the same log."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

from services.detokenizer.core import PartitionCore
from services.detokenizer.recorder import Recorder
from shared import messages as m
from shared.codec import pack_ids
from shared.metrics import Histogram, Meter
from shared.micro import Endpoint
from shared.tracing import Tracer
from tests.protocol.detokenizer_world import Letters


def recorder_of(meter: Meter) -> Recorder:
    return Recorder(meter, Tracer(), *(Endpoint(name, name) for name in ("replay", "prefix", "attach")))


def opened(key: str, choices: int = 1, queue_ms: float = 0.0) -> m.Open:
    return m.Open(key, m.ReplyTo("inbox"), 1, 3, 1000, choices=choices, queue_ms=queue_ms)


class Log:
    """Writes entries with a token for each of some choices, and remembers when each request got tokens."""

    def __init__(self, core: PartitionCore, draw: random.Random) -> None:
        self.core, self.draw = core, draw
        self.seq, self.now = 0, 1000.0
        self.lengths: Counter[tuple[str, int]] = Counter()
        self.epochs: dict[str, int] = {}
        self.times: dict[str, list[float]] = {}

    def write(self, entry: m.LogEntry) -> None:
        self.seq += 1
        self.core.apply(self.seq, self.now, entry)

    def step(self, names: list[tuple[str, int]]) -> None:
        self.now += self.draw.choice((0.004, 0.012, 0.012, 0.04, 0.3))
        entries = []
        for key, choice in names:
            position = self.lengths[key, choice]
            entries.append(
                m.Tokens(key, choice, self.epochs.get(key, 1), position, pack_ids([self.draw.randrange(26)]))
            )
            self.lengths[key, choice] += 1
            times = self.times.setdefault(key, [])
            if not times or times[-1] != self.now:
                times.append(self.now)
        self.write(m.StepTokens("w", self.seq, tuple(entries)))


def test_gaps_and_first_tokens_are_those_of_the_log() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        meter = Meter("detokenizer")
        core = PartitionCore(Letters)
        core.recorder = recorder_of(meter)
        log = Log(core, draw)
        born: dict[str, float] = {}
        for number in range(6):
            key = f"t.{number}"
            born[key] = log.now
            log.write(opened(key, 1 + number % 3, queue_ms=50.0))
            for _ in range(15):
                every = [(f"t.{n}", choice) for n in range(number + 1) for choice in range(1 + n % 3)]
                log.step(draw.sample(every, draw.randrange(1, len(every) + 1)))
            log.epochs[key] = 2
            log.write(m.Fence(key, 2))
        gaps = Histogram(meter.histogram("gorgon_detokenizer_inter_token_seconds").bounds)
        firsts = Histogram(meter.histogram("gorgon_detokenizer_time_to_first_token_seconds").bounds)
        for key, times in log.times.items():
            firsts.observe(times[0] - born[key] + 0.05)
            for before, after in pairwise(times):
                gaps.observe(after - before)
        for name, expected in (("inter_token", gaps), ("time_to_first_token", firsts)):
            found = meter.histogram(f"gorgon_detokenizer_{name}_seconds")
            assert found.counts == expected.counts
            assert abs(found.sum - expected.sum) < 0.01
        assert meter.values["gorgon_detokenizer_fences_total", ""] == 6


def test_what_is_folded_while_catching_up_is_not_counted() -> None:
    meter = Meter("detokenizer")
    core = PartitionCore(Letters)
    log = Log(core, random.Random(1))
    log.write(opened("t.old"))
    for _ in range(5):
        log.step([("t.old", 0)])
    core.recorder = recorder_of(meter)  # it serves from here on
    log.write(opened("t.new"))
    for _ in range(4):
        log.step([("t.old", 0), ("t.new", 0)])
    assert meter.histogram("gorgon_detokenizer_time_to_first_token_seconds").count == 1, "of the new one"
    assert meter.histogram("gorgon_detokenizer_inter_token_seconds").count == 6, "three gaps each"
