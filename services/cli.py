"""The `gorgon` command: run everything on one machine, talk to a deployment, look inside.

Everything here is a client of NATS, except `up` and `run`, which start the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from services.bench.command import main as bench
from services.supervisor import GATEWAY, IN_ORDER, STAGES, Plan, Supervisor
from services.top import View
from shared import codec, presence, subjects
from shared.bus import Bus, Message
from shared.client import Client
from shared.client_stream import Stream
from shared.config import StageSettings
from shared.errors import GorgonError
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.nats_bus import NatsBus

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
START_TIMEOUT = 300.0

ModelName = Annotated[str, typer.Option(help="name of the model in subjects")]
ModelPath = Annotated[Path, typer.Option("--model-path", help="Hugging Face folder")]
Url = Annotated[str, typer.Option("--nats", help="NATS server", envvar="GORGON_NATS_URL")]
DEFAULT_URL = "nats://127.0.0.1:4222"


def _run(coroutine: Coroutine[Any, Any, int | None]) -> None:
    """Runs a command; errors that people can act on become one line and exit status 1."""
    try:
        status = asyncio.run(coroutine)
    except GorgonError as error:
        err.print(f"[red]{error.code}[/red]: {error.message}")
        status = 1
    except (TimeoutError, OSError, FileNotFoundError) as error:
        err.print(f"[red]error[/red]: {error}")
        status = 1
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status or 0)


async def _connect(url: str, **settings: Any) -> Bus:
    """By the GORGON_NATS_* variables, unless `settings` say otherwise."""
    try:
        return await asyncio.wait_for(NatsBus.connect(StageSettings(nats_url=url, **settings)), 5)
    except TimeoutError:
        raise TimeoutError(f"no NATS server answers at {url}; is `gorgon up` running?") from None


# ---------------------------------------------------------------- running everything


def _plan(data: Path, model: str, model_path: Path, port: int, copies: dict[str, int]) -> Plan:
    if not (model_path / "config.json").is_file():
        raise FileNotFoundError(f"{model_path} is no Hugging Face model folder: it has no config.json")
    return Plan(data.resolve(), model, model_path.resolve(), port, copies)


async def _wait_ready(bus: Bus, plan: Plan) -> None:
    """Until every stage is ready, with a progress bar of the weights' loading. Raises OSError at once if a stage says that it cannot
    start, with its reason."""
    with Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=1.0)

        def on_beat(message: Message) -> None:
            beat = codec.decode(message.data)
            detail = presence.base_of(beat).detail
            if "load" in detail:
                bar.update(task, completed=float(detail["load"]), description=str(detail.get("loading", "loading")))

        refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def on_log(message: Message) -> None:
            for raw in message.data.splitlines():
                line = json.loads(raw)
                if line.get("event") == "cannot_start" and not refused.done():
                    refused.set_result(f"{line['stage']} cannot start: {line.get('code', '')}: {line.get('error', '')}")

        beats = await bus.subscribe(subjects.heartbeats("model_worker", plan.model), on_beat)
        logs = await bus.subscribe(subjects.logs(), on_log)
        waiting = asyncio.create_task(presence.wait_for_stages(bus, plan.copies, plan.model, START_TIMEOUT))
        try:
            either: set[asyncio.Future[Any]] = {waiting, refused}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                raise OSError(refused.result())
            waiting.result()
        except TimeoutError as error:
            raise TimeoutError(f"{error}; see {plan.data / 'logs'}") from None
        finally:
            waiting.cancel()
            await beats.unsubscribe()
            await logs.unsubscribe()


async def _up(plan: Plan) -> int:
    supervisor = Supervisor(plan)
    stopping = asyncio.Event()
    for sig in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(sig, stopping.set)
    try:
        await supervisor.start()
        bus = await _connect(plan.nats_url, **plan.connection("admin"))
        ready = asyncio.create_task(_wait_ready(bus, plan))
        stopped = asyncio.create_task(stopping.wait())
        await asyncio.wait([ready, stopped], return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            doors = plan.nats_url
            if plan.copies.get(GATEWAY):
                doors += f" and http://127.0.0.1:{plan.http_port} (OpenAI's API at /v1, a page at /)"
            err.print(f"[green]ready[/green]: model [bold]{plan.model}[/bold] at {doors}, logs in {plan.data / 'logs'}")
            await stopped
        else:
            ready.cancel()
        await bus.close()
    finally:
        err.print("stopping")
        await supervisor.stop()
    return 0


@app.command()
def up(
    model: ModelName = "demo",
    model_path: ModelPath = DEMO_MODEL,
    data: Annotated[Path, typer.Option(help="JetStream's store and the logs")] = Path("data"),
    port: Annotated[int, typer.Option(help="of the embedded NATS server")] = 4222,
    tokenizers: int = 1,
    schedulers: int = 1,
    workers: int = 1,
    detokenizers: int = 1,
    gateway: Annotated[int, typer.Option(min=0, help="HTTP gateways; 0 for none")] = 1,
    http_port: Annotated[int, typer.Option(help="of the first gateway; the others get the next ones")] = 8000,
    servers: Annotated[int, typer.Option(min=1, max=5, help="NATS servers; 3 keep three copies of everything")] = 1,
    metrics_port: Annotated[
        int, typer.Option(help="Prometheus may scrape the stages here and on the ports after it; 0: not at all")
    ] = 0,
    secured: Annotated[
        Path | None, typer.Option(help="folder of `gorgon secure-config`: TLS, and a user for each stage")
    ] = None,
) -> None:
    """Serve a model on this machine until Ctrl-C: the embedded NATS server and every stage, restarted when they die.

    `--model DIR` may name a Hugging Face folder directly.
    """
    if Path(model).is_dir():
        model_path, model = (
            Path(model),
            "".join(c if c.isalnum() or c in "_-" else "-" for c in Path(model).resolve().name),
        )
    copies = dict(zip(STAGES, (tokenizers, schedulers, workers, detokenizers), strict=True)) | {GATEWAY: gateway}
    plan = _plan(data, model, model_path, port, copies)
    plan.http_port, plan.servers, plan.metrics_port = http_port, servers, metrics_port
    if secured is not None:
        if not (secured / "nats.conf").is_file():
            raise typer.BadParameter(f"{secured} holds no nats.conf: write one with gorgon secure-config {secured}")
        plan.secured = secured.resolve()
    plan.flags[GATEWAY] = ["--dev-kill", "true"]  # one's own machine, and the gateway listens on loopback only
    _run(_up(plan))


@app.command()
def run(
    prompt: Annotated[
        str, typer.Argument(help="what the model continues")
    ] = "It was a dark night, and the old captain",
    max_tokens: int = 200,
    temperature: Annotated[float | None, typer.Option(help="default: the model's own")] = None,
    seed: int | None = None,
    model_path: ModelPath = DEMO_MODEL,
) -> None:
    """Start everything on a free port, stream one answer, stop."""

    async def main() -> int:
        from shared.broker import free_port

        with tempfile.TemporaryDirectory(prefix="gorgon-") as data:
            plan = _plan(Path(data), "demo", model_path, free_port(), dict.fromkeys(STAGES, 1))
            supervisor = Supervisor(plan)
            try:
                await supervisor.start()
                bus = await _connect(plan.nats_url)
                try:
                    await _wait_ready(bus, plan)
                    async with Client(bus, plan.model) as client:
                        options = _options(max_tokens=max_tokens, temperature=temperature, seed=seed)
                        await _print_stream(client.generate(prompt, **options), prompt)
                finally:
                    await bus.close()
            finally:
                await supervisor.stop()
        return 0

    _run(main())


@app.callback()
def _console_log(
    verbose: Annotated[bool, typer.Option("--verbose", help="also what the connection does")] = False,
) -> None:
    """Run a model as a pipeline of actors on NATS, talk to a deployment, look inside."""
    structlog.configure(
        processors=[structlog.processors.TimeStamper(fmt="%H:%M:%S"), structlog.dev.ConsoleRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(10 if verbose else 30),
    )


@app.command("secure-config")
def secure_config(
    folder: Path,
    tenant: Annotated[
        list[str] | None, typer.Option(help="gets an account of its own; may be given several times")
    ] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="by which the server is reached; may be given several times")
    ] = None,
    port: int = 4222,
    store: Annotated[str, typer.Option(help="JetStream's folder on the server's machine")] = "/data",
    mutual_tls: Annotated[bool, typer.Option("--mutual-tls", help="clients must show a certificate too")] = False,
    at: Annotated[
        Path | None, typer.Option(help="where processes find the folder, in a container for instance")
    ] = None,
) -> None:
    """Write keys, certificates and the configuration of a NATS server that lets each stage do only what it needs.

    Run it again with further tenants: what is there is kept.
    """
    from services.secure_config import write_config

    hosts = host or ["localhost", "127.0.0.1"]
    try:
        path = write_config(folder, tenant or (), hosts, port=port, store=store, mutual_tls=mutual_tls, at=at)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    err.print(f"nats-server --config {path}; a process that connects as USER takes its settings from {folder}/USER.env")


# ---------------------------------------------------------------- talking to a deployment


def _options(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


async def _print_stream(stream: Stream, prompt: str = "") -> None:
    """Text as it comes, then tokens/s."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    started = time.perf_counter()
    first: float | None = None
    async for delta in stream:
        if first is None and delta.ids:
            first = time.perf_counter()
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    result = await stream.result()
    sys.stdout.write("\n")
    ended = time.perf_counter()
    count = result.usage["completion_tokens"]
    line = f"{count} tokens · request {result.id}"
    if first is not None and count > 1:
        line += (
            f" · first after {(first - started) * 1e3:.0f} ms · {(count - 1) / max(ended - first, 1e-9):.0f} tokens/s"
        )
    err.print(f"[dim]{line}[/dim]", highlight=False)


@app.command()
def generate(
    prompt: str,
    model: ModelName = "demo",
    nats: Url = DEFAULT_URL,
    max_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    stop: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="send the prompt as a chat message")] = False,
    request_id: Annotated[str | None, typer.Option("--id", help="the request's id, for retry and attach")] = None,
    structured: Annotated[
        str | None, typer.Option(help="""what the text must be, as JSON, e.g. '{"regex": "[0-9]+"}'""")
    ] = None,
) -> None:
    """Stream one answer from a running deployment."""
    try:
        constraint = None if structured is None else json.loads(structured)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--structured") from None

    async def main() -> None:
        bus = await _connect(nats)
        try:
            async with Client(bus, model) as client:
                options = _options(
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    seed=seed,
                    stop=stop,
                    id=request_id,
                    structured=constraint,
                )
                body: Any = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
                await _print_stream(client.generate(**body, **options))
        finally:
            await bus.close()

    _run(main())


@app.command()
def attach(
    request_id: str,
    model: ModelName = "demo",
    nats: Url = DEFAULT_URL,
    tenant: str = "default",
) -> None:
    """Stream a running or recently finished request from its beginning."""

    async def main() -> None:
        bus = await _connect(nats)
        try:
            async with Client(bus, model, tenant=tenant) as client:
                await _print_stream(client.attach(request_id))
        finally:
            await bus.close()

    _run(main())


@app.command()
def cancel(request_id: str, model: ModelName = "demo", nats: Url = DEFAULT_URL, tenant: str = "default") -> None:
    """Cancel a request."""

    async def main() -> int:
        bus = await _connect(nats)
        try:
            async with Client(bus, model, tenant=tenant) as client:
                heard = await client.cancel(request_id)
        finally:
            await bus.close()
        err.print("cancelled" if heard else "no scheduler answers")
        return 0 if heard else 1

    _run(main())


# ---------------------------------------------------------------- looking inside


def _stages_table(beats: list[Heartbeat | WorkerHeartbeat]) -> Table:
    table = Table("stage", "instance", "model", "state", "load", "in flight", "detail", box=None, header_style="bold")
    order = {stage: n for n, stage in enumerate(IN_ORDER)}
    for beat in sorted(beats, key=lambda b: (order.get(presence.base_of(b).stage, 9), presence.base_of(b).instance)):
        base = presence.base_of(beat)
        detail = dict(base.detail)
        if isinstance(beat, WorkerHeartbeat):
            used = beat.kv_tokens_total - beat.kv_tokens_free
            detail = {
                "step": beat.step,
                "kv": f"{used}/{beat.kv_tokens_total}",
                "seqs": f"{len(beat.running)}/{beat.max_seqs}",
            } | detail
        text = " ".join(f"{key}={value}" for key, value in detail.items())
        state = "draining" if base.draining else "ready"
        table.add_row(base.stage, base.instance, base.model, state, f"{base.load:.0%}", str(base.in_flight), text)
    return table


@app.command()
def ps(nats: Url = DEFAULT_URL, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """The stages, their load and what they have in flight."""

    async def main() -> int:
        bus = await _connect(nats)
        try:
            beats = await presence.gather(bus, 0.5)
        finally:
            await bus.close()
        if as_json:
            rows = [
                presence.base_of(b)._asdict() | ({"running": b.running} if isinstance(b, WorkerHeartbeat) else {})
                for b in beats
            ]
            sys.stdout.write(json.dumps(rows) + "\n")
        elif beats:
            out.print(_stages_table(beats), highlight=False)
        else:
            err.print("no stage answers")
        return 0 if beats else 1

    _run(main())


@app.command()
def top(
    nats: Url = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="only this model; default: all")] = "*",
    once: Annotated[bool, typer.Option("--once", help="print one picture and end")] = False,
    wait: Annotated[float, typer.Option(help="seconds that --once listens")] = 1.0,
) -> None:
    """Stages, load, requests in flight, tokens/s, batch, KV cache and acceptance, live, by worker and in total."""

    async def main() -> int:
        loop, view = asyncio.get_running_loop(), View()
        bus = await _connect(nats)
        try:
            await bus.subscribe(
                subjects.heartbeats(model=model), lambda message: view.hear(codec.decode(message.data), loop.time())
            )
            if once:
                await asyncio.sleep(wait)
                out.print(view.render(loop.time()), highlight=False)
                return 0 if view.seen else 1
            with Live(console=out, auto_refresh=False, screen=True) as live:
                while True:
                    live.update(view.render(loop.time()), refresh=True)
                    await asyncio.sleep(0.25)
        finally:
            await bus.close()

    _run(main())


@app.command()
def tail(
    request_id: Annotated[str | None, typer.Argument(help="only lines about this request")] = None,
    nats: Url = DEFAULT_URL,
    stage: str | None = None,
    as_json: Annotated[bool, typer.Option("--json", help="lines as the stages wrote them")] = False,
) -> None:
    """Follow the structured logs of all stages."""

    def on_line(message: Message) -> None:
        for raw in message.data.splitlines():
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            request = str(line.get("request_id", ""))
            if request_id is not None and request_id not in (request, request.partition(".")[2]):
                continue
            if stage is not None and line.get("stage") != stage:
                continue
            sys.stdout.write(raw.decode() + "\n" if as_json else _pretty(line) + "\n")
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()

    async def main() -> None:
        bus = await _connect(nats)
        await bus.subscribe(subjects.logs(), on_line)
        await asyncio.Event().wait()

    _run(main())


# ---------------------------------------------------------------- measuring

app.command("bench")(bench)

# ---------------------------------------------------------------- speculation

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("train-heads", context_settings=_PASSED_ON)
def train_heads(context: typer.Context) -> None:
    """Train Medusa heads for a model on this machine; `gorgon train-heads --help` tells the options."""
    _speculation_tool("train-heads", context.args)


@app.command("tune-tree", context_settings=_PASSED_ON)
def tune_tree(context: typer.Context) -> None:
    """Design the trees of a model's heads on given prompts; `gorgon tune-tree --help` tells the options."""
    _speculation_tool("tune-tree", context.args)


def _speculation_tool(command: str, arguments: list[str]) -> None:
    # Imported on demand: these alone need torch.
    from services.model_worker.train_heads import main as tool

    raise typer.Exit(tool([command, *arguments]))


def _pretty(line: dict[str, Any]) -> str:
    head = f"{line.pop('ts', '')} {line.pop('level', ''):7} {line.pop('stage', ''):12} {line.pop('event', '')}"
    line.pop("instance", None)
    return head + "".join(f" {key}={value}" for key, value in line.items())


def main() -> None:
    app()


if __name__ == "__main__":
    main()
