"""Bytes that a token id stands for by itself, as the lists of log-probabilities show them."""

from __future__ import annotations

import contextlib
import json

from tokenizers import Tokenizer

from shared.byte_level import byte_of_char


class Pieces(dict[int, bytes]):
    """id → its bytes, looked up in the tokenizer at first use. A special token is spelled as it is written; an id that stands for
    nothing (one that pads a model's vocabulary) is b""."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)  # they leave no text
        self._added = {i: token.content for i, token in added.items()}
        state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b"{}"
        decoder = json.loads(state)
        parts = decoder.get("decoders", [decoder])
        kinds = {part.get("type") for part in parts}
        self._byte_of_char = byte_of_char() if "ByteLevel" in kinds else None
        self._fallback = "ByteFallback" in kinds
        self._replacements = [
            (part["pattern"]["String"], part["content"])
            for part in parts
            if part.get("type") == "Replace" and "String" in part["pattern"]
        ]
        self._replacements += [(part["replacement"], " ") for part in parts if part.get("type") == "Metaspace"]

    def __missing__(self, token: int) -> bytes:
        piece = self._look_up(token)
        if piece is None:
            return b""  # not kept: there is no end of such ids
        self[token] = piece
        return piece

    def _look_up(self, token: int) -> bytes | None:
        if (content := self._added.get(token)) is not None:
            return content.encode()
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return None
        if self._byte_of_char is not None and all(char in self._byte_of_char for char in text):
            return bytes(self._byte_of_char[char] for char in text)
        if self._fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            with contextlib.suppress(ValueError):
                return bytes.fromhex(text[3:5])
        for old, new in self._replacements:
            text = text.replace(old, new)
        return text.encode()
