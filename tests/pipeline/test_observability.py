"""What the stages say about themselves, against what a client saw: metrics, NATS micro, `gorgon top`, traces and logs."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
import threading
import urllib.request
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nats.micro
import pytest
import pytest_asyncio
import yaml
from nats.micro.service import ServiceInfo, ServicePing, ServiceStats
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from services.supervisor import STAGES
from shared import subjects
from shared.broker import free_ports
from shared.metrics import Kind, metrics_of
from tests.pipeline.harness import Deployment, RawClient, deployed
from tests.pipeline.http_client import call
from tests.protocol.systems import until, until_equal

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models" / "demo"
STEP = 0.01
FIXED = [
    "--engine",
    "fixed",
    "--fixed.step-time",
    str(STEP),
    "--fixed.vocab-size",
    "512",
    "--max-seqs",
    "32",
    "--fixed.max-model-len",
    "2048",
]


Samples = dict[tuple[str, str], float]  # (name of the sample, value of its own label or "")


def read_metrics(port: int) -> tuple[Samples, list[dict[str, str]], str]:
    """Samples, all label sets, and the text."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples: Samples = {}
    labels: list[dict[str, str]] = []
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("gorgon_"):
                labels.append(sample.labels)
                own = [v for k, v in sample.labels.items() if k not in ("stage", "model", "instance")]
                samples[sample.name, own[0] if own else ""] = sample.value
    return samples, labels, text


async def scrape(deployment: Deployment, number: int) -> tuple[Samples, list[dict[str, str]], str]:
    """Of the number-th child, on a thread: this loop has a NATS client to keep alive."""
    return await asyncio.to_thread(read_metrics, deployment.supervisor.plan.metrics_port + number)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Deployment]:
    data = tmp_path_factory.mktemp("observed")
    async with deployed(data, "demo", DEMO, {"model_worker": FIXED}, metrics_port=free_ports(4)) as deployment:
        yield deployment


@pytest_asyncio.fixture(loop_scope="module")
async def client(deployment: Deployment) -> AsyncIterator[RawClient]:
    async with RawClient(deployment.url, "demo") as client:
        yield client
        await deployment.until_idle()
        client.check()


module_loop = pytest.mark.asyncio(loop_scope="module")


@module_loop
async def test_metrics_agree_with_what_the_client_saw(client: RawClient, deployment: Deployment) -> None:
    requests, tokens = 40, 25
    before = [(await scrape(deployment, number))[0] for number in range(4)]
    answers = [
        await client.send(dict(prompt=[3 + n, 4, 5], max_tokens=tokens, seed=n, n=1 + n % 2)) for n in range(requests)
    ]
    refused = [await client.send(dict(prompt="a", no_such_field=1)) for _ in range(3)]
    refused.append(await client.send(dict(prompt=[5] * 10, max_tokens=10**6, id="too-long")))
    long = await client.send(dict(prompt=[3], max_tokens=1000, ignore_eos=True, id="to-be-cancelled"))
    await long.until_tokens(3)
    await client.nc.request(subjects.cancel("demo"), json.dumps(dict(id="to-be-cancelled")).encode(), timeout=5)
    for answer in [*answers, *refused, long]:
        await answer.wait()
    replay = next(e["replay"] for e in answers[0].events if e["event"] == "accepted")
    question = dict(id=answers[0].events[0]["id"])
    for _ in range(2):
        await client.nc.request(replay, json.dumps(question).encode(), timeout=5)
    await deployment.until_idle()
    await asyncio.sleep(0.3)  # what is scraped is the last heartbeat's, one every 0.1 s
    after = []
    for number, stage in enumerate(STAGES):
        samples, labels, text = await scrape(deployment, number)
        after.append(samples)
        assert all(label["stage"] == stage and label["model"] == "demo" and label["instance"] for label in labels)
        assert "process_start_time_seconds" in text
        for metric in metrics_of(stage):  # all are there, with or without samples
            family = metric.name.removesuffix("_total") if metric.kind is Kind.COUNTER else metric.name
            assert f"# TYPE {metric.name} " in text or f"# TYPE {family} " in text, metric.name

    def grown(stage: str, name: str, label: str = "") -> float:
        number = STAGES.index(stage)
        return after[number].get((name, label), 0) - before[number].get((name, label), 0)

    seen = sum(len(ids) for answer in answers for ids in answer.ids.values())
    assert seen == tokens * sum(1 + n % 2 for n in range(requests))
    cancelled = sum(map(len, long.ids.values()))
    accepted = requests + 1
    # tokenizer
    assert grown("tokenizer", "gorgon_tokenizer_accepted_total") == accepted
    assert grown("tokenizer", "gorgon_tokenizer_refused_total", "invalid_request") == 3
    assert grown("tokenizer", "gorgon_tokenizer_refused_total", refused[-1].code or "") == 1
    assert grown("tokenizer", "gorgon_tokenizer_prompt_tokens_total") == 3 * requests + 1
    assert grown("tokenizer", "gorgon_tokenizer_admission_seconds_count") == accepted
    assert grown("tokenizer", "gorgon_tokenizer_encode_seconds_count") == accepted
    assert grown("tokenizer", "gorgon_endpoint_requests_total", "generate") == accepted + 4
    assert grown("tokenizer", "gorgon_endpoint_errors_total", "generate") == 4
    # scheduler
    assert grown("scheduler", "gorgon_scheduler_queue_seconds_count") == accepted
    assert grown("scheduler", "gorgon_scheduler_cancelled_total") == 1
    assert grown("scheduler", "gorgon_endpoint_requests_total", "cancel") == 1
    # model worker: of the cancelled request it may have generated more than was committed
    generated = grown("model_worker", "gorgon_worker_tokens_total")
    assert seen + cancelled <= generated <= seen + cancelled + 200
    assert (
        grown("model_worker", "gorgon_worker_prompt_tokens_total") == sum(3 * (1 + n % 2) for n in range(requests)) + 1
    )
    assert grown("model_worker", "gorgon_worker_runs_total", "accepted") == accepted
    assert grown("model_worker", "gorgon_worker_finished_total", "length") == sum(1 + n % 2 for n in range(requests))
    assert grown("model_worker", "gorgon_worker_queue_seconds_count") == accepted
    assert grown("model_worker", "gorgon_worker_prefill_seconds_count") == accepted
    steps = grown("model_worker", "gorgon_worker_steps_total")
    assert grown("model_worker", "gorgon_worker_step_seconds_count") == steps
    assert 0 < grown("model_worker", "gorgon_worker_step_seconds_sum") <= after[2]["gorgon_nats_connected_seconds", ""]
    assert grown("model_worker", "gorgon_worker_step_sequences_sum") == generated
    assert after[2]["gorgon_worker_slots_free", ""] == after[2]["gorgon_worker_slots", ""] == 32
    assert after[2]["gorgon_worker_kv_blocks_free", ""] == after[2]["gorgon_worker_kv_blocks", ""] > 0
    # detokenizer
    assert grown("detokenizer", "gorgon_detokenizer_tokens_total") >= seen + cancelled
    assert grown("detokenizer", "gorgon_detokenizer_requests_ended_total", "finished") == requests
    assert grown("detokenizer", "gorgon_detokenizer_requests_ended_total", "cancelled") == 1
    assert grown("detokenizer", "gorgon_detokenizer_time_to_first_token_seconds_count") == accepted
    ttft = sum(a.end["timings"]["ttft_ms"] for a in answers if a.end) / 1e3
    assert ttft <= grown("detokenizer", "gorgon_detokenizer_time_to_first_token_seconds_sum") <= ttft + 5
    assert grown("detokenizer", "gorgon_detokenizer_request_seconds_count") == accepted
    # One gap fewer than steps with tokens; the choices of a request share them.
    gaps = grown("detokenizer", "gorgon_detokenizer_inter_token_seconds_count")
    assert requests * (tokens - 1) <= gaps <= requests * (tokens - 1) * 1.5 + 5000
    assert grown("detokenizer", "gorgon_endpoint_requests_total", "replay") == 2
    assert after[3]["gorgon_detokenizer_serving_partitions", ""] == 8
    packed = grown("detokenizer", "gorgon_detokenizer_snapshot_seconds_sum")
    assert 0 < packed < grown("detokenizer", "gorgon_detokenizer_snapshot_seconds_count")
    for samples in after:
        assert samples["gorgon_ready", ""] == 1
        assert samples["gorgon_in_flight_requests", ""] == 0
        assert samples["gorgon_nats_connected_seconds", ""] > 0


async def answers_of(client: RawClient, subject: str, wait: float = 0.5) -> list[dict[str, Any]]:
    """All answers to a question that many may answer."""
    got: list[dict[str, Any]] = []
    inbox = client.nc.new_inbox()

    async def take(message: Any) -> None:
        got.append(json.loads(message.data))

    subscription = await client.nc.subscribe(inbox, cb=take)
    await client.nc.publish(subject, b"", reply=inbox)
    await asyncio.sleep(wait)
    await subscription.unsubscribe()
    return got


@module_loop
async def test_nats_micro_shows_every_stage(client: RawClient, deployment: Deployment) -> None:
    """Beside a service of nats-py's own: what it answers is what a stage must answer, too."""

    async def echo(request: Any) -> None:
        await request.respond(request.data)

    native = await nats.micro.add_service(client.nc, name="native", version="1.2.3", description="for comparison")
    await native.add_endpoint(name="echo", subject="native.echo", handler=echo, metadata={})
    try:
        await client.ask(dict(prompt="a", max_tokens=2))
        for verb, shape in (("PING", ServicePing), ("INFO", ServiceInfo), ("STATS", ServiceStats)):
            everybody = {answer["name"]: answer for answer in await answers_of(client, f"$SRV.{verb}")}
            assert everybody.keys() == {"native", *(f"gorgon-{stage}" for stage in STAGES)}
            model = everybody.pop("native")
            for name, answer in everybody.items():
                assert answer["type"] == model["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
                assert {k: type(v) for k, v in answer.items()} == {k: type(v) for k, v in model.items()}
                for endpoint in answer.get("endpoints", []):
                    assert {k: type(v) for k, v in endpoint.items()} == {
                        k: type(v) for k, v in model["endpoints"][0].items()
                    }
                assert shape.from_dict(answer).to_dict() == answer
                assert answer["metadata"] == {"stage": name.removeprefix("gorgon-"), "model": "demo"}
                (by_name,) = await answers_of(client, f"$SRV.{verb}.{name}", 0.1)
                (by_id,) = await answers_of(client, f"$SRV.{verb}.{name}.{answer['id']}", 0.1)
                assert by_name["id"] == by_id["id"] == answer["id"]
        (stats,) = await answers_of(client, "$SRV.STATS.gorgon-tokenizer", 0.1)
        (generate,) = stats["endpoints"]
        assert (generate["subject"], generate["queue_group"]) == (subjects.generate("demo"), subjects.TOKENIZERS)
        assert generate["num_requests"] > generate["num_errors"] >= 0
        assert generate["processing_time"] // generate["num_requests"] == generate["average_processing_time"] > 0
        (worker,) = await answers_of(client, "$SRV.INFO.gorgon-model_worker", 0.1)
        assert [endpoint["name"] for endpoint in worker["endpoints"]] == ["run", "abort"]
        (delivery,) = await answers_of(client, "$SRV.INFO.gorgon-detokenizer", 0.1)
        answered = {"llm.v1.replay.demo.*", "llm.v1.prefix.demo.*", "llm.v1.attach.demo.*"}
        assert {endpoint["subject"] for endpoint in delivery["endpoints"]} == answered
    finally:
        await native.stop()


@module_loop
async def test_the_consumers_that_keda_looks_at_are_there(client: RawClient) -> None:
    """In a running deployment, by the manifests' names; what is their lag is 0 when nothing waits."""
    await client.ask(dict(prompt="a", max_tokens=2))
    stream = client.nc.jetstream()
    looked_at = set()
    for path in (ROOT / "deploy/kubernetes/keda").glob("*.yaml"):
        for trigger in (yaml.safe_load(path.read_text()).get("spec") or {}).get("triggers", ()):
            if trigger["type"] == "nats-jetstream":
                looked_at.add((trigger["metadata"]["stream"], trigger["metadata"]["consumer"]))
    assert len(looked_at) >= 5
    for name, consumer in looked_at:

        async def lag(name: str = name, consumer: str = consumer) -> int:
            info = await stream.consumer_info(name, consumer)  # raises NotFoundError
            return (info.num_pending or 0) + (info.num_ack_pending or 0)

        await until_equal(lag, 0)  # acknowledgements are not waited for


async def gorgon(*arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        stdout=asyncio.subprocess.PIPE,
        env={"COLUMNS": "200", **_env()},
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


def _env() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "COLUMNS"}


@module_loop
async def test_top_once(client: RawClient, deployment: Deployment) -> None:
    answers = [await client.send(dict(prompt=[3, n], max_tokens=600, ignore_eos=True)) for n in range(8)]
    for answer in answers:
        await answer.until_tokens(5)
    text = await gorgon("top", "--once", "--nats", deployment.url)
    head, *rows = text.strip().splitlines()
    assert head.startswith("demo: 8 live · 0 waiting · ") and "batch 8/32" in head and "kv " in head
    rate = float(head.split(" tok/s")[0].rsplit(" ", 1)[1].replace(",", ""))
    assert 0 < rate <= 8 / STEP * 1.1
    assert [row.split()[0] for row in rows[1:]] == ["tokenizer", "scheduler", "model_worker", "detokenizer"]
    assert "8/32" in rows[3] and "tok/s" in rows[3] and "ready" in rows[3]
    for answer in answers:
        await answer.wait()


@module_loop
async def test_top_live_on_a_terminal(client: RawClient, deployment: Deployment) -> None:
    ours, its = pty.openpty()
    command = (sys.executable, "-m", "services.cli", "top", "--nats", deployment.url)
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=its,
        stdout=its,
        stderr=its,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    os.close(its)
    seen = bytearray()

    def read() -> None:
        """To the end: what writes to a terminal that nobody reads stands still, deaf to signals."""
        try:
            seen.extend(os.read(ours, 65536))
        except OSError:  # closed on the other side
            loop.remove_reader(ours)

    loop = asyncio.get_running_loop()
    loop.add_reader(ours, read)
    try:
        await until(lambda: seen.count(b"detokenizer-1") >= 3, timeout=20.0)
        assert b"demo: 0 live" in seen
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(10):
            await process.wait()
        assert process.returncode == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(ours)
        os.close(ours)


# ---------------------------------------------------------------- traces


class Collector:
    """An OTLP collector over HTTP: keeps the spans, and the service that each came from."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                assert self.path == "/v1/traces"
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
                    collector.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, request_id: str) -> list[tuple[str, Span]]:
        return [(service, span) for service, span in self.spans if attribute(span, "gorgon.request_id") == request_id]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attribute(span: Span, name: str) -> str | int | None:
    for pair in span.attributes:
        if pair.key == name:
            return pair.value.int_value or pair.value.string_value
    return None


async def test_one_trace_a_request_also_across_the_loss_of_its_worker(tmp_path: Path, collector: Collector) -> None:
    flags = {"model_worker": FIXED}
    env = {"GORGON_OTLP_ENDPOINT": collector.url}
    streams, copies = 10, {"model_worker": 2, "gateway": 1}
    async with (
        deployed(tmp_path, "demo", DEMO, flags, copies, env=env, metrics_port=free_ports(5)) as deployment,
        RawClient(deployment.url, "demo") as client,
    ):
        await deployment.until_served()
        # Half of them bring a trace of their own, half do not; one is refused.
        given = {f"r{n}": f"00-{n + 1:032x}-{n + 100:016x}-01" for n in range(streams)}
        answers = {
            name: await client.send(
                dict(id=name, prompt=[9, n], max_tokens=250, ignore_eos=True)
                | (dict(traceparent=trace) if n % 2 else {})
            )
            for n, (name, trace) in enumerate(given.items())
        }
        wrong = await client.ask(dict(id="wrong", prompt=[10**6], traceparent=f"00-{77:032x}-{78:016x}-01"))
        body = dict(model="demo", prompt=[9, 9], max_tokens=3, stream=True)
        http = await call(
            deployment.supervisor.plan.http_port, "/v1/completions", body, {"traceparent": f"00-{88:032x}-{89:016x}-01"}
        )
        assert [event async for event in http.events()]
        for answer in answers.values():
            await answer.until_tokens(5)
        deployment.expected_deaths["model_worker-1"] = 1
        deployment.supervisor.stages["model_worker-1"].kill(signal.SIGKILL)
        for answer in answers.values():
            await answer.wait()
        await deployment.until_idle()
        client.check()
        assert wrong.code == "invalid_request"
        await asyncio.sleep(0.3)  # for another heartbeat
        scheduler, detokenizer = (await scrape(deployment, 1))[0], (await scrape(deployment, 4))[0]
        logs = {child.name: child.log_path for child in deployment.supervisor.stages.values()}
    # The stages have stopped and exported what was left.
    trace_of: dict[str, str] = {}
    migrated = 0
    for number, name in enumerate(given):
        spans = collector.of(f"default.{name}")
        (trace_id,) = {span.trace_id.hex() for _, span in spans}
        trace_of[f"default.{name}"] = trace_id
        by_name: dict[str, list[Span]] = defaultdict(list)
        for service, span in spans:
            by_name[span.name].append(span)
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            stage = {"tokenize": "tokenizer", "schedule": "scheduler", "migrate": "scheduler", "deliver": "detokenizer"}
            assert service == f"gorgon-{stage.get(span.name, 'model_worker')}"
        (tokenize,), (schedule,), (deliver,) = by_name["tokenize"], by_name["schedule"], by_name["deliver"]
        if number % 2:
            assert (trace_id, tokenize.parent_span_id.hex()) == (f"{number + 1:032x}", f"{number + 100:016x}")
        else:
            assert not tokenize.parent_span_id
        assert schedule.parent_span_id == deliver.parent_span_id == tokenize.span_id
        assert [event.name for event in schedule.events] == ["placed"]
        assert attribute(deliver, "gorgon.completion_tokens") == 250
        assert attribute(deliver, "gorgon.reason") == "finished"
        last = by_name["generate"][-1]
        if by_name["migrate"]:
            migrated += 1
            newest = max(by_name["migrate"], key=lambda span: attribute(span, "gorgon.epoch"))
            assert newest.parent_span_id == tokenize.span_id
            assert attribute(newest, "gorgon.gone").startswith("model_worker-1")  # type: ignore[union-attr]
            assert [event.name for event in newest.events] == ["fenced", "placed"]
            assert last.parent_span_id == newest.span_id
            assert attribute(last, "gorgon.epoch") == attribute(newest, "gorgon.epoch")
            assert [event.name for event in last.events] == ["resumed"]
            assert "migrated" in [event.name for event in deliver.events]
        else:
            assert last.parent_span_id == schedule.span_id
        phases = {span.name: span for _, span in spans if span.parent_span_id == last.span_id}
        assert phases.keys() == {"queue", "prefill", "decode"}
        assert phases["queue"].end_time_unix_nano == phases["prefill"].start_time_unix_nano
        assert phases["prefill"].end_time_unix_nano == phases["decode"].start_time_unix_nano
    assert 0 < migrated < streams
    # The metrics tell the same, and the death of a worker has not made them miss or repeat anything.
    assert sum(v for (n, _), v in scheduler.items() if n == "gorgon_scheduler_migrations_total") >= migrated
    assert scheduler["gorgon_scheduler_migration_seconds_count", ""] >= migrated
    assert scheduler["gorgon_scheduler_workers_gone_total", "lost"] >= 1
    assert detokenizer["gorgon_detokenizer_fences_total", ""] >= migrated
    assert detokenizer["gorgon_detokenizer_time_to_first_token_seconds_count", ""] == streams + 1
    assert detokenizer["gorgon_detokenizer_requests_ended_total", "finished"] == streams + 1
    assert detokenizer["gorgon_detokenizer_tokens_total", ""] == 250 * streams + 3
    assert len(set(trace_of.values())) == streams
    ((_, refused),) = collector.of("default.wrong")
    assert (refused.name, refused.trace_id.hex(), refused.parent_span_id.hex()) == (
        "tokenize",
        f"{77:032x}",
        f"{78:016x}",
    )
    assert refused.status.message.startswith("invalid_request")
    by_name = {s.name: s for _, s in collector.of(f"default.{http.headers['x-request-id']}")}
    assert {s.trace_id.hex() for s in by_name.values()} == {f"{88:032x}"}
    assert by_name["http"].parent_span_id.hex() == f"{89:016x}"
    assert by_name["tokenize"].parent_span_id == by_name["http"].span_id
    assert by_name["deliver"].parent_span_id == by_name["schedule"].parent_span_id == by_name["tokenize"].span_id
    _check_logs(logs, trace_of)


def _check_logs(logs: dict[str, Path], trace_of: dict[str, str]) -> None:
    """Every line about a request has its stage and trace, and, past the tokenizer, its epoch."""
    counts: dict[str, int] = defaultdict(int)
    for name, path in logs.items():
        for text in path.read_text().splitlines():
            if not text.startswith("{"):
                continue
            line = json.loads(text)
            assert not {"key", "request"} & line.keys(), line
            if (request_id := line.get("request_id")) in trace_of:
                stage = name.rpartition("-")[0]
                counts[stage] += 1
                assert (line["stage"], line["trace_id"]) == (stage, trace_of[request_id]), line
                assert stage == "tokenizer" or line["epoch"] >= 1, line
    assert {"tokenizer", "scheduler", "model_worker"} <= counts.keys()
