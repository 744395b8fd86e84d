"""The files of deploy/ by their publishers' own descriptions: SkyPilot's parser, Kubernetes' schemas, the message types
of Vertex and Cloud Build, XPK's parser. Run by environments of their own, whose packages tests/schemas.txt and
tests/sky.txt name; a line for each part.

    python tests/check_schemas.py schemas|sky
"""

import argparse
import os
import pathlib
import re
import shlex
import sys

import yaml

DEPLOY = pathlib.Path(__file__).parents[1] / "deploy"
read = lambda name: list(yaml.safe_load_all((DEPLOY / name).read_text()))


def sky() -> str:
    import sky

    os.chdir(DEPLOY.parent)
    given = [("COMMAND", "python b5_cts.py --x 'a b' --y=1"), ("BUCKET", "gs://me-cts")]
    task = sky.Task.from_yaml_config(read("sky.yaml")[0], env_overrides=given)
    assert task.envs["COMMAND"] == given[0][1] and "/bucket" in task.storage_mounts
    assert {str(r.accelerators) for r in task.resources} >= {"{'H100': 8}", "{'tpu-v6e-8': 1}"}
    assert all(r.use_spot and r.job_recovery["recover_on_exit_codes"] == [143] for r in task.resources)
    bad = read("sky.yaml")[0] | {"nodes": 2}
    try:
        sky.Task.from_yaml_config(bad, env_overrides=given)
    except ValueError:
        return f"sky.yaml, SkyPilot {sky.__version__}"
    raise AssertionError("the parser takes anything")


def kubernetes() -> str:
    import kubernetes_validate

    *others, jobset = read("jobset.yaml")
    jobs = [r["template"] for r in jobset["spec"]["replicatedJobs"]]
    others += [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job} for job in jobs]
    for resource in others:
        kubernetes_validate.validate(resource, "1.33", strict=True)
    others[-1]["spec"]["backofLimit"] = 0
    try:
        kubernetes_validate.validate(others[-1], "1.33", strict=True)
    except kubernetes_validate.ValidationError:
        return f"jobset.yaml, Kubernetes 1.33: {len(others)} resources"
    raise AssertionError("the schema takes anything")


def google() -> str:
    from google.cloud.aiplatform_v1.types import CustomJobSpec
    from google.cloud.devtools.cloudbuild_v1.types import Build
    from google.protobuf import json_format

    for name, kind in (("vertex.yaml", CustomJobSpec), ("cloudbuild.yaml", Build)):
        json_format.ParseDict(read(name)[0], kind.pb(kind()))  # raises on a field or value that is unknown
    return "vertex.yaml, cloudbuild.yaml"


def xpk() -> str:
    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser()
    set_parser(parser)
    commands = re.findall(r"^    xpk (.*)$", (DEPLOY / "README.md").read_text(), re.MULTILINE)
    create, delete = [parser.parse_args(shlex.split(command)) for command in commands]
    assert (create.restart_on_exit_codes, int(create.max_restarts), delete.workload) == ("143", 50, "b5-s3")
    return "README.md, xpk: 2 commands"


if __name__ == "__main__":
    for check in {"sky": [sky], "schemas": [kubernetes, google, xpk]}[sys.argv[1]]:
        print("fine:", check(), flush=True)
