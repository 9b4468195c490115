"""Sampled tokens follow the distribution that they are said to follow. Fixed seeds: a failure is a defect, not bad luck."""

import pytest
import torch

from kernels.reference import ReferenceOps, filter_scores
from tests.kernels.cases import sampling_batch

torch.set_num_threads(1)
DRAWS = 40_000


def expected_probabilities(logits: torch.Tensor, batch) -> torch.Tensor:
    scores = logits[None] / batch.temperature[:1]
    return filter_scores(scores, batch.top_k[:1], batch.top_p[:1], batch.min_p[:1])[0].double().softmax(0)


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
    "filters", [{}, {"temperature": 0.6, "top_k": 20}, {"top_p": 0.8}, {"temperature": 1.5, "min_p": 0.05}]
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
