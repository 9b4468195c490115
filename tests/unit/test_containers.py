"""What compose.yaml and the Dockerfile promise about privileges."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
STAGES = {"tokenizer", "scheduler", "detokenizer", "gateway", "model_worker", "model_worker_cuda"}


def services(name: str) -> dict[str, dict]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["services"]


def test_stages_run_without_privileges():
    found = services("compose.yaml")
    assert found.keys() >= STAGES
    for name in (*STAGES, "nats"):
        service = found[name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        for port in service.get("ports", ()):
            assert port.split("}:")[0].endswith(":-127.0.0.1"), f"{name} is reachable from elsewhere by default"


def test_every_image_runs_as_an_ordinary_user():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    targets = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S))
    assert targets.keys() >= STAGES
    for name in STAGES:
        assert re.findall(r"^USER (\S+)", targets[name], re.M)[-1:] == ["gorgon"], name


def test_the_secured_deployment_gives_each_stage_its_own_key_only():
    found = services("deploy/compose.secure.yaml")
    assert STAGES | {"nats"} == found.keys()
    for name in STAGES:
        user = "model_worker" if name == "model_worker_cuda" else name
        assert found[name]["env_file"] == f"./secure/{user}.env"
        keys = [volume for volume in found[name]["volumes"] if "/keys/" in volume]
        assert keys == [f"./secure/keys/{user}.nk:/secure/keys/{user}.nk:ro"]
        assert not any("./secure:" in volume for volume in found[name]["volumes"])
    assert not any("/keys" in volume for volume in found["nats"]["volumes"])
