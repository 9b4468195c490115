"""Bytes of single tokens, against the texts that the whole tokenizer makes."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from services.cli import DEMO_MODEL
from services.tokenizer.pieces import Pieces
from tests.pipeline.harness import SHARED


def folders() -> list[str]:
    found = [str(DEMO_MODEL / "tokenizer.json")]
    return found + sorted(str(path) for path in (SHARED / "data/tokenizers").rglob("tokenizer.json"))


@pytest.mark.parametrize("path", folders(), ids=lambda path: path.split("/")[-2])
def test_pieces_join_to_the_text(path: str) -> None:
    tokenizer = Tokenizer.from_file(path)
    pieces = Pieces(tokenizer)
    text = "The naïve café – 日本語, 🙂!\n\tx = 1"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert b"".join(pieces[token] for token in ids).decode().strip() == whole.strip()


def test_what_stands_for_nothing() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    pieces = Pieces(tokenizer)
    assert pieces[10**7] == b""
    assert pieces[tokenizer.token_to_id("</s>")] == b"</s>"
    assert 10**7 not in pieces, "there is no end of such ids"
