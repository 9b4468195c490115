"""Text → token ids."""

from __future__ import annotations

from tokenizers import Tokenizer

# Normalisation can shorten a text before it is cut into tokens (composition, stripped blanks), rarely to less than this.
_LARGEST_SHRINKAGE = 4


class Encoder:
    """A tokenizer of the `tokenizers` library, without truncation and padding. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        self._longest = max(map(len, tokenizer.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens` is for plain prompts; a chat template writes its own."""
        # `encode` holds the GIL all the while, encode_batch_fast does not (and it leaves out the offsets).
        encoding = self.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
        ids: list[int] = encoding.ids
        return ids

    def bad_words(self, word: str) -> list[tuple[int, ...]]:
        """The sequences of ids that spell a word at the beginning of a text and in the middle of one: with and without a space before
        it, as transformers and vLLM tokenise bad words."""
        bare = word.lstrip() or word
        encoded = (tuple(self.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}"))
        return list(dict.fromkeys(ids for ids in encoded if ids))

    def added_id(self, text: str) -> int | None:
        """Of a token that the tokenizer has beside its vocabulary, special or not."""
        return self._added.get(text)

    def to_json(self) -> str:
        """As tokenizer.json holds it."""
        return str(self.tokenizer.to_str())

    def longest_text(self, tokens: int) -> int:
        """Characters that so many tokens can stand for at most: a longer text need not be encoded to know that it is too long."""
        return tokens * self._longest * _LARGEST_SHRINKAGE
