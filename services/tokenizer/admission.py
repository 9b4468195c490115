"""A client's bytes → a Request of the pipeline, or the reason why not: a function of the bytes and the model's files."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog

from services.tokenizer.chat_template import MAX_CHARS
from services.tokenizer.model_files import ModelFiles
from services.tokenizer.tool_choice import forced_call, strict_calls
from shared.api import (
    DEFAULT_TENANT,
    GenerateRequest,
    NamedTool,
    check_tenant,
    decode_body,
    encoding_of,
    hash_body,
    parse_request,
)
from shared.codec import pack_ids
from shared.errors import ErrorCode, GorgonError
from shared.messages import ReplyTo, Request
from shared.sampling import MAX_BAD_WORD_TOKENS, SamplingParams
from shared.strategies import strategy_of
from shared.structured import ConstraintError, constraint_of
from shared.subjects import is_token, request_key
from shared.tool_calls import SINGLE
from shared.traceparent import trace_id_of

log = structlog.get_logger()

# What generation_config.json may say where the request does not.
_MODEL_DEFAULTS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens",
)  # fmt: skip
_SAMPLED = frozenset({"max_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p"})


class Addressee(NamedTuple):
    """Who is told: as much of it as could be read. `id` is None when the request has no usable one."""

    reply: ReplyTo
    id: str | None = None
    tenant: str = DEFAULT_TENANT
    metadata: Mapping[str, Any] = {}
    trace: str = ""  # the client's traceparent

    @property
    def key(self) -> str | None:
        """For logs."""
        return request_key(self.tenant, self.id) if self.id is not None else None


class Admitted(NamedTuple):
    request: Request
    to: Addressee
    prompt_tokens: int
    constrained_by: str  # the field that says what the text must be, if one does


class Refused(NamedTuple):
    error: GorgonError
    to: Addressee


class Admission:
    """Thread-safe."""

    def __init__(self, files: ModelFiles, model: str, default_max_tokens: int) -> None:
        self._files = files
        self._model = model
        self._defaults = {"max_tokens": default_max_tokens, **files.defaults}

    def admit(
        self,
        data: bytes,
        reply_subject: str,
        context: int | None,
        *,
        tenant: str | None = None,
        job_id: str | None = None,
    ) -> Admitted | Refused:
        """context   tokens of prompt and completion together, None if unknown
        tenant    through whose door it came; None: the body says whose it is
        job_id    of a durable request: its id if it has none of its own
        """
        started = time.perf_counter()
        to = Addressee(ReplyTo(reply_subject, encoding_of(data)), tenant=tenant or DEFAULT_TENANT)
        try:
            body, _ = decode_body(data)
            to = addressee_of(body, to, tenant)
            asked = parse_request(body)
            check_tenant(body, tenant)
            to = to._replace(metadata=asked.metadata, reply=to.reply._replace(stream=asked.stream))
            if to.id is None:
                to = to._replace(id=job_id or uuid.uuid4().hex)
            return self._request(asked, body, to, context, started, durable=job_id is not None)
        except GorgonError as error:
            return Refused(error, to)
        except Exception as error:
            log.error("admission_failed", request_id=to.key, exc_info=error)
            return Refused(GorgonError(ErrorCode.INTERNAL, "the request could not be prepared"), to)

    def _request(
        self,
        asked: GenerateRequest,
        body: Mapping[str, Any],
        to: Addressee,
        context: int | None,
        started: float,
        durable: bool,
    ) -> Admitted:
        if asked.model is not None and asked.model != self._model:
            message = f"model: {asked.model!r:.80} was sent to the subject of {self._model!r}"
            raise GorgonError(ErrorCode.INVALID_REQUEST, message)
        assert to.id is not None
        key = request_key(to.tenant, to.id)
        body_hash = hash_body(body, model=self._model, durable=durable)
        ids = self._prompt_ids(asked, body, context)
        self._check_ids("prompt", ids)
        self._check_ids("stop_token_ids", asked.stop_token_ids)
        self._check_ids("logit_bias", [int(token) for token in asked.logit_bias])
        request = Request(
            key=key,
            model=self._model,
            body_hash=body_hash,
            prompt_ids=pack_ids(ids),
            sampling=self._sampling(asked, key, body_hash, len(ids), context),
            reply=to.reply,
            stop=tuple(asked.stop),
            choices=asked.best_of or asked.n,
            best=asked.n if _ranks(asked) else 0,
            echo=asked.echo,
            durable=durable,
            priority=asked.priority,
            deadline=asked.deadline,
            metadata=asked.metadata,
            trace=to.trace,
            tokenize_ms=(time.perf_counter() - started) * 1e3,
            tool_format=self._tool_format(asked),
            constraint=self._constraint(asked),
        )
        return Admitted(request, to, len(ids), _constrained_by(asked))

    def _tool_format(self, asked: GenerateRequest) -> str:
        """How calls are to be looked for in the text, "" if they are not."""
        name = self._files.tool_format if asked.uses_tools else ""
        return name if asked.parallel_tool_calls else SINGLE.get(name, "")

    def _constraint(self, asked: GenerateRequest) -> str:
        """Not compiled yet: that may take long."""
        try:
            if asked.demands_call:
                name = asked.tool_choice.name if isinstance(asked.tool_choice, NamedTool) else None
                files = self._files
                several = name is None and asked.parallel_tool_calls
                return forced_call(files.tool_format, asked.tools or (), name, files.encoder.added_id, several)
            if asked.structured is not None:
                return constraint_of(asked.structured)
            return self._strict_calls(asked) if asked.uses_tools else ""
        except ConstraintError as error:
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"{_constrained_by(asked)}: {error}") from None

    def _strict_calls(self, asked: GenerateRequest) -> str:
        files, strategy = self._files, strategy_of(asked.changed)
        constraint = strict_calls(
            files.tool_format, asked.tools or (), files.encoder.added_id, asked.parallel_tool_calls
        )
        if constraint and (strategy is not None or asked.ignore_eos):
            other = strategy or "ignore_eos"
            raise GorgonError(ErrorCode.INVALID_REQUEST, f"tools: 'strict' cannot be used with {other!r}")
        return constraint

    def _prompt_ids(self, asked: GenerateRequest, body: Mapping[str, Any], context: int | None) -> list[int]:
        if isinstance(asked.prompt, list):
            return asked.prompt
        encoder = self._files.encoder
        if asked.messages is not None:
            if self._files.template is None:
                message = f"model {self._model!r} has no chat template: send a 'prompt'"
                raise GorgonError(ErrorCode.UNSUPPORTED, message)
            tools = asked.tools if asked.tool_choice != "none" else None
            most = encoder.longest_text(context) if context is not None else MAX_CHARS
            text = self._files.template.render(body["messages"], tools, asked.chat_template_kwargs, most)
        else:
            assert asked.prompt is not None
            text = asked.prompt
        if context is not None and len(text) > encoder.longest_text(context):
            message = f"a prompt of {len(text)} characters exceeds the context of {context} tokens"
            raise GorgonError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, message)
        ids = encoder.encode(text, add_special_tokens=asked.messages is None)
        if not ids:
            raise GorgonError(ErrorCode.INVALID_REQUEST, "the prompt has no tokens")
        return ids

    def _check_ids(self, field: str, ids: list[int]) -> None:
        if ids and (largest := max(ids)) >= self._files.vocab_size:
            message = f"{field}: id {largest} is outside the vocabulary of {self._files.vocab_size}"
            raise GorgonError(ErrorCode.INVALID_REQUEST, message)

    def _sampling(
        self, asked: GenerateRequest, key: str, body_hash: bytes, prompt_tokens: int, context: int | None
    ) -> SamplingParams:
        room = context - prompt_tokens if context is not None else None
        least = 1 if asked.max_tokens is None else asked.max_tokens
        if room is not None and room < least:
            wanted = f"{prompt_tokens} prompt tokens and {least} to generate"
            raise GorgonError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, f"{wanted} exceed the context of {context} tokens")
        given = {name: value for name in _MODEL_DEFAULTS if (value := getattr(asked, name)) is not None}
        strategy = strategy_of(asked.changed)
        # The model's defaults are meant for sampling: searches take what the request says.
        chosen = (self._defaults if strategy is None else self._unsampled(strategy)) | given
        if room is not None:
            chosen["max_tokens"] = min(chosen["max_tokens"], room)
        if chosen.get("min_tokens", 0) > chosen["max_tokens"]:
            if asked.min_tokens is not None:
                message = f"min_tokens: {asked.min_tokens} is above max_tokens, {chosen['max_tokens']}"
                raise GorgonError(ErrorCode.INVALID_REQUEST, message)
            chosen["min_tokens"] = chosen["max_tokens"]
        return SamplingParams(
            **chosen,
            seed=asked.seed if asked.seed is not None else _draw_seed(key, body_hash),
            stop_token_ids=tuple(asked.stop_token_ids),
            ignore_eos=asked.ignore_eos,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logprobs=asked.logprobs,
            logit_bias=tuple((int(token), bias) for token, bias in asked.logit_bias.items()),
            bad_words=self._bad_words(asked) if strategy is None else (),
            num_beams=asked.num_beams,
            length_penalty=asked.length_penalty,
            early_stopping=asked.early_stopping,
            penalty_alpha=asked.penalty_alpha or 0.0,
            cd_alpha=asked.cd_alpha or 0.0,
            cd_beta=asked.cd_beta,
            cd_temperature=asked.cd_temperature,
            # An echo comes with log-probabilities if the completion does, as OpenAI's.
            prompt_logprobs=asked.logprobs if asked.prompt_logprobs is None and asked.echo else asked.prompt_logprobs,
            ranked=_ranks(asked),
        )

    def _unsampled(self, strategy: str) -> dict[str, Any]:
        """Defaults of a request with another strategy than sampling."""
        if strategy == "cd_alpha":  # which samples, too, but has no penalties
            return {name: value for name, value in self._defaults.items() if name in _SAMPLED}
        return {"max_tokens": self._defaults["max_tokens"], "temperature": 0.0}

    def _bad_words(self, asked: GenerateRequest) -> tuple[tuple[int, ...], ...]:
        if asked.bad_words is None:
            return self._files.bad_words
        banned: dict[tuple[int, ...], None] = {}
        for word in asked.bad_words:
            for ids in self._files.encoder.bad_words(word):
                if len(ids) > MAX_BAD_WORD_TOKENS:
                    message = f"bad_words: {word!r:.40} has {len(ids)} tokens, more than {MAX_BAD_WORD_TOKENS}"
                    raise GorgonError(ErrorCode.INVALID_REQUEST, message)
                banned[ids] = None
        return tuple(banned)


def _ranks(asked: GenerateRequest) -> bool:
    """The client is told of the best choices only."""
    return asked.best_of is not None and asked.best_of > asked.n


def _constrained_by(asked: GenerateRequest) -> str:
    """The field that says what the text must be."""
    if asked.demands_call:
        return "tool_choice"
    return "structured" if asked.structured is not None else "tools"


def addressee_of(body: Mapping[str, Any], to: Addressee, tenant: str | None = None) -> Addressee:
    """`to`, completed by what a body that may be wrong in any way says. `tenant`: as of `admit`."""
    request_id, trace = body.get("id"), body.get("traceparent")
    tenant = tenant if tenant is not None else body.get("tenant")
    return to._replace(
        reply=to.reply._replace(batched=body.get("batched") is True),
        id=request_id if isinstance(request_id, str) and is_token(request_id) else None,
        tenant=tenant if isinstance(tenant, str) and is_token(tenant) else DEFAULT_TENANT,
        trace=trace if isinstance(trace, str) and trace_id_of(trace) else "",
    )


def _draw_seed(key: str, body_hash: bytes) -> int:
    """As good as random, since ids are unique, and yet the same for every repetition of a request, however late it comes."""
    digest = hashlib.blake2b(key.encode() + body_hash, digest_size=8).digest()
    return int.from_bytes(digest) >> 1
