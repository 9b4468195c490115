"""deploy/kubernetes: every object against Kubernetes's own schema, KEDA's by a schema kept here, and both against the code's names.

KEDA's custom resource definition comes in no Python package, so SCALED_OBJECT below is written by hand from its documentation and holds
only what is used here; a field that it does not know is an error, too.
"""

from __future__ import annotations

import copy
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from services.detokenizer.settings import DetokenizerSettings
from services.gateway.settings import GatewaySettings
from services.model_worker.settings import WorkerSettings
from services.scheduler.settings import SchedulerSettings
from services.tokenizer.settings import TokenizerSettings
from shared import subjects
from shared.broker import find_binary
from tests.unit.test_deploy_observe import check

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
STAGES = {
    "gateway": GatewaySettings,
    "tokenizer": TokenizerSettings,
    "scheduler": SchedulerSettings,
    "model-worker": WorkerSettings,
    "detokenizer": DetokenizerSettings,
}
Object = dict[str, Any]


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", "minLength": 1} | more


def metadata(required: list[str], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Of a trigger: KEDA takes strings only, numbers included."""
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {name: text() for name in (*required, *optional)},
    }


TRIGGERS = {
    "nats-jetstream": metadata(
        ["natsServerMonitoringEndpoint", "account", "stream", "consumer"],
        ("lagThreshold", "activationLagThreshold", "useHttps"),
    ),
    "prometheus": metadata(["serverAddress", "query", "threshold"], ("activationThreshold", "namespace")),
    "cpu": metadata(["value"], ("containerName",)),
}
COUNT = {"type": "integer", "minimum": 0}
RULES = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "value", "periodSeconds"],
                "additionalProperties": False,
                "properties": {
                    "type": {"enum": ["Pods", "Percent"]},
                    "value": {"type": "integer", "minimum": 1},
                    "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
                },
            },
        },
    },
}
SCALED_OBJECT = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "keda.sh/v1alpha1"},
        "kind": {"const": "ScaledObject"},
        "metadata": {"type": "object", "required": ["name"], "properties": {"name": text()}},
        "spec": {
            "type": "object",
            "required": ["scaleTargetRef", "triggers"],
            "additionalProperties": False,
            "properties": {
                "scaleTargetRef": {
                    "type": "object",
                    "required": ["name"],
                    "additionalProperties": False,
                    "properties": {"name": text(), "kind": text(), "apiVersion": text()},
                },
                "pollingInterval": COUNT,
                "cooldownPeriod": COUNT,
                "minReplicaCount": COUNT,
                "maxReplicaCount": COUNT,
                "fallback": {
                    "type": "object",
                    "required": ["failureThreshold", "replicas"],
                    "additionalProperties": False,
                    "properties": {
                        "failureThreshold": COUNT,
                        "replicas": COUNT,
                        "behavior": {"enum": ["static", "currentReplicas", "currentReplicasIfHigher"]},
                    },
                },
                "advanced": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "horizontalPodAutoscalerConfig": {
                            "type": "object",
                            "additionalProperties": False,
                            "properties": {
                                "behavior": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {"scaleUp": RULES, "scaleDown": RULES},
                                }
                            },
                        }
                    },
                },
                "triggers": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["type", "metadata"],
                        "additionalProperties": False,
                        "properties": {
                            "type": {"enum": list(TRIGGERS)},
                            "metricType": {"enum": ["AverageValue", "Value", "Utilization"]},
                            "metadata": {"type": "object"},
                        },
                        "allOf": [
                            {
                                "if": {"properties": {"type": {"const": kind}}},
                                "then": {"properties": {"metadata": schema}},
                            }
                            for kind, schema in TRIGGERS.items()
                        ],
                    },
                },
            },
        },
    },
}


def validate(found: Object) -> None:
    if found["apiVersion"].startswith("keda.sh/"):
        jsonschema.validate(found, SCALED_OBJECT)
    else:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


def documents(path: Path) -> list[Object]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def patched(objects: list[Object], patch: Object) -> None:
    """A JSON patch (RFC 6902, replace and remove only) on every object that its target selects."""
    target = patch["target"]
    hit = [o for o in objects if o["kind"] == target["kind"] and target.get("name") in (None, o["metadata"]["name"])]
    assert hit, f"nothing is patched by {target}"
    for found in hit:
        for operation in yaml.safe_load(patch["patch"]):
            *way, last = operation["path"].strip("/").split("/")
            place: Any = found
            for step in way:
                place = place[int(step)] if isinstance(place, list) else place[step]
            assert last in place, f"{operation['path']} of {found['metadata']['name']}"
            match operation["op"]:
                case "replace":
                    place[last] = operation["value"]
                case "remove":
                    del place[last]
                case other:
                    raise AssertionError(f"this test knows no {other}")


KNOWN_KEYS = {"apiVersion", "kind", "namespace", "resources", "labels", "configMapGenerator", "images", "patches"}


def built(folder: Path) -> list[Object]:
    """What `kubectl apply -k` would create, names of generated objects and image tags aside."""
    (overlay,) = documents(folder / "kustomization.yaml")
    assert overlay.keys() <= KNOWN_KEYS
    objects: list[Object] = []
    for resource in overlay["resources"]:
        path = folder / resource
        objects += built(path.resolve()) if path.is_dir() else documents(path)
    for generator in overlay.get("configMapGenerator", ()):
        data = {name: (folder / name).read_text() for name in generator["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generator["name"]}, "data": data})
    for patch in overlay.get("patches", ()):
        patched(objects, patch)
    # Nothing lies about that is not used.
    used = {*overlay["resources"], "kustomization.yaml"}
    used |= {name for generator in overlay.get("configMapGenerator", ()) for name in generator["files"]}
    assert {path.name for path in folder.iterdir()} <= used
    return objects


BASE = built(KUBERNETES / "base")
KEDA = built(KUBERNETES / "keda")


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def containers(objects: list[Object]) -> Iterator[tuple[Object, Object]]:
    """(workload, container)"""
    for found in objects:
        if found["kind"] in ("Deployment", "StatefulSet"):
            for container in found["spec"]["template"]["spec"]["containers"]:
                yield found, container


@pytest.mark.parametrize("folder", ["base", "cpu", "keda"])
def test_every_object_is_valid(folder: str) -> None:
    objects = built(KUBERNETES / folder)
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    for found in objects:
        validate(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("spec", "replicas"), "two"), (("spec", "template", "spec", "contaners"), []), (("kind",), "Deploymnet")],
)
def test_mistakes_are_found(path: tuple[str, ...], value: Any) -> None:
    wrong = copy.deepcopy(named(BASE, "Deployment")["tokenizer"])
    *way, last = path
    place = wrong
    for step in way:
        place = place[step]
    place[last] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.utils.SchemaNotFoundError)):
        validate(wrong)


@pytest.mark.parametrize("change", [{"lagThreshold": 5}, {"consumr": "x"}, {"stream": ""}])
def test_mistakes_in_triggers_are_found(change: dict[str, Any]) -> None:
    wrong = copy.deepcopy(named(KEDA, "ScaledObject")["scheduler"])
    wrong["spec"]["triggers"][0]["metadata"] |= change
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong)


def test_a_deployment_and_a_budget_for_each_stage() -> None:
    deployments, budgets = named(BASE, "Deployment"), named(BASE, "PodDisruptionBudget")
    assert deployments.keys() == STAGES.keys()
    assert budgets.keys() == STAGES.keys() | {"nats"}
    for found in [*deployments.values(), *named(BASE, "StatefulSet").values()]:
        name = found["metadata"]["name"]
        labels = found["spec"]["template"]["metadata"]["labels"]
        assert found["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budgets[name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        (spread,) = found["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert spread["labelSelector"]["matchLabels"].items() <= labels.items()


def test_images_are_those_that_are_built() -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    (overlay,) = documents(KUBERNETES / "base" / "kustomization.yaml")
    renamed = {image["name"] for image in overlay["images"]}
    for folder in ("base", "cpu", "keda"):
        for _, container in containers(built(KUBERNETES / folder)):
            image = container["image"]
            if image.startswith("gorgon/"):
                assert image.removeprefix("gorgon/").replace("-", "_") in targets
                assert image in renamed or folder == "cpu"


def environment(container: Object) -> dict[str, str]:
    configs = named(BASE, "ConfigMap")
    values: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        values |= configs[source["configMapRef"]["name"]]["data"]
    return values | {entry["name"]: entry.get("value", "from a field") for entry in container.get("env", ())}


def test_the_stages_take_their_settings_and_have_the_time_to_drain() -> None:
    for deployment, container in containers(BASE):
        name, pod = deployment["metadata"]["name"], deployment["spec"]["template"]["spec"]
        if name == "nats":
            continue
        values = {k.removeprefix("GORGON_").lower(): v for k, v in environment(container).items() if "GORGON" in k}
        settings_class = STAGES[name]
        assert values.keys() <= settings_class.model_fields.keys()
        values["name"] = f"{name}-7d4b9-x2v"
        settings = settings_class.model_validate(values, strict=False)
        wait = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod["terminationGracePeriodSeconds"] >= settings.drain_timeout + wait + 5
        assert settings.replicas == named(BASE, "StatefulSet")["nats"]["spec"]["replicas"] == 3
        annotations = deployment["spec"]["template"]["metadata"]["annotations"]
        port = 8000 if name == "gateway" else settings.metrics_port
        assert annotations["prometheus.io/port"] == str(port)
        assert port in {p["containerPort"] for p in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in container[probe]:
                assert "$GORGON_READY_FILE" in container[probe]["exec"]["command"][-1]
                # Within the patience of a probe a stage touches the file many times.
                assert settings.heartbeat_interval * 5 < 0.2 * 60
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert Path(settings.ready_file).parent.as_posix() in mounts
        if "/model" in mounts:
            assert mounts["/model"]["readOnly"]


def test_pods_are_unprivileged() -> None:
    """As the namespace's "restricted" Pod Security Standard wants it, and read-only besides."""
    for found, container in containers(BASE):
        pod = found["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert not any("hostPath" in volume for volume in pod["volumes"])
    (user,) = set(re.findall(r"--uid (\d+)", (ROOT / "Dockerfile").read_text()))
    assert named(BASE, "Deployment")["tokenizer"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(
        user
    )


def test_only_the_worker_has_a_gpu() -> None:
    gpus = {d["metadata"]["name"]: c["resources"]["limits"].get("nvidia.com/gpu") for d, c in containers(BASE)}
    assert {name for name, count in gpus.items() if count} == {"model-worker"}
    cpu = {d["metadata"]["name"]: c for d, c in containers(built(KUBERNETES / "cpu"))}
    assert "nvidia.com/gpu" not in cpu["model-worker"]["resources"]["limits"]


def test_nats_is_a_cluster_of_three() -> None:
    nats = named(BASE, "StatefulSet")["nats"]
    services = named(BASE, "Service")
    conf = named(BASE, "ConfigMap")["nats"]["data"]["nats.conf"]
    headless = services[nats["spec"]["serviceName"]]
    assert headless["spec"]["clusterIP"] == "None" and headless["spec"]["publishNotReadyAddresses"]
    routes = re.findall(r"nats://(nats-\d)\.([\w-]+):(\d+)", conf)
    assert routes == [(f"nats-{n}", headless["metadata"]["name"], "6222") for n in range(3)]
    (container,) = nats["spec"]["template"]["spec"]["containers"]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"client": 4222, "cluster": 6222, "monitor": 8222}
    lame_duck = int(re.search(r"lame_duck_duration: (\d+)s", conf)[1])  # type: ignore[index]
    assert nats["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > lame_duck
    assert "max_payload: 8MB" in conf, "shared.bus.MAX_PAYLOAD"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nats.conf"
        path.write_text(conf.replace("/data", f"{folder}/data"))
        server = [str(find_binary()), "-t", "-c", str(path)]
        done = subprocess.run(
            server, env={"POD_NAME": "nats-0"}, capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stderr
    url = environment(next(c for d, c in containers(BASE) if d["metadata"]["name"] == "tokenizer"))["GORGON_NATS_URL"]
    host, port = re.fullmatch(r"nats://(\w+):(\d+)", url).groups()  # type: ignore[union-attr]
    assert int(port) in {p["port"] for p in services[host]["spec"]["ports"]}


def test_keda_scales_every_stage_within_sense() -> None:
    scaled = named(KEDA, "ScaledObject")
    assert scaled.keys() == STAGES.keys()
    for name, found in scaled.items():
        spec = found["spec"]
        assert spec["scaleTargetRef"]["name"] == name
        # One at least: the consumers that are looked at are made by the stages.
        assert 1 <= spec["minReplicaCount"] < spec["maxReplicaCount"]
        assert spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
    assert scaled["detokenizer"]["spec"]["maxReplicaCount"] <= DetokenizerSettings.model_fields["partitions"].default
    for deployment in named(KEDA, "Deployment").values():
        assert "replicas" not in deployment["spec"], "that is KEDA's business"
    assert named(BASE, "Deployment")["tokenizer"]["spec"]["replicas"] >= 2


def test_keda_looks_at_consumers_that_exist() -> None:
    """KEDA takes a consumer that does not exist for one that is as far behind as can be."""
    (config,) = [o for o in KEDA if o["kind"] == "ConfigMap" and o["metadata"]["name"] == "gorgon"]
    model = config["data"]["GORGON_MODEL"]
    classes = int(config["data"].get("GORGON_TENANT_CLASSES", SchedulerSettings.model_fields["tenant_classes"].default))
    intake = {(subjects.STREAM_REQ, subjects.consumer_req(model, c)) for c in range(classes)}
    jobs = {(subjects.STREAM_JOBS, name) for name in subjects.job_consumers(model)}
    wanted = {"tokenizer": jobs, "scheduler": intake, "model-worker": intake}
    for name, found in named(KEDA, "ScaledObject").items():
        triggers = [t["metadata"] for t in found["spec"]["triggers"] if t["type"] == "nats-jetstream"]
        assert {(t["stream"], t["consumer"]) for t in triggers} == wanted.get(name, set())
        for trigger in triggers:
            service, _, port = trigger["natsServerMonitoringEndpoint"].partition(":")
            ports = {p["name"]: p["port"] for p in named(KEDA, "Service")[service.split(".")[0]]["spec"]["ports"]}
            assert int(port) == ports["monitor"]


def test_keda_asks_prometheus_for_metrics_that_there_are() -> None:
    queries = [
        trigger["metadata"]["query"]
        for found in named(KEDA, "ScaledObject").values()
        for trigger in found["spec"]["triggers"]
        if trigger["type"] == "prometheus"
    ]
    assert len(queries) >= 3
    for query in queries:
        check(query)
        # KEDA wants one number.
        assert all(isinstance(part, promql_parser.AggregateExpr) for part in _terms(promql_parser.parse(query)))


def _terms(expression: Any) -> list[Any]:
    if isinstance(expression, promql_parser.BinaryExpr):
        return _terms(expression.lhs) + _terms(expression.rhs)
    return [expression]
