"""A detokenizer that takes tokens of any epoch: the fold without its first rule."""

from services.detokenizer.service import DetokenizerService
from services.detokenizer.settings import DetokenizerSettings
from shared.messages import Tokens
from shared.service import run_stage
from shared.tokenlog import PartitionFold, RequestState


def is_current(self: PartitionFold, request: RequestState, tokens: Tokens) -> bool:
    return True


if __name__ == "__main__":
    PartitionFold.is_current = is_current  # type: ignore[method-assign]
    run_stage(DetokenizerService, DetokenizerSettings)
