"""Text of a choice: exact, steady, and cut at stop strings, whatever the token borders."""

from __future__ import annotations

import functools
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.detokenizer.decoding import ByteFallbackDecoding, ByteLevelDecoding, GenericDecoding, decoder_for
from services.detokenizer.stream import ChoiceStream, StopMatcher

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FOLDERS = {
    "stories260K": DATA / "weights/stories260K",
    "babyllama": DATA / "weights/babyllama-tok361",
    "gpt2": DATA / "tokenizers/gpt2",
    "qwen2": DATA / "tokenizers/qwen2",
}
TEXTS = [
    "Once upon a time, there was a little girl.",
    "naïve café — “quotes” … 你好，世界！ こんにちは 한국어",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    " leading and  double   spaces \n\n\tand lines\r\n",
    "ﷺ ẞ ﬀ \u200b\ufeff x\u0301",
    "<0x41> <unk> <|endoftext|> ▁ Ġ",
]


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    path = FOLDERS[name] / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return Tokenizer.from_file(str(path))


@functools.cache
def decoder(name: str):
    return decoder_for(tokenizer(name))


def whole(name: str, ids: list[int]) -> str:
    return tokenizer(name).decode(ids, skip_special_tokens=True)


def cut(items: list[int], borders: list[int]) -> list[list[int]]:
    points = sorted({0, len(items), *(b % (len(items) + 1) for b in borders)})
    return [items[a:b] for a, b in pairwise(points)]


names = pytest.mark.parametrize("name", FOLDERS)


def test_the_two_kinds_of_decoders_are_recognised():
    assert isinstance(decoder("qwen2")(), ByteLevelDecoding)
    assert isinstance(decoder("gpt2")(), ByteLevelDecoding)
    assert isinstance(decoder("babyllama")(), ByteFallbackDecoding)
    assert isinstance(decoder("stories260K")(), ByteFallbackDecoding)


@names
@pytest.mark.parametrize("text", TEXTS)
def test_text_of_real_ids_is_exact_and_never_broken(name, text):
    ids = tokenizer(name).encode(text).ids
    stream = ChoiceStream(decoder(name)())
    for token in ids:
        stream.feed([token])
        assert "\ufffd" not in stream.text
        assert whole(name, ids).startswith(stream.text)
    stream.flush()
    assert stream.text == whole(name, ids)


@names
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_in_any_pieces_give_what_decoding_in_one_go_gives(name, data):
    """Broken UTF-8, special ids and ids beyond the vocabulary included."""
    size = tokenizer(name).get_vocab_size()
    low = st.integers(0, min(size, 400) - 1)  # the byte tokens are there
    ids = data.draw(st.lists(low | st.integers(0, size + 5), max_size=40))
    borders = data.draw(st.lists(st.integers(0, 40), max_size=10))
    stream, by_token = ChoiceStream(decoder(name)()), ChoiceStream(decoder(name)())
    before = ""
    for piece in cut(ids, borders):
        stream.feed(piece)
        for token in piece:
            by_token.feed([token])
        assert stream.text == by_token.text, "what is shown must not depend on how the ids were cut"
        assert stream.text.startswith(before), "what was shown must not change"
        assert stream.text_from(len(before)) == stream.text[len(before) :]
        before = stream.text
    stream.flush()
    assert stream.text == whole(name, ids)
    assert stream.chars == len(stream.text)
    assert stream.shown == len(ids)


def test_text_comes_with_its_token():
    """Nothing is kept back without need."""
    for name in FOLDERS:
        ids = tokenizer(name).encode("Once upon a time there was a cat").ids
        stream = ChoiceStream(decoder(name)())
        for i, token in enumerate(ids):
            stream.feed([token])
            assert stream.text == whole(name, ids[: i + 1])


def test_endless_broken_bytes_take_linear_time_and_are_shown():
    ids = [tokenizer("gpt2").token_to_id("§")] * 20_000
    stream = ChoiceStream(decoder("gpt2")())
    for token in ids:
        stream.feed([token])
    assert stream.chars >= len(ids) - 1


def test_other_decoders_work_through_decode_stream():
    vocabulary = {"[UNK]": 0, "hel": 1, "##lo": 2, "world": 3, "##s": 4}
    wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    decoding = decoder_for(wordpiece)()
    assert isinstance(decoding, GenericDecoding)
    ids = [1, 2, 3, 4]
    text = "".join(decoding.feed([token]) for token in ids) + decoding.flush()
    assert text == wordpiece.decode(ids) == "hello worlds"


# ---------------------------------------------------------------- stop strings


def oracle(text: str, stops: list[str]) -> tuple[str, str | None, int]:
    """Shown text, the stop string, and the number of characters read when it was complete: by trying every end."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop, end
    return text, None, len(text)


words = st.text("ab", max_size=12)


@settings(max_examples=500)
@given(
    pieces=st.lists(words, max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=5)
)
def test_stop_strings_match_as_by_trying_every_end(pieces, stops):
    matcher = StopMatcher(stops)
    shown, read = "", ""
    for piece in pieces:
        shown += matcher.feed(piece)
        read += piece
        expected, stop, _ = oracle(read, stops)
        assert matcher.matched == stop
        if stop is not None:
            assert shown == expected
            return
        kept = read[len(shown) :]
        assert read == shown + kept
        assert not kept or any(s.startswith(kept) for s in stops), "kept back without need"
        possible = (read[i:] for i in range(len(shown)))
        assert not any(s.startswith(p) for p in possible for s in stops), "shown although it may begin a stop string"
    assert shown + matcher.flush() == read


@pytest.mark.parametrize(
    "stops, text, shown, matched",
    [
        (["bcd", "c"], "abcd", "ab", "c"),  # complete first
        (["cd", "bcd"], "abcd", "a", "bcd"),  # complete together: the longest
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["aab"], "aaab", "a", "aab"),
        (["x"], "abc", "abc", None),
    ],
)
def test_which_stop_string_wins(stops, text, shown, matched):
    for pieces in ([text], list(text)):
        matcher = StopMatcher(stops)
        out = ""
        for piece in pieces:
            if matcher.matched is None:
                out += matcher.feed(piece)
        if matcher.matched is None:
            out += matcher.flush()
        assert (out, matcher.matched) == (shown, matched)


@names
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stops_on_real_tokens_count_the_token_that_completes_them(name, data):
    text = data.draw(st.sampled_from(TEXTS))
    ids = tokenizer(name).encode(text).ids
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : start + data.draw(st.integers(1, 8))]
    borders = data.draw(st.lists(st.integers(0, 60), max_size=8))
    stream = ChoiceStream(decoder(name)(), [stop])
    for piece in cut(ids, borders):
        stream.feed(piece)
    stream.flush()
    full = whole(name, ids)
    expected, matched, end = oracle(full, [stop])
    assert (stream.text, stream.matched) == (expected, matched)
    if matched is None:
        assert stream.shown == len(ids)
        return
    # The token that completed it is the first after which the text reaches `end`.
    plain = ChoiceStream(decoder(name)())
    tokens = iter(ids)
    while plain.chars < end and (token := next(tokens, None)) is not None:
        plain.feed([token])
    assert stream.shown == plain.shown


def test_a_stop_id_counts_but_is_not_shown():
    ids = tokenizer("gpt2").encode("Hello world").ids
    stream = ChoiceStream(decoder("gpt2")(), ["nothing"])
    stream.feed(ids, hidden=1)
    stream.flush()
    assert (stream.text, stream.shown) == ("Hello", 2)
