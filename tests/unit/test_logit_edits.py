"""Penalties, bias, bad words and min_tokens are those of transformers, bit by bit, on the device path and through the engine."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kernels.reference import ReferenceOps
from services.model_worker.engine import EngineRequest, FinishReason
from services.model_worker.logit_edits import edit_row
from services.model_worker.sampler import SamplingMode, choose
from services.model_worker.sequence import Sequence
from services.model_worker.step_plan import SchedulerLimits
from services.model_worker.step_state import Staging, StepState, field_row
from shared.sampling import SamplingParams
from tests.unit.engine_harness import greedy, needs_weights, running, weights

VOCABULARY, EOS = 60, 2


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_params(rng: random.Random) -> SamplingParams:
    """Some of the processors each; small vocabularies make words of several tokens come about."""
    few = range(3, 9)
    words = [tuple(rng.choices(few, k=rng.randint(1, 4))) for _ in range(rng.choice((0, 1, 12)))]
    return SamplingParams(
        temperature=0.0,
        repetition_penalty=rng.choice((1.0, 1.3, 0.7)),
        logit_bias=tuple(
            (token, rng.uniform(-100, 100)) for token in rng.sample(range(VOCABULARY), rng.choice((0, 7)))
        ),
        bad_words=tuple(dict.fromkeys(words)),
        min_tokens=rng.choice((0, 0, 5)),
        stop_token_ids=(7, 30),
    )


def theirs(params: SamplingParams, prompt_len: int) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
    if params.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in params.bad_words]))
    if params.min_tokens:
        ends = [EOS, *params.stop_token_ids]
        processors.append(MinNewTokensLengthLogitsProcessor(prompt_len, params.min_tokens, ends))
    return processors


class Recorded(ReferenceOps):
    """Keeps the logits that the choice was made from."""

    def sample(self, logits, batch):
        self.scores = logits.clone()
        return super().sample(logits, batch)


def sequence_of(params: SamplingParams, slot: int, tokens: list[int], prompt_len: int) -> Sequence:
    request = EngineRequest(str(slot), 0, 1, tokens[:prompt_len], params, tokens[prompt_len:])
    sequence = Sequence(request, slot, {EOS}, 500)
    sequence.slot = slot
    sequence.device_row = field_row(params, 0, prompt_len)
    sequence.edit_row = edit_row(params, {EOS})
    return sequence


def test_processed_logits_equal_transformers_in_a_mixed_batch_token_by_token() -> None:
    rng, generator = random.Random(1), torch.Generator().manual_seed(2)
    limits = SchedulerLimits(block_size=16, max_model_len=500, max_seqs=24, max_batched_tokens=64)
    state = StepState(limits, VOCABULARY, torch.device("cpu"))
    staging = Staging(200_000, torch.device("cpu"), 1)
    ops = Recorded()
    all_params = [drawn_params(rng) for _ in range(24)]
    prompts = [[rng.randrange(3, 9) for _ in range(rng.randint(1, 20))] for _ in all_params]
    # Some have generated tokens already, as after a migration.
    known = [prompt + [rng.randrange(3, 9) for _ in range(rng.choice((0, 3)))] for prompt in prompts]
    sequences = [
        sequence_of(params, slot, tokens, len(prompt))
        for slot, (params, tokens, prompt) in enumerate(zip(all_params, known, prompts, strict=True))
    ]
    staging.begin()
    staged = state.stage_admissions(staging, sequences)
    staging.upload()
    state.apply_admissions(staged)
    for sequence in sequences:
        if sequence.request.params.has_penalties:
            state.reset_penalties(sequence)
    mode = SamplingMode.union(map(SamplingMode.of, all_params))
    assert mode.penalties and mode.edits and mode.recent
    tokens = [array("i", ids) for ids in known]
    banned = 0
    for _ in range(12):
        logits = torch.randn(24, VOCABULARY, generator=generator) * 2
        logits[:, 3:9] += 6  # so that they are chosen again and again
        context = torch.tensor([len(ids) for ids in tokens], dtype=torch.int32)
        chosen = choose(ops, state, logits.clone(), torch.arange(24), context, mode)
        for row, (params, prompt) in enumerate(zip(all_params, prompts, strict=True)):
            ids = torch.tensor(np.asarray(tokens[row], dtype=np.int64))[None]
            expected = theirs(params, len(prompt))(ids, logits[row : row + 1].clone())[0]
            assert torch.equal(ops.scores[row], expected), (row, params)
            banned += int(torch.isinf(expected).sum())
            tokens[row].append(int(chosen[row]))
    assert banned > 100


@needs_weights
def test_generated_ids_equal_transformers_generate() -> None:
    folder = weights("stories260K")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = [1, 403, 407, 261, 378]
    plain = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    words = [plain[5:7], plain[10:13], [plain[2]], [prompt[-1], plain[0]]]
    bias = {plain[20]: -8.0, plain[1]: 3.5}
    options = [
        {"bad_words_ids": words},
        {"sequence_bias": {(token,): value for token, value in bias.items()}, "repetition_penalty": 1.2},
        {"bad_words_ids": words, "min_new_tokens": 30, "eos_token_id": [2, *set(plain[:40])]},
    ]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, **each)[0, len(prompt) :].tolist()
        for each in options
    ]
    ours = [
        {"bad_words": tuple(map(tuple, words))},
        {"logit_bias": tuple(bias.items()), "repetition_penalty": 1.2},
        {"bad_words": tuple(map(tuple, words)), "min_tokens": 30, "stop_token_ids": tuple(set(plain[:40]))},
    ]
    with running(folder) as started:
        requests = [greedy(str(n), prompt, 60, params={"ignore_eos": False, **each}) for n, each in enumerate(ours)]
        outputs = started.run([*requests, greedy("plain", prompt, 60)])
    assert [output.ids for output in outputs] == [*expected, plain]
    assert len({tuple(output.ids) for output in outputs}) == 4
    assert outputs[2].finish is FinishReason.STOP_TOKEN and len(outputs[2].ids) >= 31
