"""The files in infra/ as far as they can be checked without a cluster: schemas, linters, and what they say about clipfilter.

What is not checked: that images exist in their registries, that a cloud accepts the machine types, and that any of it runs.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from clipfilter.cli.main import add_commands
from clipfilter.engine.driver import Progress
from clipfilter.engine.metrics import RunMetrics
from tests.support.engine import REPO

INFRA = REPO / "infra"
SCHEMAS = Path(__file__).parent / "schemas"
#: The newest Kubernetes that every managed service offers.
KUBERNETES = "1.34"


def document(name: str) -> Any:
    return yaml.safe_load((INFRA / name).read_text())


def tool(name: str) -> str:
    """A program that a package put beside this Python."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed (a development requirement)")
    return str(path)


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    app = typer.Typer(name="clipfilter")
    add_commands(app)
    group = typer.main.get_command(app)
    return group.commands  # type: ignore[attr-defined,no-any-return]


def refuse_unknown(commands: dict[str, Any], words: list[str], where: str) -> None:
    """Parse a clipfilter command as its command line would; nothing is run."""
    command = commands[words[0]]
    context = command.make_context("clipfilter", words[1:], resilient_parsing=False)
    assert context.params, where


# the image


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.beam"])
def test_a_dockerfile_is_linted(name: str) -> None:
    done = subprocess.run([tool("hadolint"), str(INFRA / name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_something(tmp_path: Path) -> None:
    bad = (
        (INFRA / "Dockerfile")
        .read_text()
        .replace("--no-install-recommends ", "")
        .replace("USER 10001:10001", "USER root")
    )
    (tmp_path / "Dockerfile").write_text(bad)
    done = subprocess.run([tool("hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 1
    assert {"DL3015", "DL3002"} <= set(re.findall(r"DL\d+", done.stdout))


def test_the_image_is_pinned_unprivileged_and_made_of_what_is_there() -> None:
    text = (INFRA / "Dockerfile").read_text()
    instructions = [
        line.split(maxsplit=1) for line in re.sub(r"\\\n", " ", text).splitlines() if re.match(r"[A-Z]+ ", line)
    ]
    assert re.search(r"PYTHON_IMAGE=python:3\.\d+\.\d+-slim-\w+$", text, re.MULTILINE), "the base has an exact version"
    assert [value for name, value in instructions if name == "USER"][-1] == "10001:10001"
    assert {"FROM ${PYTHON_IMAGE} AS build", "ARG TORCH_INDEX=", "ENV PIP_EXTRA_INDEX_URL=${TORCH_INDEX}"} <= set(
        text.splitlines()
    )
    assert "--constraint constraints.txt" in text
    allowed = {
        line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied: set[str] = set()
    for name, value in instructions:
        if name == "COPY" and not value.startswith("--from"):
            copied |= set(value.split()[:-1])
    assert copied == allowed
    for path in copied:
        assert (REPO / path).exists(), path
    extras = re.search(r"ARG EXTRAS=(.*)", text)
    assert extras
    declared = set(
        re.findall(
            r"^(\w+) = \[",
            (REPO / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1],
            re.MULTILINE,
        )
    )
    assert set(extras[1].split(",")) <= declared


def test_secrets_come_from_the_environment_only() -> None:
    """No file holds a value for anything that is named like a secret."""
    secret = re.compile(r"(?i)(password|secret_?access_?key|auth_token|api_?key|webhook)\w*[\"']?\s*[:=]\s*(\S.*)")
    for path in sorted(p for p in INFRA.rglob("*") if p.is_file()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith(("#", "/home")):
                continue
            for match in secret.finditer(line):
                assert match[2].startswith(("$", "~", "{")), f"{path.name}:{number}: {line.strip()}"


def test_the_beam_image_has_the_versions_that_were_tested() -> None:
    text = (INFRA / "Dockerfile.beam").read_text()
    python = re.search(r"PYTHON_IMAGE=python:(3\.\d+)", (INFRA / "Dockerfile").read_text())
    assert python
    assert f"beam_python{python[1]}_sdk:{pinned('apache-beam')}" in text


# compose


def test_compose_fits_the_published_specification() -> None:
    compose = document("compose/compose.yaml")
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text())
    assert compose.pop("name") == "clipfilter"  # a key younger than this edition of the schema (2021)
    jsonschema.validate(compose, schema)
    typo = copy.deepcopy(compose)
    typo["services"]["head"]["healthcheck"]["tests"] = typo["services"]["head"]["healthcheck"].pop("test")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(typo, schema)
    for name, service in compose["services"].items():
        assert re.search(r":[\w.-]+$", service["image"]), f"{name} has no version"
        assert not service["image"].endswith(":latest")
        for other in service.get("depends_on", {}):
            assert "healthcheck" in compose["services"][other]
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network"
        for volume in service.get("volumes", []):
            assert (INFRA / "compose" / volume.split(":")[0]).exists(), volume
    build = compose["services"]["head"]["build"]
    assert (INFRA / "compose" / build["context"] / build["dockerfile"]).resolve() == INFRA / "Dockerfile"


# Kubernetes


def kubernetes(value: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    validate(value, KUBERNETES, strict=True)


def ray_jobs() -> dict[str, dict[str, Any]]:
    config = next(
        d for d in yaml.safe_load_all((INFRA / "kuberay/nightly.yaml").read_text()) if d["kind"] == "ConfigMap"
    )
    return {"rayjob": document("kuberay/rayjob.yaml"), "nightly": yaml.safe_load(config["data"]["rayjob.yaml"])}


def pod_templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


@pytest.mark.parametrize("name", ["rayjob", "nightly"])
def test_a_rayjob_fits_kuberay_and_its_pods_fit_kubernetes(name: str, commands: dict[str, Any]) -> None:
    job = ray_jobs()[name]
    schema = json.loads((SCHEMAS / "rayjob-part.json").read_text())
    jsonschema.validate(job, schema)
    wrong = copy.deepcopy(job)
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'string'"):
        jsonschema.validate(wrong, schema)
    for template in pod_templates(job):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**template["metadata"], "name": "x"},
            "spec": template["spec"],
        }
        kubernetes(pod)
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert template["spec"]["securityContext"]["runAsUser"] == 10001
        for container in template["spec"]["containers"]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert "memory" in container["resources"]["limits"]
            assert "env" not in container, "values come from the Secret"
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned("ray")
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "clipfilter"
    refuse_unknown(commands, words[1:], name)
    port = words[words.index("--metrics-port") + 1] if "--metrics-port" in words else None
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    if port:
        assert head["metadata"]["annotations"]["prometheus.io/port"] == port
        assert int(port) in [p["containerPort"] for p in head["spec"]["containers"][0]["ports"]]


def test_the_nightly_job_is_the_single_one_under_another_name() -> None:
    single, nightly = ray_jobs()["rayjob"], ray_jobs()["nightly"]
    assert nightly["metadata"].pop("generateName") == "clipfilter-nightly-"
    del single["metadata"]["name"]
    for job in (single, nightly):
        del job["spec"]["entrypoint"], job["spec"]["backoffLimit"]
    assert nightly == single


def test_the_cron_job_and_what_it_may_do_fit_kubernetes() -> None:
    found = {d["kind"]: d for d in yaml.safe_load_all((INFRA / "kuberay/nightly.yaml").read_text())}
    for value in found.values():
        kubernetes(value)
    assert found["Role"]["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]
    assert found["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    pod = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    assert pod["volumes"][0]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert pod["containers"][0]["command"][-1] == "/job/" + next(iter(found["ConfigMap"]["data"]))
    broken = copy.deepcopy(found["CronJob"])
    broken["spec"]["jobTemplate"]["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(Exception, match="container"):
        kubernetes(broken)


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(.*)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert match
    return match[1]


# Ray's cluster launcher


def test_the_cluster_fits_rays_own_schema() -> None:
    import ray

    cluster = document("ray/cluster.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_worker": 3}, schema)
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert sum(kind.get("max_workers", 0) for kind in kinds.values()) == cluster["max_workers"]
    spot = [
        name
        for name, kind in kinds.items()
        if kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    ]
    assert spot == ["gpu_spot"]
    assert all("aws" not in key.lower() for kind in kinds.values() for key in kind["node_config"]), (
        "no keys in the file"
    )


# Slurm


def test_the_slurm_script_is_linted() -> None:
    script = INFRA / "slurm/clipfilter.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert (done.returncode, "usage:" in done.stderr) == (2, True)
    assert script.stat().st_mode & 0o100


# Airflow


def test_the_dag_is_well_formed_and_its_commands_exist(commands: dict[str, Any]) -> None:
    """Without Airflow: the file parses, takes only what Airflow has under these names, and calls clipfilter rightly."""
    path = INFRA / "airflow/clipfilter_nightly.py"
    tree = ast.parse(path.read_text())
    imports = {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert {n for n in imports if n.startswith("airflow")} == {
        "airflow.providers.standard.operators.bash.BashOperator", "airflow.sdk.DAG",
        "airflow.DAG", "airflow.operators.bash.BashOperator",
    }  # fmt: skip
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "BashOperator"]
    given = [{k.arg: k.value for k in call.keywords} for call in calls]
    assert [ast.literal_eval(call["task_id"]) for call in given] == ["plan", "night", "verify"]
    for call in given:
        line = ast.literal_eval(call["bash_command"])
        assert "{{" not in line, "values come through the environment, never into the shell's text"
        words = shlex.split(line)
        assert words[0] == "$CLIPFILTER"
        refuse_unknown(commands, words[1:], line)


# metrics


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """{sample name: its labels} of everything a job exports, from the code."""
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")

    class Result:
        exit_code, version = 0, "000001"
        totals = dict.fromkeys(("rows", "embedded", "keep", "review", "reject", "failed"), 1)

    metrics = RunMetrics("run")
    progress = Progress(stage="decided")
    progress.failed_by_class["decode_error"] = 1
    progress.seconds["encode_images"] = 1.0
    metrics.update(progress)
    metrics.finish(Result())  # type: ignore[arg-type]
    return {sample.name: set(sample.labels) for family in metrics.collect() for sample in family.samples}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in json.loads((INFRA / "grafana/clipfilter.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in document("prometheus/rules.yml")["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_dashboard_and_alerts_ask_for_what_the_code_exports(exported: dict[str, set[str]]) -> None:
    asked: set[str] = set()
    for title, expression in expressions():
        for name, selector in re.findall(r"(clipfilter_\w+)(?:\{([^}]*)\})?", expression):
            assert name in exported, f"{title}: {name} is not exported"
            asked.add(name)
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= exported[name] | {"instance", "job"}, f"{title}: {name} has no label {labels}"
        inner = set(exported) & set(re.findall(r"clipfilter_\w+", expression))
        known = set().union(*(exported[name] for name in inner)) | {"instance"}
        for grouped in re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", expression):
            assert {label.strip() for label in grouped.split(",")} <= known, f"{title}: groups by unknown labels"
    assert set(exported) == asked, f"nobody looks at {set(exported) - asked}"
    templates = json.loads((INFRA / "grafana/clipfilter.json").read_text())["templating"]["list"]
    assert {t["name"] for t in templates} == {"job_kind", "instance"}


def test_expressions_are_promql() -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for _, expression in expressions():
        parser.parse(expression)
    with pytest.raises(ValueError, match="parenthesis"):
        parser.parse("sum by (rate(x[5m])")


def test_every_target_of_the_compose_file_is_scraped() -> None:
    scraped = document("prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    compose = document("compose/compose.yaml")["services"]
    for target in scraped:
        host, _, port = target.partition(":")
        assert port in compose[host]["expose"]
    assert document("prometheus/prometheus.yml")["rule_files"] == ["rules.yml"]
    source = document("grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    dashboard = json.loads((INFRA / "grafana/clipfilter.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
