"""The only place where a NATS subject, stream, bucket or consumer name is spelled (shared/permissions.py adds the wildcards).

llm.v1.generate.<model>                request door (core, queue group TOKENIZERS)
llm.v1.jobs.<model>                    durable door (stream JOBS)
llm.v1.results.<tenant>.<id>           events of a durable request (stream RESULTS)
llm.v1.cancel.<model>                  cancel a request (core, queue group SCHEDULERS)
llm.v1.replay.<model>.<partition>      what has been generated so far (core, answered by the partition's owner)
llm.v1.beacon.<model>.<partition>      "this partition is being served" (core, from the owner)
llm.v1.req.<model>.<class>             accepted requests (stream REQ), one class a group of tenants
llm.v1.tok.<model>.<partition>         the token log (stream TOK)
llm.v1.attach.<model>.<partition>      an accepted request's events go elsewhere (core, from tokenizers to the owner)
llm.v1.prefix.<model>.<partition>      committed prefix of a fenced request (core, answered by the owner)
llm.v1.worker.<worker>.run|abort       orders to one worker incarnation (core)
llm.v1.hb.<stage>.<model>.<instance>   heartbeats (core)
llm.v1.dead.<model>                    quarantined requests (stream DEAD)
llm.v1.ctl.ps                          "who is there" for gorgon ps (core; every instance answers)
llm.v1.ctl.held                        "who reads this request" among gateways (core; who does answers)
llm.v1.pieces.<model>                  texts of token ids, ids of texts (core, queue group TOKENIZERS)
llm.v1.log.<stage>.<instance>          structured log lines for gorgon tail (core)
$SRV.<verb>[.gorgon-<stage>[.<instance>]]   PING, INFO, STATS of the NATS micro protocol (core; every instance answers)

The doors (generate, jobs, cancel, replay) also exist with a tenant as one more token. Whoever comes through such a door is that tenant,
whatever the body says: NATS maps a tenant's account to it (docs/security.md). The doors without are for those who are trusted to say
whose request it is.
"""

from __future__ import annotations

import re
import zlib

ROOT = "llm.v1"

STREAM_JOBS = "JOBS"
STREAM_RESULTS = "RESULTS"
STREAM_REQ = "REQ"
STREAM_TOK = "TOK"
STREAM_DEAD = "DEAD"
BUCKET_ASSIGN = "assign"
BUCKET_SNAPSHOT = "snapshot"

TOKENIZERS = "tokenizers"
FALLBACK = "fallback"  # of the tokenizers of all models, on generate("*"): for models that nobody serves
SCHEDULERS = "schedulers"

PS = f"{ROOT}.ctl.ps"
HELD = f"{ROOT}.ctl.held"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


# What to tell whoever gave a name that is none.
TOKEN_RULE = "1 to 64 of letters, digits, '_' and '-'"


def is_token(text: str) -> bool:
    """Whether `text` may stand as one token of a subject and as part of a KV key (request ids, tenants, models, instances)."""
    return _TOKEN.match(text) is not None


def request_key(tenant: str, request_id: str) -> str:
    """The name of a request inside Gorgon, `<tenant>.<id>`: ids are the client's own, so they are namespaced by tenant."""
    return f"{tenant}.{request_id}"


def split_request_key(key: str) -> tuple[str, str]:
    tenant, _, request_id = key.partition(".")
    return tenant, request_id


def partition_of(key: str, partitions: int) -> int:
    """The token-log partition of a request. Fixed for a deployment: changing `partitions` needs an empty log."""
    return zlib.crc32(key.encode()) % partitions


def tenant_class_of(tenant: str, classes: int) -> int:
    return zlib.crc32(tenant.encode()) % classes


def generate(model: str) -> str:
    return f"{ROOT}.generate.{model}"


def pieces(model: str) -> str:
    return f"{ROOT}.pieces.{model}"


def jobs(model: str) -> str:
    return f"{ROOT}.jobs.{model}"


def of_tenant(door: str, tenant: str = "*") -> str:
    """The same door for one tenant only."""
    return f"{door}.{tenant}"


def tenant_of(subject: str, door: str) -> str | None:
    """Whose door a message for `door` came through; None if it was the one that is everybody's."""
    return subject[len(door) + 1 :] or None


def results(key: str) -> str:
    return f"{ROOT}.results.{key}"


def cancel(model: str) -> str:
    return f"{ROOT}.cancel.{model}"


def replay(model: str, partition: int | str) -> str:
    return f"{ROOT}.replay.{model}.{partition}"


def beacon(model: str, partition: int | str) -> str:
    return f"{ROOT}.beacon.{model}.{partition}"


def req(model: str, tenant_class: int | str) -> str:
    return f"{ROOT}.req.{model}.{tenant_class}"


def tok(model: str, partition: int | str) -> str:
    return f"{ROOT}.tok.{model}.{partition}"


def attach(model: str, partition: int | str) -> str:
    return f"{ROOT}.attach.{model}.{partition}"


def prefix(model: str, partition: int | str) -> str:
    return f"{ROOT}.prefix.{model}.{partition}"


def worker_run(worker: str) -> str:
    return f"{ROOT}.worker.{worker}.run"


def worker_abort(worker: str) -> str:
    return f"{ROOT}.worker.{worker}.abort"


def heartbeat(stage: str, model: str, instance: str) -> str:
    return f"{ROOT}.hb.{stage}.{model}.{instance}"


def heartbeats(stage: str = "*", model: str = "*") -> str:
    return f"{ROOT}.hb.{stage}.{model}.*"


def dead(model: str) -> str:
    return f"{ROOT}.dead.{model}"


def log(stage: str, instance: str) -> str:
    return f"{ROOT}.log.{stage}.{instance}"


def logs() -> str:
    return f"{ROOT}.log.>"


def micro(verb: str, service: str, instance: str) -> tuple[str, str, str]:
    """Where an instance of a NATS micro service answers a verb: asked of all services, of its kind, of itself (ADR-32)."""
    return f"$SRV.{verb}", f"$SRV.{verb}.{service}", f"$SRV.{verb}.{service}.{instance}"


def micro_name(stage: str) -> str:
    """A stage's name as a NATS micro service."""
    return f"gorgon-{stage}"


def consumer_req(model: str, tenant_class: int) -> str:
    return f"scheduler-{model}-{tenant_class}"


def consumer_jobs(model: str) -> str:
    return f"tokenizer-{model}"


def consumer_tenants_jobs(model: str) -> str:
    return f"tokenizer-{model}-tenants"


def job_consumers(model: str) -> dict[str, str]:
    """Durable consumers of a model's jobs, and the subject of each."""
    return {consumer_jobs(model): jobs(model), consumer_tenants_jobs(model): of_tenant(jobs(model))}


def snapshot_key(model: str, partition: int) -> str:
    return f"{model}.{partition}"


def archive_key(model: str, key: str) -> str:
    """Where an ended request is kept (bucket BUCKET_SNAPSHOT) for those that attach later."""
    return f"{model}.ended.{key}"


# What each stream holds; `shared.streams` creates them.
STREAM_SUBJECTS: dict[str, str] = {
    STREAM_JOBS: f"{ROOT}.jobs.>",
    STREAM_RESULTS: f"{ROOT}.results.*.*",
    STREAM_REQ: f"{ROOT}.req.*.*",
    STREAM_TOK: f"{ROOT}.tok.*.*",
    STREAM_DEAD: f"{ROOT}.dead.*",
}
