"""`gorgon bench`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from services.bench import report
from services.bench.measure import Timeline, summary
from services.bench.targets import EngineAlone, Pipeline
from services.bench.workloads import WORKLOADS, Planned, at_rate, read_trace, replay
from shared.api import said
from shared.config import StageSettings
from shared.errors import StartError
from shared.nats_bus import NatsBus

Draw = Callable[[int, int], list[Planned]]  # of (vocabulary, context)

LEAST = 1e-6  # of what must be above 0
SMALL = 32  # a smaller run of each workload comes first, so that kernels are compiled and connections open


def main(
    workload: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(WORKLOADS)}; may be repeated; default: all that fit")
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(help="replay a trace of Azure (.csv) or Mooncake (.jsonl)")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="take so many of a trace's requests")] = None,
    speed: Annotated[float, typer.Option(min=LEAST, help="replay a trace so many times as fast")] = 1.0,
    shrink: Annotated[int, typer.Option(min=1, help="divide a trace's lengths by this, for a small context")] = 1,
    rate: Annotated[
        float | None, typer.Option(min=LEAST, help="requests a second, as a Poisson process, for all workloads")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each; all are reported")] = 1,
    seed: int = 0,
    timeout: Annotated[float, typer.Option(min=LEAST, help="seconds to wait for the last end")] = 600.0,
    model: Annotated[str, typer.Option(help="name of the model in subjects")] = "demo",
    nats: Annotated[
        str, typer.Option("--nats", envvar="GORGON_NATS_URL", help="the deployment's server")
    ] = "nats://127.0.0.1:4222",
    engine: Annotated[
        Path | None, typer.Option(help="no deployment: the engine alone, with the model in this folder")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=JSON, a field of the engine's EngineConfig, e.g. prefix_cache=false")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for bench.json and plots")] = None,
    warm_up: Annotated[bool, typer.Option(help="run a smaller load first")] = True,
) -> None:
    """Measure a running deployment, or the engine alone: throughput, time to first token, time between tokens."""
    unknown = [name for name in workload or () if name not in WORKLOADS]
    if unknown:
        raise typer.BadParameter(f"unknown workloads {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if not trace and (requests is not None or speed != 1.0 or shrink != 1):
        raise typer.BadParameter("--requests, --speed and --shrink are about a --trace")
    if option and engine is None:
        raise typer.BadParameter("--option is about an --engine; a deployment's workers have settings of their own")
    try:
        loads = _loads(workload, trace, requests, speed, shrink, rate, seed)
        options = dict(_option(text) for text in option or ())
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    setting = dict(
        engine=None if engine is None else str(engine), options=options, speed=speed, shrink=shrink, rate=rate
    )
    status = asyncio.run(_run(loads, engine, options, nats, model, repeats, timeout, out, warm_up, setting))
    raise typer.Exit(status)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option takes NAME=JSON, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a plain word


def _loads(
    names: list[str] | None,
    traces: list[Path] | None,
    count: int | None,
    speed: float,
    shrink: int,
    rate: float | None,
    seed: int,
) -> dict[str, Draw]:
    loads: dict[str, Draw] = {}
    if names is None and traces is None:
        names = list(WORKLOADS)
    for name in names or ():
        loads[name] = lambda vocabulary, context, name=name: WORKLOADS[name].draw(vocabulary, seed)  # type: ignore[misc]
    for path in traces or ():
        arrivals = read_trace(path)[:count]
        loads[path.stem] = lambda vocabulary, context, arrivals=arrivals: replay(  # type: ignore[misc]
            arrivals, vocabulary, context, speed=speed, shrink=shrink
        )
    if rate is not None:
        loads = {name: _at_rate(draw, rate, seed) for name, draw in loads.items()}
    return loads


def _at_rate(draw: Draw, rate: float, seed: int) -> Draw:
    return lambda vocabulary, context: at_rate(draw(vocabulary, context), rate, seed)


@asynccontextmanager
async def _target(
    engine: Path | None, options: dict[str, Any], nats: str, model: str
) -> AsyncIterator[Pipeline | EngineAlone]:
    if engine is not None:
        try:
            alone = EngineAlone(engine, **options)
        except ValidationError as error:
            raise LookupError(f"--option: {said(error)}") from None
        except TypeError as error:  # no such field
            raise LookupError(f"--option: {error}") from None
        await asyncio.to_thread(alone.load, _say_progress)
        try:
            yield alone
        finally:
            await asyncio.to_thread(alone.stop)
        return
    bus = await asyncio.wait_for(NatsBus.connect(StageSettings(nats_url=nats)), 5)
    try:
        pipeline = Pipeline(bus, model)
        await pipeline.begin()
        yield pipeline
    finally:
        await bus.close()


def _say_progress(part: float, what: str) -> None:
    print(f"{part:4.0%} {what}", file=sys.stderr)


async def _run(
    loads: dict[str, Draw],
    engine: Path | None,
    options: dict[str, Any],
    nats: str,
    model: str,
    repeats: int,
    timeout: float,
    out: Path | None,
    warm_up: bool,
    setting: dict[str, Any],
) -> int:
    results: list[dict[str, Any]] = []
    failed = False
    try:
        async with _target(engine, options, nats, model) as target:
            print(report.COLUMNS, flush=True)
            for name, draw in loads.items():
                planned = draw(target.vocabulary, target.context)
                longest = max(len(request.prompt) + request.output for request in planned)
                if longest > target.context:
                    print(f"{name} is left out: {longest} tokens, the context is {target.context}", file=sys.stderr)
                    continue
                if warm_up:
                    await target.run([Planned(0.0, p.prompt, min(p.output, 4)) for p in planned[:SMALL]], timeout)
                for repeat in range(repeats):
                    timelines = await target.run(planned, timeout)
                    results.append(summary(name, timelines))
                    print(report.row(results[-1]), flush=True)
                    failed |= results[-1]["failed"] > 0
                    for code, count in results[-1]["errors"].items():
                        print(f"{name}: {count} × {code}", file=sys.stderr)
                    if out is not None:
                        report.write_json(out / "bench.json", results, setting)
                        _plot(out / f"{name}{f'-{repeat + 1}' if repeats > 1 else ''}.png", name, timelines)
    except (LookupError, OSError, StartError) as error:  # a TimeoutError, which says nothing, is an OSError
        print(f"error: {str(error) or f'no NATS server answers at {nats}'}", file=sys.stderr)
        return 1
    return 1 if failed or not results else 0


def _plot(path: Path, name: str, timelines: list[Timeline]) -> None:
    with contextlib.suppress(ImportError):
        report.plot(path, name, timelines)
        return
    print("no plots: pip install 'gorgon[bench]'", file=sys.stderr)
