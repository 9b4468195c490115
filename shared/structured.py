"""Structured output: what a request may demand of its text, as grammars of llguidance. Only stages that need the library import this.

A constraint is a line of text, the grammar in llguidance's own form. It is made once, at admission, and travels with the request; the
worker compiles that same text and nothing else, so it can neither be read differently there nor change at a migration. A place in a
grammar (`Matcher`) depends only on the text and the tokens so far: it is rebuilt anywhere by replaying them.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

if TYPE_CHECKING:
    from shared.api import Structured

MAX_CONSTRAINT_BYTES = 64 * 1024  # the grammar's text: what bounds the time that it takes to compile, and a step's mask
REMEMBERED = 64  # compiled grammars
MAX_REASON = 400  # characters of what the library says

# JSON may be laid out as the model likes (as in llama.cpp: a blank, or a line's end and an indentation), but no run of blanks is
# endless: models lose themselves in them.
# `lenient` would let keywords that are not implemented pass.
_JSON_OPTIONS: dict[str, Any] = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\n[ \t]{0,20}",
    "lenient": False,
    "coerce_one_of": False,
}
# The library's measures of work, not of time, so that a grammar passes or fails alike everywhere: the defaults but for the two that
# bound a step, whose mask everybody in the batch waits for.
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=25_000, verbose_errors=False)


# What a text is made of: characters, and ids of special tokens, which no characters can stand for.
Text = str | Sequence[str | int]


class ConstraintError(ValueError):
    """The constraint is wrong, too large, or demands what the library does not implement; the message says what."""


def constraint_of(structured: Structured) -> str:
    """The constraint that a request's field `structured` means. Raises ConstraintError if it is too large; whether it is right only
    `Vocabulary.compile` knows."""
    if structured.json_schema is not None:
        constraint = json_constraint(structured.json_schema)
    elif structured.json_object is not None:
        constraint = json_constraint({"type": "object"})
    elif structured.regex is not None:
        constraint = LLMatcher.grammar_from_regex(structured.regex)
    elif structured.grammar is not None:
        constraint = LLMatcher.grammar_from_lark(structured.grammar)
    else:
        assert structured.choice is not None
        constraint = choice_constraint(structured.choice)
    return _sized(constraint)


def json_constraint(schema: Mapping[str, Any]) -> str:
    """JSON text that a schema (draft 2020-12) allows."""
    return _sized(LLMatcher.grammar_from_json_schema(dict(schema), overrides=_JSON_OPTIONS))  # type: ignore[arg-type]


def choice_constraint(texts: Sequence[str]) -> str:
    """One of these texts."""
    return _sized("start: " + " | ".join(map(_literal, texts)))


def tool_constraint(
    alternatives: Sequence[tuple[Text, Mapping[str, Any], Text]], *, separator: Text | None = None
) -> str:
    """A call in a model's own notation: for each tool what stands before the JSON arguments, their schema, and what stands after.

    separator   between calls, if there may be several
    """
    calls, rules = _calls(alternatives, separator)
    return _sized(f"start: {calls}\n{rules}\n")


def optional_calls_constraint(
    marker: str,
    marker_id: int | None,
    begin: str,
    alternatives: Sequence[tuple[Text, Mapping[str, Any], Text]],
    *,
    closing: Text = "",
    separator: Text | None = None,
    again: bool = False,
    bare: str = "",
) -> str:
    """Free text, in which every call is one of these.

    marker         what shows that calls follow, and its id if it is a token of its own
    begin          what follows it;  alternatives: as of `tool_constraint`, after that
    closing        what stands after the calls;  separator: between them, if there may be several
    again          text and further calls may follow
    bare           calls may also stand without the marker, where a line begins: a regular expression of what is taken for one
    """
    taken = rf"(?s:.*){_pattern(marker)}(?s:.*)"
    if bare:
        taken = rf"({taken}|((?s:.*)\n|[ \t\r\n]*)({bare})(?s:.*))"
    calls, rules = _calls(alternatives, separator)
    heads = ["MARKED" if marker_id is None else f"FREE? <[{marker_id}]> {_literal(begin)}"]
    terminals = [f"FREE: /(?s:.+)/ & ~/{taken}/", f"ANY: /(?s:.*)/ & ~/{taken}/"]
    if marker_id is None:
        terminals.append(f"MARKED: ANY {_literal(marker + begin)}")
    if bare:
        heads.append("BARE")
        terminals.append(f"BARE: ((/(?s:.+)\\n/ & ~/{taken}/) | /[ \\t\\r\\n]*/) {_literal(begin)}")
    start = "(head part)* FREE?" if again else "FREE? | head part"
    part = f"{calls} {_literal(closing)}"
    return _sized("\n".join([f"start: {start}", f"head: {' | '.join(heads)}", f"part: {part}", rules, *terminals]))


def _calls(alternatives: Sequence[tuple[Text, Mapping[str, Any], Text]], separator: Text | None) -> tuple[str, str]:
    """A call, or several with the separator, and the rules that this needs."""
    calls = [
        f"{_literal(before)} %json {json.dumps(dict(schema) | {'x-guidance': _JSON_OPTIONS})} {_literal(after)}"
        for before, schema, after in alternatives
    ]
    more = "" if separator is None else f" ({_literal(separator)} call)*"
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(calls)))}"]
    rules += [f"call_{index}: {call}" for index, call in enumerate(calls)]
    return f"call{more}", "\n".join(rules)


def _pattern(text: str) -> str:
    """A regular expression of this text, in the grammar's language."""
    return re.escape(text).replace("/", "\\/")


def _literal(text: Text) -> str:
    """In the grammar's language."""
    pieces = (text,) if isinstance(text, str) else text
    return " ".join(
        f"<[{piece}]>" if isinstance(piece, int) else json.dumps(piece, ensure_ascii=False) for piece in pieces
    )


def _sized(constraint: str) -> str:
    if (size := len(constraint.encode("utf-8", "replace"))) > MAX_CONSTRAINT_BYTES:
        raise ConstraintError(f"a constraint of {size} bytes: at most {MAX_CONSTRAINT_BYTES} are taken")
    return constraint


class Matcher:
    """A place in a grammar: which tokens may come next. One thread at a time.

    complete   nothing but the end may come
    error      why it can tell no more (a token that the grammar forbids, or the library's limits), else ""
    """

    __slots__ = ("_matcher", "_tokenizer", "complete", "error")

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self.error = ""
        self.complete = False
        self.check()

    @property
    def raw(self) -> LLMatcher:
        """For the library's own executor."""
        return self._matcher

    def fork(self) -> Matcher:
        return Matcher(self._matcher.deep_copy(), self._tokenizer)

    def advance(self, tokens: Iterable[int]) -> bool:
        """Goes past these tokens; False, with `error`, if that is not possible."""
        return self._after(lambda: self._matcher.consume_tokens(list(tokens)))

    def rollback(self, tokens: int) -> bool:
        """Takes the last tokens back."""
        return self._after(lambda: self._matcher.rollback(tokens))

    def fill_mask(self, address: int, size: int) -> bool:
        """Writes the tokens that may come next as a bit set of `size` bytes, token 0 in bit 0 of the first. End-of-sequence ids are
        among them where the grammar may end. Releases the GIL."""
        return self._after(lambda: self._matcher.unsafe_compute_mask_ptr(address, size))

    def mask(self) -> bytes:
        """As `fill_mask` writes it; empty after an error."""
        bits: list[bytes] = []
        return bits[0] if self._after(lambda: bits.append(self._matcher.compute_bitmask())) else b""

    def mistaken(self, special: int) -> int | None:
        """For a special token in the mask: None if the grammar means it. Where all that may follow is text that spells it, the library
        proposes the special token and would refuse it; then the ordinary token that begins this text."""
        found: list[int] = []

        def look() -> None:
            if not self._matcher.validate_tokens([special]):
                text = self._matcher.compute_ff_bytes().decode("utf-8", "ignore")
                found.extend(self._tokenizer.greedy_tokenize(text)[:1])

        self._after(look)
        return found[0] if found else None

    def _after(self, call: Callable[[], object]) -> bool:
        if self.error:
            return False
        try:
            call()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception; it ends this matcher and nothing else
            self.error = f"{type(error).__name__}: {error}"
            return False
        return self.check()

    def check(self) -> bool:
        """Looks whether the library is still content."""
        if self._matcher.is_error():
            self.error = self._matcher.get_error().strip() or "the grammar engine failed"
            return False
        self.complete = self._matcher.is_stopped()
        return True


class Vocabulary:
    """A model's tokens as the library sees them, and the grammars compiled for them lately. Thread-safe.

    tokenizer_json   content of tokenizer.json; vocab_size: columns of the model's logits, at least the tokenizer's
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Iterable[int]) -> None:
        ends = sorted(eos_ids)
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends or None)
        special = filter(self._tokenizer.is_special_token, range(self._tokenizer.vocab_size))
        self.special_ids = frozenset(special) - frozenset(ends)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, constraint: str) -> Matcher:
        """A matcher at the constraint's beginning. Raises ConstraintError with the library's reason. Takes a millisecond mostly,
        seconds at worst; releases the GIL."""
        with self._lock:
            compiled = self._compiled.get(constraint)
            if compiled is not None:
                self._compiled.move_to_end(constraint)
                return Matcher(compiled.deep_copy(), self._tokenizer)
        try:
            compiled = LLMatcher(self._tokenizer, _sized(constraint), log_level=0, limits=_LIMITS)
        except (ConstraintError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # A panic of the library is no Exception; whoever asked must hear of it all the same.
            raise ConstraintError(f"{type(error).__name__}: {error}"[:MAX_REASON]) from None
        if compiled.is_error():
            raise ConstraintError(" ".join(compiled.get_error().split())[:MAX_REASON] or "not a grammar")
        if compiled.is_stopped() and not compiled.is_accepting():
            raise ConstraintError("no text satisfies it")
        with self._lock:
            self._compiled[constraint] = compiled
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
            return Matcher(compiled.deep_copy(), self._tokenizer)
