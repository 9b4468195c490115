"""What each user of a secured NATS may do: which subjects a stage publishes and hears, and what a tenant's account sees of them.

Everything that is not listed is denied by the server. `services/secure_config.py` writes the server's configuration from it;
docs/security.md explains it, tests/pipeline/test_security.py attacks it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from shared import subjects as s

ACCOUNT = "GORGON"  # of the stages
SYSTEM_ACCOUNT = "SYS"
STAGES = ("tokenizer", "scheduler", "model_worker", "detokenizer", "gateway")
ADMIN = "admin"  # may do everything within ACCOUNT: `gorgon ps`, `tail`, and whoever sets things up

CLIENTS = "_INBOX"  # where clients wait for events; those that come through an account's import are `_R_` here
_IMPORTED = "_R_"
_STAGES_INBOX = "_GORGON"
_API = "$JS.API"
# Long enough for a request that says nothing; the server forgets a reply subject of an import after that.
_RESPONSES = "15m"


class Permissions(NamedTuple):
    """Subjects with wildcards. Beside them a stage may answer whoever asks it (one message for each question)."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def inbox_prefix(user: str) -> str:
    """Below it a user hears answers, and nobody else does. The gateway's and other clients' are where events may be sent to."""
    if user == "gateway":
        return f"{CLIENTS}.gateway"
    return CLIENTS if user == ADMIN else f"{_STAGES_INBOX}.{user}"


def permissions(user: str) -> Permissions:
    """Raises KeyError for a user that is none of STAGES and ADMIN."""
    if user == ADMIN:
        return Permissions((">",), (">",))
    own = _STAGES[user]
    publish = (
        f"{s.ROOT}.hb.{user}.>",
        f"{s.ROOT}.log.{user}.>",
        f"{_API}.STREAM.INFO.*",
    )
    subscribe = (f"{inbox_prefix(user)}.>", s.PS, "$SRV.>")
    return Permissions(publish + own.publish, subscribe + own.subscribe)


def _reads(*streams: str) -> tuple[str, ...]:
    """Single messages, by sequence or subject."""
    return tuple(f"{_API}.STREAM.MSG.GET.{stream}" for stream in streams)


def _takes(*streams: str) -> tuple[str, ...]:
    """What a consumer that exists has."""
    return tuple(
        f"{_API}.CONSUMER.{operation}.{stream}.*" for stream in streams for operation in ("INFO", "MSG.NEXT")
    ) + tuple(f"$JS.ACK.{stream}.>" for stream in streams)


def _follows(*streams: str) -> tuple[str, ...]:
    """Makes consumers of its own. Whoever may do that can have the server send that stream's messages to any subject of the account:
    tokenizers, which take what strangers send, and workers may not."""
    made = tuple(f"{_API}.CONSUMER.{operation}.{stream}.>" for stream in streams for operation in ("CREATE", "DELETE"))
    return made + _takes(*streams)


_ASSIGN, _SNAPSHOT = f"KV_{s.BUCKET_ASSIGN}", f"KV_{s.BUCKET_SNAPSHOT}"
_TO_CLIENTS = (f"{CLIENTS}.>", f"{_IMPORTED}.>")

_STAGES = {
    "tokenizer": Permissions(
        (
            *_TO_CLIENTS,
            s.req("*", "*"),
            s.results("*.*"),
            s.attach("*", "*"),
            *_reads(s.STREAM_REQ, _ASSIGN),
            *_takes(s.STREAM_JOBS),
            f"{_API}.CONSUMER.INFO.{s.STREAM_REQ}.*",
        ),
        (s.generate(">"), s.pieces("*"), s.heartbeats("*")),
    ),
    "scheduler": Permissions(
        (
            *_TO_CLIENTS,
            s.tok("*", "*"),
            s.prefix("*", "*"),
            s.worker_run("*"),
            s.worker_abort("*"),
            s.results("*.*"),
            s.dead("*"),
            f"$KV.{s.BUCKET_ASSIGN}.>",
            # It alone creates streams and the consumers of jobs; the others wait for it.
            f"{_API}.STREAM.CREATE.*",
            f"{_API}.STREAM.UPDATE.*",
            f"{_API}.STREAM.PURGE.{s.STREAM_REQ}",
            *_reads(s.STREAM_REQ, s.STREAM_TOK, _ASSIGN),
            *_follows(s.STREAM_REQ, s.STREAM_JOBS, _ASSIGN),
        ),
        (s.cancel(">"), s.heartbeats("*")),
    ),
    "model_worker": Permissions((s.tok("*", "*"),), (s.worker_run("*"), s.worker_abort("*"))),
    "detokenizer": Permissions(
        (
            *_TO_CLIENTS,
            s.tok("*", "*"),
            s.results("*.*"),
            s.beacon("*", "*"),
            f"$KV.{s.BUCKET_ASSIGN}.>",
            f"$KV.{s.BUCKET_SNAPSHOT}.>",
            *_reads(s.STREAM_TOK, s.STREAM_RESULTS, _ASSIGN, _SNAPSHOT),
            *_follows(s.STREAM_TOK, s.STREAM_RESULTS),
        ),
        (s.replay("*", ">"), s.prefix("*", "*"), s.attach("*", "*"), s.beacon("*", "*"), s.heartbeats("detokenizer")),
    ),
    "gateway": Permissions(
        (s.generate("*"), s.cancel("*"), s.replay("*", "*"), s.pieces("*"), s.HELD),
        (s.beacon("*", "*"), s.heartbeats("*"), s.HELD),
    ),
}


# ---------------------------------------------------------------- tenants

_RESULT = f"{_API}.DIRECT.GET.{s.STREAM_RESULTS}.{s.results('*.*')}"
# Door of ACCOUNT, with the tenant at the end (of a result: before the id); whether it answers with a stream of messages.
_DOORS = (
    (s.of_tenant(s.generate("*")), True),
    (s.of_tenant(s.replay("*", "*")), True),
    (s.of_tenant(s.cancel("*")), False),
    (s.of_tenant(s.jobs("*")), False),
)


def exports(tenants: list[str]) -> list[dict[str, Any]]:
    """What ACCOUNT offers to the tenants' accounts. The server fills the tenant's token in by the account that asks, and gives each
    question a reply subject of its own: a tenant can neither be another nor have an answer sent to another."""

    def service(subject: str, position: int, streams: bool) -> dict[str, Any]:
        offered = {"service": subject, "accounts": tenants, "account_token_position": position}
        more = {"response_type": "stream", "response_threshold": _RESPONSES} if streams else {}
        return offered | more

    doors = [service(door, len(door.split(".")), streams) for door, streams in _DOORS]
    return [
        *doors,
        service(_RESULT, len(_RESULT.split(".")) - 1, False),
        {"stream": s.beacon("*", "*"), "accounts": tenants},
    ]


def imports(tenant: str) -> list[dict[str, Any]]:
    """How a tenant's account sees it: under the same subjects as everybody, the tenant left out. A job's last event is what a request
    to its results subject is answered with."""

    def service(theirs: str, ours: str) -> dict[str, Any]:
        return {"service": {"account": ACCOUNT, "subject": theirs}, "to": ours}

    doors = [service(door.removesuffix("*") + tenant, door.removesuffix(".*")) for door, _ in _DOORS]
    results = s.results(f"{tenant}.*")
    return [
        *doors,
        service(f"{_API}.DIRECT.GET.{s.STREAM_RESULTS}.{results}", results),
        {"stream": {"account": ACCOUNT, "subject": s.beacon("*", "*")}},
    ]
