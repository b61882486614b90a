"""The manifests fit the published schemas, and the image's file is without a fault that hadolint knows."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.house.source import ROOT
from tests.launch.commands import COMPOSE, KUBERNETES, found
from tests.launch.schemas import definitions, known_parts, problems

CRDS = "SHARDCKPT_TEST_CRDS"
"""A folder with the CRDs of JobSet, PyTorchJob, TrainJob and TrainingRuntime, as their projects publish them."""
DOCUMENTS = [
    pytest.param(document, id=f"{path.name}: {document['kind']}")
    for path in KUBERNETES
    for document in yaml.safe_load_all(path.read_text())
]


@pytest.fixture
def kubernetes() -> None:
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: bash launch/setup.sh")


@pytest.mark.usefixtures("kubernetes")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_manifests_are_what_kubernetes_takes(document: dict[str, Any]) -> None:
    if document["kind"] != "TrainJob":  # which has no part that Kubernetes itself knows
        assert list(known_parts(document))
    assert problems(document) == []


@pytest.mark.usefixtures("kubernetes")
@pytest.mark.parametrize(("key", "value"), [("imagePullPolicies", "Never"), ("volumeMounts", "none")])
def test_what_kubernetes_does_not_take_is_found(key: str, value: str) -> None:
    for path in KUBERNETES:
        for document in yaml.safe_load_all(path.read_text()):
            spoiled = copy.deepcopy(document)
            for containers in found(spoiled, "containers"):
                containers[0][key] = value
                assert len(problems(spoiled)) == 1


@pytest.mark.skipif(CRDS not in os.environ, reason=f"{CRDS} names no folder with the CRDs of JobSet and Kubeflow")
@pytest.mark.usefixtures("kubernetes")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_manifests_are_what_the_extensions_take(document: dict[str, Any]) -> None:
    if "." not in document["apiVersion"]:
        pytest.skip("Kubernetes' own")
    schema = definitions(Path(os.environ[CRDS]))[document["apiVersion"], document["kind"]]
    validator = jsonschema.Draft202012Validator(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []
    document = copy.deepcopy(document)
    document["spec"]["surprise"] = 1
    assert not validator.is_valid(document)


def test_the_images_file_is_without_fault() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: bash launch/setup.sh")
    checked = subprocess.run([program, ROOT / "docker/Dockerfile"], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_image_is_made_by_the_same_script_of_what_its_build_is_given(tmp_path: Path) -> None:
    """Every file that setup.sh looks at is copied into it before, and let through by the ignore file."""
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    runs = [line for line in lines if line.startswith("RUN ") and "useradd" not in line]
    assert [line.split(" bash ")[1] for line in runs] == ['launch/setup.sh "${EXTRAS}"']
    copied = [
        name for line in lines if line.startswith("COPY ") and "--from" not in line for name in line.split()[1:-1]
    ]
    let_through = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    assert {f"!{name}" for name in copied} <= set(let_through)
    script = (ROOT / "launch/setup.sh").read_text()
    for name in ("pyproject.toml", "docker/constraints.txt", "launch/setup.sh"):
        assert name in script
        assert any(name == place or name.startswith(f"{place}/") for place in copied)
    project = (ROOT / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in project  # the package is not built without it
    assert "README.md" in copied


def test_compose_is_what_its_specification_takes() -> None:
    """The schema of compose-spec, as the package check-jsonschema brings it."""
    schema = json.loads(
        (importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text()
    )
    validator = jsonschema.Draft202012Validator(schema)
    document = yaml.safe_load(COMPOSE.read_text())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []
    for spoil in ({"healthcheck": {"test": 1}}, {"depends_on": {"store": {"condition": "awake"}}}, {"surprise": 1}):
        spoiled = copy.deepcopy(document)
        spoiled["services"]["node-1"] |= spoil
        assert not validator.is_valid(spoiled), spoil


def test_compose_waits_for_the_store_and_tells_who_is_well() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(services) == {"store", "node-0", "node-1"}
    for name, service in services.items():
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert service["healthcheck"]["test"][0] == "CMD"
        if name != "store":
            assert service["depends_on"] == {"store": {"condition": "service_healthy"}}
            assert service["hostname"] == name
            assert service["command"] == services["node-0"]["command"]
            assert services[service["command"][5].split("=")[1].split(":")[0]]  # where they meet is one of them
