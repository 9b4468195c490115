"""What the tokenizer stage reads from a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.tokenizer.chat_template import ChatTemplate, TemplateBroken
from services.tokenizer.encoder import Encoder
from services.tokenizer.tool_format import tool_format_of
from shared.api import GenerateRequest
from shared.errors import StartError
from shared.model_folder import eos_ids, named_eos_ids
from shared.sampling import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS

# The named special tokens that transformers hands to chat templates.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Names in generation_config.json → fields of GenerateRequest.
_SAMPLING_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}


class ModelFilesError(StartError):
    """`code` is "missing_file" or "invalid_file"."""


@dataclass(frozen=True)
class ModelFiles:
    """defaults   of a request, from generation_config.json: fields of GenerateRequest, valid ones
    bad_words  sequences of ids that generation_config.json bans
    context    tokens of prompt and completion that the model is made for, None if config.json does not say
    tool_format   of shared.tool_calls, "" if the model is not known to call tools
    eos_ids    end-of-sequence ids, as the worker reads them
    """

    encoder: Encoder
    template: ChatTemplate | None
    vocab_size: int
    context: int | None
    defaults: Mapping[str, Any]
    bad_words: tuple[tuple[int, ...], ...] = ()
    tool_format: str = ""
    eos_ids: frozenset[int] = frozenset()


def load_model_files(folder: Path) -> ModelFiles:
    """Raises ModelFilesError that names the file and what is wrong with it."""
    if not folder.is_dir():
        raise ModelFilesError("missing_file", f"there is no model folder {folder}")
    config = _read_json(folder / "config.json", required=True)
    text_config = config.get("text_config")
    config = config | text_config if isinstance(text_config, dict) else config
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(folder, tokenizer_config)
    tokenizer = _load_tokenizer(folder / "tokenizer.json")
    vocab_size = config.get("vocab_size", tokenizer.get_vocab_size())
    context = next((config[name] for name in _CONTEXT_FIELDS if config.get(name) is not None), None)
    for name, value in (("vocab_size", vocab_size), ("max_position_embeddings", context)):
        if value is not None and (type(value) is not int or value < 1):
            raise ModelFilesError("invalid_file", f"{folder / 'config.json'}: {name} is {value!r}")
    templates = _read_templates(folder, tokenizer_config)
    try:
        template = ChatTemplate(templates, special) if templates else None
    except TemplateBroken as error:
        raise ModelFilesError("invalid_file", f"{folder}: {error}") from None
    path = folder / "generation_config.json"
    generation = _read_json(path)
    try:
        ends = eos_ids(config, generation, vocab_size)
    except ValueError as error:
        raise ModelFilesError("invalid_file", f"{folder}: {error}") from None
    return ModelFiles(
        Encoder(tokenizer),
        template,
        vocab_size,
        context,
        _defaults(path, generation),
        _bad_words(path, generation, named_eos_ids(config, generation), vocab_size),
        tool_format_of(templates.values(), [token.content for token in tokenizer.get_added_tokens_decoder().values()]),
        ends,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelFilesError("missing_file", f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError("invalid_file", f"{path}: {error}") from None


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    if not required and not path.exists():
        return {}
    try:
        data = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelFilesError("invalid_file", f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelFilesError("invalid_file", f"{path} does not hold an object")
    return data


def _special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """A token is written as a string or as an object with `content`. The separate map is the old form."""
    named = dict(tokenizer_config)
    if "added_tokens_decoder" not in named:
        named |= _read_json(folder / "special_tokens_map.json")
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _load_tokenizer(path: Path) -> Tokenizer:
    """Its post-processor alone decides which special tokens a plain prompt gets: where there is a tokenizer.json, transformers ignores
    `add_bos_token` in tokenizer_config.json too."""
    text = _read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelFilesError("invalid_file", f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Files of their own replace those in tokenizer_config.json, where `chat_template` is a string or a list of named ones."""
    named = {path.stem: _read_text(path) for path in folder.glob("additional_chat_templates/*.jinja")}
    if (path := folder / "chat_template.jinja").exists():
        named["default"] = _read_text(path)
    written = tokenizer_config.get("chat_template")
    if not named and isinstance(written, str):
        named["default"] = written
    elif not named and isinstance(written, list):
        try:
            named = {entry["name"]: entry["template"] for entry in written}
        except (TypeError, KeyError) as error:
            raise ModelFilesError("invalid_file", f"{folder}: chat_template: {error!r}") from None
    return named


def _defaults(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {field: config[name] for name, field in _SAMPLING_DEFAULTS.items() if config.get(name) is not None}
    try:
        request = GenerateRequest.model_validate({"prompt": "-"} | defaults)
    except ValueError as error:
        raise ModelFilesError("invalid_file", f"{path}: {error}") from None
    return {name: getattr(request, name) for name in defaults}


def _bad_words(
    path: Path, config: Mapping[str, Any], ends: frozenset[int], vocab_size: int
) -> tuple[tuple[int, ...], ...]:
    """`bad_words_ids`. As in transformers, an end-of-sequence id alone is not banned."""
    words = config.get("bad_words_ids") or []
    try:
        banned = tuple(tuple(word) for word in words if not (len(word) == 1 and word[0] in ends))
        fits = len(banned) <= MAX_BAD_WORDS and all(1 <= len(word) <= MAX_BAD_WORD_TOKENS for word in banned)
        if not fits or any(type(i) is not int or not 0 <= i < vocab_size for word in banned for i in word):
            raise ValueError(f"not up to {MAX_BAD_WORDS} lists of 1 to {MAX_BAD_WORD_TOKENS} token ids")
    except (TypeError, ValueError) as error:
        raise ModelFilesError("invalid_file", f"{path}: bad_words_ids: {error}") from None
    return banned
