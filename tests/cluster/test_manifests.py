from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

from cluster.packing import SECRET_FOLDERS, SECRETS

sys.path.insert(0, str(Path(__file__).parent))

from command_lines import check_command_line, without_assignments

MANIFESTS = REPOSITORY / "cluster" / "manifests"
DOCKERFILE = (MANIFESTS / "Dockerfile").read_text()
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
PINNED = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split() if "==" in line)
KUBERNETES = ["network.yaml", "raycluster.yaml", "rayjob.yaml", "storage.yaml"]
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}


def test_dockerignore__lets_what_is_copied_through_and_no_secret():
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert lines[0] == "*" and {line[1:] for line in lines if line.startswith("!")} == copied
    behind = lines[lines.index("!downstream") + 1 :]  # the last line that matches a file decides
    assert {f"**/{name}" for name in (*SECRETS, *SECRET_FOLDERS)} <= set(behind)


def load(name: str) -> Any:
    return yaml.safe_load((MANIFESTS / name).read_text())


def cluster_spec() -> Any:
    return load("raycluster.yaml")["spec"]


def groups(spec: Any) -> list[Any]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def container(group: Any) -> Any:
    (only,) = group["template"]["spec"]["containers"]
    return only


def command_lines() -> Iterator[list[str]]:
    """Every dicm and ray command that a manifest runs."""
    yield shlex.split(load("rayjob.yaml")["spec"]["entrypoint"])
    for group in groups(cluster_spec()):
        if "lifecycle" in container(group):
            yield container(group)["lifecycle"]["preStop"]["exec"]["command"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        for line in load("cluster.yaml")[key]:
            yield without_assignments(shlex.split(line))


@pytest.mark.parametrize("name", KUBERNETES)
def test_manifests__are_kubernetes_objects(name: str):
    manifest = load(name)
    assert {"apiVersion", "kind", "metadata", "spec"} == set(manifest)
    assert re.fullmatch(r"[a-z0-9-]+", manifest["metadata"]["name"])


def test_raycluster__training_cannot_land_on_the_head():
    assert cluster_spec()["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(cluster_spec()["headGroupSpec"])["resources"]["limits"]


def test_raycluster__grows_with_demand():
    spec = cluster_spec()
    assert spec["enableInTreeAutoscaling"] is True
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] < group["maxReplicas"]
        assert int(container(group)["resources"]["limits"]["nvidia.com/gpu"]) >= 1


def test_raycluster__every_pod_sees_the_shared_storage_and_has_memory_for_batches():
    claim = load("storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in groups(cluster_spec()):
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(group)["volumeMounts"]}
        assert mounts["/shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]
        assert pod["securityContext"]["runAsNonRoot"] is True


def test_raycluster__a_worker_that_must_go_has_time_to_save():
    for group in cluster_spec()["workerGroupSpecs"]:
        command = container(group)["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["dicm", "cluster", "drain"]
        notice = int(command[command.index("--seconds") + 1])
        assert 10 <= notice < group["template"]["spec"]["terminationGracePeriodSeconds"]


def test_rayjob__has_the_cluster_of_raycluster_and_can_be_found_by_its_run():
    spec = load("rayjob.yaml")["spec"]
    assert spec["rayClusterSpec"] == cluster_spec()
    assert spec["entrypointNumCpus"] == spec["entrypointNumGpus"] == 0
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] >= 1
    assert spec["submissionMode"] in SUBMISSION_MODES
    assert f"run={spec['metadata']['run']}" in shlex.split(spec["entrypoint"])
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_cluster_yaml__is_what_ray_up_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load("cluster.yaml")
    validate_config(prepare_config(config))
    assert config["available_node_types"][config["head_node_type"]]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_manifests__every_command_exists(words: list[str]):
    check_command_line(words)


def test_manifests__ask_for_a_token_everywhere_and_hold_none():
    for spec in (cluster_spec(), load("rayjob.yaml")["spec"]["rayClusterSpec"]):
        assert spec["authOptions"] == {"mode": "token", "secretName": "dicm-token"}
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in load("cluster.yaml")[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token" in line and "RAY_AUTH_TOKEN_PATH=" in line
    for path in MANIFESTS.iterdir():
        assert not re.search(r"auth_token[\"']?\s*[:=]\s*[\"']?[0-9a-fA-F]{16}|RAY_AUTH_TOKEN=", path.read_text())


def test_manifests__a_dashboard_that_binds_wider_than_loopback_is_behind_a_network_policy():
    (start,) = [line for line in load("cluster.yaml")["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert cluster_spec()["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    policy = load("network.yaml")["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    labels = policy["podSelector"]["matchLabels"]
    pods = [*groups(cluster_spec()), {"template": load("rayjob.yaml")["spec"]["submitterPodTemplate"]}]
    for pod in pods:
        assert labels.items() <= pod["template"]["metadata"]["labels"].items()


def test_manifests__a_vanished_node_is_given_up_when_the_docs_say():
    variables = {one["name"]: one["value"] for one in container(cluster_spec()["headGroupSpec"])["env"]}
    period, timeout, times = (
        int(variables[f"RAY_health_check_{name}"]) for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert times * (period + timeout) == 16_000
    settings = {f"{name}={value}" for name, value in variables.items() if "health" in name}
    for text in ((MANIFESTS / "cluster.yaml").read_text(), (REPOSITORY / "docs" / "cluster.md").read_text()):
        assert all(setting in text for setting in settings) and "16 s" in text


def test_manifests__versions_are_those_of_the_project():
    ray, ours = PINNED["ray"], PROJECT["project"]["version"]
    assert cluster_spec()["rayVersion"] == ray
    images = re.findall(r"\S+/dicm:\S+", "".join(path.read_text() for path in MANIFESTS.iterdir()))
    images += re.findall(r"\S+/dicm:\S+", (REPOSITORY / "docs" / "cluster.md").read_text())
    assert len(images) >= 6
    assert {image.partition(":")[2] for image in images} == {f"{ours}-ray{ray}"}


def test_dockerfile__installs_the_pinned_set_on_a_python_that_the_project_takes():
    base = re.search(r"^FROM python:(\d+)\.(\d+)-", DOCKERFILE, re.MULTILINE)
    assert base
    [least] = re.findall(r"(\d+)\.(\d+)", PROJECT["project"]["requires-python"])
    newest_with_a_wheel_of_compressai = (3, 12)  # the image has no compiler
    assert tuple(map(int, least)) <= tuple(map(int, base.groups())) <= newest_with_a_wheel_of_compressai
    install = re.search(r"uv pip install .*--constraint constraints.txt '\.\[(\w+)\]'", DOCKERFILE)
    assert install and install.group(1) in PROJECT["project"]["optional-dependencies"]


def test_dockerfile__copies_all_packages_and_does_not_run_as_root():
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    assert all((REPOSITORY / name).exists() for name in copied)
    packages = {pattern.rstrip("*") for pattern in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"dicm.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    user = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)[-1]
    assert int(user) == cluster_spec()["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] > 0


def test_manifests__come_with_the_package(tmp_path: Path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "dicm.py"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "cluster", tmp_path / "cluster")
    program = "from setuptools.build_meta import build_wheel; build_wheel('out')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f"cluster/manifests/{path.name}" for path in MANIFESTS.iterdir()} <= held
