"""The session on a GPU that may be cut off: gates, resumption, limits. What its parts measure is not the point here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks.gpu_session import Part, Session, choose, parts, run, table

ROOT = Path(__file__).parents[2]


def part(name: str, code: str, limit: float = 20, gate: bool = False) -> Part:
    return Part(name, [sys.executable, "-c", code], limit, 1, gate)


def test_a_failed_gate_stops_timings_and_the_next_call_goes_on(tmp_path: Path) -> None:
    wanted = tmp_path / "mended"
    gate = part("gate", f"import os, sys; sys.exit(not os.path.exists({str(wanted)!r}))", gate=True)
    timing = part("timing", f"open({str(tmp_path / 'timed')!r}, 'a').write('x')")
    assert not run([gate, timing], Session(tmp_path), [], 60, anyway=False)
    assert not (tmp_path / "timed").exists()
    wanted.touch()
    assert run([gate, timing], Session(tmp_path), [], 60, anyway=False)
    assert run([gate, timing], Session(tmp_path), [], 60, anyway=False), "nothing is left to do"
    assert (tmp_path / "timed").read_text() == "x", "once"
    assert run([gate, timing], Session(tmp_path), ["timing"], 60, anyway=False)
    assert (tmp_path / "timed").read_text() == "xx", "named parts are done again"


def test_a_part_is_cut_off_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    session = Session(tmp_path)
    assert not session.run(part("slow", child), 1.0)
    assert session.done["slow"]["status"] is None and session.done["slow"]["seconds"] < 15
    assert not Session(tmp_path).passed("slow")


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert not run([part("a", "")], Session(tmp_path), [], 1.0, anyway=False)
    assert not Session(tmp_path).done


def test_every_part_can_be_started() -> None:
    names = [p.name for p in parts(Path("out"), Path("tokenizer"))]
    assert len(set(names)) == len(names)
    for p in parts(Path("out"), Path("tokenizer")):
        _, *rest = p.command
        file = Path(rest[1].replace(".", "/") + ".py") if rest[0] == "-m" else Path(rest[0])
        assert rest[:2] == ["-m", "pytest"] or (ROOT / file).is_file(), p.command
        assert all((ROOT / a).is_file() for a in rest if a.startswith("tests/")), p.command
    with pytest.raises(KeyError):
        choose([], Session.__new__(Session), ["nothing"])


def test_table(tmp_path: Path) -> None:
    rows = {"batch 1": {"figure": 1156.0, "complete": True}, "ttft 2048": {"figure": 10.1}}
    through = {"batch 1": {"figure": 1138.0}, "ttft 2048": {"figure": 11.5}}
    for kind, workloads in (("engine", rows), ("serving", through)):
        (tmp_path / f"{kind}-qwen3-0.6b.json").write_text(json.dumps({"workloads": workloads}))
    shown = table(tmp_path)
    assert "| qwen3-0.6b | batch 1, output tok/s | 1,156 | 1,138 | 0.984 | 700 | 900 |" in shown
    assert "| qwen3-0.6b | ttft 2048, ms | 10.10 | 11.50 | +1.40 ms | 9.3 |  |" in shown
