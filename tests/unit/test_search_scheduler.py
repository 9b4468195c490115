"""All strategies in one batch scheduler, against a device of two caches that checks each row's context: no tensors, no model."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.model_worker.interface import EngineRequest
from services.model_worker.search.beam import Candidates
from services.model_worker.search.beam_group import blocks_needed
from services.model_worker.search.strategy import Strategy
from services.model_worker.step_plan import SchedulerLimits, StepPlan
from shared.sampling import SamplingParams
from tests.unit.test_batch_scheduler import Arrival, run_all
from tests.unit.test_beam_search import EOS, Device, World, logprobs_after, search

K = 3
PARAMS: dict[Strategy, dict[str, Any]] = {
    Strategy.SAMPLING: {},
    Strategy.BEAM_SEARCH: {"num_beams": 3},
    Strategy.CONTRASTIVE_SEARCH: {"penalty_alpha": 0.5, "top_k": K},
    Strategy.CONTRASTIVE_DECODING: {"cd_alpha": 0.1},
}


def next_token(strategy: Strategy, text: list[int]) -> int:
    """What this strategy chooses on this device: the likeliest, or another one that depends on the text."""
    ranks = (-logprobs_after(text)).argsort(kind="stable")
    match strategy:
        case Strategy.CONTRASTIVE_SEARCH:
            return int(ranks[len(text) % K])
        case Strategy.CONTRASTIVE_DECODING:
            return int(ranks[1])
        case _:
            return int(ranks[0])


class TwoCaches(Device):
    """`amateur` holds what the second model has computed. `memories`: the texts whose hidden states are kept."""

    def __init__(self, limits: SchedulerLimits, num_blocks: int) -> None:
        super().__init__(limits, num_blocks)
        self.amateur = [-1] * len(self.cache)
        self.memories: dict[int, list[int]] = {}

    def _amateur_row(self, slot: int, text: list[int]) -> None:
        self.amateur[self._place(slot, len(text) - 1)] = text[-1]
        first = max(0, len(text) - self.window) if self.window else 0
        read = [self.amateur[self._place(slot, position)] for position in range(first, len(text))]
        assert read == text[first:], "the amateur has not seen this context"

    def run(self, plan: StepPlan) -> tuple[list[list[int]], list[Candidates]]:
        ids, candidates = super().run(plan)
        for source, target, rows in plan.copies:
            a, b = source * self.size, target * self.size
            self.amateur[b : b + rows] = self.amateur[a : a + rows]
        for chunk in plan.amateur_chunks:
            tokens = chunk.sequence.tokens.tolist()
            for end in range(chunk.start + 1, chunk.start + chunk.rows + 1):
                self._amateur_row(chunk.sequence.slot, tokens[:end])
        for chunk in plan.contrasted_chunks:
            tokens, memory = chunk.sequence.tokens.tolist(), chunk.sequence.memory
            if chunk.start == 0:
                self.memories[memory] = []
            assert len(self.memories[memory]) == chunk.start, "hidden states are missing"
            for end in range(chunk.start + 1, chunk.start + chunk.rows + 1):
                self._row(chunk.sequence.slot, tokens[:end])
            self.memories[memory] = tokens[: chunk.start + chunk.rows]
        assert len({sequence.memory for sequence in plan.contrasted}) == len(plan.contrasted)
        for sequence in plan.contrasted:
            text, slot = self.written[sequence.slot], sequence.slot
            assert self.memories[sequence.memory] == text
            token = next_token(sequence.strategy, text)
            for lane in range(sequence.candidates):  # each has a place of its own
                self.cache[self._place(slot, len(text) + lane)] = -2
            text.append(token)
            self._row(slot, text)
            self.memories[sequence.memory] = list(text)
            ids.append([token])
        for sequence in plan.guided:
            text = self.written[sequence.slot]
            self._row(sequence.slot, text)
            self._amateur_row(sequence.slot, text)
            text.append(next_token(sequence.strategy, text))
            ids.append([text[-1]])
        return ids, candidates


def continuation(strategy: Strategy, prompt: list[int], tokens: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + tokens and not (len(text) > len(prompt) and text[-1] == EOS):
        text.append(next_token(strategy, text))
    return text[len(prompt) :]


wishes = st.lists(
    st.tuples(
        st.sampled_from(list(Strategy)),
        st.integers(1, 20),  # prompt length
        st.integers(1, 12),  # max_tokens
        st.integers(1, 3),  # choices of contrastive decoding
        st.integers(0, 2),  # priority
        st.integers(0, 12),  # turn at which it comes
        st.sampled_from([None, None, None, 3, 9]),  # turns after which it is aborted
        st.integers(0, 1),  # which common beginning
        st.integers(0, 3),  # tokens generated elsewhere before
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=100, deadline=None)
@given(
    wanted=wishes, spare_blocks=st.integers(0, 30), max_seqs=st.integers(3, 8), memories=st.integers(1, 2),
    budget=st.integers(0, 20), prefix_cache=st.booleans(), depth=st.integers(0, 1), window=st.sampled_from([0, 0, 5]),
)  # fmt: skip
def test_strategies_share_a_batch_and_its_blocks(
    wanted: list[tuple[Strategy, int, int, int, int, int, int | None, int, int]], spare_blocks: int, max_seqs: int,
    memories: int, budget: int, prefix_cache: bool, depth: int, window: int,
) -> None:  # fmt: skip
    rows = max_seqs + memories * (K - 1) + budget
    limits = SchedulerLimits(4, 34, max_seqs, rows, frozenset({EOS}), window, overshoot=K, memories=memories)
    largest = max(blocks_needed(length, length + tokens, 3, 4) for _, length, tokens, *_ in wanted)
    world = World(limits, max(largest, limits.blocks_of(34 + K)) + spare_blocks, prefix_cache, depth)
    world.device = TwoCaches(limits, world.scheduler.pool.num_blocks)
    arrivals: list[Arrival] = []
    for index, (strategy, length, max_tokens, n, priority, come, abort, beginning, done) in enumerate(wanted):
        prompt = [(beginning * 5 + position * 3) % 11 + 7 for position in range(length)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, **PARAMS[strategy])
        before = continuation(strategy, prompt, max_tokens)[:-1][: 0 if strategy is Strategy.BEAM_SEARCH else done]
        requests = []
        for choice in range(n if strategy is Strategy.CONTRASTIVE_DECODING else 1):
            generated = before[: max(0, len(before) - choice)]  # of one choice more than of another
            requests.append(
                EngineRequest(str(index), choice, 1, prompt, params, generated, priority=priority, choices=3)
            )
        arrivals.append((come, abort, requests))
    for sequence, abort in run_all(world, arrivals):
        request = sequence.request
        outputs = [output for output in world.outputs.get(request.request_id, []) if output.choice == request.choice]
        got = [token for output in outputs for token in output.ids]
        if sequence.strategy is Strategy.BEAM_SEARCH:
            expected = search(list(request.prompt_ids), request.params.max_tokens, 3).best(1)[0].ids
            assert got == expected or (abort is not None and not got)
        else:
            whole = continuation(sequence.strategy, list(request.prompt_ids), request.params.max_tokens)
            expected = whole[len(request.generated_ids) :]
            assert got == (expected if abort is None else expected[: len(got)])


def test_a_choice_takes_over_only_rows_that_earlier_steps_have_written() -> None:
    """The row of the prompt's last token is that of the first guided step; copies come before a step's rows."""
    limits = SchedulerLimits(4, 34, 4, 20)
    world = World(limits, 30, False, 0)
    world.device = TwoCaches(limits, 30)
    prompt, params = [7, 8, 9, 10, 11, 12], SamplingParams(max_tokens=8, ignore_eos=True, cd_alpha=0.1)
    whole = continuation(Strategy.CONTRASTIVE_DECODING, prompt, 8)
    for choice, done in enumerate((0, 3)):
        world.scheduler.add(EngineRequest("a", choice, 1, prompt, params, whole[:done]))
    world.finish()
    for choice, done in enumerate((0, 3)):
        got = [token for output in world.outputs["a"] if output.choice == choice for token in output.ids]
        assert got == whole[done:]
    assert world.scheduler.prefix_hit_tokens == len(prompt)
