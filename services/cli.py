"""The `gorgon` command: run everything on one machine, talk to a deployment, look inside.

Everything here is a client of NATS, except `up` and `run`, which start the supervisor.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from pydantic import ValidationError
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from services.bench.command import main as bench
from services.supervisor import GATEWAY, IN_ORDER, STAGES, Plan, Supervisor
from services.top import View
from shared import codec, presence, subjects
from shared.api import DEFAULT_TENANT
from shared.broker import BrokerError
from shared.bus import Bus, BusError, Message
from shared.client import Client
from shared.client_stream import Stream
from shared.config import StageSettings
from shared.errors import GorgonError
from shared.messages import Heartbeat, WorkerHeartbeat
from shared.nats_bus import NatsBus

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# What is read by a program or a file has no width, so tables are not cut to that of some terminal.
out = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 240)
err = Console(stderr=True)

DEMO_MODEL = Path(__file__).resolve().parent.parent / "models" / "demo"
START_TIMEOUT = 300.0
MAX_PORT = 65535

ModelPath = Annotated[Path, typer.Option("--model-path", help="Hugging Face folder")]
Copies = Annotated[int, typer.Option(min=0, help="processes of this stage")]
Url = Annotated[str, typer.Option("--nats", help="NATS server", envvar="GORGON_NATS_URL")]
DEFAULT_URL = "nats://127.0.0.1:4222"


def _run(coroutine: Coroutine[Any, Any, int | None]) -> None:
    """Runs a command; errors that people can act on become one line and exit status 1."""
    try:
        status = asyncio.run(coroutine)
    except GorgonError as error:
        status = _say_error(error.code, error.message)
    except BrokenPipeError:
        # Whoever read the output has gone. Nobody is told, and Python's own flush at the end must not try again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (OSError, BusError, BrokerError) as error:
        status = _say_error("error", str(error))
    except KeyboardInterrupt:
        status = 130
    raise typer.Exit(status or 0)


def _say_error(what: str, message: str) -> int:
    """On one line, however narrow the terminal, and as it is: brackets in it are no markup."""
    err.print(Text.assemble((what, "red"), f": {message}"), soft_wrap=True)
    return 1


def _token(value: str) -> str:
    """Of a name that becomes part of a subject."""
    if not subjects.is_token(value):
        raise typer.BadParameter(subjects.TOKEN_RULE)
    return value


ModelName = Annotated[str, typer.Option(help="name of the model in subjects", callback=_token)]
Tenant = Annotated[str, typer.Option(help="whose request it is", callback=_token)]
RequestId = Annotated[str, typer.Argument(help="as the last line of `gorgon generate` says", callback=_token)]


async def _connect(url: str, **settings: Any) -> Bus:
    """By the GORGON_NATS_* variables, unless `settings` say otherwise."""
    try:
        given = StageSettings(nats_url=url, **settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise OSError(f"GORGON_{'_'.join(map(str, first['loc'])).upper()}: {first['msg']}") from None
    try:
        return await asyncio.wait_for(NatsBus.connect(given), 5)
    except TimeoutError:
        raise TimeoutError(f"no NATS server answers at {url}; is `gorgon up` running?") from None


# ---------------------------------------------------------------- running everything


def _plan(data: Path, model: str, model_path: Path, port: int, copies: dict[str, int]) -> Plan:
    if not (model_path / "config.json").is_file():
        raise typer.BadParameter(f"{model_path} is no Hugging Face model folder: it has no config.json")
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
            ready_line = Text.assemble(("ready", "green"), ": model ", (plan.model, "bold"), f" at {doors}, ")
            err.print(ready_line.append(f"logs in {plan.data / 'logs'}"), soft_wrap=True)
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
    model: Annotated[str, typer.Option(help="name of the model in subjects, or a Hugging Face folder")] = "demo",
    model_path: ModelPath = DEMO_MODEL,
    data: Annotated[Path, typer.Option(help="JetStream's store and the logs")] = Path("data"),
    port: Annotated[int, typer.Option(min=1, max=MAX_PORT, help="of the embedded NATS server")] = 4222,
    tokenizers: Copies = 1,
    schedulers: Copies = 1,
    workers: Copies = 1,
    detokenizers: Copies = 1,
    gateway: Annotated[int, typer.Option(min=0, help="HTTP gateways; 0 for none")] = 1,
    http_port: Annotated[
        int, typer.Option(min=1, max=MAX_PORT, help="of the first gateway; the others get the next ones")
    ] = 8000,
    servers: Annotated[int, typer.Option(min=1, max=5, help="NATS servers; 3 keep three copies of everything")] = 1,
    metrics_port: Annotated[
        int,
        typer.Option(
            min=0, max=MAX_PORT, help="Prometheus may scrape the stages here and on the ports after it; 0: not at all"
        ),
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
            "".join(c if subjects.is_token(c) else "-" for c in Path(model).resolve().name)[:64] or "model",
        )
    elif not subjects.is_token(model):
        raise typer.BadParameter(f"{model} is neither a folder nor a name of letters, digits, '_' and '-'")
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
                        return await _print_stream(client.generate(prompt, **options), prompt)
                finally:
                    await bus.close()
            finally:
                await supervisor.stop()

    _run(main())


@app.callback()
def _console_log(
    verbose: Annotated[bool, typer.Option("--verbose", help="also what the connection does")] = False,
) -> None:
    """Run a model as a pipeline of actors on NATS, talk to a deployment, look inside."""
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="%H:%M:%S"),
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
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
    port: Annotated[int | None, typer.Option(help="default: 4222")] = None,
    store: Annotated[
        str | None, typer.Option(help="JetStream's folder on the server's machine; default: /data")
    ] = None,
    mutual_tls: Annotated[bool | None, typer.Option(help="clients must show a certificate too")] = None,
    at: Annotated[str | None, typer.Option(help="where processes find the folder, in a container for instance")] = None,
) -> None:
    """Write keys, certificates and the configuration of a NATS server that lets each stage do only what it needs.

    Run it again with further tenants or hosts: what is there is kept, and so are the options that are not given.
    """
    from services.secure_config import write_config

    options = _options(hosts=host, port=port, store=store, mutual_tls=mutual_tls, at=at)
    try:
        path = write_config(folder, tenant or (), **options)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    err.print(f"nats-server --config {path}; a process that connects as USER takes its settings from {folder}/USER.env")


# ---------------------------------------------------------------- talking to a deployment


def _options(**options: Any) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


async def _print_stream(stream: Stream, prompt: str = "") -> int:
    """Text as it comes, then tokens/s. Returns 1 if it was cancelled: the text is not all that was asked for."""
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
    if result.status == "cancelled":
        line = f"cancelled · {line}"
    err.print(Text(line, "dim"), soft_wrap=True)
    return int(result.status == "cancelled")


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
    tenant: Tenant = DEFAULT_TENANT,
    structured: Annotated[
        str | None, typer.Option(help="""what the text must be, as JSON, e.g. '{"regex": "[0-9]+"}'""")
    ] = None,
) -> None:
    """Stream one answer from a running deployment."""
    try:
        constraint = None if structured is None else json.loads(structured)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--structured") from None

    async def main() -> int:
        bus = await _connect(nats)
        try:
            async with Client(bus, model, tenant=tenant) as client:
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
                return await _print_stream(client.generate(**body, **options))
        finally:
            await bus.close()

    _run(main())


ANSWER_WITHIN = 5.0  # seconds in which a partition of the log that changes hands has its new owner


@app.command()
def attach(
    request_id: RequestId,
    model: ModelName = "demo",
    nats: Url = DEFAULT_URL,
    tenant: Tenant = DEFAULT_TENANT,
    partitions: Annotated[
        int, typer.Option(min=1, envvar="GORGON_PARTITIONS", help="of the deployment's token log")
    ] = 8,
    wait: Annotated[float, typer.Option(min=0, help="seconds for one that is still queued, or yet to come")] = 3.0,
) -> None:
    """Stream a running or recently finished request from its beginning."""

    async def main() -> int:
        bus = await _connect(nats)
        try:
            async with Client(bus, model, tenant=tenant, partitions=partitions) as client:
                return await _print_stream(client.attach(request_id, wait=wait, silence=wait + ANSWER_WITHIN))
        finally:
            await bus.close()

    _run(main())


# By what Client.cancel says.
_CANCELLED = {
    "": "no scheduler answers",
    "live": "cancelled",
    "ended": "it had ended already",
    "unknown": "no such request is running: if it waits, or comes within minutes, it is cancelled",
}


@app.command()
def cancel(
    request_id: RequestId, model: ModelName = "demo", nats: Url = DEFAULT_URL, tenant: Tenant = DEFAULT_TENANT
) -> None:
    """Cancel a request."""

    async def main() -> int:
        bus = await _connect(nats)
        try:
            async with Client(bus, model, tenant=tenant) as client:
                state = await client.cancel(request_id)
        finally:
            await bus.close()
        err.print(_CANCELLED[state], highlight=False)
        return 0 if state in ("live", "unknown") else 1

    _run(main())


# ---------------------------------------------------------------- looking inside


def _stages_table(beats: list[Heartbeat | WorkerHeartbeat]) -> Table:
    table = Table(box=None, header_style="bold")
    for name in ("stage", "instance", "model", "state", "load", "in flight", "detail"):
        long = name in ("instance", "detail")  # these go on in the next line where the terminal is narrow
        table.add_column(name, no_wrap=not long, overflow="fold" if long else "ellipsis")
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
    model: Annotated[
        str | None, typer.Option(help="only this model; default: all", callback=lambda name: name and _token(name))
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="print one picture and end")] = False,
    wait: Annotated[float, typer.Option(help="seconds that --once listens")] = 1.0,
) -> None:
    """Stages, load, requests in flight, tokens/s, batch, KV cache and acceptance, live, by worker and in total."""

    async def main() -> int:
        loop, view = asyncio.get_running_loop(), View()
        bus = await _connect(nats)
        try:
            await bus.subscribe(
                subjects.heartbeats(model=model or "*"),
                lambda message: view.hear(codec.decode(message.data), loop.time()),
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
    stage: Annotated[str | None, typer.Option(help=f"only lines of this stage: {', '.join(IN_ORDER)}")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="lines as the stages wrote them")] = False,
) -> None:
    """Follow the structured logs of all stages, until Ctrl-C."""
    if request_id is not None and not all(map(subjects.is_token, request_id.split(".", 1))):
        raise typer.BadParameter(f"{subjects.TOKEN_RULE}; or TENANT.ID", param_hint="REQUEST_ID")
    if stage is not None and stage not in IN_ORDER:
        raise typer.BadParameter(f"there are {', '.join(IN_ORDER)}", param_hint="--stage")

    gone = asyncio.Event()  # the reader of a pipe

    def on_line(message: Message) -> None:
        try:
            show(message)
        except BrokenPipeError:
            gone.set()

    def show(message: Message) -> None:
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
        sys.stdout.flush()

    async def main() -> None:
        bus = await _connect(nats)
        try:
            await bus.subscribe(subjects.logs(), on_line)
            await gone.wait()
        finally:
            await bus.close()
        raise BrokenPipeError

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
