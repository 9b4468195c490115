"""Bodies of the OpenAI door, as OpenAI's API reference has them, and Gorgon's fields beside them. What of them is honoured and how it
is passed on is said in services/gateway/translate.py; ranges are checked there too, by the pipeline's own contract (shared/api.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Objects = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]

MAX_KEYS = 4096  # of an object that is looked at entry by entry: each wrong one would become a complaint of its own


def few_keys(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_KEYS:
        raise ValueError(f"{len(value)} keys: at most {MAX_KEYS} are taken")
    return value


FewKeys = BeforeValidator(few_keys)


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        return few_keys(value)


class StreamOptions(Body):
    """`continuous_usage_stats` (vLLM's) puts the usage so far into every chunk."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Body):
    """Fields of both completions. Beside OpenAI's: those that docs/protocol.md describes under the same names."""

    model: Annotated[str, Field(min_length=1, description="one of GET /v1/models")]
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], FewKeys] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    metadata: Annotated[dict[str, str], FewKeys] | None = None
    # Gorgon's own
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Ids | None = None
    bad_words: Strings | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    penalty_alpha: float | None = None
    cd_alpha: float | None = None
    cd_beta: float | None = None
    best_of: int | None = None
    structured: dict[str, Any] | None = None
    priority: int | None = None
    response_format: dict[str, Any] | None = None


class ChatCompletionRequest(Common):
    messages: Annotated[Objects, Field(description="objects with `role` and `content`")]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Objects | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # OpenAI's that only some values of are honoured
    modalities: Strings | None = None
    service_tier: str | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # OpenAI's that are refused
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    moderation: Any = None
    prediction: Any = None
    prompt_cache_options: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(Common):
    prompt: Annotated[
        str | Ids | Strings | Annotated[list[Ids], Field(fail_fast=True)],
        Field(description="a text or token ids, or a list of either"),
    ]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingRequest(Body):
    model: Annotated[str, Field(min_length=1)]
    input: Any
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
