"""A hostile user against the whole pipeline on a real nats-server with TLS, nkeys and permissions (docs/security.md).

Each wall has its positive control: the same thing done by somebody who may, so that a refusal proves the wall and not a broken test.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from nats import errors
from nats.aio.client import Client as Nats
from openai import AsyncOpenAI

from services.secure_config import connection, write_config
from services.supervisor import GATEWAY
from shared import subjects
from shared.client import Client
from shared.config import StageSettings
from shared.errors import ErrorCode, GorgonError
from shared.nats_bus import NatsBus
from tests.pipeline.harness import Deployment, deployed

DEMO = Path(__file__).parents[2] / "models/demo"
MODEL = "demo"
QUIET = 0.5  # seconds in which something that gets through would have come
STORY = "The captain looked"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secured")
    write_config(folder, ["alice", "bob"])
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    data, flags = tmp_path_factory.mktemp("data"), {"scheduler": ["--trim-interval", "1"]}
    async with deployed(data, MODEL, DEMO, flags, {GATEWAY: 1}, secured=folder) as deployment:
        yield deployment


in_module = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def url(deployment: Deployment) -> str:
    return deployment.url


class User:
    """A raw connection, and what the server refused it."""

    def __init__(self) -> None:
        self.nc = Nats()
        self.refused: list[str] = []
        self.heard: list[tuple[str, bytes]] = []

    async def _on_error(self, error: Exception) -> None:
        self.refused.append(str(error))

    async def _on_message(self, message: Any) -> None:
        self.heard.append((message.subject, message.data))

    async def may_publish(self, subject: str, data: bytes = b"x", reply: str = "") -> bool:
        return await self._permitted(subject, self.nc.publish(subject, data, reply))

    async def may_subscribe(self, subject: str) -> bool:
        return await self._permitted(subject, self.nc.subscribe(subject, cb=self._on_message))

    async def _permitted(self, subject: str, doing: Any) -> bool:
        self.refused.clear()
        await doing
        for _ in range(3):  # the first pong may be the answer to a ping of the client's own
            await self.nc.flush(timeout=5)
        refused = [error for error in self.refused if f'"{subject.lower()}"' in error]
        assert refused or not self.refused, self.refused
        return not refused


@asynccontextmanager
async def user(url: str, folder: Path, name: str) -> AsyncIterator[User]:
    someone = User()
    own = connection(folder, name)
    context = ssl.create_default_context(cafile=own["nats_tls_ca"])
    await someone.nc.connect(
        url,
        tls=context,
        nkeys_seed=own["nats_nkey"],
        inbox_prefix=own.get("nats_inbox_prefix", "_INBOX"),
        error_cb=someone._on_error,
        allow_reconnect=False,
    )
    try:
        yield someone
    finally:
        await someone.nc.close()


@asynccontextmanager
async def tenant(url: str, folder: Path, name: str, **options: Any) -> AsyncIterator[Client]:
    bus = await NatsBus.connect(StageSettings(nats_url=url, **connection(folder, f"tenant-{name}")))
    try:
        async with Client(bus, MODEL, **({"tenant": name} | options)) as client:
            yield client
    finally:
        await bus.close()


# ---------------------------------------------------------------- the door of the server


@in_module
async def test_the_pipeline_works_over_tls_and_nkeys(deployment: Deployment):
    async with Client(deployment.bus, MODEL) as client:
        result = await client.generate(STORY, max_tokens=16, temperature=0).result()
        again = await client.generate(STORY, max_tokens=16, temperature=0, stream=False).result()
    assert len(result.choices[0].ids) == 16
    assert again.choices == result.choices
    await deployment.until_idle()


@in_module
async def test_an_administrator_sees_every_stage_by_nats_micro(deployment: Deployment, url: str, folder: Path):
    async with user(url, folder, "admin") as admin:
        inbox = admin.nc.new_inbox()
        assert await admin.may_subscribe(inbox)
        assert await admin.may_publish("$SRV.PING", b"", reply=inbox)
        stages = {child.name.rsplit("-", 1)[0] for child in deployment.supervisor.stages.values()}
        async with asyncio.timeout(10):
            while {json.loads(data)["name"] for _, data in admin.heard} != {f"gorgon-{stage}" for stage in stages}:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@in_module
async def test_the_gateway_works_with_its_few_rights(deployment: Deployment):
    base = f"http://127.0.0.1:{deployment.supervisor.plan.http_port}/v1"
    async with AsyncOpenAI(base_url=base, api_key="none") as openai:
        options = dict(model=MODEL, prompt=STORY, max_tokens=16, temperature=0)
        whole = await openai.completions.create(**options, logprobs=1)
        stream = await openai.completions.create(**options, stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream if chunk.choices]) == whole.choices[0].text
        assert whole.choices[0].logprobs is not None
    await deployment.until_idle()


async def connects(url: str, **options: Any) -> bool:
    nc = Nats()
    try:
        await nc.connect(url, allow_reconnect=False, connect_timeout=2, error_cb=_ignore, **options)
    except (TimeoutError, errors.Error, ssl.SSLError, OSError):
        return False
    await nc.close()
    return True


async def _ignore(error: Exception) -> None:
    pass


@in_module
async def test_nobody_enters_without_a_key_or_without_tls(url: str, folder: Path, tmp_path: Path):
    own = connection(folder, "tokenizer")
    trusting = ssl.create_default_context(cafile=own["nats_tls_ca"])
    assert await connects(url, tls=trusting, nkeys_seed=own["nats_nkey"])
    assert not await connects(url, tls=trusting)
    assert not await connects(url, tls=trusting, user="admin", password="")
    write_config(tmp_path)  # the keys of another deployment
    assert not await connects(url, tls=trusting, nkeys_seed=connection(tmp_path, "tokenizer")["nats_nkey"])
    # The server's certificate is of no CA that this client knows.
    strange = ssl.create_default_context(cafile=connection(tmp_path, "tokenizer")["nats_tls_ca"])
    assert not await connects(url, tls=strange, nkeys_seed=own["nats_nkey"])


@in_module
async def test_nothing_is_said_before_tls(url: str):
    """Who speaks NATS without TLS is cut off."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    assert b'"tls_required":true' in await reader.readline()
    writer.write(b'CONNECT {"verbose":true}\r\nPING\r\n')
    answer = await asyncio.wait_for(reader.read(), 5)
    assert b"PONG" not in answer
    writer.close()


def test_secrets_are_the_owners_alone(folder: Path):
    secrets = [*folder.glob("keys/*.nk"), *folder.glob("tls/*-key.pem")]
    assert len(secrets) >= 12
    assert {path.stat().st_mode & 0o777 for path in secrets} == {0o600}
    configuration = (folder / "nats.conf").read_text()
    for path in folder.glob("keys/*.nk"):
        assert path.read_text() not in configuration
    before = {path: path.read_bytes() for path in secrets}
    write_config(folder, ["carol"])  # nothing that is in use changes
    assert {path: path.read_bytes() for path in secrets} == before
    assert {"alice", "bob", "carol"} <= json.loads((folder / "nats.conf").read_text())["accounts"].keys()


# ---------------------------------------------------------------- walls between the stages

# (user, subject): who may publish, and who may not. Everybody else's line is somebody's wall.
MAY_PUBLISH = [
    ("tokenizer", "llm.v1.attach.other.0"),
    ("tokenizer", "_INBOX.somebody"),
    ("scheduler", "llm.v1.tok.other.0"),
    ("scheduler", "llm.v1.worker.nobody.run"),
    ("scheduler", "$KV.assign.x.y"),
    ("model_worker", "llm.v1.tok.other.0"),
    ("model_worker", "llm.v1.hb.model_worker.other.x"),
    ("detokenizer", "llm.v1.tok.other.0"),
    ("detokenizer", "_R_.somebody"),
    ("gateway", "llm.v1.generate.other"),
    ("admin", "llm.v1.tok.other.0"),
]
MAY_NOT_PUBLISH = [
    *(("tokenizer", f"llm.v1.tok.{MODEL}.{partition}") for partition in range(8)),
    ("tokenizer", "llm.v1.worker.nobody.run"),
    ("tokenizer", "llm.v1.hb.model_worker.demo.x"),
    ("tokenizer", "llm.v1.prefix.demo.0"),
    ("tokenizer", "$KV.assign.default.x"),
    ("tokenizer", "$KV.snapshot.demo.0"),
    ("tokenizer", "_GORGON.scheduler.x"),
    ("tokenizer", "$JS.API.STREAM.CREATE.EVIL"),
    ("tokenizer", "$JS.API.STREAM.DELETE.TOK"),
    ("tokenizer", "$JS.API.STREAM.UPDATE.TOK"),
    ("tokenizer", "$JS.API.STREAM.PURGE.REQ"),
    ("tokenizer", "$JS.API.CONSUMER.CREATE.JOBS.evil.llm.v1.jobs.demo"),
    ("tokenizer", "$JS.API.CONSUMER.DURABLE.CREATE.JOBS.evil"),
    ("tokenizer", "$JS.API.CONSUMER.CREATE.JOBS"),
    ("tokenizer", "$JS.API.CONSUMER.DELETE.JOBS.tokenizer-demo"),
    ("tokenizer", "$JS.API.STREAM.MSG.GET.TOK"),
    ("tokenizer", "$JS.API.DIRECT.GET.RESULTS"),
    ("model_worker", "llm.v1.req.demo.0"),
    ("model_worker", "llm.v1.worker.another.abort"),
    ("model_worker", "llm.v1.hb.scheduler.demo.x"),
    ("model_worker", "llm.v1.cancel.demo"),
    ("model_worker", "llm.v1.results.default.x"),
    ("model_worker", "_INBOX.somebody"),
    ("model_worker", "$KV.assign.default.x"),
    ("model_worker", "$JS.API.CONSUMER.CREATE.TOK.evil.llm.v1.tok.demo.0"),
    ("scheduler", "llm.v1.generate.demo"),
    ("scheduler", "llm.v1.req.demo.0"),
    ("scheduler", "$KV.snapshot.demo.0"),
    ("scheduler", "$JS.API.STREAM.DELETE.REQ"),
    ("scheduler", "$JS.API.STREAM.PURGE.TOK"),
    ("detokenizer", "llm.v1.req.demo.0"),
    ("detokenizer", "llm.v1.worker.nobody.run"),
    ("detokenizer", "$JS.API.STREAM.DELETE.TOK"),
    ("detokenizer", "$JS.API.STREAM.PURGE.TOK"),
    ("gateway", "llm.v1.tok.demo.0"),
    ("gateway", "llm.v1.req.demo.0"),
    ("gateway", "llm.v1.worker.nobody.run"),
    ("gateway", "_INBOX.somebody"),
    ("gateway", "$JS.API.STREAM.MSG.GET.RESULTS"),
    ("gateway", "$SYS.REQ.SERVER.PING"),
]
MAY_SUBSCRIBE = [
    ("tokenizer", "llm.v1.generate.other"),
    ("model_worker", "llm.v1.worker.x.run"),
    ("scheduler", "llm.v1.cancel.other"),
    ("detokenizer", "llm.v1.replay.other.0"),
    ("gateway", "_INBOX.gateway.x"),
    ("admin", "llm.v1.tok.>"),
]
MAY_NOT_SUBSCRIBE = [
    *((stage, subject) for stage in ("tokenizer", "model_worker", "gateway") for subject in (">", "llm.v1.>", "llm.v1.tok.>")),
    *((stage, "_INBOX.>") for stage in ("tokenizer", "model_worker", "scheduler", "detokenizer", "gateway")),
    *((stage, "_R_.>") for stage in ("tokenizer", "model_worker", "scheduler", "detokenizer", "gateway")),
    ("tokenizer", "llm.v1.results.>"),
    ("tokenizer", "_GORGON.scheduler.>"),
    ("tokenizer", "llm.v1.worker.*.run"),
    ("model_worker", "llm.v1.generate.*"),
    ("model_worker", "llm.v1.req.>"),
    ("scheduler", "llm.v1.generate.>"),
    ("detokenizer", "llm.v1.generate.>"),
    ("detokenizer", "llm.v1.worker.>"),
    ("gateway", "llm.v1.generate.>"),
    ("gateway", "llm.v1.results.>"),
    ("gateway", "llm.v1.log.>"),
]  # fmt: skip


@in_module
async def test_a_stage_publishes_only_what_it_needs(url: str, folder: Path):
    for name in dict.fromkeys(name for name, _ in MAY_PUBLISH):
        async with user(url, folder, name) as someone:
            for _, subject in (pair for pair in MAY_PUBLISH if pair[0] == name):
                assert await someone.may_publish(subject), f"{name} needs {subject}"
            for _, subject in (pair for pair in MAY_NOT_PUBLISH if pair[0] == name):
                assert not await someone.may_publish(subject), f"{name} must not publish {subject}"


@in_module
async def test_a_stage_hears_only_what_it_needs(url: str, folder: Path):
    for name in dict.fromkeys(name for name, _ in MAY_SUBSCRIBE):
        async with user(url, folder, name) as someone:
            for _, subject in (pair for pair in MAY_SUBSCRIBE if pair[0] == name):
                assert await someone.may_subscribe(subject), f"{name} needs {subject}"
            for _, subject in (pair for pair in MAY_NOT_SUBSCRIBE if pair[0] == name):
                assert not await someone.may_subscribe(subject), f"{name} must not hear {subject}"


@in_module
async def test_a_tokenizer_writes_no_tokens(deployment: Deployment, folder: Path):
    """A worker does (of a model that nobody serves)."""
    bus = deployment.bus
    name = "llm.v1.tok.nobody.0"
    async with (
        user(deployment.url, folder, "tokenizer") as attacker,
        user(deployment.url, folder, "model_worker") as worker,
    ):
        before = await bus.last_seq(subjects.STREAM_TOK, name)
        await attacker.may_publish(name, b"forged")
        await asyncio.sleep(QUIET)
        assert await bus.last_seq(subjects.STREAM_TOK, name) == before
        await worker.may_publish(name, b"genuine")
        await asyncio.sleep(QUIET)
        assert await bus.last_seq(subjects.STREAM_TOK, name) > before


# ---------------------------------------------------------------- walls between the tenants


@in_module
async def test_a_tenant_is_served_in_its_own_account(deployment: Deployment, folder: Path):
    async with tenant(deployment.url, folder, "alice") as alice:
        stream = alice.generate(STORY, max_tokens=24, temperature=0)
        result = await stream.result()
        assert (await alice.attach(stream.id).result()).choices == result.choices
    assert stream.accepted is not None
    assert stream.accepted["tenant"] == "alice"
    async with Client(deployment.bus, MODEL) as trusted:
        assert (await trusted.generate(STORY, max_tokens=24, temperature=0).result()).choices == result.choices


@in_module
async def test_a_tenant_cannot_be_another(url: str, folder: Path):
    async with tenant(url, folder, "bob", tenant="alice", accept_timeout=5.0) as impostor:
        for refused in (impostor.generate(STORY, max_tokens=4), impostor.generate(STORY, max_tokens=4, id="mine")):
            with pytest.raises(GorgonError) as caught:
                await refused.result()
            assert caught.value.code == ErrorCode.INVALID_REQUEST
            assert "bob" in caught.value.message
    # Nor by naming the door: in its account that subject is nobody's.
    async with user(url, folder, "tenant-bob") as bob:
        for subject in ("llm.v1.generate.demo.alice", "llm.v1.generate.demo.bob", "llm.v1.jobs.demo.alice"):
            with pytest.raises(errors.NoRespondersError):
                await bob.nc.request(subject, json.dumps({"prompt": STORY}).encode(), timeout=2)
        answer = await bob.nc.request("llm.v1.generate.demo", json.dumps({"prompt": STORY}).encode(), timeout=5)
        assert json.loads(answer.data)["tenant"] == "bob"


@in_module
async def test_a_tenant_reads_and_ends_only_its_own(url: str, folder: Path):
    async with tenant(url, folder, "alice") as alice, user(url, folder, "tenant-bob") as bob:
        stream = alice.generate(STORY, max_tokens=400, temperature=0, ignore_eos=True)
        first = await anext(stream)
        assert first.ids
        assert await bob.may_subscribe(">")  # in its own account
        replay = stream.accepted["replay"] if stream.accepted else ""

        async def ask(subject: str, **body: Any) -> dict[str, Any]:
            answer = await bob.nc.request(subject, json.dumps(body).encode(), timeout=5)
            return dict(json.loads(answer.data))

        assert (await ask(replay, id=stream.id, tenant="alice"))["code"] == "invalid_request"
        assert (await ask(replay, id=stream.id))["code"] == "not_found"
        assert (await ask(replay, id=stream.id, attach=True))["code"] == "not_found"
        assert (await ask("llm.v1.cancel.demo", id=stream.id, tenant="alice"))["code"] == "invalid_request"
        # Bob's own of that name, which may come yet.
        assert await ask("llm.v1.cancel.demo", id=stream.id) == {"ok": True, "request": "unknown"}
        await asyncio.sleep(QUIET)
        assert not stream.done, "bob's cancel is bob's"
        assert {subject.split(".")[2] for subject, _ in bob.heard if subject.startswith("llm.")} <= {
            "beacon",
            "replay",
            "cancel",
        }
        # Alice can do all of that.
        other = alice.attach("nothing-of-that-name")
        assert not other.done
        async with user(url, folder, "tenant-alice") as herself:
            answer = await herself.nc.request(replay, json.dumps({"id": stream.id}).encode(), timeout=5)
            assert json.loads(answer.data)["event"] == "tokens"
        await stream.cancel()
        assert (await stream.result()).status == "cancelled"
        other.finish(dict(event="cancelled", id=other.id, usage=dict(completion_tokens=0)))


@in_module
async def test_answers_go_to_the_one_who_asked(url: str, folder: Path):
    """A reply subject is taken in the account of the one who names it, so nobody can have events sent to another."""
    async with user(url, folder, "tenant-alice") as alice, user(url, folder, "tenant-bob") as bob:
        inbox = "_INBOX.known-to-everybody"
        assert await alice.may_subscribe(inbox)
        body = json.dumps({"prompt": STORY, "max_tokens": 4}).encode()
        assert await bob.may_publish("llm.v1.generate.demo", body, reply=inbox)
        await asyncio.sleep(2 * QUIET)
        assert not alice.heard
        assert await alice.may_publish("llm.v1.generate.demo", body, reply=inbox)
        for _ in range(100):
            if any(b"finished" in data for _, data in alice.heard):
                break
            await asyncio.sleep(0.1)
        assert {json.loads(data)["event"] for _, data in alice.heard} == {"accepted", "tokens", "finished"}


@in_module
async def test_a_tenant_sees_nothing_of_the_pipeline(deployment: Deployment, folder: Path):
    async with user(deployment.url, folder, "tenant-bob") as bob, user(deployment.url, folder, "admin") as admin:
        for someone in (bob, admin):
            assert await someone.may_subscribe("llm.v1.>")
        async with tenant(deployment.url, folder, "alice") as alice:
            await alice.generate(STORY, max_tokens=4).result()
        await asyncio.sleep(QUIET)
        kinds = [{subject.split(".")[2] for subject, _ in someone.heard} for someone in (bob, admin)]
        assert kinds[0] <= {"beacon"}
        assert {"generate", "req", "tok", "hb"} <= kinds[1]
        for subject in (
            "$JS.API.INFO",
            "$JS.API.STREAM.INFO.TOK",
            "$JS.API.DIRECT.GET.RESULTS",
            "$SYS.REQ.SERVER.PING",
        ):
            with pytest.raises((errors.NoRespondersError, errors.TimeoutError)):
                answer = await bob.nc.request(subject, b"", timeout=1)
                assert b"not enabled" in answer.data, answer  # how the server says that an account has no JetStream
                raise errors.TimeoutError
        # What it publishes under the pipeline's subjects stays in its account.
        name = "llm.v1.tok.nobody.1"  # of a model that is not served: nobody else writes there
        before = await deployment.bus.last_seq(subjects.STREAM_TOK, name)
        assert await bob.may_publish(name, b"forged")
        await asyncio.sleep(QUIET)
        assert await deployment.bus.last_seq(subjects.STREAM_TOK, name) == before


@in_module
async def test_the_result_of_a_job_is_its_tenants(url: str, folder: Path):
    async with user(url, folder, "tenant-alice") as alice, user(url, folder, "tenant-bob") as bob:
        body = json.dumps({"id": "night", "prompt": STORY, "max_tokens": 8, "stream": False}).encode()
        stored = json.loads((await alice.nc.request("llm.v1.jobs.demo", body, timeout=5)).data)
        assert stored["stream"] == "JOBS"
        subject = "llm.v1.results.alice.night"
        for _ in range(100):
            answer = await alice.nc.request(subject, b"", timeout=5)
            if answer.data and json.loads(answer.data)["event"] == "finished":
                break
            await asyncio.sleep(0.1)
        assert json.loads(answer.data)["choices"][0]["text"]
        for name in (subject, "llm.v1.results.bob.night"):
            with pytest.raises(errors.NoRespondersError if "alice" in name else errors.Error):
                found = await bob.nc.request(name, b"", timeout=2)
                assert found.headers is not None and found.headers["Status"] == "404"
                raise errors.Error
        # A query in the body would be answered with whatever it asks for: by subject the server takes none.
        query = json.dumps({"seq": 1, "next_by_subj": "llm.v1.results.alice.night"}).encode()
        with pytest.raises(errors.NoRespondersError):
            await bob.nc.request(subject, query, timeout=2)
        found = await bob.nc.request("llm.v1.results.bob.night", query, timeout=2)
        assert not found.data


@in_module
async def test_a_tenants_stream_survives_the_death_of_the_server(deployment: Deployment, folder: Path):
    """The server forgets which inbox an import's reply subject stands for: the client attaches with a new one."""
    async with tenant(deployment.url, folder, "alice") as alice:
        expected = await alice.generate(STORY, max_tokens=150, temperature=0, ignore_eos=True).result()
        stream = alice.generate(STORY, max_tokens=150, temperature=0, ignore_eos=True)
        ids: list[int] = []
        async for delta in stream:
            if not ids:
                deployment.supervisor.broker.kill(9)  # type: ignore[arg-type]
                deployment.expected_deaths["nats"] = 1
            assert delta.position == len(ids)
            ids += delta.ids
        assert ids == expected.choices[0].ids


@in_module
async def test_no_stage_was_refused_anything(deployment: Deployment, folder: Path):
    """After all of the above: their rights are enough, for a repeated request and for the trimming of REQ as well."""
    async with tenant(deployment.url, folder, "alice") as alice:
        first = await alice.generate(STORY, max_tokens=4, id="twice").result()
    async with tenant(deployment.url, folder, "alice") as again:
        assert (await again.generate(STORY, max_tokens=4, id="twice").result()).choices == first.choices
    await asyncio.sleep(1.5)
    refusals = [
        line
        for child in deployment.supervisor.stages.values()
        for line in child.log_path.read_text().splitlines()
        if "not_permitted" in line and "stream.create" not in line  # what each tries until the scheduler has done it
    ]
    assert not refusals
    async with user(deployment.url, folder, "tokenizer") as attacker:
        assert not await attacker.may_publish("llm.v1.worker.nobody.run")
    server = deployment.supervisor.brokers[0].log_path.read_text()
    assert "Violation" in server, "the server's log is where refusals are seen"


def test_what_was_chosen_once_stays_chosen(tmp_path: Path):
    """A further tenant must not take down a wall, nor send processes elsewhere."""

    def read() -> tuple[dict[str, Any], str, bytes, bytes]:
        names = ("keys/tokenizer.nk", "tls/server.pem")
        config = json.loads((tmp_path / "nats.conf").read_text())
        return config, (tmp_path / "tokenizer.env").read_text(), *((tmp_path / name).read_bytes() for name in names)

    write_config(
        tmp_path, ["alice"], hosts=["llm.example.org"], port=4333, store="/var/x", mutual_tls=True, at="/secure"
    )
    config, env, key, certificate = read()
    assert config["tls"]["verify"] and config["port"] == 4333 and config["jetstream"]["store_dir"] == "/var/x"
    assert "tls://llm.example.org:4333" in env and "/secure/keys/tokenizer.nk" in env and "client.pem" in env
    write_config(tmp_path, ["bob"])
    again = read()
    assert again[1:] == (env, key, certificate)
    assert again[0] | {"accounts": None} == config | {"accounts": None}
    assert again[0]["accounts"].keys() == config["accounts"].keys() | {"bob"}
    # Another host needs another certificate of the server; whoever trusts the CA trusts it.
    write_config(tmp_path, hosts=["llm.example.org", "10.0.0.7"])
    assert read()[2] == key and read()[3] != certificate
    alternatives = x509.load_pem_x509_certificate(read()[3]).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert [name.value for name in alternatives.value] == ["llm.example.org", ipaddress.ip_address("10.0.0.7")]
    write_config(tmp_path, mutual_tls=False)
    assert not read()[0]["tls"]["verify"]


def test_names_that_cannot_be_tenants(tmp_path: Path):
    for name in ("", "a.b", "*", "GORGON", "SYS", "default"):
        with pytest.raises(ValueError, match="tenant"):
            write_config(tmp_path, [name])
