"""The manifests without a cluster: JobSets, the SkyPilot task, the Dockerfile."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
JOBSETS = sorted((LAUNCH / "gke").glob("*.yaml"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def obj(required, **properties):
    """A JSON schema of an object that has these properties and no other."""
    return {
        "type": "object",
        "required": required.split(),
        "additionalProperties": False,
        "properties": properties,
    }


def array(items):
    return {"type": "array", "minItems": 1, "items": items}


NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
STRING, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}
STRINGS = {"type": "object", "additionalProperties": STRING}
# The part of the API that the manifests use, written strictly. jobset.x-k8s.io/v1alpha2:
# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/; below it batch/v1 Job and core/v1 Pod.
CONTAINER = obj(
    "name image command args resources",
    name=NAME,
    image=STRING,
    command=array(STRING),
    args=array(STRING),
    env=array(obj("name value", name=STRING, value=STRING)),
    ports=array(obj("containerPort", containerPort={**COUNT, "maximum": 65535})),
    resources=obj(
        "requests limits",
        requests={"type": "object", "additionalProperties": COUNT},
        limits={"type": "object", "additionalProperties": COUNT},
    ),
    volumeMounts=array(obj("name mountPath", name=NAME, mountPath=STRING)),
)
POD = obj(
    "restartPolicy containers nodeSelector terminationGracePeriodSeconds",
    restartPolicy={"const": "Never"},  # podFailurePolicy asks for it
    terminationGracePeriodSeconds=COUNT,
    serviceAccountName=NAME,
    nodeSelector=STRINGS,
    tolerations=array(
        obj(
            "key operator effect",
            key=STRING,
            operator={"enum": ["Exists", "Equal"]},
            effect={"enum": ["NoSchedule", "NoExecute", "PreferNoSchedule"]},
        )
    ),
    containers=array(CONTAINER),
    volumes=array(
        {
            "oneOf": [
                obj("name emptyDir", name=NAME, emptyDir=obj("medium", medium={"const": "Memory"})),
                obj(
                    "name csi",
                    name=NAME,
                    csi=obj(
                        "driver volumeAttributes",
                        driver={"const": "gcsfuse.csi.storage.gke.io"},
                        volumeAttributes=obj("bucketName", bucketName=STRING),
                    ),
                ),
            ]
        }
    ),
)
JOB = obj(
    "parallelism completions completionMode backoffLimit template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"const": "Indexed"},
    backoffLimit={"const": 0},  # one pod down, all start anew
    podFailurePolicy=obj(
        "rules",
        rules=array(
            obj(
                "action onExitCodes",
                action={"enum": ["FailJob", "FailIndex", "Ignore", "Count"]},
                onExitCodes=obj(
                    "operator values",
                    containerName=NAME,
                    operator={"enum": ["In", "NotIn"]},
                    values=array(COUNT),
                ),
            )
        ),
    ),
    template=obj("spec", metadata=obj("annotations", annotations=STRINGS), spec=POD),
)
JOBSET = obj(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=obj("name", name=NAME, annotations=STRINGS),
    spec=obj(
        "replicatedJobs failurePolicy",
        network=obj("", enableDNSHostnames={"type": "boolean"}),
        failurePolicy=obj(
            "maxRestarts",
            maxRestarts={"type": "integer", "minimum": 0},
            rules=array(
                obj(
                    "name action onJobFailureReasons",
                    name=STRING,
                    action={
                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                    },
                    onJobFailureReasons=array(
                        {"enum": ["PodFailurePolicy", "BackoffLimitExceeded"]}
                    ),
                )
            ),
        ),
        replicatedJobs=array(
            obj("name template", name=NAME, replicas=COUNT, template=obj("spec", spec=JOB))
        ),
    ),
)


def load(path):
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, JOBSET)
    job = manifest["spec"]["replicatedJobs"][0]
    pod = job["template"]["spec"]["template"]["spec"]
    return manifest, job, pod


def header(path):
    return "".join(re.findall(r"^#.*\n", path.read_text(), re.M))


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobset(path):
    manifest, job, pod = load(path)
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]  # devices cannot be overcommitted
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert not {0, 75, 76, 137, 143} & set(rule["onExitCodes"]["values"])
    assert {2, 3} <= set(rule["onExitCodes"]["values"])
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in pod.get("volumes", [])}
    if any(
        "csi" in volume for volume in pod["volumes"]
    ):  # the annotation starts the driver's sidecar
        annotations = spec["template"]["metadata"]["annotations"]
        assert annotations == {"gke-gcsfuse/volumes": "true"}
    assert f"jobset {manifest['metadata']['name']}" in header(path)
    config = next(arg for arg in container["args"] if arg.startswith("--config="))
    assert (ROOT / config.removeprefix("--config=")).exists()
    # pods are named after JobSet, job and indices; that is a host name of at most 63 characters
    longest = (
        f"{manifest['metadata']['name']}-{job['name']}-{job['replicas']}-{spec['completions']}"
    )
    assert len(longest) + 6 <= 63


@pytest.mark.parametrize(
    "path", [p for p in JOBSETS if p.name.startswith("tpu")], ids=lambda p: p.name
)
def test_tpu_jobset_fills_its_slices(path):
    manifest, job, pod = load(path)
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    per_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    hosts = job["template"]["spec"]["completions"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert per_host == 4 and hosts * per_host == chips  # ct5p-hightpu-4t: 4 chips a host
    pool = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"][pool] == "cloud.google.com/gke-nodepool"
    text = header(path)
    assert f"--tpu-topology={topology}" in text and f"--num-nodes={hosts} " in text
    assert f"v5p-{2 * chips}" in text and f"{chips} chips" in text  # v5p counts two cores a chip
    assert (job["replicas"] > 1) == ("multislice" in path.name)


def test_gpu_jobset_tells_each_pod_its_place():
    manifest, job, pod = load(LAUNCH / "gke" / "gpu.yaml")
    (container,) = pod["containers"]
    name, hosts = manifest["metadata"]["name"], job["template"]["spec"]["completions"]
    assert job["replicas"] == 1 and manifest["spec"]["network"]["enableDNSHostnames"] is True
    port = container["ports"][0]["containerPort"]
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:{port}" in container["args"]
    assert f"--num_processes={hosts}" in container["args"]
    assert f"--num-nodes={hosts} " in header(LAUNCH / "gke" / "gpu.yaml")
    # What the container's command runs, with a stand-in for python.
    shell, option, script, *rest = container["command"]
    script = 'python() { printf "%s\\n" "$@"; }; ' + script.replace("exec ", "")
    run = subprocess.run(
        [shell, option, script, *rest, *container["args"]],
        env={"JOB_COMPLETION_INDEX": "3", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert run.stdout.split() == ["-m", "sdjax.main", "--process_id=3", *container["args"]]


# The keys of a task, https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKYPILOT = obj(
    "name resources num_nodes workdir envs setup run",
    name=STRING,
    resources=obj(
        "accelerators",
        accelerators={"type": "string", "pattern": r"^[A-Z0-9-]+:[1-8]$"},
        use_spot={"type": "boolean"},
        disk_size=COUNT,
        job_recovery=obj("", recover_on_exit_codes=array({**COUNT, "maximum": 255})),
    ),
    num_nodes=COUNT,
    workdir=STRING,
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup=STRING,
    run=STRING,
)


def test_skypilot_task(tmp_path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKYPILOT)
    codes = task["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert {75, 76} <= set(codes) and not {0, 2, 3} & set(codes)
    assert task["envs"]["EXTRA"] in EXTRAS and (ROOT / task["envs"]["CONFIG"]).exists()
    assert task["envs"]["WORKDIR"] is None  # SkyPilot then asks for --env WORKDIR=...
    for part in ("setup", "run"):
        check = ["bash", "-n", "-c", task[part]]
        assert subprocess.run(check, timeout=20).returncode == 0

    python = tmp_path / "sdjax-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    environment = {
        **{key: value or "gs://bucket/x" for key, value in task["envs"].items()},
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "FLAGS": "--config.mesh.fsdp=8 --config.seed=1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NODE_RANK": "1",
    }
    printed = {}
    for nodes in ("1", "2"):
        printed[nodes] = subprocess.run(
            ["bash", "-c", task["run"]],
            env={**environment, "SKYPILOT_NUM_NODES": nodes},
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.split()
    rest = ["--config=configs/sd21_base.py", "--workdir=gs://bucket/x"]
    rest += environment["FLAGS"].split()
    assert printed["1"] == ["-u", "-m", "sdjax.main", *rest]
    assert printed["2"] == ["-u", "-m", "sdjax.main", "--coordinator=10.0.0.1:8476",
                            "--num_processes=2", "--process_id=1", *rest]  # fmt: skip


INSTRUCTIONS = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "STOPSIGNAL", "ENTRYPOINT", "CMD"}


@pytest.fixture(scope="module")
def dockerfile():
    """[(instruction, its argument)] in order."""
    text = re.sub(r"^#.*\n", "", (LAUNCH / "Dockerfile").read_text(), flags=re.M)
    lines = re.sub(r"\\\n", "", text).splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def test_dockerfile_instructions(dockerfile):
    names = [name for name, _ in dockerfile]
    assert set(names) <= INSTRUCTIONS
    assert names.count("FROM") == 1 and set(names[: names.index("FROM")]) <= {"ARG"}
    for index, (name, argument) in enumerate(dockerfile):
        if name == "ARG":
            variable = argument.split("=")[0]
            assert any("${" + variable + "}" in later for _, later in dockerfile[index + 1 :])
        if name == "COPY":
            *sources, _ = argument.split()
            for source in sources:
                assert (ROOT / source).exists(), source
    arguments = dict(dockerfile)
    assert json.loads(arguments["ENTRYPOINT"]) == ["python", "-m", "sdjax.main"]  # PID 1: SIGTERM
    assert json.loads(arguments["CMD"]) == ["--help"]


def test_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this machine")
    run = subprocess.run(
        [hadolint, str(LAUNCH / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("platform", ["cpu", "cuda12", "cuda13", "tpu", "rocm"])
def test_dockerfile_installs_what_the_build_argument_says(dockerfile, platform):
    (command,) = [argument for name, argument in dockerfile if name == "RUN"]
    run = subprocess.run(
        ["sh", "-ec", f'pip() {{ echo "$@"; }}; {command}'],
        env={"PLATFORM": platform, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
    )
    if platform == "rocm":
        assert run.returncode != 0 and "cuda12" in run.stderr
    else:
        assert (
            run.stdout
            == "install --editable ." + ("" if platform == "cpu" else f"[{platform}]") + "\n"
        )
        assert platform == "cpu" or platform in EXTRAS


def test_fields_and_files_that_launchers_and_docs_name_exist():
    from sdjax.config import default

    files = [*LAUNCH.rglob("*.*"), LAUNCH / "Dockerfile", ROOT / "docs" / "scaling.md"]
    for file in files:
        text = file.read_text()
        for field in re.findall(r"--config\.([\w.]*\w)", text):
            value = default()
            for part in field.split("."):
                if field not in ("field", "FIELD", "mesh"):  # placeholders of the text
                    value = value[part]
        for name in re.findall(r"\b(?:configs|launch)/[\w./]*\w\.\w+", text):
            assert (ROOT / name).exists(), f"{file.name}: {name}"
