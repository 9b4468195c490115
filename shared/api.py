"""The public contract: what a client may ask and what events it gets. docs/protocol.md explains it with examples.

A request is one JSON object or MessagePack map; the answer's encoding follows the request's. Validation is strict: a wrong type, a
value out of range or an unknown field is refused with `invalid_request` that names the field; nothing is silently ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

import msgpack
import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from shared.codec import pack, pack_ids
from shared.errors import RETRYABLE, ErrorCode, GorgonError
from shared.messages import Failure, ReplyTo
from shared.sampling import (
    MAX_BAD_WORDS,
    MAX_BEAMS,
    MAX_CONTRASTIVE,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
)
from shared.strategies import complaint
from shared.subjects import TOKEN_RULE, is_token
from shared.traceparent import parse as parse_traceparent

DEFAULT_TENANT = "default"
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16
MAX_METADATA_BYTES = 4096
MAX_TOKENS = 1_000_000
MAX_BAD_WORD_STRINGS = MAX_BAD_WORDS // 2  # each is banned with and without a space before it
MAX_BAD_WORD_CHARS = 256
MAX_DEPTH = 64  # of nesting in a request
MAX_ALTERNATIVES = 1000  # of structured.choice

Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_MOST_ID = 2**31 - 1


def _prompt(value: Any) -> Any:
    """As `str | list[TokenId] | None` would have it, in a tenth of the time for thousands of ids."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("neither a string nor an array of token ids")
    if value and not _are_ids(value):
        at = next(i for i, item in enumerate(value) if type(item) is not int or not 0 <= item <= _MOST_ID)
        raise ValueError(f"item {at} is no token id, an integer from 0 to {_MOST_ID}")
    return value


def _are_ids(values: list[Any]) -> bool:
    if set(map(type, values)) != {int}:
        return False
    try:
        return pack_ids(values)[3::4].isascii()  # none of the highest bytes has the sign's bit
    except OverflowError:
        return False


Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Bias = Annotated[Finite, Field(ge=-100, le=100)]

# What says only how the answer travels, and for how long: it may differ when a request is sent again. (Whoever has so much time in all
# sends less with each repetition; the request keeps its first deadline.)
_DELIVERY_FIELDS = frozenset({"id", "tenant", "stream", "batched", "traceparent", "deadline"})


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ChatMessage(Strict):
    """One turn. Templates may use further keys (tool calls, names): those are passed through to the template."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None


class Structured(Strict):
    """What the text must be; exactly one of these. What each means: docs/structured.md."""

    json_schema: dict[str, Any] | None = None
    json_object: Literal[True] | None = None
    regex: Annotated[str, Field(min_length=1)] | None = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_ALTERNATIVES, fail_fast=True),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Structured:
        if sum(value is not None for value in self.__dict__.values()) != 1:
            raise ValueError(f"exactly one of {', '.join(Structured.model_fields)} is needed")
        return self


class NamedTool(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]


@cache
def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """To compare with, not to change."""
    return {name: field.get_default(call_default_factory=True) for name, field in model.model_fields.items()}


class GenerateRequest(Strict):
    """The body of a request. Exactly one of `prompt` and `messages`. Sampling fields: see shared/sampling.py.

    None for a sampling field means the model's own default (generation_config.json), else the one of SamplingParams.
    """

    id: str | None = None  # the client's own, unique within its tenant; makes a retry safe. Default: a random one
    tenant: str = DEFAULT_TENANT
    model: str | None = None  # if given, it must be the subject's
    prompt: Annotated[str | list[int] | None, PlainValidator(_prompt)] = None
    # Without fail_fast each of a million wrong items would become a complaint of its own.
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None  # handed to the chat template
    # With tools: "auto" unless given. "required" demands a call, a name a call of that tool.
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True  # false: at most one call
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] = 1
    best_of: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] = Field(
        default_factory=list, max_length=MAX_STOPS, fail_fast=True
    )
    stop_token_ids: list[TokenId] = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    ignore_eos: bool = False
    repetition_penalty: Annotated[Finite, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Bias] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)  # by token id
    bad_words: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]],
            Field(max_length=MAX_BAD_WORD_STRINGS, fail_fast=True),
        ]
        | None
    ) = None
    min_tokens: Annotated[StrictInt, Field(ge=0, le=MAX_TOKENS)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    num_beams: Annotated[StrictInt, Field(ge=1, le=MAX_BEAMS)] = 1
    length_penalty: Annotated[Finite, Field(ge=-10, le=10)] = 1.0
    early_stopping: bool | Literal["never"] = False
    penalty_alpha: Annotated[Finite, Field(gt=0, le=1)] | None = None
    cd_alpha: Annotated[Finite, Field(gt=0, le=1)] | None = None
    cd_beta: Annotated[Finite, Field(ge=0, le=10)] | None = None
    cd_temperature: Annotated[Finite, Field(gt=0, le=100)] = 1.0
    prompt_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    priority: Annotated[StrictInt, Field(ge=-100, le=100)] = 0
    deadline: Annotated[Finite, Field(gt=0, le=86_400)] | None = None  # seconds from acceptance
    stream: bool = True
    batched: bool = False  # the client takes arrays of events (of several requests on one reply subject)
    metadata: dict[str, Any] = Field(default_factory=dict)
    traceparent: Annotated[str, Field(max_length=64)] | None = None
    structured: Structured | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        """Before each of a million wrong entries becomes a complaint."""
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} entries are taken, not {len(value)}")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        for key in value:
            if not (key.isascii() and key.isdecimal() and str(int(key[:11])) == key and int(key) < 2**31):
                raise ValueError(f"{key!r:.20} is not a token id")
        return value

    @field_validator("id", "tenant")
    @classmethod
    def _is_token(cls, value: str | None) -> str | None:
        if value is not None and not is_token(value):
            raise ValueError(TOKEN_RULE)
        return value

    @field_validator("traceparent")
    @classmethod
    def _is_traceparent(cls, value: str | None) -> str | None:
        if value is not None and parse_traceparent(value) is None:
            raise ValueError("not a W3C traceparent: 00-<32 hex digits>-<16 hex digits>-<2 hex digits>")
        return value

    @field_validator("metadata")
    @classmethod
    def _small_metadata(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(pack(value))
        except OverflowError:
            raise ValueError("an integer of more than 64 bits") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"more than {MAX_METADATA_BYTES} bytes")
        return value

    @model_validator(mode="after")
    def _structured_ends(self) -> GenerateRequest:
        if self.structured is not None and self.demands_call:
            raise ValueError("'structured' and 'tool_choice' both say what the text must be")
        if self.demands_call and self.ignore_eos:
            raise ValueError("'tool_choice' says where the text ends: 'ignore_eos' contradicts it")
        if self.structured is not None and self.ignore_eos:
            raise ValueError("'structured' says where the text ends: 'ignore_eos' contradicts it")
        return self

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of 'prompt' and 'messages' is needed")
        if self.prompt is not None and not self.prompt:
            raise ValueError("prompt: it is empty")
        if self.messages is not None and not self.messages:
            raise ValueError("messages: it is empty")
        if self.messages is None and (self.tools is not None or self.chat_template_kwargs is not None):
            raise ValueError("'tools' and 'chat_template_kwargs' need 'messages'")
        if self.tools is None and self.tool_choice is not None:
            raise ValueError("'tool_choice' needs 'tools'")
        if self.tools is None and not self.parallel_tool_calls:
            raise ValueError("'parallel_tool_calls' needs 'tools'")
        if not self.tools and self.demands_call:
            raise ValueError("'tool_choice' demands a call, but there are no 'tools'")
        return self

    @model_validator(mode="after")
    def _one_strategy(self) -> GenerateRequest:
        if (wrong := complaint(self.changed)) is not None:
            raise ValueError(wrong)
        if self.penalty_alpha is not None and self.top_k is not None and self.top_k > MAX_CONTRASTIVE:
            raise ValueError(f"contrastive search takes at most {MAX_CONTRASTIVE} candidates: 'top_k'")
        return self

    @property
    def changed(self) -> dict[str, Any]:
        """The fields that were given with another value than their default."""
        defaults = _defaults(type(self))
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return {name: value for name, value in given.items() if value != defaults[name]}

    @property
    def demands_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def uses_tools(self) -> bool:
        """Whether the model is told of tools, and its calls are looked for."""
        return bool(self.tools) and self.tool_choice != "none"

    @model_validator(mode="after")
    def _enough_choices(self) -> GenerateRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: {self.best_of} is less than n, {self.n}")
        return self

    @model_validator(mode="after")
    def _something_to_do(self) -> GenerateRequest:
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens: 0 is for 'echo' and 'prompt_logprobs' only")
        return self


# ---------------------------------------------------------------- bytes


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def encoding_of(data: bytes) -> str:
    """Either "json" or "msgpack". JSON is told by its first non-blank byte `{`, which is no MessagePack map."""
    start = data.lstrip()[:1]
    return "json" if start in (b"{", b"") else "msgpack"


def decode_body(data: bytes) -> tuple[dict[str, Any], str]:
    """A client's bytes → (map, `encoding_of` them). Raises GorgonError(INVALID_REQUEST)."""
    encoding = encoding_of(data)
    try:
        if encoding == "json":
            body = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        else:
            body = msgpack.unpackb(data, strict_map_key=True)
    except RecursionError:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"the {encoding} is nested too deeply") from None
    except Exception as error:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"not valid {encoding}: {_printable(str(error))}") from None
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise GorgonError(ErrorCode.INVALID_REQUEST, "the body must be a map with string keys")
    return body, encoding


def _nesting_exceeds(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        return levels == 0 or any(_nesting_exceeds(v, levels - 1) for v in value.values())
    if isinstance(value, list):
        return levels == 0 or any(_nesting_exceeds(v, levels - 1) for v in value if type(v) in (list, dict))
    return False


def _canonical(value: Any) -> bytes:
    """Equal for equal values, in whatever encoding and order of keys they came. ValueError for what JSON cannot express."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate is not a character") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def hash_body(body: Mapping[str, Any], **context: Any) -> bytes:
    """16 bytes that tell two requests under one id apart (BLAKE2b, RFC 7693), over everything that says what is to be generated
    and `context`. `body` has passed parse_request. Raises GorgonError(INVALID_REQUEST) for values that JSON cannot express or that are
    nested too deeply."""
    if any(_nesting_exceeds(value, MAX_DEPTH) for field, value in body.items() if field != "prompt"):
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"nested more than {MAX_DEPTH} levels deep")
    said = {k: v for k, v in body.items() if k not in _DELIVERY_FIELDS and v is not None}
    if isinstance(ids := said.get("prompt"), list):
        said["prompt"] = {"ids": hashlib.blake2b(pack_ids(ids), digest_size=16).hexdigest()}
    try:
        return hashlib.blake2b(_canonical([said, context]), digest_size=16).digest()
    except ValueError as error:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"a value that JSON cannot express: {error}") from None


def check_tenant(body: Mapping[str, Any], tenant: str | None) -> None:
    """Through a tenant's own door a body need not say whose it is, but it must not say otherwise.
    Raises GorgonError(INVALID_REQUEST)."""
    if tenant is not None and body.get("tenant", tenant) != tenant:
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"tenant: this connection is of tenant {tenant!r}")


def parse_request(body: Mapping[str, Any]) -> GenerateRequest:
    """Raises GorgonError(INVALID_REQUEST) that names offending fields."""
    if unknown := body.keys() - GenerateRequest.model_fields.keys():
        names = ", ".join(_printable(name) for name in sorted(unknown)[:5])
        raise GorgonError(ErrorCode.INVALID_REQUEST, f"unknown fields: {names}")
    try:
        return GenerateRequest.model_validate(body)
    except ValidationError as error:
        raise GorgonError(ErrorCode.INVALID_REQUEST, said(error)) from None
    except RecursionError:
        raise GorgonError(ErrorCode.INVALID_REQUEST, "nested too deeply") from None


def said(error: ValidationError) -> str:
    """What is wrong, each with the field that it is about. What concerns several fields names them itself."""
    problems = []
    for e in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        field, message = _printable(".".join(map(str, e["loc"]))), e["msg"].removeprefix("Value error, ")
        problems.append(f"{field}: {message}" if field else message)
    return "; ".join(problems)


def _printable(text: str) -> str:
    """What a client sent, fit to be said in a message: neither long nor with lone surrogates."""
    return text[:80].encode("utf-8", "replace").decode()


def _json_number(value: Any) -> Any:
    """JSON has no infinities: a log-probability of -inf is sent as null (as orjson does of itself)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _json_number(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_number(v) for v in value]
    return value


def encode_event(event: Mapping[str, Any] | list[Mapping[str, Any]], encoding: str) -> bytes:
    """An event, or for `batched` clients an array of them, as the client wants it."""
    if encoding == "msgpack":
        return pack(event)
    try:
        return orjson.dumps(event)
    except TypeError:
        # A client's metadata may hold what only the slower one can say: lone surrogates, integers beyond 64 bits.
        return json.dumps(_json_number(event), separators=(",", ":")).encode()


def encode_for(reply: ReplyTo, events: Iterable[Mapping[str, Any]]) -> list[bytes]:
    """Messages for a reply subject: one array if the client takes batches, else one message an event."""
    if reply.batched:
        return [encode_event(list(events), reply.encoding)]
    return [encode_event(event, reply.encoding) for event in events]


# ---------------------------------------------------------------- events

TERMINAL_EVENTS = frozenset({"finished", "cancelled", "error"})


def accepted_event(
    request_id: str,
    tenant: str,
    *,
    prompt_tokens: int,
    seed: int,
    replay: str,
    results: str | None,
    tool_format: str = "",
) -> dict[str, Any]:
    """`replay` is the subject to ask for what was missed; `results` (durable door) the subject that the events are stored under;
    `tool_format` how calls are written in the text (shared.tool_calls), if they are looked for."""
    event = dict(event="accepted", id=request_id, tenant=tenant, prompt_tokens=prompt_tokens, seed=seed, replay=replay)
    return event | ({"results": results} if results else {}) | ({"tool_format": tool_format} if tool_format else {})


def tokens_event(
    request_id: str,
    choice: int,
    position: int,
    ids: list[int],
    text: str,
    offset: int,
    logprobs: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """`ids` extend the choice at `position` (index of ids[0]); `text` extends its text at character `offset`. The two advance on
    their own: text lags while a character or a possible stop string is incomplete, so either may be empty. Choice PROMPT (-1) is the
    prompt, told like a choice.

    logprobs, one for each id: {"id", "logprob", "top": [[id, logprob], ...]}.
    """
    event = dict(event="tokens", id=request_id, choice=choice, position=position, ids=ids, text=text, offset=offset)
    if logprobs is not None:
        event["logprobs"] = logprobs
    return event


def finished_event(
    request_id: str,
    choices: list[dict[str, Any]],
    *,
    prompt_tokens: int,
    completion_tokens: int,
    timings: Mapping[str, float],
    metadata: Mapping[str, Any],
    cached_tokens: int = 0,
    prompt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """prompt: lengths (and with stream=false contents) of what was told of the prompt, as of a choice.

    choices: {"choice", "finish_reason": "stop", "length" or "tool_calls", "stop": stop string, stop id or null, "tokens": count,
    "chars": length of its text} and, with stream=false, "ids", "text" and "logprobs" too. A choice that calls tools also has
    "tool_calls": [{"id", "name", "arguments": JSON text, for a broken call "error"}] and "content", its text without the calls."""
    told = {} if prompt is None else {"prompt": prompt}
    return dict(
        event="finished",
        id=request_id,
        choices=choices,
        **told,
        usage=usage_of(prompt_tokens, completion_tokens, cached_tokens),
        timings=dict(timings),
        metadata=dict(metadata),
    )


def cancelled_event(
    request_id: str,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    metadata: Mapping[str, Any],
    choices: list[dict[str, Any]],
    cached_tokens: int = 0,
    prompt: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """choices: {"choice", "tokens", "chars"} of what was told; prompt: the same of the prompt, if it was to be told."""
    told = {} if prompt is None else {"prompt": prompt}
    usage = usage_of(prompt_tokens, completion_tokens, cached_tokens)
    return dict(event="cancelled", id=request_id, choices=choices, **told, usage=usage, metadata=dict(metadata))


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, int]:
    """cached_tokens: of the prompt, those that a worker's prefix cache had."""
    return dict(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        cached_tokens=cached_tokens,
    )


def as_error(event: Mapping[str, Any]) -> GorgonError:
    """What an error event says."""
    try:
        code = ErrorCode(event["code"])
    except ValueError:
        code = ErrorCode.INTERNAL  # of a newer server
    return GorgonError(code, event["message"], retry_after=event.get("retry_after"))


def error_event(
    request_id: str | None, error: GorgonError | Failure, *, metadata: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`id` is null only when the request was too broken to have one."""
    event: dict[str, Any] = dict(
        event="error",
        id=request_id,
        code=str(error.code),
        message=error.message,
        retryable=error.code in RETRYABLE,
    )
    if isinstance(error, GorgonError) and error.retry_after is not None:
        event["retry_after"] = error.retry_after
    if metadata:
        event["metadata"] = dict(metadata)
    return event
