"""What a partition's owner is asked: the committed prefix of a request (by schedulers), and what has been generated (by clients)."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from pydantic import Field, StrictInt, ValidationError, field_validator

from services.detokenizer.answer import Answer, Cursor
from shared.api import DEFAULT_TENANT, MAX_CHOICES, Strict, check_tenant, decode_body, said
from shared.codec import pack_ids
from shared.errors import ErrorCode, GorgonError
from shared.messages import PROMPT, PrefixQuery, PrefixReply, ReplyTo
from shared.subjects import TOKEN_RULE, is_token, request_key
from shared.tokenlog import RequestState

Count = Annotated[StrictInt, Field(ge=0, lt=2**40)]


class CursorField(Strict):
    choice: Annotated[StrictInt, Field(ge=PROMPT, lt=MAX_CHOICES)] = 0
    position: Count = 0
    offset: Count = 0


class ReplayRequest(Strict):
    """Body of a question on the replay subject, JSON or MessagePack. `attach`: later events go to the question's reply subject too.
    `stream` false: only the terminal event, with the whole text. Without cursors: from the beginning."""

    id: str
    tenant: str = DEFAULT_TENANT
    cursors: Annotated[list[CursorField], Field(max_length=MAX_CHOICES + 1)] = Field(default_factory=list)
    attach: bool = False
    batched: bool = False
    stream: bool = True

    @field_validator("id", "tenant")
    @classmethod
    def _is_token(cls, value: str) -> str:
        if not is_token(value):
            raise ValueError(TOKEN_RULE)
        return value


class Replay(NamedTuple):
    key: str
    id: str
    cursors: dict[int, Cursor]
    attach: bool
    reply: ReplyTo


def parse_replay(data: bytes, reply_subject: str, tenant: str | None = None) -> Replay:
    """`tenant`: through whose door it came; None: the body says whose request it is. Raises GorgonError(INVALID_REQUEST)."""
    body, encoding = decode_body(data)
    check_tenant(body, tenant)
    try:
        asked = ReplayRequest.model_validate(body)
    except ValidationError as error:
        raise GorgonError(ErrorCode.INVALID_REQUEST, said(error)) from None
    cursors = {c.choice: (c.position, c.offset) for c in asked.cursors}
    reply = ReplyTo(reply_subject, encoding, asked.batched, asked.stream)
    return Replay(request_key(tenant or asked.tenant, asked.id), asked.id, cursors, asked.attach, reply)


def prefix_reply(query: PrefixQuery, state: RequestState | None, answer: Answer | None) -> PrefixReply | None:
    """None: not yet, the fence has not been folded here (or an END that will finish the request is under way)."""
    if state is None:
        return None
    if state.terminal is not None:
        return PrefixReply("ended", state.epoch)
    if state.epoch > query.epoch:
        return PrefixReply("superseded", state.epoch)
    if state.epoch < query.epoch or answer is None or len(answer.done) == len(state.choices):
        return None
    return PrefixReply("running", state.epoch, tuple(map(pack_ids, state.prefix)), answer.done, state.prompt_done)
