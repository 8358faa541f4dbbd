#!/usr/bin/env python3
"""Checks the recipes for Kubernetes and SkyPilot in docs/clusters.md with the schemas that these programs have, and that the schemas notice mistakes.

    python3 -m venv venv && venv/bin/pip install kubernetes-validate==1.37.0 skypilot==0.10.5 sqlalchemy==2.1.9 greenlet==3.5.6
    venv/bin/python tests/python/check_clusters.py

kubernetes-validate has the schemas of Kubernetes' own API with it, and SkyPilot reads the task as `sky jobs launch` does before it asks a
cloud. Neither needs a network or a cluster.
"""

import copy
import re
import sys
from pathlib import Path

import kubernetes_validate
import sky
import yaml

PAGE = Path(__file__).parents[2] / "docs/clusters.md"
# The oldest and the newest API that a cluster of today may have.
VERSIONS = ["1.30", "1.37"]
failed = []


def check(what, holds, shown=""):
    print(f"{'ok' if holds else 'WRONG':>6}  {what}" + ("" if holds else f": {shown}"))
    if not holds:
        failed.append(what)


def mistakes_of_kubernetes(document, version):
    """What Kubernetes of this version has against a document; none if nothing."""
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


def mistakes_of_sky(document):
    """What SkyPilot has against a task; none if nothing."""
    try:
        sky.Task.from_yaml_config(copy.deepcopy(document))
    except (ValueError, AssertionError) as error:
        return str(error)
    return None


def changed(document, path, value):
    """A copy with another value at a path."""
    other = copy.deepcopy(document)
    place = other
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return other


blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
section = {block: yaml.safe_load(block) for block in blocks if re.match(r"(apiVersion|name):", block)}
jobs = [document for document in section.values() if "apiVersion" in document]
tasks = [document for document in section.values() if "run" in document]
check("the page has recipes for both", jobs and tasks, list(section))

for job in jobs:
    name = f"Kubernetes' {job['kind']} `{job['metadata']['name']}`"
    for version in VERSIONS:
        told = mistakes_of_kubernetes(job, version)
        check(f"{name}, {version}", told is None, told)
    pod = ["spec", "template", "spec"]
    container = [*pod, "containers", 0]
    for path, value in [
        (["spec", "backofLimit"], 3),
        ([*pod, "restartPolicy"], 7),
        ([*container, "command"], "pipeline run"),
        ([*container, "resources", "requests"], ["cpu"]),
        ([*container, "volumeMounts", 0, "path"], "/x"),
    ]:
        told = mistakes_of_kubernetes(changed(job, path, value), VERSIONS[-1])
        check(f"a mistake in `{path[-1]}` is noticed", told is not None)

for task in tasks:
    told = mistakes_of_sky(task)
    check(f"SkyPilot's task `{task['name']}`", told is None, told)
    read = sky.Task.from_yaml_config(copy.deepcopy(task))
    check("its command is the page's", read.run == task["run"], read.run)
    (resources,) = read.resources
    wanted = {"cpus": resources.cpus, "memory": resources.memory, "use_spot": resources.use_spot}
    check("its resources are the page's", wanted == task["resources"], wanted)
    for path, value in [(["resource"], {}), (["resources", "cpu"], 8), (["envs"], "PIPELINE_REMOTE"), (["run"], ["pipeline"])]:
        told = mistakes_of_sky(changed(task, path, value))
        check(f"a mistake in `{path[-1]}` is noticed", told is not None)

if failed:
    sys.exit(f"{len(failed)} of these are wrong")
print("all is right")
