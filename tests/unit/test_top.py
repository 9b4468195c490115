"""`gorgon top` from heartbeats, for several models at once."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from services.top import GONE_AFTER, View
from shared.messages import Heartbeat, WorkerHeartbeat


def beat(
    stage: str, instance: str, model: str = "m", load: float = 0.0, in_flight: int = 0, **detail: Any
) -> Heartbeat:
    return Heartbeat(stage, model, instance, 1, 0.1, False, load, in_flight, detail)


def worker(instance: str, tokens: int, model: str = "m", **detail: Any) -> WorkerHeartbeat:
    base = beat(
        "model_worker", instance, model, 0.25, 8, batch=8, waiting=1, tokens=tokens, preemptions=2, outbox=0, **detail
    )
    return WorkerHeartbeat(base, 10, 0.0, 2.0, {}, 32, 1000, 750, 512, 100)


def shown(view: View, now: float, width: int = 180) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(view.render(now), highlight=False)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def test_nobody() -> None:
    assert shown(View(), 0.0) == ["no stage answers"]


def test_rates_totals_and_models() -> None:
    view = View()
    for n in range(31):
        now = n / 10
        view.hear(worker("a-1", 50 * n, tokens_per_step=2.5), now)
        view.hear(worker("a-2", 30 * n, tokens_per_step=1.5), now)
        view.hear(worker("b-1", 10 * n, model="other"), now)
        view.hear(beat("scheduler", "s-1", live=17, waiting=3, workers=2, migrations=1), now)
        view.hear(beat("scheduler", "s-2", live=17, waiting=2, workers=2, migrations=0), now)
        view.hear(beat("tokenizer", "t-1", accepted=4 * n), now)
    lines = shown(view, 3.0)
    assert lines[0] == "m: 17 live · 5 waiting · 800 tok/s · batch 16/64 · kv 25% · acceptance 2.00"
    stages = [line.split()[:2] for line in lines]
    assert stages[2:7] == [
        ["tokenizer", "t-1"],
        ["scheduler", "s-1"],
        ["scheduler", "s-2"],
        ["model_worker", "a-1"],
        ["model_worker", "a-2"],
    ]
    assert "40 req/s" in lines[2] and "live=17 waiting=3" in lines[3]
    assert "500 tok/s" in lines[5] and "8/32" in lines[5] and "25%" in lines[5] and "2.50" in lines[5]
    assert lines[7] == "other: 0 live · 0 waiting · 100 tok/s · batch 8/32 · kv 25%"
    assert "model_worker" in lines[9]


def test_figures_stay_whole_on_a_narrow_terminal() -> None:
    view = View()
    for n in range(21):
        view.hear(worker("model_worker-1-6a156a1e4d", 50 * n, tokens_per_step=2.5), n / 10)
        view.hear(beat("scheduler", "scheduler-1-2737c165ba", live=17, waiting=3, workers=2), n / 10)
    lines = shown(view, 2.0, width=80)
    assert len(lines) == 4 and all(len(line) <= 80 for line in lines)
    for figure in ("model_worker-1", "ready", "25%", "500 tok/s", "8/32", "2.50"):
        assert figure in lines[3]


def test_a_terminal_that_is_too_narrow_for_all_figures_shows_the_first_ones_whole() -> None:
    view = View()
    for n in range(21):
        view.hear(worker("model_worker-1-6a156a1e4d", 50 * n, tokens_per_step=2.5), n / 10)
        view.hear(beat("scheduler", "scheduler-1-2737c165ba", live=17, waiting=3, workers=2), n / 10)
    assert "waiting=1" in shown(view, 2.0, width=100)[-1]
    for width, whole in ((79, "25% 8 2.50"), (70, "25% 8 8/32"), (60, "8 8/32"), (50, "8/32")):
        lines = shown(view, 2.0, width)
        assert all(len(line) <= width for line in lines)
        worker_line = lines[-1].split()
        assert worker_line[0] == "model_worker" and worker_line[1].startswith("model_worker-1")
        assert {"ready", "500", "tok/s", *whole.split()} <= set(worker_line), lines[-1]


def test_who_is_silent_disappears_and_rates_follow_the_window() -> None:
    view = View()
    view.hear(worker("w", 0), 0.0)
    view.hear(beat("tokenizer", "t"), 0.0)
    for n in range(1, 101):
        view.hear(worker("w", 100 if n > 50 else n * 2), n / 10)  # busy for 5 s, idle since
    lines = shown(view, 10.0)
    assert "0 tok/s" in lines[0] and len(lines) == 3, "the tokenizer is gone"
    assert view.seen["w"].rate == 0
    assert len(view.seen["w"].counts) < 30
    assert shown(view, 10.0 + GONE_AFTER) == ["no stage answers"]


def test_a_worker_that_loads() -> None:
    view = View()
    view.hear(beat("model_worker", "w", loading="weights", load=0.5), 0.0)
    assert "loading" in shown(view, 0.1)[2]
