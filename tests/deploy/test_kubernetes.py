"""deploy/kubernetes against the schemas that Kubernetes and KubeRay publish, and against Baton itself.

Every document of Kubernetes' own, and every pod in the RayCluster, is held against Kubernetes' published JSON schemas
(the package kubernetes-validate, strict: no field that they do not know). The fields of the RayCluster around its pods
have a schema here: an unknown, misspelt or missing field, or one of the wrong type, is refused. It was compared by
hand, field by field, with the ray.io/v1 schema in two states of the operator's custom resource definition, both of the
repository ray-project/kuberay:

- ray-operator/config/crd/bases/ray.io_rayclusters.yaml, commit 1184bc872c0801e59c18caf8a1a4eb5f2800ce93, an early one;
- helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml, commit 017710c025a86af5225c0e68cd78fb06e2918296, a late one.

All that the manifest uses is in both, and what either requires of it is required here. The early one has no suspend,
numOfHosts, idleTimeoutSeconds of a group or version of the autoscaler; the manifest does without them. No API server
and no operator is asked.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig
from cluster.server.grpc.health import LIVENESS, READINESS

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
MANIFEST = KUBERNETES / "base" / "baton.yaml"
VERSIONS = ("1.27", "1.37")
"""The oldest that the manifest names, and the newest whose schemas are known."""
STRING, BOOL, INT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?([KMGTPE]i|[numkMGTPE])?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def record(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = record(("name",), name=STRING, labels=STRINGS, annotations=STRINGS, namespace=STRING)
SECRET_KEY = record(("name", "key"), name=STRING, key=STRING, optional=BOOL)
ENV = several(
    record(("name",), name=STRING, value=STRING, valueFrom=record(("secretKeyRef",), secretKeyRef=SECRET_KEY))
)
RESOURCES = record(requests=QUANTITIES, limits=QUANTITIES)
TEMPLATE = {"type": "object", "required": ["spec"]}  # Kubernetes' own, see `as_pod`
GROUP = record(
    ("groupName", "maxReplicas", "minReplicas", "rayStartParams", "template"),
    groupName=STRING,
    replicas=INT,
    minReplicas=INT,
    maxReplicas=INT,
    numOfHosts=INT,
    idleTimeoutSeconds=INT,
    suspend=BOOL,
    rayStartParams=STRINGS,
    template=TEMPLATE,
)
RAY_CLUSTER = record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=METADATA,
    spec=record(
        ("headGroupSpec",),
        rayVersion=STRING,
        suspend=BOOL,
        enableInTreeAutoscaling=BOOL,
        autoscalerOptions=record(
            idleTimeoutSeconds=INT,
            upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
            version={"enum": ["v1", "v2"]},
            env=ENV,
            resources=RESOURCES,
        ),
        headGroupSpec=record(
            ("rayStartParams", "template"),
            rayStartParams=STRINGS,
            serviceType=STRING,
            enableIngress=BOOL,
            template=TEMPLATE,
        ),
        workerGroupSpecs=several(GROUP),
    ),
)


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    """By kind, and a budget by its kind and name."""
    loaded = list(yaml.safe_load_all(MANIFEST.read_text()))
    return {d["kind"] + (f" {d['metadata']['name']}" if d["kind"] == "PodDisruptionBudget" else ""): d for d in loaded}


@pytest.fixture(scope="module")
def cluster(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = documents["RayCluster"]["spec"]
    return spec


@pytest.fixture
def service(documents: dict[str, dict[str, Any]], tmp_path: Path) -> ServiceConfig:
    """The configuration in the ConfigMap, as Baton reads it, with a token in the place of the mounted one."""
    token = tmp_path / "service"
    token.write_text("secret")
    file = tmp_path / "service.yaml"
    text = documents["ConfigMap"]["data"]["service.yaml"]
    assert "/etc/baton/tokens/service" in text
    file.write_text(text.replace("/etc/baton/tokens/service", str(token)))
    return load_config(file, environ={})


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    return only


def as_pod(group: dict[str, Any]) -> dict[str, Any]:
    """A pod of a group, as Kubernetes would be given it."""
    template = group["template"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}} | {
        "spec": template["spec"]
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_every_field_is_known(documents: dict[str, dict[str, Any]], version: str) -> None:
    assert sorted(documents) == [
        "ConfigMap", "NetworkPolicy", "PodDisruptionBudget baton-decode", "PodDisruptionBudget baton-prefill",
        "RayCluster", "Service",
    ]  # fmt: skip
    jsonschema.validate(documents["RayCluster"], RAY_CLUSTER)
    pods = [as_pod(group) for group in groups(documents["RayCluster"]["spec"]).values()]
    for document in [d for kind, d in documents.items() if kind != "RayCluster"] + pods:
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_field_of_a_pod_is_noticed(cluster: dict[str, Any]) -> None:
    misspelt = json.loads(json.dumps(as_pod(groups(cluster)["gateway"])).replace('"readinessProbe"', '"readyProbe"'))
    with pytest.raises(kubernetes_validate.ValidationError, match="readyProbe"):
        kubernetes_validate.validate(misspelt, VERSIONS[-1], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")
def test_the_overlay_for_gpus_gives_pods_that_kubernetes_knows() -> None:
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / "gpu")]
    rendered = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=60).stdout
    cluster = next(d for d in yaml.safe_load_all(rendered) if d["kind"] == "RayCluster")
    jsonschema.validate(cluster, RAY_CLUSTER)
    for name, group in groups(cluster["spec"]).items():
        kubernetes_validate.validate(as_pod(group), VERSIONS[-1], strict=True)
        assert container(group)["image"] == "baton:cuda"
        assert ("nvidia.com/gpu" in container(group)["resources"]["limits"]) == (name in ("prefill", "decode"))


@pytest.mark.parametrize(("wrong", "right"), [("rayStartparams", "rayStartParams"), ("maxReplica", "maxReplicas")])
def test_a_misspelt_field_is_noticed(documents: dict[str, dict[str, Any]], wrong: str, right: str) -> None:
    text = json.dumps(documents["RayCluster"])
    assert f'"{right}"' in text
    misspelt = json.loads(text.replace(f'"{right}"', f'"{wrong}"'))
    errors = jsonschema.Draft202012Validator(RAY_CLUSTER).iter_errors(misspelt)
    assert any(f"'{wrong}'" in error.message for error in errors)


def test_the_ray_of_the_manifest_is_the_tested_one(cluster: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]


def test_every_container_that_runs_ray_has_the_token_and_no_rights(cluster: dict[str, Any]) -> None:
    all_containers = [container(group) for group in groups(cluster).values()]
    for environment in [cluster["autoscalerOptions"]["env"], *(c["env"] for c in all_containers)]:
        by_name = {entry["name"]: entry for entry in environment}
        assert by_name["RAY_AUTH_MODE"]["value"] == "token"
        assert by_name["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "baton-tokens", "key": "ray"}
    for each in all_containers:
        assert each["securityContext"]["allowPrivilegeEscalation"] is False
        assert each["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for group in groups(cluster).values():
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert "kind: Secret" not in MANIFEST.read_text(), "tokens are made, not kept in a file"


def test_each_pool_has_a_group_that_alone_offers_what_it_asks_for(
    cluster: dict[str, Any], service: ServiceConfig
) -> None:
    workers = {name: groups(cluster)[name] for name in ("prefill", "decode")}
    for name, pool in (("prefill", service.prefill), ("decode", service.decode)):
        assert workers[name]["minReplicas"] <= workers[name]["replicas"] <= workers[name]["maxReplicas"]
        assert pool.replicas <= workers[name]["maxReplicas"]
        offered = {key: started_with(group)["resources"] for key, group in workers.items()}
        assert offered[name] == pool.resources
        assert [key for key, resources in offered.items() if set(resources) & set(pool.resources or {})] == [name]
    for name in ("head", "gateway"):
        assert groups(cluster)[name]["rayStartParams"]["num-cpus"] == "0"


def started_with(group: dict[str, Any]) -> dict[str, Any]:
    """The resources that `ray start` is given when the container's shell evaluates the command that KubeRay makes."""
    flags = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
    (command,) = container(group)["args"]
    shell = 'ray() { printf "%s\\n" "$@"; }; ulimit() { :; }; ' + command
    environment = {"KUBERAY_GEN_RAY_START_CMD": f"ray start {flags} --block", "PATH": "/usr/bin:/bin"}
    output = subprocess.run(
        ["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    (resources,) = (line for line in output.stdout.splitlines() if line.startswith("--resources="))
    return {"resources": json.loads(resources.removeprefix("--resources="))}


def test_the_service_leads_to_a_gateway_that_is_ready_and_nothing_else_is_open(
    documents: dict[str, dict[str, Any]], cluster: dict[str, Any], service: ServiceConfig
) -> None:
    ports = {port["name"]: port for port in documents["Service"]["spec"]["ports"]}
    gateway = container(groups(cluster)["gateway"])
    named = {entry["name"]: entry["containerPort"] for entry in gateway["ports"]}
    for name, number in (("grpc", service.server.port), ("http", service.server.http.port)):
        assert ports[name]["port"] == named[ports[name]["targetPort"]] == number
    assert documents["Service"]["spec"]["selector"] == {"ray.io/cluster": "baton", "ray.io/group": "gateway"}
    assert "publishNotReadyAddresses" not in documents["Service"]["spec"]
    for probe, name in (("startupProbe", LIVENESS), ("livenessProbe", LIVENESS), ("readinessProbe", "readiness")):
        assert gateway[probe]["grpc"] == {"port": service.server.port, "service": name}
    assert "readiness" in READINESS
    assert "readinessProbe" not in container(groups(cluster)["head"]), "it would cut the workers off from the GCS"
    assert service.server.host == service.server.http.host == "0.0.0.0"
    assert service.server.auth_token == "secret"
    assert service.ray.address == "auto"
    policy = documents["NetworkPolicy"]["spec"]
    everybody = [rule for rule in policy["ingress"] if "from" not in rule]
    assert everybody == [{"ports": [{"port": name, "protocol": "TCP"} for name in ("grpc", "http")]}]


def test_a_pod_has_the_time_to_drain_and_the_configuration_is_mounted_whole(
    cluster: dict[str, Any], service: ServiceConfig
) -> None:
    pod = groups(cluster)["gateway"]["template"]["spec"]
    hook_s = float(container(groups(cluster)["gateway"])["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= hook_s + service.server.drain_timeout_s + 20
    mounts = container(groups(cluster)["gateway"])["volumeMounts"]
    assert not [mount for mount in mounts if "subPath" in mount], "what is mounted as one file is never updated"


def test_budgets_hold_one_worker_of_each_pool(documents: dict[str, dict[str, Any]]) -> None:
    for name in ("prefill", "decode"):
        spec = documents[f"PodDisruptionBudget baton-{name}"]["spec"]
        # A percentage or maxUnavailable needs a controller with a scale, which a RayCluster has not.
        assert spec["minAvailable"] == 1
        assert spec["selector"]["matchLabels"] == {"ray.io/cluster": "baton", "ray.io/group": name}
