"""The files of deploy/ are what their tools take, and what they say to `repa` it understands."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from repa_pipeline.command_table import COMMANDS

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SCRIPTS = sorted(DEPLOY.glob("*.sh"))
COMMAND = re.compile(
    rf"(?:\brepa |-m repa_pipeline |sbatch deploy/slurm-)({'|'.join(COMMANDS)})(?:\.sh)? "
)


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def test_the_cluster_file_fits_the_schema_that_ray_brings() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = load("ray-cluster.yaml")
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "max_workers": "eight"}, schema)


# What a RayJob may have, as far as ours goes: names of KubeRay's and Kubernetes' own schemas.
CONTAINER = {"name", "image", "env", "envFrom", "resources", "volumeMounts"}
POD = {"containers", "volumes", "terminationGracePeriodSeconds"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
JOB = {
    "entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "submissionMode",
    "rayClusterSpec",
}  # fmt: skip


def test_the_ray_job_is_one() -> None:
    job = load("kuberay-train.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"} and job["spec"].keys() <= JOB
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() <= CLUSTER
    (workers,) = cluster["workerGroupSpecs"]
    assert workers.keys() == GROUP
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    least, most = re.search(r"--workers (\d+),(\d+)", job["spec"]["entrypoint"]).groups()  # type: ignore[union-attr]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (int(least), int(most))
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod.keys() <= POD and container.keys() <= CONTAINER
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        assert all(isinstance(pair["value"], str) for pair in container["env"])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(path)], check=True)
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash" and "set -euo pipefail" in lines
    first_command = lines.index("set -euo pipefail")
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert directives and max(directives) < first_command  # Slurm reads none after a command


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_every_flag_given_to_repa_exists(path: Path) -> None:
    text = path.read_text().replace("\\\n", " ").replace("\n    --", " --")
    found = [
        (match[1], line[match.end() :])
        for line in text.splitlines()
        for match in COMMAND.finditer(line)
    ]
    assert found
    for command, rest in found:
        fields = dataclasses.fields(COMMANDS[command])
        known = {f"--{field.name.replace('_', '-')}" for field in fields}
        words = shlex.split(rest.partition(" #")[0])
        assert {word for word in words if word.startswith("--")} <= known
