"""Single situations in real processes: a server that stands still, a full disk, a rolling upgrade, poison, overload, deadlines, clients
that vanish."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest

from services.model_worker.fixed_engine import expected_ids
from services.model_worker.interface import EngineRequest
from services.model_worker.settings import FixedEngineSettings
from services.supervisor import Child
from shared import codec, subjects
from shared.bus import Message, StorageFull, StreamSpec
from shared.errors import ErrorCode, GorgonError
from shared.messages import Request, Tombstone, WorkerHeartbeat
from shared.sampling import SamplingParams
from tests.chaos.checker import Record, Reference, check, check_stored
from tests.chaos.deployment import MODEL, Deployment, deployed
from tests.chaos.report import clients
from tests.chaos.workload import Body, RecordingClient, Workload
from tests.pipeline.harness import RawClient

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(180)]

DEMO = Path(__file__).resolve().parents[2] / "models/demo"
STEP = 0.02
FIXED = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--max-seqs", "64"]
LIMIT = 60.0  # seconds that a stream may take


def requests(count: int, tokens: int) -> dict[str, Body]:
    return {
        f"fixed-{i}": dict(prompt=[10 + i, 11, 12], seed=i, max_tokens=tokens, ignore_eos=True) for i in range(count)
    }


def expected(body: Body) -> list[int]:
    params = SamplingParams(max_tokens=body["max_tokens"], seed=body.get("seed", 0), ignore_eos=True)
    return expected_ids(EngineRequest("", 0, 1, body["prompt"], params), FixedEngineSettings.model_validate({}))


@asynccontextmanager
async def loaded(deployment: Deployment, bodies: dict[str, Body], kinds: dict[str, int]) -> AsyncIterator[Workload]:
    async with AsyncExitStack() as stack:
        yield Workload(deployment.bus, await clients(stack, deployment), bodies, LIMIT, kinds)


def complaints(workload: Workload, references: dict[str, Record]) -> dict[str, list[str]]:
    found = {}
    for record in workload.records:
        if record.id.startswith("reference"):
            continue
        wrong = check(record, Reference.of(references[record.request]))
        wrong += check_stored(record) if record.kind == "durable" else []
        if wrong:
            found[f"{record.id} ({record.kind})"] = wrong
    return found


def log_events(child: Child, name: str) -> list[dict[str, Any]]:
    lines = [line for line in child.log_path.read_text().splitlines() if line.startswith("{")]
    return [event for line in lines if (event := json.loads(line)).get("event") == name]


async def tombstone(deployment: Deployment, request_id: str, within: float) -> Tombstone:
    """How the request ended."""
    assignments = await deployment.bus.bucket(subjects.BUCKET_ASSIGN)
    async with asyncio.timeout(within):
        while True:
            entry = await assignments.get(subjects.request_key("default", request_id))
            if entry is not None and entry.value is not None:
                end = codec.decode(entry.value)
                if isinstance(end, Tombstone):
                    return end
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- NATS


async def test_a_server_that_stands_still_for_six_seconds_fences_nobody(tmp_path: Path) -> None:
    bodies = requests(4, 200)
    async with (
        deployed(tmp_path, DEMO, FIXED) as deployment,
        loaded(deployment, bodies, {"plain": 3, "durable": 1}) as workload,
    ):
        references = await workload.references(bodies)
        over = asyncio.Event()
        running = asyncio.create_task(workload.keep_running(1, 24, over.is_set))
        await asyncio.sleep(2.0)
        broker = deployment.supervisor.broker
        broker.kill(signal.SIGSTOP)
        await asyncio.sleep(6.0)
        broker.kill(signal.SIGCONT)
        await asyncio.sleep(2.0)
        over.set()
        await running
        assert complaints(workload, references) == {}
        assert max(record.longest_gap for record in workload.records) > 5.0, "it did stand still for them"
        assert await deployment.migrated() == 0
        assert {child.name: child.restarts for child in deployment.supervisor.children() if child.restarts} == {}
        assert await deployment.unrest() == []


async def test_a_full_disk_in_mid_run_delays_streams_and_loses_none(tmp_path: Path) -> None:
    """Others fill the store to its limit: new requests are told so, running ones wait, and all go on when there is room again."""
    bodies = requests(4, 400)
    limit = 32 * 2**20
    async with (
        deployed(tmp_path, DEMO, FIXED, store_limit=limit) as deployment,
        loaded(deployment, bodies, {"plain": 3, "durable": 1}) as workload,
    ):
        references = await workload.references(bodies)
        running = asyncio.create_task(workload.keep_running(1, 16, lambda: workload.ended > 0))
        await asyncio.sleep(1.0)
        assert workload.records, "streams are under way"
        bus = deployment.bus
        await bus.ensure_stream(StreamSpec("FILLER", "filler"))
        for size in (2**20, 2**14, 2**8, 1):  # up to the last byte
            with pytest.raises(StorageFull):
                while True:
                    await bus.append("filler", bytes(size))
        await asyncio.sleep(0.5)
        async with RecordingClient(deployment.url, MODEL, accept_timeout=0.5) as client:
            began = asyncio.get_running_loop().time()
            with pytest.raises(GorgonError) as refused:
                await client.generate(id="late", prompt=[1, 2, 3], max_tokens=4).result()
            assert refused.value.code == ErrorCode.STORAGE_FULL
            assert asyncio.get_running_loop().time() - began < 1.0
            assert [e for e in client.events["late"] if e.get("retry_after")], "it says when to come again"
        before = {record.id: len(record.ids.get(0, ())) for record in workload.records}
        await asyncio.sleep(3.0)
        assert workload.ended == 0
        assert sum(len(r.ids.get(0, ())) for r in workload.records) - sum(before.values()) <= 64 * len(before)
        workers = [c for n, c in deployment.supervisor.stages.items() if n.startswith("model_worker")]
        assert any(log_events(worker, "storage_full") for worker in workers), "a clear event in the log"
        await bus.api("STREAM.DELETE.FILLER", {})
        await running
        assert complaints(workload, references) == {}
        assert await deployment.migrated() == 0
        assert {child.name: child.restarts for child in deployment.supervisor.children() if child.restarts} == {}
        assert await deployment.unrest() == []


# ---------------------------------------------------------------- a rolling upgrade


class Handovers:
    """When each worker incarnation first said that it goes, and when that it holds nothing any more (loop time)."""

    def __init__(self) -> None:
        self.empty: dict[str, float] = {}

    def on_beat(self, message: Message) -> None:
        beat = codec.decode(message.data)
        if isinstance(beat, WorkerHeartbeat) and beat.base.draining and not beat.running:
            self.empty.setdefault(beat.base.instance, asyncio.get_running_loop().time())


async def test_a_rolling_upgrade_under_load_is_seen_by_nobody(tmp_path: Path) -> None:
    """Each process is told to go, NATS last, and started anew while streams run: no error, and a worker hands over within a second."""
    bodies = requests(4, 150)
    async with (
        deployed(tmp_path, DEMO, FIXED) as deployment,
        loaded(deployment, bodies, {"plain": 4, "durable": 1, "attached": 1}) as workload,
    ):
        loop = asyncio.get_running_loop()
        references = await workload.references(bodies)
        handovers = Handovers()
        await deployment.bus.subscribe(subjects.heartbeats("model_worker", MODEL), handovers.on_beat)
        over = asyncio.Event()
        running = asyncio.create_task(workload.keep_running(1, 24, over.is_set))
        await asyncio.sleep(1.5)
        took: dict[str, float] = {}
        held: dict[str, int] = {}
        for child in [*deployment.supervisor.stages.values(), deployment.supervisor.broker]:
            await deployment.until_ready()
            await asyncio.sleep(0.5)
            pid, restarts, known = child.pid, child.restarts, set(handovers.empty)
            told = loop.time()
            held[child.name] = sum(
                not record.id.startswith("ref") and record.end == "stalled" for record in workload.records
            )
            child.kill(signal.SIGTERM)
            async with asyncio.timeout(30):
                while child.pid in (pid, None):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert child.restarts == restarts + 1
            if child.name.startswith("model_worker"):
                (instance,) = (i for i in handovers.empty if i not in known)
                took[child.name] = handovers.empty[instance] - told
        await deployment.until_ready()
        over.set()
        await running
        print("handed over after", took, "with streams under way:", held)
        assert complaints(workload, references) == {}
        errors = [e for record in workload.records for e in record.events if e["event"] == "error"]
        assert [e for e in errors if e["code"] != ErrorCode.NOT_FOUND] == []
        assert min(held.values()) > 8, "under load"
        assert len(took) == 2 and max(took.values()) < 1.0, took
        assert await deployment.migrated() > 0
        deployment.injector.ended = {child.name: {-1} for child in deployment.supervisor.children()}
        assert await deployment.unrest() == []


# ---------------------------------------------------------------- poison

POISON = 7


@pytest.mark.parametrize("kind", ["kill", "raise", "hang"])
async def test_poison_is_quarantined_and_its_neighbours_complete(tmp_path: Path, kind: str) -> None:
    """A request that kills, breaks or hangs whatever worker has it. All that is needed to see it again is in the dead-letter stream."""
    faults = json.dumps({str(POISON): {"kind": kind, "position": 20}})
    bodies = requests(4, 300)
    poison: Body = dict(prompt=[POISON, 8, 9], seed=5, max_tokens=100, ignore_eos=True)
    async with (
        deployed(tmp_path, DEMO, [*FIXED, "--fixed.faults", faults]) as deployment,
        loaded(deployment, bodies, {"plain": 1}) as workload,
    ):
        references = await workload.references(bodies)
        over = asyncio.Event()
        running = asyncio.create_task(workload.keep_running(1, 12, over.is_set))
        await asyncio.sleep(0.5)
        stream = workload.clients[0].generate(id="poison", **poison)
        ids: list[int] = []
        with pytest.raises(GorgonError) as caught:
            async with asyncio.timeout(60):
                async for delta in stream:
                    ids += delta.ids
        over.set()
        await running
        assert caught.value.code == ErrorCode.QUARANTINED
        assert ids == expected(poison)[:20], "what it gave before is its own"
        assert complaints(workload, references) == {}

        last = await deployment.bus.last_seq(subjects.STREAM_DEAD, subjects.dead(MODEL))
        stored = await deployment.bus.read(subjects.STREAM_DEAD, last)
        assert stored is not None and last == 1, "one letter"
        letter = msgpack.unpackb(stored.data)
        assert letter["key"] == "default.poison" and letter["deaths"] >= 4
        again = codec.decode_as(Request, letter["request"])
        generated = codec.unpack_ids(letter["generated"][0])
        assert list(codec.unpack_ids(again.prompt_ids)) == poison["prompt"]
        assert (again.sampling.seed, again.sampling.max_tokens) == (5, 100)
        assert list(generated) == ids
        deaths = {c.name: c.restarts for c in deployment.supervisor.children() if c.restarts}
        assert set(deaths) <= {"model_worker-1", "model_worker-2"}
        assert 2 <= sum(deaths.values()) <= 6, deaths


async def test_kills_from_outside_quarantine_nobody(tmp_path: Path) -> None:
    bodies = requests(4, 150)
    async with deployed(tmp_path, DEMO, FIXED) as deployment, loaded(deployment, bodies, {"plain": 1}) as workload:
        references = await workload.references(bodies)
        over = asyncio.Event()
        running = asyncio.create_task(workload.keep_running(1, 16, over.is_set))
        draw = random.Random(3)
        for _ in range(12):
            await asyncio.sleep(draw.uniform(0.2, 1.5))
            await deployment.until_every_stage_serves()
            deployment.supervisor.stages[f"model_worker-{draw.randint(1, 2)}"].kill(signal.SIGKILL)
        over.set()
        await running
        assert complaints(workload, references) == {}
        assert await deployment.migrated() > 0
        assert await deployment.bus.last_seq(subjects.STREAM_DEAD, subjects.dead(MODEL)) == 0


# ---------------------------------------------------------------- overload, deadlines, vanished clients


async def test_overload_is_an_immediate_error_and_harms_nobody(tmp_path: Path) -> None:
    """400 requests at once, with room for 8 to run and 32 to wait."""
    # RawClient allows no duplicates, which two owners of a partition may send for a moment.
    copies = {"tokenizer": 1, "model_worker": 1, "detokenizer": 1}
    worker = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--max-seqs", "8", "--max-waiting", "0"]
    flags = {"tokenizer": ["--max-waiting", "32"]}
    async with (
        deployed(tmp_path, DEMO, worker, copies=copies, flags=flags) as deployment,
        RawClient(deployment.url, MODEL) as client,
    ):
        body: Body = dict(prompt=[10, 11, 12], seed=1, max_tokens=40, ignore_eos=True)
        loop = asyncio.get_running_loop()
        began = loop.time()
        answers = [await client.send(body | {"id": f"r{number}"}) for number in range(400)]
        async with asyncio.timeout(10):
            while sum(answer.code == "overloaded" for answer in answers) + 80 < len(answers):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        told = loop.time() - began
        for answer in answers:
            await answer.wait(60)
        refused = [answer for answer in answers if answer.code == "overloaded"]
        served = [answer for answer in answers if answer.code is None]
        print(f"{len(refused)} of {len(answers)} refused, after {told:.2f} s; {len(served)} served")
        assert len(refused) + len(served) == len(answers), {answer.code for answer in answers}
        assert 32 <= len(served) <= 80
        assert told < 2.0
        assert all(answer.end is not None and answer.end["retry_after"] > 0 for answer in refused)
        assert all(answer.names == ["error"] for answer in refused)
        assert all(answer.ids[0] == expected(body) for answer in served)
        client.check()
        assert await deployment.unrest() == []


async def test_a_deadline_ends_a_request_wherever_it_is(tmp_path: Path) -> None:
    """Running, in the queue, in a worker that stands still, and with no worker at all."""
    # RawClient allows no duplicates, which two owners of a partition may send for a moment.
    copies = {"tokenizer": 1, "model_worker": 1, "detokenizer": 1}
    worker = ["--engine", "fixed", "--fixed.step-time", str(STEP), "--max-seqs", "1", "--max-waiting", "0"]
    async with (
        deployed(tmp_path, DEMO, worker, copies=copies) as deployment,
        RawClient(deployment.url, MODEL) as client,
    ):
        body: Body = dict(prompt=[10, 11, 12], seed=1, max_tokens=1000, ignore_eos=True)  # 20 seconds
        loop = asyncio.get_running_loop()

        async def ends_in_time(number: int, deadline: float) -> None:
            began = loop.time()
            answer = await client.ask(body | {"id": f"r{number}", "deadline": deadline})
            took = loop.time() - began
            assert answer.code == "deadline_exceeded", answer.end
            assert deadline - 0.1 < took < deadline + 1.5, took

        await asyncio.gather(ends_in_time(1, 1.0), ends_in_time(2, 0.5))  # one runs, one waits
        child = deployment.supervisor.stages["model_worker-1"]
        standing = asyncio.create_task(ends_in_time(3, 3.0))
        await asyncio.sleep(0.5)
        child.kill(signal.SIGSTOP)
        await standing
        await ends_in_time(4, 0.5)  # nobody to give it to
        child.kill(signal.SIGCONT)
        await ends_in_time(5, 0.5)
        client.check()


async def test_a_vanished_clients_request_is_cancelled_and_a_job_is_not(tmp_path: Path) -> None:
    flags = {"detokenizer": ["--vanished-after", "1.5"]}
    async with deployed(tmp_path, DEMO, FIXED, flags=flags) as deployment:
        body: Body = dict(prompt=[10, 11, 12], seed=1, max_tokens=400, ignore_eos=True)  # 8 seconds
        job = json.dumps(body | {"id": "job"}).encode()
        async with RawClient(deployment.url, MODEL) as stays:
            async with RawClient(deployment.url, MODEL) as goes:
                left = await goes.send(body | {"id": "left"})
                await left.until_tokens(5)
            there = await stays.send(body | {"id": "there"})
            await deployment.bus.append(subjects.jobs(MODEL), job)
            end = await tombstone(deployment, "left", 6.0)
            assert end.reason == "cancelled"
            await there.wait()
            assert there.ids[0] == expected(body)
            assert (await tombstone(deployment, "job", 20.0)).reason == "finished"
            assert (await tombstone(deployment, "there", 5.0)).reason == "finished"
        assert await deployment.unrest() == []


async def test_a_client_that_does_not_read_slows_nobody(tmp_path: Path) -> None:
    """It asks for 32 streams with log-probabilities and never reads from its socket; what others see is as even as before."""
    bodies = requests(4, 250)
    async with (
        deployed(tmp_path, DEMO, FIXED) as deployment,
        loaded(deployment, bodies, {"plain": 1}) as workload,
    ):
        references = await workload.references(bodies)
        port = deployment.supervisor.plan.port
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
        await reader.readline()
        writer.write(b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB deaf.> 1\r\n')
        body: Body = dict(prompt=[10, 11, 12], max_tokens=900, ignore_eos=True, logprobs=20)
        for number in range(32):
            data = json.dumps(body | {"id": f"deaf-{number}", "seed": number}).encode()
            writer.write(b"PUB llm.v1.generate.%s deaf.%d %d\r\n%s\r\n" % (MODEL.encode(), number, len(data), data))
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await tombstone_or_running(deployment, "deaf-31")
        await workload.keep_running(1, 16, lambda: workload.ended >= 16)
        gaps = sorted(record.longest_gap for record in workload.records if not record.id.startswith("reference"))
        print("longest gaps:", [round(gap, 2) for gap in gaps[-3:]])
        assert complaints(workload, references) == {}
        assert await deployment.migrated() == 0
        assert gaps[len(gaps) // 2] < 1.0
        writer.close()


async def tombstone_or_running(deployment: Deployment, request_id: str) -> None:
    """Until a scheduler has taken the request."""
    assignments = await deployment.bus.bucket(subjects.BUCKET_ASSIGN)
    async with asyncio.timeout(10):
        while await assignments.get(subjects.request_key("default", request_id)) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_a_long_step_is_no_hang(tmp_path: Path) -> None:
    """Each step takes thrice as long as a worker may be silent: heartbeats and the bound that it declares say that all is well."""
    slow = ["--engine", "fixed", "--fixed.step-time", "1.4", "--max-seqs", "8"]
    bodies = requests(4, 3)
    async with (
        deployed(tmp_path, DEMO, slow) as deployment,
        loaded(deployment, bodies, {"plain": 1}) as workload,
    ):
        references = await workload.references(bodies)
        await workload.keep_running(1, 8, lambda: workload.ended >= 1)
        assert complaints(workload, references) == {}
        assert min(record.longest_gap for record in workload.records) > 1.0
        assert await deployment.migrated() == 0
        assert {child.name: child.restarts for child in deployment.supervisor.children() if child.restarts} == {}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own; needs the right to mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_disk_without_a_byte_left_delays_streams_and_loses_none(tmp_path: Path) -> None:
    """Somebody else fills the disk itself: nats-server cannot write, and acknowledges nothing. A request that comes meanwhile may find
    room in a file that is there already; else it is refused. The server (2.15) gives a stream up at its first failed write, and
    does not even stop when it is told to: once there is room again it has to be killed and started anew. Then all goes on."""
    bodies = requests(4, 300)
    with small_disk(tmp_path / "nats", 64) as disk:
        async with (
            deployed(tmp_path, DEMO, FIXED, store_limit=48 * 2**20) as deployment,
            loaded(deployment, bodies, {"plain": 3, "durable": 1}) as workload,
        ):
            references = await workload.references(bodies)
            running = asyncio.create_task(workload.keep_running(1, 16, lambda: workload.ended > 0))
            await asyncio.sleep(1.0)
            filler = disk / "filler"
            with filler.open("wb") as out, suppress(OSError):
                while out.write(bytes(2**16)):
                    out.flush()
            async with RecordingClient(deployment.url, MODEL, accept_timeout=3.0) as client:
                late = client.generate(id="late", **bodies["fixed-0"])
                await asyncio.sleep(4.0)
                log = deployment.supervisor.broker.log_path.read_text()
                assert "no space left on device" in log, "the server has noticed"
                assert workload.ended < len(workload.records) - 1, "most streams wait"
                filler.unlink()
                deployment.supervisor.broker.kill(signal.SIGKILL)
                try:
                    assert (await late.result()).choices[0].ids == references["fixed-0"].ids[0]
                except GorgonError as error:
                    assert error.code in (ErrorCode.STORAGE_FULL, ErrorCode.UNAVAILABLE)
            await running
            assert complaints(workload, references) == {}
            deployment.injector.ended = {"nats": {-1}}  # and nobody else
            assert await deployment.unrest() == []
