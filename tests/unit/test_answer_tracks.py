"""What clients are told beside the choices as they come: the prompt, and the best choices only."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from services.detokenizer import snapshot
from services.detokenizer.core import PartitionCore
from services.detokenizer.decoding import decoder_for
from shared import messages as m
from shared.codec import pack_ids
from tests.protocol.detokenizer_world import EOS, Letters, piece

ROOT = Path(__file__).parents[2]
TOKENIZERS = [ROOT / "models/demo/tokenizer.json", ROOT.parent / "shared/data/weights/stories260K/tokenizer.json"]
TEXT = "The old captain — café, naïve 🙂🙂 漢字 — looked at the sea."


def tokens(
    choice: int, position: int, ids: list[int], finish: str | None = None, logprob: float = -1.0
) -> m.StepTokens:
    rows = tuple(m.TokenLogprobs(logprob, pack_ids([7]), (-0.1,)) for _ in ids)
    stop = ids[-1] if finish == "stop" else None
    return m.StepTokens("w", 1, (m.Tokens("t.r", choice, 1, position, pack_ids(ids), finish, stop, rows),))


def apply(core: PartitionCore, *entries: m.LogEntry) -> list[dict]:
    """What the client is sent of them."""
    events: list[dict] = []
    for entry in entries:
        core.apply(core.seq + 1, float(core.seq + 1), entry)
        for answer in core.take_dirty():
            events += answer.unsent()
    return events


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.parent.name)
def test_an_echo_and_its_completion_are_the_text_of_all_ids(path: Path) -> None:
    """Wherever the prompt ends, in the middle of a character too."""
    if not path.exists():
        pytest.skip(f"{path} is not here")
    tokenizer = Tokenizer.from_file(str(path))
    ids = tokenizer.encode(TEXT).ids
    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        core = PartitionCore(decoder_for(tokenizer))
        opened = m.Open("t.r", m.ReplyTo("x"), 1, cut, 99, choices=2, prompt_ids=pack_ids(prompt))
        events = apply(core, opened, tokens(0, 0, rest, "length"), tokens(1, 0, rest[:1], "length"))
        texts = {choice: "".join(e["text"] for e in events if e.get("choice") == choice) for choice in (m.PROMPT, 0, 1)}
        assert texts[m.PROMPT] + texts[0] == tokenizer.decode(ids)
        assert texts[m.PROMPT] + texts[1] == tokenizer.decode(ids[: cut + 1])
        assert [e["ids"] for e in events if e.get("choice") == m.PROMPT] == [prompt]
        assert events[-1]["prompt"] == {"tokens": cut, "chars": len(texts[m.PROMPT])}
        # Nothing is generated: what is incomplete of the prompt is shown as what it is.
        core = PartitionCore(decoder_for(tokenizer))
        events = apply(core, opened._replace(max_tokens=0, choices=1), tokens(0, 0, [], "length"))
        assert "".join(e.get("text", "") for e in events) == tokenizer.decode(prompt)


def test_the_prompt_is_told_before_the_choices_with_its_logprobs() -> None:
    core = PartitionCore(Letters)
    opened = m.Open("t.r", m.ReplyTo("x"), 1, 5, 99, prompt_logprobs=True)
    events = apply(core, opened, tokens(0, 0, [1, 2]), tokens(m.PROMPT, 0, [3, 4]))
    assert [(e["choice"], e["ids"], e["text"]) for e in events] == [(m.PROMPT, [3, 4], "")]
    assert [row["logprob"] for row in events[0]["logprobs"]] == [None, -1.0]
    assert "logprobs" not in events[0] or events[0]["logprobs"][1]["top"] == [[7, -0.1]]
    core = PartitionCore(Letters, snapshot.unpack(core.snapshot(), Letters))
    events = apply(core, tokens(m.PROMPT, 2, [5, 6, 8]))
    assert [(e["choice"], e["position"], e["ids"]) for e in events] == [(m.PROMPT, 2, [5, 6, 8]), (0, 0, [1, 2])]
    assert "logprobs" not in events[1]
    (end,) = apply(core, tokens(0, 2, [EOS], "stop"))[-1:]
    assert end["prompt"] == {"tokens": 5, "chars": 0} and end["choices"][0]["tokens"] == 3
    (answer,) = core.answers.values()
    again = answer.replay({m.PROMPT: (4, 0), 0: (2, 2)})
    assert [(e.get("choice"), e.get("ids")) for e in again] == [(m.PROMPT, [8]), (0, [EOS]), (None, None)]
    whole = answer.replay({}, stream=False)[0]["prompt"]
    assert whole["ids"] == [3, 4, 5, 6, 8] and [row["id"] for row in whole["logprobs"]] == whole["ids"]
    assert whole["logprobs"][0] == {"id": 3, "logprob": None, "top": []} or whole["logprobs"][0]["logprob"] is None


def test_only_the_best_choices_are_told_at_the_end_best_first() -> None:
    core = PartitionCore(Letters)
    opened = m.Open("t.r", m.ReplyTo("x"), 1, 5, 99, choices=4, best=2)
    entries = [
        tokens(0, 0, [1, 1], "length", -0.9),
        tokens(1, 0, [2] * 9, None, -0.5),  # by the sum it would be the last but one
        tokens(2, 0, [3], "length", -2.0),
        tokens(3, 0, [4], None, -0.5),
    ]
    assert apply(core, opened, *entries) == []
    (answer,) = core.answers.values()
    assert [(e["event"], e["ids"]) for e in answer.replay({})] == [("tokens", [])]
    core = PartitionCore(Letters, snapshot.unpack(core.snapshot(), Letters))
    assert apply(core, tokens(3, 1, [EOS], "stop", -1.5)) == []
    events = apply(core, tokens(1, 9, [2], "length", -0.5))
    assert [(e.get("choice"), e.get("ids")) for e in events] == [(0, [2] * 10), (1, [1, 1]), (None, None)]
    assert all("logprobs" not in event for event in events)
    end = events[-1]
    assert [(c["choice"], c["tokens"], c["finish_reason"]) for c in end["choices"]] == [
        (0, 10, "length"),
        (1, 2, "length"),
    ]
    assert end["usage"]["completion_tokens"] == 2 + 10 + 1 + 2
    (answer,) = core.answers.values()
    kept = snapshot.unpack_answer(snapshot.pack_answer(answer), Letters)
    assert kept.replay({}) == answer.replay({}) == events
    assert kept.replay({}, stream=False)[0]["choices"][0]["text"] == piece(2) * 10


def test_a_cancelled_request_tells_how_much_was_told() -> None:
    core = PartitionCore(Letters)
    opened = m.Open("t.r", m.ReplyTo("x"), 1, 2, 99, choices=2, prompt_ids=pack_ids([5, 6]))
    events = apply(core, opened, tokens(0, 0, [1, 30]), m.End("t.r", "cancelled"))
    assert events[-1]["choices"] == [{"choice": 0, "tokens": 2, "chars": 3}, {"choice": 1, "tokens": 0, "chars": 0}]
    assert events[-1]["prompt"] == {"tokens": 2, "chars": 2}
    core = PartitionCore(Letters)
    events = apply(core, opened._replace(best=1), tokens(0, 0, [1, 30]), m.End("t.r", "cancelled"))
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 2
