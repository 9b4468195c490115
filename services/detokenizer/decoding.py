"""Text of token ids, as they come: at the end exactly what `Tokenizer.decode(ids, skip_special_tokens=True)` says of all of them,
with those special tokens left in that the reader asked for (the marks of tool calls).

What has come out never changes and depends on the ids only, not on how they were cut into calls: so every owner of a partition
produces the same text at the same character offsets.

`tokenizers.decoders.DecodeStream` is not enough for that: with a byte-fallback tokenizer it raises "invalid prefix" on ids that are
no valid UTF-8 (a run of byte tokens that turns out broken is decoded anew as a whole), and on ids that stay invalid it decodes all
of them again at each step. So the two kinds of decoders that language models use are done here, at a table lookup a token; others
fall back to DecodeStream.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shared.byte_level import byte_of_char

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoding(Protocol):
    """The text of one growing sequence of ids."""

    def feed(self, ids: Iterable[int]) -> str:
        """Returns what further text is certain now."""

    def flush(self) -> str:
        """No more ids: returns what was kept back, broken bytes as U+FFFD."""


class NewDecoding(Protocol):
    """Begins a sequence. `shown` are special tokens that are part of the text."""

    def __call__(self, shown: tuple[str, ...] = ()) -> Decoding: ...


class ByteLevelDecoding:
    """Byte-level BPE (GPT-2, Llama 3, Qwen): a token stands for bytes, and the bytes of all tokens together are UTF-8."""

    def __init__(self, pieces: dict[int, bytes]) -> None:
        self._piece = pieces.__getitem__
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._piece, ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteFallbackDecoding:
    """SentencePiece with byte fallback (Llama 2, Mistral, Gemma): a token is text, or a byte `<0xNN>`.

    The tokenizer decodes a run of bytes only as a whole: as UTF-8, or as one U+FFFD a byte if any of it is broken. So a run is kept
    back until it ends.
    """

    def __init__(self, pieces: dict[int, str | int], strip: int) -> None:
        self._pieces = pieces
        self._strip = strip  # spaces that are still to be taken from the beginning of the text
        self._run = bytearray()

    def feed(self, ids: Iterable[int]) -> str:
        out = []
        for token in ids:
            piece = self._pieces[token]
            if isinstance(piece, int):
                self._run.append(piece)
            elif piece is not _SKIPPED:
                if self._run:
                    out.append(self._take_run())
                out.append(piece)
        return self._stripped("".join(out))

    def flush(self) -> str:
        return self._stripped(self._take_run())

    def _take_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
            else:
                self._strip -= 1
                text = text[1:]
        return text


class GenericDecoding:
    """Any other tokenizer, by DecodeStream. Keeps the ids of the last two pieces of text, to know what is left at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._context: list[int] = []  # ids of the newest text
        self._pending: list[int] = []  # ids after it

    def feed(self, ids: Iterable[int]) -> str:
        out = []
        for token in ids:
            self._pending.append(token)
            if text := self._stream.step(self._tokenizer, token):
                out.append(text)
                self._context, self._pending = self._pending, []
        return "".join(out)

    def flush(self) -> str:
        known = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class ShowingDecoding:
    """A GenericDecoding for each part of the text between special tokens that are shown."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, str]) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._part = GenericDecoding(tokenizer)

    def feed(self, ids: Iterable[int]) -> str:
        out = []
        for token in ids:
            if token in self._shown:
                out += [self._part.flush(), self._shown[token]]
                self._part = GenericDecoding(self._tokenizer)
            else:
                out.append(self._part.feed((token,)))
        return "".join(out)

    def flush(self) -> str:
        return self._part.flush()


# A special token leaves no text, but unlike an empty piece it does not end a run of bytes either.
_SKIPPED: str = str(b"<skipped>", "ascii")


class _BytePieces(dict[int, bytes]):
    """id → its bytes, looked up in the tokenizer at first use."""

    def __init__(self, tokenizer: Tokenizer, shown: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer, shown)
        self._bytes = byte_of_char()

    def __missing__(self, token: int) -> bytes:
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        if text is None:
            piece = b""  # special, or one of the ids that pad a model's vocabulary
        elif all(char in self._bytes for char in text):
            piece = bytes(self._bytes[char] for char in text)
        else:
            piece = text.encode()  # an added token is spelled as it is
        self[token] = piece
        return piece


class _FallbackPieces(dict[int, "str | int"]):
    """id → its text, or the byte that it stands for, looked up in the tokenizer at first use."""

    def __init__(self, tokenizer: Tokenizer, replacements: list[tuple[str, str]], shown: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = _special_ids(tokenizer, shown)
        self._replacements = replacements

    def __missing__(self, token: int) -> str | int:
        text = None if token in self._special else self._tokenizer.id_to_token(token)
        piece: str | int
        if text is None:
            piece = _SKIPPED
        else:
            for old, new in self._replacements:
                text = text.replace(old, new)
            piece = text
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                with contextlib.suppress(ValueError):
                    piece = int(text[3:5], 16)
        self[token] = piece
        return piece


def _special_ids(tokenizer: Tokenizer, shown: Collection[str]) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special and token.content not in shown)


def decoder_for(tokenizer: Tokenizer) -> NewDecoding:
    """How this tokenizer's ids become text: returns what makes the Decoding of a new sequence."""
    parts = _parts(tokenizer)
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        byte_pieces = functools.cache(lambda shown: _BytePieces(tokenizer, shown))
        return lambda shown=(): ByteLevelDecoding(byte_pieces(shown))
    strip = 0
    if kinds and kinds[-1] == "Strip" and parts[-1]["content"] == " " and parts[-1]["stop"] == 0:
        strip = int(parts[-1]["start"])
        kinds.pop()
    replacing = parts[: kinds.count("Replace")]
    plain = all(part["type"] == "Replace" and "String" in part["pattern"] for part in replacing)
    if plain and kinds[len(replacing) :] == ["ByteFallback", "Fuse"]:
        replacements = [(p["pattern"]["String"], p["content"]) for p in replacing]
        pieces = functools.cache(lambda shown: _FallbackPieces(tokenizer, replacements, shown))
        return lambda shown=(): ByteFallbackDecoding(pieces(shown), strip)
    ids = functools.cache(
        lambda shown: {i: token for token in shown if (i := tokenizer.token_to_id(token)) is not None}
    )
    return lambda shown=(): ShowingDecoding(tokenizer, ids(shown)) if ids(shown) else GenericDecoding(tokenizer)


def _parts(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]
