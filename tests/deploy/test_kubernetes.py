"""deploy/kubernetes/baton.yaml against the fields that KubeRay and Kubernetes know, and against Baton itself.

The schema here is this project's own, for the fields that the manifest uses and a few beside them: an unknown, misspelt
or missing field, or one of the wrong type, is refused. Its RayCluster was compared by hand, field by field, with the
ray.io/v1 schema in two states of the operator's custom resource definition, both of the repository ray-project/kuberay:

- ray-operator/config/crd/bases/ray.io_rayclusters.yaml, commit 1184bc872c0801e59c18caf8a1a4eb5f2800ce93, an early one;
- helm-chart/kuberay-operator/crds/ray.io_rayclusters.yaml, commit 017710c025a86af5225c0e68cd78fb06e2918296, a late one.

All that the manifest uses is in both, and what either requires of it is required here. The early one has no suspend,
numOfHosts, idleTimeoutSeconds of a group or version of the autoscaler; the manifest does without them. Not compared:
the releases in between, the volumes of a worker group (the manifest has none there), and the other kinds of document,
which have no schema here. No API server and no operator is asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.config.load import load_config
from cluster.config.schema import ServiceConfig

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "kubernetes" / "baton.yaml"
STRING, BOOL, INT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": STRING}
QUANTITY = {"type": "string", "pattern": r"^\d+(\.\d+)?([KMGTPE]i|[numkMGTPE])?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


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
CONTAINER = record(
    ("name", "image"),
    name=STRING,
    image=STRING,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    command=several(STRING),
    args=several(STRING),
    env=ENV,
    ports=several(record(("containerPort",), containerPort=PORT, name=STRING, protocol=STRING)),
    securityContext=record(
        allowPrivilegeEscalation=BOOL, capabilities=record(drop=several(STRING), add=several(STRING)), runAsUser=INT
    ),
    resources=RESOURCES,
    volumeMounts=several(record(("name", "mountPath"), name=STRING, mountPath=STRING, subPath=STRING, readOnly=BOOL)),
)
ITEMS = several(record(("key", "path"), key=STRING, path=STRING, mode=INT))
VOLUME = record(
    ("name",),
    name=STRING,
    configMap=record(("name",), name=STRING, items=ITEMS, defaultMode=INT),
    secret=record(("secretName",), secretName=STRING, items=ITEMS, defaultMode=INT),
    persistentVolumeClaim=record(("claimName",), claimName=STRING, readOnly=BOOL),
)
POD = record(
    ("containers",),
    securityContext=record(runAsNonRoot=BOOL, runAsUser=INT, runAsGroup=INT, fsGroup=INT),
    containers=several(CONTAINER),
    terminationGracePeriodSeconds=INT,
    volumes=several(VOLUME),
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]},
    nodeSelector=STRINGS,
    serviceAccountName=STRING,
    tolerations=several(record(key=STRING, operator=STRING, value=STRING, effect=STRING)),
)
TEMPLATE = record(("spec",), metadata=record(labels=STRINGS, annotations=STRINGS), spec=POD)
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
    return {document["kind"]: document for document in yaml.safe_load_all(MANIFEST.read_text())}


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


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_every_field_is_known(documents: dict[str, dict[str, Any]]) -> None:
    assert set(documents) == {"ConfigMap", "RayCluster", "Service", "NetworkPolicy"}
    jsonschema.validate(documents["RayCluster"], RAY_CLUSTER)


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
    for environment in [cluster["autoscalerOptions"]["env"], *(c["env"] for c in containers(cluster))]:
        by_name = {entry["name"]: entry for entry in environment}
        assert by_name["RAY_AUTH_MODE"]["value"] == "token"
        assert by_name["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "baton-tokens", "key": "ray"}
    for container in containers(cluster):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
    assert "kind: Secret" not in MANIFEST.read_text(), "tokens are made, not kept in a file"


def test_each_pool_has_a_group_that_alone_offers_what_it_asks_for(
    cluster: dict[str, Any], service: ServiceConfig
) -> None:
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    for name, pool in (("prefill", service.prefill), ("decode", service.decode)):
        assert groups[name]["minReplicas"] <= groups[name]["replicas"] <= groups[name]["maxReplicas"]
        assert pool.replicas <= groups[name]["maxReplicas"]
        offered = {key: started_with(group)["resources"] for key, group in groups.items()}
        assert offered[name] == pool.resources
        assert [key for key, resources in offered.items() if set(resources) & set(pool.resources or {})] == [name]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def started_with(group: dict[str, Any]) -> dict[str, Any]:
    """The resources that `ray start` is given when the container's shell evaluates the command that KubeRay makes."""
    flags = " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items())
    (command,) = group["template"]["spec"]["containers"][0]["args"]
    shell = 'ray() { printf "%s\\n" "$@"; }; ulimit() { :; }; ' + command
    environment = {"KUBERAY_GEN_RAY_START_CMD": f"ray start {flags} --block", "PATH": "/usr/bin:/bin"}
    output = subprocess.run(
        ["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=30, check=True
    )
    (resources,) = (line for line in output.stdout.splitlines() if line.startswith("--resources="))
    return {"resources": json.loads(resources.removeprefix("--resources="))}


def test_the_service_leads_to_the_gateway_and_nothing_else_is_open(
    documents: dict[str, dict[str, Any]], cluster: dict[str, Any], service: ServiceConfig
) -> None:
    (port,) = documents["Service"]["spec"]["ports"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    named = {entry["name"]: entry["containerPort"] for entry in head["ports"]}
    assert port["port"] == named[port["targetPort"]] == service.server.port
    assert documents["Service"]["spec"]["selector"] == {"ray.io/cluster": "baton", "ray.io/node-type": "head"}
    assert service.server.host == "0.0.0.0"
    assert service.server.auth_token == "secret"
    assert service.ray.address == "auto"
    policy = documents["NetworkPolicy"]["spec"]
    everybody = [rule for rule in policy["ingress"] if "from" not in rule]
    assert everybody == [{"ports": [{"port": "grpc", "protocol": "TCP"}]}]


def test_a_head_that_is_told_to_stop_lets_the_service_drain_while_ray_lives(
    cluster: dict[str, Any], tmp_path: Path
) -> None:
    (command,) = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["args"]
    (tmp_path / "ray").write_text(
        f'#!/bin/bash\n[ "$1" = health-check ] && exit\necho $$ > {tmp_path}/ray-pid\nexec sleep 60\n'
    )
    (tmp_path / "baton").write_text(
        f"""#!/bin/bash
        trap 'sleep 0.5; kill -0 $(cat {tmp_path}/ray-pid) && echo yes > {tmp_path}/drained; exit' TERM
        echo yes > {tmp_path}/serves
        while true; do sleep 0.05; done
        """
    )
    for stub in (tmp_path / "ray", tmp_path / "baton"):
        stub.chmod(0o755)
    environment = {"KUBERAY_GEN_RAY_START_CMD": "ray start --head --block", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    process = subprocess.Popen(
        ["bash", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(400):
            if (tmp_path / "serves").exists() and (tmp_path / "ray-pid").exists():
                break
            time.sleep(0.05)
        process.terminate()
        process.wait(20)
        assert (tmp_path / "drained").read_text() == "yes\n"
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)


def test_the_head_ends_when_ray_or_the_service_does(cluster: dict[str, Any], tmp_path: Path) -> None:
    """The container's command with stand-ins: Kubernetes can only start again what has ended."""
    (command,) = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["args"]
    (tmp_path / "ray").write_text('#!/bin/bash\n[ "$1" = health-check ] || exec sleep 60\n')
    (tmp_path / "baton").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\nsleep 0.5\n')
    for stub in (tmp_path / "ray", tmp_path / "baton"):
        stub.chmod(0o755)
    environment = {"KUBERAY_GEN_RAY_START_CMD": "ray start --head --block", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    process = subprocess.Popen(
        ["bash", "-c", command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(20)
        assert (tmp_path / "asked").read_text() == "up --config /etc/baton/service.yaml\n"
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
