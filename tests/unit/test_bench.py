"""`gorgon bench`: traces, timelines and what they amount to, and a run against the engine alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from services.bench import report
from services.bench.measure import Timeline, spread, summary, throughput
from services.bench.targets import Run
from services.bench.workloads import WORKLOADS, Planned, at_rate, read_trace, replay
from services.cli import app
from tests.unit.engine_harness import SHARED, needs_weights, weights

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,40,44\n2023-11-16 18:15:48.9305900,4000,9\n"
)
MOONCAKE = "".join(
    json.dumps(row) + "\n"
    for row in (
        dict(timestamp=0, input_length=1100, output_length=8, hash_ids=[1, 2, 3]),
        dict(timestamp=3000, input_length=1200, output_length=600, hash_ids=[1, 2, 4]),
    )
)


def test_azure(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    arrivals = read_trace(tmp_path / "a.csv")
    assert [(a.at, a.prompt_tokens, a.output) for a in arrivals] == [(0.0, 40, 44), (2.25, 4000, 9)]
    planned = replay(arrivals, 100, 512, speed=10, shrink=1)
    assert planned[1].at == pytest.approx(0.225)
    assert [len(p.prompt) + p.output < 512 for p in planned] == [True, True], "cut to the context"
    assert planned[0].prompt[:20] != planned[1].prompt[:20]


def test_mooncake(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    arrivals = read_trace(tmp_path / "m.jsonl")
    assert [a.prompt_tokens for a in arrivals] == [1100, 1200]
    one, two = replay(arrivals, 500, 4096, speed=1, shrink=1)
    assert (len(one.prompt), len(two.prompt)) == (1100, 1200)
    assert one.prompt[:1024] == two.prompt[:1024] and one.prompt[1024:1100] != two.prompt[1024:1100]
    assert two.at == 3.0
    small = replay(arrivals, 500, 4096, speed=1, shrink=16)
    assert (len(small[0].prompt), small[0].output, small[1].output) == (68, 1, 37)
    assert small[0].prompt[:64] == small[1].prompt[:64], "blocks shrink, and stay the same"


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.csv", "a,b\n1,2\n"), ("x.jsonl", "{}\n"), ("y.jsonl", "no JSON\n"), ("z.jsonl", "[1]\n")],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="neither"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_a_trace_without_requests_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" if name == "x.csv" else "")
    with pytest.raises(ValueError, match="no request"):
        read_trace(tmp_path / name)


@pytest.mark.skipif(not (SHARED / "data/traces").is_dir(), reason="../shared/data/traces is not here")
def test_the_real_traces() -> None:
    conversations = read_trace(SHARED / "data/traces/AzureLLMInferenceTrace_conv.csv")
    assert len(conversations) == 19_366
    assert sum(a.prompt_tokens for a in conversations) / len(conversations) == pytest.approx(1155, abs=1)
    prompts = read_trace(SHARED / "data/traces/mooncake_synthetic.jsonl")
    assert len(prompts) == 3_993
    assert all(a.prompt_tokens > 0 and a.output > 0 for a in prompts)


def test_workloads_are_those_of_the_table() -> None:
    drawn = WORKLOADS["nano256"].draw(1000, 0)
    assert len(drawn) == 256 and all(100 <= len(p.prompt) <= 1024 and 100 <= p.output <= 1024 for p in drawn)
    assert drawn == WORKLOADS["nano256"].draw(1000, 0) != WORKLOADS["nano256"].draw(1000, 1)
    assert {token for p in drawn for token in p.prompt} == set(range(1000))


def test_poisson_arrivals() -> None:
    planned = at_rate([Planned(0.0, [1], 1)] * 2000, 50.0, 3)
    assert planned[0].at == 0 and planned[-1].at == pytest.approx(40, rel=0.1)


def test_figures() -> None:
    one = Timeline(1.0, 100, [(1.5, 1), (1.6, 2), (1.8, 1)], 1.8)
    two = Timeline(2.0, 50, [(3.0, 1)], 3.0)
    bad = Timeline(2.5, 10, [], 4.0, "overloaded")
    assert one.gaps() == pytest.approx([0.05, 0.05, 0.2])
    got = summary("w", [one, two, bad])
    assert (got["requests"], got["failed"], got["errors"]) == (3, 1, {"overloaded": 1})
    assert (got["output_tokens"], got["input_tokens"], got["seconds"]) == (5, 150, 3.0)
    assert got["output_tokens_per_second"] == pytest.approx(5 / 3)
    assert got["first_token_ms"]["p50"] == pytest.approx(750) and got["first_token_ms"]["max"] == pytest.approx(1000)
    assert got["inter_token_ms"]["p50"] == pytest.approx(50)
    assert spread([]) == {} and spread([0.1] * 10)["p99"] == pytest.approx(100)
    assert throughput([one, two], 0.5) == [(0, 0), (0.5, 0), (1.0, 0), (1.5, 8.0), (2.0, 0), (2.5, 0), (3.0, 2.0)]
    assert "| w | 3 | 1 | 3.00 |" in report.row(got)
    assert report.row(summary("x", [Timeline(0.0, 1, [], 1.0, "lost")])).count("–") == 2


async def test_requests_are_sent_in_their_time_and_given_up_in_the_end() -> None:
    planned = [Planned(at, [1, 2], 1) for at in (0.06, 0.0, 0.03)]
    run, sent = Run(planned), []

    def send(number: int) -> None:
        sent.append((number, run.now()))
        if number != 2:
            run.tokens(number, 1, run.now())
            run.end(number, run.now())

    timelines = await run.send(planned, send, 0.1)
    assert [number for number, _ in sent] == [1, 2, 0]
    assert all(at >= planned[number].at - 0.001 for number, at in sent)
    assert [t.error for t in timelines] == ["", "", "no end in time"]
    assert timelines[0].first_token is not None and timelines[0].first_token < 0.05


@needs_weights
def test_the_engine_alone(tmp_path: Path) -> None:
    """The command itself, on a trace: table, JSON and a plot."""
    pytest.importorskip("matplotlib")
    (tmp_path / "trace.jsonl").write_text(MOONCAKE)
    options = ["--engine", str(weights("stories260K")), "--option", "device=cpu", "--option", "max_seqs=4"]
    trace = ["--trace", str(tmp_path / "trace.jsonl"), "--shrink", "16", "--speed", "1000"]
    result = CliRunner().invoke(
        app, ["bench", *options, *trace, "--workload", "batch-8", "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    assert "| trace | 2 | 0 |" in result.output and "| batch-8 | 8 | 0 |" in result.output
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert [(r["workload"], r["output_tokens"]) for r in found["results"]] == [("batch-8", 8 * 256), ("trace", 38)]
    assert (tmp_path / "out/trace.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out/batch-8.png").stat().st_size > 10_000


def test_wrong_options() -> None:
    for wrong in (
        *(["--workload", "nano"], ["--engine", "x", "--option", "device"], ["--trace", "/no/such.csv"]),
        # What would be ignored, or divide by zero.
        *(
            ["--option", "prefix_cache=false"],
            ["--speed", "2"],
            ["--requests", "3"],
            ["--shrink", "2"],
            ["--rate", "0"],
        ),
    ):
        result = CliRunner().invoke(app, ["bench", *wrong])
        assert result.exit_code == 2, result.output


def test_what_keeps_a_benchmark_from_its_beginning_is_said_in_one_line() -> None:
    for arguments, said in (
        (["--nats", "nats://127.0.0.1:1"], "no NATS server answers at nats://127.0.0.1:1"),
        (["--engine", "/no/such/model"], "config_missing"),
        (["--engine", "/no/such/model", "--option", "no_such_field=1"], "no_such_field"),
        (
            ["--engine", "/no/such/model", "--option", "max_seqs=many"],
            "--option: max_seqs: Input should be a valid integer",
        ),
    ):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert result.exit_code == 1 and said in result.output.splitlines()[-1], result.output
