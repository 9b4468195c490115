"""Sampled tokens follow the distribution that they are said to follow. Fixed seeds: a failure is a defect, not bad luck."""

import itertools

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kernels.reference import ReferenceOps, filter_scores, keep_typical
from tests.kernels.cases import sampling_batch

torch.set_num_threads(1)
DRAWS = 40_000


def expected_probabilities(logits: torch.Tensor, batch) -> torch.Tensor:
    """By transformers' warpers in float64, in their order."""
    warpers = [TemperatureLogitsWarper(batch.temperature[0].item())]
    if batch.top_k[0] > 0:
        warpers.append(TopKLogitsWarper(int(batch.top_k[0])))
    if batch.top_p[0] < 1:
        warpers.append(TopPLogitsWarper(batch.top_p[0].item()))
    if batch.min_p[0] > 0:
        warpers.append(MinPLogitsWarper(batch.min_p[0].item()))
    if batch.typical_p is not None and batch.typical_p[0] < 1:
        warpers.append(TypicalLogitsWarper(batch.typical_p[0].item()))
    scores = logits[None].double()
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].softmax(0)


def chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's statistic as a standard normal deviate (Wilson and Hilferty 1931); rare tokens share a cell."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    rare = expected < 10
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    counts, expected = counts[expected > 5], expected[expected > 5]
    freedom = len(expected) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize("varied", ["seed", "position", "choice"])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.6, "top_k": 20},
        {"top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.05},
        {"typical_p": 0.5},
        {"temperature": 2.0, "typical_p": 0.9},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.7},
        {"temperature": 0.8, "top_p": 0.9, "typical_p": 0.2},
    ],
)
def test_draws_follow_the_distribution(varied, filters):
    logits = torch.randn(97, generator=torch.Generator().manual_seed(5)) * 2
    batch = sampling_batch(DRAWS, **{varied: torch.arange(DRAWS)}, **filters)
    tokens = ReferenceOps().sample(logits.expand(DRAWS, -1), batch)
    assert abs(chi_square(tokens, expected_probabilities(logits, batch))) < 3.5


def test_the_statistic_rejects_a_wrong_distribution():
    logits = torch.randn(97, generator=torch.Generator().manual_seed(5)) * 2
    batch = sampling_batch(DRAWS, seed=torch.arange(DRAWS))
    tokens = ReferenceOps().sample(logits.expand(DRAWS, -1), batch)
    batch.temperature.fill_(1.05)
    assert chi_square(tokens, expected_probabilities(logits, batch)) > 5


def test_neighbouring_positions_are_independent():
    logits = torch.zeros(2)
    batch = sampling_batch(DRAWS, seed=7, position=torch.arange(DRAWS))
    tokens = ReferenceOps().sample(logits.expand(DRAWS, -1), batch)
    pairs = tokens[:-1] * 2 + tokens[1:]
    assert abs(chi_square(pairs[::2], torch.full((4,), 0.25, dtype=torch.float64))) < 3.5


@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_kept_tokens_are_those_of_transformers(spread):
    """Each combination of filters, for many rows at once."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(200, 97, generator=generator) * spread
    for top_k, top_p, min_p, typical_p in itertools.product((0, 25), (1.0, 0.9), (0.0, 0.02), (0.2, 0.6, 0.95, 1.0)):
        batch = sampling_batch(1, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
        rows = [field.expand(200) for field in (batch.top_k, batch.top_p, batch.min_p)]
        kept = keep_typical(filter_scores(logits, *rows), batch.typical_p.expand(200)) > -torch.inf
        expected = torch.stack([expected_probabilities(row, batch) > 0 for row in logits])
        assert torch.equal(kept, expected), (top_k, top_p, min_p, typical_p)
