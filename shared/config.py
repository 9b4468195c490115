"""Settings common to the stages. Each stage has one typed settings object, a subclass that lives in its own package.

Values come from, in order of precedence: command-line flags (`--nats-url`), environment (`GORGON_NATS_URL`), a TOML file named by
`--config` or `GORGON_CONFIG` (top-level keys for all stages, a `[tokenizer]` table and so on for one), the defaults below.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tomllib
import uuid
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from shared.permissions import STAGES
from shared.subjects import is_token

CONFIG_VARIABLE = "GORGON_CONFIG"


class _StageTable(TomlConfigSettingsSource):
    """The file's top-level keys, overridden by the stage's own table; the other stages' tables are not this stage's business."""

    def __init__(self, settings: type[StageSettings], path: str) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file of settings")  # pydantic would go on without one
        super().__init__(settings, Path(path))
        data: dict[str, Any] = dict(self.init_kwargs)
        if unknown := [
            key for key, value in data.items() if isinstance(value, dict) and key not in (*STAGES, settings.stage)
        ]:
            raise SettingsError(f"{path}: there is no stage {', '.join(unknown)}, only {', '.join(STAGES)}")
        table = data.get(settings.stage, {})
        self.init_kwargs = {k: v for k, v in data.items() if not isinstance(v, dict)} | table


class StageSettings(BaseSettings):
    """What every stage can be told."""

    stage: ClassVar[str] = ""
    model_config = SettingsConfigDict(
        env_prefix="GORGON_", extra="forbid", cli_kebab_case=True, cli_hide_none_type=True, protected_namespaces=()
    )

    nats_url: str = Field("nats://127.0.0.1:4222", description="server, or several separated by commas")
    nats_user: str = Field("", description="user of a server that knows its users by passwords")
    nats_password: str = Field("", description="that user's password")
    nats_nkey: str = Field("", description="file with the seed of this process's nkey")
    nats_credentials: str = Field("", description=".creds file with this process's JWT and seed")
    nats_tls_ca: str = Field("", description="file with the CA that the server's certificate must be of")
    nats_tls_cert: str = Field("", description="file with this process's certificate, if the server asks for one")
    nats_tls_key: str = Field("", description="file with the certificate's key")
    nats_inbox_prefix: str = Field("_INBOX", description="below which answers are waited for, as permissions demand")
    model: str = Field("demo", description="name of the model in subjects")
    model_path: str = Field("models/demo", description="Hugging Face folder: weights, config.json, tokenizer.json")
    name: str = Field("", description="name of this instance; default: host name")
    partitions: int = Field(8, ge=1, le=1024, description="partitions of the token log; fixed for the life of the log")
    tenant_classes: int = Field(4, ge=1, le=256, description="intake subjects over which tenants are spread")
    heartbeat_interval: float = Field(0.1, gt=0, description="seconds")
    drain_timeout: float = Field(10.0, gt=0, description="seconds a stage may take to hand over after SIGTERM")
    attach_window: float = Field(300.0, gt=0, description="seconds that an ended request can still be attached to")
    tok_max_age: float = Field(3600.0, gt=0, description="seconds the token log is kept, at least two attach windows")
    results_max_age: float = Field(86400.0, gt=0, description="seconds the results of durable requests are kept")
    stream_max_bytes: int = Field(0, ge=0, description="limit of each stream; 0: only the server's own")
    log_format: str = Field("auto", pattern="^(auto|json|console)$", description="auto, json or console")
    log_level: str = Field(
        "info",
        pattern="^(?i:debug|info|warning|error|critical)$",
        description="debug, info, warning, error or critical",
    )
    ready_file: str = Field("", description="touched at each heartbeat while ready and connected, for health checks")
    otlp_endpoint: str = Field(
        "",
        description="OpenTelemetry collector for traces, e.g. http://host:4318; default: OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus may scrape the stage here; 0: not at all")
    metrics_host: str = Field("0.0.0.0", description="address that it is scraped on")
    replicas: int = Field(1, ge=1, le=5, description="JetStream replicas of every stream and bucket")

    @field_validator("model", "name")
    @classmethod
    def _one_subject_token(cls, value: str) -> str:
        if value and not is_token(value):
            raise ValueError("only letters, digits, '_' and '-', at most 64")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources = [init_settings, env_settings]
        if path := os.environ.get(CONFIG_VARIABLE):
            assert issubclass(settings_cls, StageSettings)
            sources.append(_StageTable(settings_cls, path))
        return tuple(sources)

    @classmethod
    def from_command_line(cls, argv: list[str] | None = None) -> StageSettings:
        """Settings of a process: flags, environment, file. Ends the process with a message when they are wrong."""
        args = list(sys.argv[1:] if argv is None else argv)
        program = f"python -m services.{cls.stage}"
        # The file is a source of settings, not a setting: it is taken out before the others are read.
        file = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
        file.add_argument("--config", metavar="FILE")
        given, args = file.parse_known_args(args)
        if given.config is not None:
            os.environ[CONFIG_VARIABLE] = given.config
        # `--nats` is what people type; the field is nats_url.
        args = [f"--nats-url{a[6:]}" if a == "--nats" or a.startswith("--nats=") else a for a in args]
        source: CliSettingsSource[Any] = CliSettingsSource(cls, cli_prog_name=program)
        source.root_parser.epilog = (
            "--config FILE names a TOML file of settings: top-level keys for all stages, a table for each "
            f"([{cls.stage}]), whose keys are these names with '_' for '-'.\nEach can also be given as a variable: "
            "GORGON_NATS_URL for --nats-url, and so on. Flags come first, then variables, then the file."
        )
        try:
            return CliApp.run(cls, cli_args=args, cli_settings_source=source)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
            ]
            wrong = "; ".join(problems)
        except tomllib.TOMLDecodeError as error:
            wrong = f"{os.environ[CONFIG_VARIABLE]}: {error}"
        except (SettingsError, OSError) as error:
            wrong = str(error)
        print(f"{program}: {wrong}", file=sys.stderr)
        sys.exit(2)

    def incarnation(self) -> str:
        """A new identity for this process: instance name and boot id. Two lives of one instance are never confused."""
        host = self.name or "".join(c if c.isalnum() or c in "_-" else "-" for c in socket.gethostname())[:40]
        return f"{host}-{uuid.uuid4().hex[:10]}"
