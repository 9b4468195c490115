"""OpenAI's fields → the fields of shared.api.GenerateRequest. What is not honoured is refused, never ignored."""

from __future__ import annotations

import hashlib
from typing import Any

import msgpack

from services.gateway.errors import ApiError, refused
from services.gateway.schema import ChatCompletionRequest, Common, CompletionRequest
from shared.api import MAX_METADATA_BYTES, parse_request
from shared.errors import GorgonError

Body = dict[str, Any]

# Same name, same meaning.
_PASSED = (
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias", "temperature", "top_p", "top_k"),
    *("min_p", "typical_p", "seed", "n", "best_of", "stop", "stop_token_ids", "bad_words", "min_tokens", "ignore_eos"),
    *("num_beams", "length_penalty", "early_stopping", "penalty_alpha", "cd_alpha", "cd_beta", "priority"),
)
_REFUSED = {
    "audio": "audio is not supported",
    "function_call": "'function_call' is deprecated: use 'tool_choice'",
    "functions": "'functions' is deprecated: use 'tools'",
    "moderation": "moderation is not supported",
    "prediction": "predicted outputs are not supported",
    "prompt_cache_options": "the prefix cache has no options: it is always on",
    "reasoning_effort": "not supported: give the model's template its own switch in 'chat_template_kwargs'",
    "verbosity": "verbosity is not supported",
    "web_search_options": "web search is not supported",
}
# OpenAI's default of the older endpoint; chats have the model's, or the tokenizers'.
COMPLETION_MAX_TOKENS = 16
MAX_TOP_LOGPROBS = 20


def chat_body(asked: ChatCompletionRequest, deadline: float | None) -> Body:
    """Raises ApiError."""
    for field, message in _REFUSED.items():
        if getattr(asked, field) is not None:
            raise refused(message, field, code="unsupported_parameter")
    _only(asked.modalities in (None, ["text"]), "modalities", "only text is generated")
    _only(asked.service_tier in (None, "auto", "default"), "service_tier", "there is one tier, 'default'")
    _only(not asked.store, "store", "completions are not stored")
    _only(asked.prompt_cache_retention in (None, "in_memory"), "prompt_cache_retention", "prefixes are kept in memory")
    body = _common(asked, deadline) | {"messages": _messages(asked.messages)}
    wanted = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(wanted) == 2:
        raise refused("'max_tokens' and 'max_completion_tokens' disagree", "max_completion_tokens")
    if wanted:
        body["max_tokens"] = wanted.pop()
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    if asked.logprobs:
        body["logprobs"] = _top(asked.top_logprobs or 0, "top_logprobs")
    if asked.tools:
        functions = all(
            tool.get("type") == "function" and isinstance(tool.get("function"), dict) for tool in asked.tools
        )
        _only(functions, "tools", 'only {"type": "function", "function": {…}} is supported')
        body["tools"] = asked.tools
    if asked.tool_choice is not None:
        _only(bool(asked.tools) or asked.tool_choice == "none", "tool_choice", "it needs 'tools'")
        if asked.tools:
            body["tool_choice"] = _tool_choice(asked.tool_choice)
    if asked.parallel_tool_calls is False and asked.tools:
        body["parallel_tool_calls"] = False
    if asked.chat_template_kwargs is not None:
        body["chat_template_kwargs"] = asked.chat_template_kwargs
    names = {"safety_identifier": asked.safety_identifier, "prompt_cache_key": asked.prompt_cache_key}
    try:
        return checked(_with_metadata(body, asked, names))
    except ApiError as error:
        if asked.max_tokens is None:
            error.rename("max_tokens", "max_completion_tokens")
        raise


def completion_bodies(asked: CompletionRequest, deadline: float | None, max_prompts: int) -> list[Body]:
    """One body a prompt. Raises ApiError."""
    _only(not asked.suffix, "suffix", "insertion is not supported")
    prompts = _prompts(asked)
    if len(prompts) > max_prompts:
        raise refused(f"{len(prompts)} prompts: at most {max_prompts} are taken in one call", "prompt")
    body = _common(asked, deadline)
    body["max_tokens"] = asked.max_tokens if asked.max_tokens is not None else COMPLETION_MAX_TOKENS
    if asked.logprobs is not None:
        body["logprobs"] = _top(asked.logprobs, "logprobs")
    if asked.echo:
        body["echo"] = True
    body = _with_metadata(body, asked, {})
    if len(prompts) > 1:  # each is a request of its own, but the key of a retry stands for all of them together
        try:
            told = hashlib.sha256(msgpack.packb(prompts, unicode_errors="surrogatepass")).hexdigest()
        except OverflowError:
            raise refused("prompt: no token id has more than 64 bits", "prompt", code="invalid_request") from None
        body["metadata"] = body.get("metadata", {}) | {"prompts": told[:32]}
    return [checked(body | {"prompt": prompt}) for prompt in prompts]


def _common(asked: Common, deadline: float | None) -> Body:
    if asked.stream_options is not None:
        _only(bool(asked.stream), "stream_options", "it needs 'stream': true")
        _only(not asked.stream_options.include_obfuscation, "stream_options.include_obfuscation", "not supported")
    body: Body = {name: value for name in _PASSED if (value := getattr(asked, name)) is not None}
    body["stream"] = bool(asked.stream)
    if deadline is not None:
        body["deadline"] = deadline
    structured = _structured(asked.response_format)
    if structured is not None and asked.structured is not None:
        raise refused("'structured' and 'response_format' exclude each other", "structured")
    if (constraint := structured or asked.structured) is not None:
        body["structured"] = constraint
    return body


def _only(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise refused(f"{field}: {message}", field, code="unsupported_value")


def _top(count: int, field: str) -> int:
    if not 0 <= count <= MAX_TOP_LOGPROBS:
        raise refused(f"{field}: {count} is not between 0 and {MAX_TOP_LOGPROBS}", field)
    return count


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Templates know the system's role by its older name."""
    return [m | {"role": "system"} if m.get("role") == "developer" else m for m in messages]


def _tool_choice(choice: str | dict[str, Any]) -> str | dict[str, str]:
    if isinstance(choice, str):
        _only(choice in ("none", "auto", "required"), "tool_choice", "none, auto, required or a function")
        return choice
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        message = 'tool_choice: only {"type": "function", "function": {"name": …}} is supported'
        raise refused(message, "tool_choice", code="unsupported_value")
    return {"name": function["name"]}


def _structured(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    if response_format is None:
        return None
    kind = response_format.get("type")
    _known_fields(response_format, {"type", "json_schema"} if kind == "json_schema" else {"type"}, "response_format")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        spec = response_format.get("json_schema")
        if not isinstance(spec, dict) or not isinstance(schema := spec.get("schema"), dict):
            raise refused("response_format.json_schema.schema is missing", "response_format")
        _known_fields(spec, {"name", "description", "schema", "strict"}, "response_format.json_schema")
        return {"json_schema": schema}
    raise refused("response_format.type: text, json_object or json_schema", "response_format")


def _known_fields(given: dict[str, Any], known: set[str], name: str) -> None:
    if unknown := sorted(str(field)[:80] for field in given.keys() - known):
        field = f"{name}.{unknown[0]}"
        message = f"Unrecognized request argument supplied: {field}".encode("utf-8", "replace").decode()
        raise refused(message, "response_format", code="unknown_parameter")


def _prompts(asked: CompletionRequest) -> list[str | list[int]]:
    prompt = asked.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refused("prompt: an empty list", "prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _with_metadata(body: Body, asked: Common, names: dict[str, str | None]) -> Body:
    """The names that a client gives its end users go along with the request's metadata. Raises ApiError if they alone are too long."""
    given = {name: value for name, value in ({"user": asked.user} | names).items() if value is not None}
    sizes = {name: len(value.encode("utf-8", "surrogatepass")) for name, value in given.items()}
    if sum(sizes.values()) > MAX_METADATA_BYTES:
        longest = max(sizes, key=sizes.__getitem__)
        message = f"{longest}: what goes along with the request is more than {MAX_METADATA_BYTES} bytes"
        raise refused(message, longest, code="invalid_request")
    if asked.metadata or given:
        body["metadata"] = (asked.metadata or {}) | given
    return body


def checked(body: Body) -> Body:
    """The body, if the pipeline would take it. Raises ApiError."""
    try:
        parse_request(body)
    except GorgonError as error:
        raise ApiError.of(error) from None
    try:
        msgpack.packb(body)
    except (UnicodeEncodeError, OverflowError, ValueError, RecursionError) as error:
        raise refused(f"the request holds what cannot be sent: {str(error)[:200]}") from None
    return body
