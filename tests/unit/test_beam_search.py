"""Beam search as pure logic: the scores against transformers' own loop, the blocks against a device that remembers what it was told."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.model_worker.batch_scheduler import BatchScheduler
from services.model_worker.block_pool import BlockPool
from services.model_worker.interface import EngineRequest, FinishReason, TokenOutput
from services.model_worker.search.beam import BeamSearch, Candidates
from services.model_worker.search.beam_group import blocks_needed
from services.model_worker.sequence import Sequence
from services.model_worker.step_plan import SchedulerLimits, StepPlan
from shared.sampling import SamplingParams
from tests.unit.test_batch_scheduler import Arrival, retire, run_all

EOS = 5
VOCABULARY = 23


def logprobs_after(tokens: list[int], sharpness: float = 2.0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A model: the distribution depends on all tokens before it."""
    seed = 0
    for token in tokens:
        seed = (seed * 31 + token + 1) % (2**31 - 1)
    logits = sharpness * np.random.default_rng(seed).standard_normal(VOCABULARY)
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def likeliest(rows: list[list[int]], count: int) -> Candidates:
    logprobs = np.stack([logprobs_after(row) for row in rows])
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :count]
    return Candidates(np.take_along_axis(logprobs, ids, 1), ids.astype(np.int64))


def search(
    prompt: list[int], max_tokens: int, beams: int, stops: tuple[int, ...] = (EOS,), **options: Any
) -> BeamSearch:
    run = BeamSearch(beams, max_tokens, dict.fromkeys(stops, FinishReason.STOP), **options)
    rows = [prompt]
    while not run.done:
        step = run.advance(likeliest(rows, run.candidates))
        rows = [rows[parent] + [token] for parent, token in zip(step.parents, step.tokens, strict=True)]
    return run


@pytest.fixture(scope="module")
def table_model() -> Any:
    """`logprobs_after` as a model of transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):  # type: ignore[misc]
        config_class = transformers.LlamaConfig

        def __init__(self) -> None:
            super().__init__(transformers.LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, use_cache=False))
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.generation_config = transformers.GenerationConfig(pad_token_id=0, bos_token_id=None, eos_token_id=None)

        def forward(self, input_ids: Any, **_: Any) -> Any:
            last = torch.from_numpy(np.stack([logprobs_after(row) for row in input_ids.tolist()]))[:, None]
            return transformers.modeling_outputs.CausalLMOutput(logits=last)

        def prepare_inputs_for_generation(self, input_ids: Any, **_: Any) -> Any:
            return {"input_ids": input_ids}

    return TableModel()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
@pytest.mark.parametrize(("beams", "stops"), [(2, ()), (3, (EOS,)), (4, (EOS, 7, 11))])
def test_hypotheses_and_scores_equal_transformers(
    table_model: Any, early_stopping: bool | str, length_penalty: float, beams: int, stops: tuple[int, ...]
) -> None:
    import torch

    options: dict[str, Any] = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    for prompt in ([1, 2, 3], [9], [4, 4, 8, 1]):
        expected = table_model.generate(
            torch.tensor([prompt]), num_beams=beams, num_return_sequences=beams, max_new_tokens=14, do_sample=False,
            use_cache=False, eos_token_id=list(stops) or None, return_dict_in_generate=True, output_scores=True, **options,
        )  # fmt: skip
        found = search(prompt, 14, beams, stops, **options).best(beams)
        for hypothesis, row, score in zip(found, expected.sequences.tolist(), expected.sequences_scores, strict=True):
            ids = row[len(prompt) :]
            padding = set(ids[len(hypothesis.ids) :])
            assert hypothesis.ids == ids[: len(hypothesis.ids)] and padding <= {0, *stops[:1]}
            assert hypothesis.score == pytest.approx(float(score), rel=1e-6)
            ends = hypothesis.ids[-1] in stops
            assert hypothesis.finish is (FinishReason.STOP if ends else FinishReason.LENGTH)
            assert ends or len(hypothesis.ids) == 14


class Device:
    """A paged cache that holds what was written. A row checks, block by block, that its beam's whole context is in place."""

    def __init__(self, limits: SchedulerLimits, num_blocks: int) -> None:
        self.size = limits.block_size
        self.window = limits.window
        self.cache = [-1] * num_blocks * self.size
        self.tables: dict[int, dict[int, int]] = {}
        self.written: dict[int, list[int]] = {}  # tokens of plain sequences, by slot

    def _place(self, slot: int, position: int) -> int:
        return self.tables[slot][position // self.size] * self.size + position % self.size

    def _row(self, slot: int, text: list[int]) -> None:
        """Writes the last token of `text` and reads all before it."""
        self.cache[self._place(slot, len(text) - 1)] = text[-1]
        first = max(0, len(text) - self.window) if self.window else 0
        read = [self.cache[self._place(slot, position)] for position in range(first, len(text))]
        assert read == text[first:], "a row sees another context than its own"

    def run(self, plan: StepPlan) -> tuple[list[list[int]], list[Candidates]]:
        assert plan.table_slots or not plan.admitted
        for slot, column, block in zip(plan.table_slots, plan.table_columns, plan.table_blocks, strict=True):
            self.tables.setdefault(slot, {})[column] = block
        for source, target, rows in plan.copies:
            a, b = source * self.size, target * self.size
            self.cache[b : b + rows] = self.cache[a : a + rows]
        for sequence in plan.admitted:
            self.written[sequence.slot] = sequence.tokens.tolist()
        ids = []
        for sequence in plan.decodes:
            text = self.written[sequence.slot]
            self._row(sequence.slot, text)
            text.append(int(logprobs_after(text).argmax()))
            ids.append([text[-1]])
        for chunk in plan.chunks:
            tokens = chunk.sequence.tokens.tolist()
            for end in range(chunk.start + 1, chunk.start + chunk.rows + 1):
                self._row(chunk.sequence.slot, tokens[:end])
            if chunk.final:
                self.written[chunk.sequence.slot].append(int(logprobs_after(tokens).argmax()))
                ids.append([self.written[chunk.sequence.slot][-1]])
        return ids, [self._beams(sequence) for sequence in plan.beams]

    def _beams(self, sequence: Sequence) -> Candidates:
        group = sequence.group
        assert group is not None and sequence.inflight == 1
        context = sequence.computed - 1
        known = sequence.tokens.tolist()
        steps = group.search._steps
        texts = []
        for index, beam in enumerate(group.beams):
            # What the search says this beam's tokens are: the cache must hold just these.
            ids, at = [], index
            for step in reversed(steps):
                ids.append(step.tokens[at])
                at = step.parents[at]
            text = known + ids[::-1]
            assert len(text) == context + 1 and text[-1] == beam.token
            texts.append((beam.slot, text))
        assert len({slot for slot, _ in texts}) == len(texts)
        for slot, text in texts:
            self.cache[self._place(slot, context)] = text[-1]
        for slot, text in texts:  # after all have written: none may have written where another reads
            self._row(slot, text)
        return likeliest([text for _, text in texts], group.search.candidates)


class World:
    def __init__(self, limits: SchedulerLimits, num_blocks: int, prefix_cache: bool, depth: int) -> None:
        self.scheduler = BatchScheduler(limits, BlockPool(num_blocks, prefix_cache))
        self.device = Device(limits, num_blocks)
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, Any]] = deque()
        self.outputs: dict[str, list[TokenOutput]] = {}

    def turn(self) -> bool:
        plan = self.scheduler.schedule()
        if plan is not None:
            assert plan.rows <= self.scheduler.limits.max_batched_tokens
            self.in_flight.append((plan, self.device.run(plan)))
        idle = plan is None and not self.in_flight
        if len(self.in_flight) > (self.depth if plan is not None else 0):
            plan, (ids, candidates) = self.in_flight.popleft()
            for output in retire(self.scheduler, plan, ids, None, [[] for _ in plan.chunks], candidates):
                self.outputs.setdefault(output.request_id, []).append(output)
        assert self.scheduler.pool.check() == []
        return not idle

    def finish(self) -> None:
        for _ in range(5000):
            if not self.turn():
                break
        else:
            raise AssertionError("no end")
        assert self.scheduler.check_idle() == []


wishes = st.lists(
    st.tuples(
        st.integers(1, 20),  # prompt length
        st.integers(1, 14),  # max_tokens
        st.integers(1, 4),  # beams; 1: greedy
        st.integers(0, 2),  # priority
        st.integers(0, 12),  # turn at which it comes
        st.sampled_from([None, None, None, 3, 9]),  # turns after which it is aborted
        st.sampled_from([True, False, "never"]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(
    wanted=wishes, spare_blocks=st.integers(0, 30), max_seqs=st.integers(4, 9), budget=st.integers(9, 40),
    prefix_cache=st.booleans(), depth=st.integers(0, 1), window=st.sampled_from([0, 0, 5]),
)  # fmt: skip
def test_beams_share_blocks_and_get_their_own_tokens(
    wanted: list[tuple[int, int, int, int, int, int | None, bool | str]], spare_blocks: int, max_seqs: int, budget: int,
    prefix_cache: bool, depth: int, window: int,
) -> None:  # fmt: skip
    limits = SchedulerLimits(4, 34, max_seqs, budget, frozenset({EOS}), window)
    largest = max(blocks_needed(length, length + tokens, beams, 4) for length, tokens, beams, *_ in wanted)
    world = World(limits, max(largest, limits.blocks_of(34)) + spare_blocks, prefix_cache, depth)
    arrivals: list[Arrival] = []
    for index, (length, max_tokens, beams, priority, come, abort, early) in enumerate(wanted):
        prompt = [(position * 3) % 11 + 7 for position in range(length)]
        params = SamplingParams(max_tokens=max_tokens, num_beams=beams, early_stopping=early, temperature=0.0)
        request = EngineRequest(str(index), 0, 1, prompt, params, priority=priority, choices=beams)
        arrivals.append((come, abort, [request]))
    for sequence, abort in run_all(world, arrivals):
        outputs, params = world.outputs.get(sequence.request.request_id, []), sequence.request.params
        if params.num_beams == 1 or (abort is not None and not outputs):
            continue
        expected = search(
            list(sequence.request.prompt_ids), params.max_tokens, params.num_beams, early_stopping=params.early_stopping
        )
        found = expected.best(params.num_beams)
        assert [output.choice for output in outputs] == list(range(params.num_beams))
        assert [(o.ids, o.finish, o.score) for o in outputs] == [(f.ids, f.finish, f.score) for f in found]


def test_full_blocks_are_shared_and_the_last_one_is_not() -> None:
    world = World(SchedulerLimits(4, 64, 4, 64, frozenset({EOS})), 64, True, 0)
    params = SamplingParams(max_tokens=3, num_beams=3, ignore_eos=True)
    sequence = world.scheduler.add(EngineRequest("a", 0, 1, list(range(6, 16)), params))
    for _ in range(3):
        world.turn()
    assert sequence.group is not None and len(sequence.group.beams) == 3
    tables = [beam.blocks for beam in sequence.group.beams]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2] and len({table[2] for table in tables}) == 3
    assert world.scheduler.pool.num_blocks - world.scheduler.pool.free == 2 + 3
    world.finish()


def test_a_group_needs_all_its_slots_and_lets_others_pass_when_it_is_done() -> None:
    world = World(SchedulerLimits(4, 64, 4, 64, frozenset({EOS})), 64, False, 1)
    for name, beams in (("greedy", 1), ("beams", 4), ("after", 1)):
        world.scheduler.add(
            EngineRequest(name, 0, 1, [1, 2, 3], SamplingParams(max_tokens=6, num_beams=beams, ignore_eos=True))
        )
    seen = []
    while world.turn():
        seen.append({sequence.request.request_id for sequence in world.scheduler.running})
    assert {"greedy", "beams"} not in seen and {"beams"} in seen
    assert world.scheduler.check_idle() == [] and len(world.outputs["after"]) == 6


def test_an_isolated_search_tells_that_it_has_survived_a_step() -> None:
    world = World(SchedulerLimits(4, 64, 4, 64, frozenset({EOS})), 64, False, 1)
    params = SamplingParams(max_tokens=6, num_beams=2, ignore_eos=True)
    world.scheduler.add(EngineRequest("suspect", 0, 1, [1, 2, 3], params, isolated=True, choices=2))
    other = world.scheduler.add(EngineRequest("other", 0, 1, [1, 2], SamplingParams(max_tokens=20, ignore_eos=True)))
    while not world.outputs.get("suspect"):
        world.turn()
        assert other not in world.scheduler.running
    (first,) = world.outputs["suspect"]
    assert first.ids == [] and first.finish is None
    world.finish()
    assert [output.finish for output in world.outputs["suspect"]] == [None, FinishReason.LENGTH, FinishReason.LENGTH]
