"""Manifests against what the makers of Kubernetes and of its extensions publish; what no schema knows is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.launch.commands import found

KUBERNETES = "1.32"
"""The oldest version whose schemas are asked; its extensions bring their own."""


def known_parts(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The document, or, of a kind that is not Kubernetes' own, the Jobs and pods in it, as documents of their own."""
    if "." not in document["apiVersion"]:
        yield document
    for jobs in found(document, "replicatedJobs"):
        for job in jobs:
            named = {"name": job["name"], **job["template"].get("metadata", {})}
            yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": named, "spec": job["template"]["spec"]}
    for roles in found(document, "pytorchReplicaSpecs"):
        for role in roles.values():
            template = {"name": document["metadata"]["name"]}
            yield {"apiVersion": "v1", "kind": "PodTemplate", "metadata": template, "template": role["template"]}


def problems(document: dict[str, Any]) -> list[str]:
    """What Kubernetes would refuse in the parts that it knows."""
    import kubernetes_validate

    said = []
    for part in known_parts(document):
        try:
            kubernetes_validate.validate(part, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            said.append(f"{part['kind']} {'.'.join(map(str, error.path))}: {error.message}")
    return said


def definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The schemas in these CustomResourceDefinitions, by apiVersion and kind."""
    schemas = {}
    for path in folder.glob("*.yaml"):
        definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        for version in definition["versions"]:
            name = f"{definition['group']}/{version['name']}", definition["names"]["kind"]
            schemas[name] = closed(version["schema"]["openAPIV3Schema"])
    return schemas


def closed(schema: Any) -> Any:
    """The same schema, but it refuses what it does not name, where it is not said to take anything."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    names_all = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if names_all and not schema.get("x-kubernetes-preserve-unknown-fields"):
        inner.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        inner.pop("type", None)
    return inner
