"""What `deploy/` holds is what its readers take: linters, published schemas, metrics that there are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from support import METRICS
from trirank_build.cli import app
from trirank_build.serving.live import Served
from typer.main import get_command

DEPLOY = Path(__file__).parent.parent / "deploy"
BIN = Path(sys.executable).parent
MANIFESTS = [
    pytest.param(document, id=f"{path.stem}-{document['kind']}")
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
    if "kind" in document
]


def of_kind(kind):
    ours = (p.values[0] for p in MANIFESTS if p.values[0]["metadata"]["name"] == "trirank")
    return next(manifest for manifest in ours if manifest["kind"] == kind)


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_manifests_are_of_the_published_schema(manifest):
    if manifest["kind"] == "InferenceService":  # KServe's own; its predictor is a pod
        pod = {name: part for name, part in manifest["spec"]["predictor"].items() if name != "minReplicas"}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": manifest["metadata"], "spec": pod}
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_every_claim_and_secret_that_is_named_is_there():
    """A claim that nobody made leaves all replicas pending; secrets are made by hand, and said how."""
    text = "\n".join(path.read_text() for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")))
    made = {p.values[0]["metadata"]["name"] for p in MANIFESTS if p.values[0]["kind"] == "PersistentVolumeClaim"}
    assert set(re.findall(r"claimName: ([\w-]+)", text)) == made == {"trirank-releases", "trirank-state"}
    named = set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", text))
    assert named == set(re.findall(r"create secret generic ([\w-]+)", text)) == {"trirank-users", "trirank-redis"}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_is_of_the_published_schema(name):
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_wrong_compose_file_would_be_noticed(tmp_path):
    wrong = (DEPLOY / "compose.yaml").read_text().replace("shm_size:", "shm_sise:")
    (tmp_path / "compose.yaml").write_text(wrong)
    command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", tmp_path / "compose.yaml"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_the_dockerfile_is_clean():
    done = subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def commands():
    """Every call of `trirank` in the folder, as a list of words."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    yield json.loads(re.search(r"CMD (\[.*rank.*\])", dockerfile)[1])
    yield [
        *json.loads(re.search(r"ENTRYPOINT (.*)", dockerfile)[1]),
        *json.loads(re.findall(r"\nCMD (.*)", dockerfile)[-1]),
    ]
    for kind in ("Deployment", "InferenceService"):
        spec = of_kind(kind)["spec"]
        pod = spec["template"]["spec"] if kind == "Deployment" else spec["predictor"]
        for container in pod["containers"]:
            for name, part in container.items():
                if name.endswith("Probe"):
                    yield part["exec"]["command"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_options_are_ours(words):
    assert words[0] == "trirank"
    found = get_command(app).commands[words[1]]
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_hpa_scales_what_there_is_by_a_metric_that_is_made():
    hpa, deployment = of_kind("HorizontalPodAutoscaler")["spec"], of_kind("Deployment")
    assert hpa["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    made = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    assert {metric["pods"]["metric"]["name"] for metric in hpa["metrics"]} == made


@pytest.mark.parametrize("file", ["kubernetes/prometheus-adapter.yaml", "grafana/dashboards/trirank.json"])
@pytest.mark.parametrize("pipeline", ["ensemble", "single"])
def test_whatever_pipeline_is_served_its_models_are_seen(file, pipeline):
    text = (DEPLOY / file).read_text().replace('\\"', '"')
    asked = set(re.findall(r'model=~"([^"]*)"', text))
    served = Served(Path("release"), "0123456789ab", pipeline)
    assert asked
    for pattern in asked:
        assert all(re.fullmatch(pattern, stage) for stage in served.stages)


def test_services_find_the_pods():
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Service")["spec"]["selector"].items() <= labels.items()
    assert of_kind("Service")["spec"]["clusterIP"] == "None"
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    names = {port["name"] for port in of_kind("Deployment")["spec"]["template"]["spec"]["containers"][0]["ports"]}
    assert {port["targetPort"] for port in of_kind("Service")["spec"]["ports"]} <= names


def test_the_dashboard_shows_what_it_should():
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "trirank.json").read_text())
    titles = " ".join(panel["title"] for panel in board["panels"])
    for word in ("by stage", "batch", "queue", "Failures", "NDCG@10"):
        assert word in titles
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    sources = yaml.safe_load((DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {each["uid"] for each in sources["datasources"]}


def test_no_metric_is_asked_for_that_is_not_listed():
    text = "".join(path.read_text() for path in DEPLOY.rglob("*") if path.suffix in (".json", ".yml", ".yaml"))
    assert (
        set(
            re.findall(
                r"\b(?:nv|trirank)_[a-z0-9_]*(?:_us|_count|_success|_failure|_bytes|_utilization|_ndcg10)\b", text
            )
        )
        == METRICS
    )


def test_prometheus_reads_its_files():
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    for name in config["rule_files"]:
        rules = yaml.safe_load((DEPLOY / "prometheus" / name).read_text())
        assert all(
            rule["expr"] and rule["annotations"]["summary"] for group in rules["groups"] for rule in group["rules"]
        )
