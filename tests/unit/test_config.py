"""Settings: where values come from, and which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from shared.config import CONFIG_VARIABLE, StageSettings


class ToySettings(StageSettings):
    stage: ClassVar[str] = "toy"
    speed: int = Field(1, description="how fast")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # setenv first, so that what from_command_line sets is undone as well.
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    for name in ("GORGON_MODEL", "GORGON_SPEED", "GORGON_NATS_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "gorgon.toml"
    path.write_text(
        'model = "from-file"\npartitions = 16\n[toy]\nspeed = 2\n[scheduler]\nunknown = "not our business"\n'
    )
    return path


def test_flags_come_before_environment_before_file(toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ToySettings.from_command_line(["--config", str(toml)])
    assert isinstance(settings, ToySettings)
    assert (settings.model, settings.partitions, settings.speed) == ("from-file", 16, 2)
    monkeypatch.setenv("GORGON_SPEED", "3")
    monkeypatch.setenv("GORGON_MODEL", "from-environment")
    settings = ToySettings.from_command_line(["--config", str(toml), "--model", "from-flag"])
    assert isinstance(settings, ToySettings)
    assert (settings.model, settings.partitions, settings.speed) == ("from-flag", 16, 3)


def test_nats_is_short_for_nats_url() -> None:
    assert ToySettings.from_command_line(["--nats", "nats://a:1"]).nats_url == "nats://a:1"
    assert ToySettings.from_command_line(["--nats-url", "nats://b:1"]).nats_url == "nats://b:1"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--speed", "fast"], "speed: "),
        (["--unknown", "1"], "--unknown"),
        (["--model", "two.tokens"], "model: only letters"),
        (["--partitions", "0"], "partitions: "),
        (["--log-level", "loud"], "log_level: "),
        (["--config"], "--config"),
        (["--config", "/no/such/file.toml"], "/no/such/file.toml"),
        (["--config", "misspelt.toml"], "no stage model-worker"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("misspelt.toml").write_text("[model-worker]\nmax_seqs = 12\n")
    with pytest.raises(SystemExit) as caught:
        ToySettings.from_command_line(args)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["a b", "a.b", "x" * 65, "*", "ü"])
def test_names_are_one_token_of_a_subject(name: str) -> None:
    with pytest.raises(ValidationError):
        StageSettings(name=name)


def test_every_life_has_an_identity_of_its_own() -> None:
    settings = StageSettings(name="worker-1")
    first, second = settings.incarnation(), settings.incarnation()
    assert first != second
    assert first.startswith("worker-1-")
    assert StageSettings().incarnation() != ""


@pytest.mark.parametrize(("text", "said"), [("[toy]\nspede = 2\n", "spede: "), ("speed = = 2\n", "bad.toml: ")])
def test_a_broken_file_is_refused(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        ToySettings.from_command_line([f"--config={path}"])
    assert said in capsys.readouterr().err


def test_a_broken_variable_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GORGON_SPEED", "fast")
    with pytest.raises(SystemExit):
        ToySettings.from_command_line([])
    assert "speed: " in capsys.readouterr().err


def test_help_tells_of_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ToySettings.from_command_line(["--help"])
    assert "--config FILE" in capsys.readouterr().out
