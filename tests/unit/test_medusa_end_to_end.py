"""The script that trains a model, gives it heads and measures both, in miniature, over as many calls as it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from benchmarks import medusa_end_to_end as script

TEXT = "\n\n".join(
    f"The {size} {animal} sat by the {place} and {deed}, for it was {number} years old and knew no better."
    for size in ("small", "large", "old", "quiet")
    for animal in ("fox", "dog", "hen", "captain", "horse", "cat", "goose", "hare")
    for place in ("river", "door", "hill", "fire", "sea", "garden", "road", "well")
    for deed in ("sang", "slept", "told a story")
    for number in ("two", "nine", "forty")
)


def call(monkeypatch: pytest.MonkeyPatch, work: Path, minutes: float, *more: str) -> int:
    options = [
        "--text",
        str(work / "text.txt"),
        "--work",
        str(work),
        "--tiny",
        "--device",
        "cpu",
        "--minutes",
        str(minutes),
    ]
    quick = ["--model-seconds", "4", "--head-seconds", "2", "--distil", "0", "--tree-tokens", "300", "--reserve", "1"]
    monkeypatch.setattr(sys, "argv", ["medusa", *options, *quick, "--batches", "1", "2", "--repeats", "1", *more])
    return script.main()


def test_it_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    assert call(monkeypatch, tmp_path, 0.04) == 3, "out of time in the model's training"
    assert (tmp_path / "model.pt").is_file() and not (tmp_path / "medusa.json").exists()
    assert call(monkeypatch, tmp_path, 3) == 0
    said = capsys.readouterr().out
    assert "resumed at step" in said and "| 2 |" in said
    found = json.loads((tmp_path / "medusa.json").read_text())
    assert {"model", "held_out", "heads", "trees", "speed at temperature 0"} == found.keys()
    assert found["held_out"]["loss"] == pytest.approx(found["model"]["held_out_loss"], rel=0.3)
    rows = found["speed at temperature 0"]["rows"]
    assert [row["batch"] for row in rows] == [1, 2] and all(row["ratio"] > 0 for row in rows)
    # Another batch is measured, and nothing else is done again.
    assert call(monkeypatch, tmp_path, 3, "--batches", "1", "2", "4") == 0
    again = json.loads((tmp_path / "medusa.json").read_text())
    assert again["model"] == found["model"] and again["speed at temperature 0"]["rows"][:2] == rows
    assert len(again["speed at temperature 0"]["rows"]) == 3
